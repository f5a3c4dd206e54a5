"""report.json: what a run did, for scripts, and for the page that people look at."""

from __future__ import annotations

import json
import os
import platform
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..data.prepare import Data
from ..files.write import write_atomically
from .meter import Meter
from .recipe import Recipe

REPORT_NAME = "report.json"
LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "safetensors")
CPU_NAMES = Path("/proc/cpuinfo")


def contents(recipe: Recipe, trainer: Any, meter: Meter, data: Data) -> dict[str, Any]:
    """What training says of itself; `veneer.train.finish` adds what was found of the adapter on disk."""
    log, (learned, total) = trainer.state.log_history, trainer.model.get_nb_trainable_parameters()
    seconds = meter.seconds
    return {
        "model": recipe.model,
        "method": recipe.method,
        "verified": False,
        "trainable_parameters": learned,
        "total_parameters": total,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "losses": [entry["loss"] for entry in log if "loss" in entry],
        "eval": _evaluation(trainer.state),
        "real_tokens": meter.real_tokens,
        "supervised_tokens": meter.supervised_tokens,
        "train_seconds": seconds,
        "tokens_per_second": meter.real_tokens / seconds if seconds else None,
        "peak_rss_bytes": meter.peak,
        "processes": trainer.args.world_size,
        "history": [entry for entry in log if "loss" in entry],
        "data": data.account.as_dict(),
        "eval_data": data.eval_account and data.eval_account.as_dict(),
        "rows_held_out": None if data.evaluation is None else len(data.evaluation),
        "labels": data.labels,
        "recipe": recipe.model_dump(),
        "environment": environment(trainer.args.device),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def in_words(content: dict[str, Any]) -> str:
    """The main facts of a report as Markdown, for the adapter's card."""
    after, learned = content["eval"] or {}, content["trainable_parameters"]
    before = f" (before: {after['before']['loss']:.4f})" if after.get("before") else ""
    facts = {
        "base model": Path(content["model"]).name,
        "trained": f"{learned:,} of {content['total_parameters']:,} parameters",
        "data": f"{content['data']['kept']:,} rows, {content['supervised_tokens']:,} tokens learned",
        "steps": f"{content['steps']:,}",
        "evaluation loss": f"{after['loss']:.4f}{before}" if after else "not evaluated",
        "made with": f"veneer {content['environment']['veneer']}",
    }
    return "\n".join(f"- {name}: {fact}" for name, fact in facts.items()) + "\n\n"


def write_report(folder: Path, content: dict[str, Any]) -> None:
    write_atomically(folder / REPORT_NAME, (json.dumps(content, indent=2) + "\n").encode())


def environment(device: Any) -> dict[str, str]:
    """Where the numbers come from: libraries and machine."""
    from .. import __version__

    known = {name: version(name) for name in LIBRARIES}
    machine = {"python": platform.python_version(), "platform": platform.platform(), "device": _device(device)}
    return {"veneer": __version__, **known, **machine}


def _device(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return (
        f"{_cpu() if device.type == 'cpu' else device.type}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    )


def _cpu() -> str:
    names = CPU_NAMES.read_text(encoding="utf-8").splitlines() if CPU_NAMES.is_file() else []
    found = next((line.partition(":")[2].strip() for line in names if line.startswith("model name")), "")
    return found or platform.processor() or platform.machine()


def _evaluation(state: Any) -> dict[str, Any] | None:
    """Before training, all along, and of the adapter that was kept: the best one, or else the last."""
    found = [
        {"step": entry["step"]} | {name[5:]: entry[name] for name in ("eval_loss", "eval_perplexity", "eval_accuracy")}
        for entry in state.log_history
        if "eval_loss" in entry
    ]
    if not found:
        return None
    best = [entry for entry in found if state.best_model_checkpoint and entry["step"] == state.best_global_step]
    before = [entry for entry in found if entry["step"] == 0]
    return {"before": before[0] if before else None, **(best or found)[-1], "history": found}
