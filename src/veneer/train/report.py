"""report.json: the facts of a run, for scripts and for the page report.html."""

from __future__ import annotations

import json
import os
import platform
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..data.pieces import row_facts
from ..data.prepare import Data
from ..files.write import write_atomically
from .meter import Meter
from .recipe import Recipe

REPORT_NAME = "report.json"
LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "safetensors")
CPU_NAMES = Path("/proc/cpuinfo")
EVALUATED = ("loss", "perplexity", "accuracy", "margin", "chosen_reward", "rejected_reward")
"""Measures of an evaluation; which of them there are depends on the objective."""


def contents(recipe: Recipe, trainer: Any, meter: Meter, data: Data, tokenizer: Any) -> dict[str, Any]:
    """The facts known after training; `veneer.train.finish` adds those of the adapter on disk."""
    trainable, total = trainer.model.get_nb_trainable_parameters()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    seconds = meter.seconds
    return {
        "model": recipe.model,
        "method": recipe.method,
        "verified": False,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "losses": [entry["loss"] for entry in history],
        "eval": _evaluation(trainer.state),
        "real_tokens": meter.real_tokens,
        "supervised_tokens": meter.supervised_tokens,
        "train_seconds": seconds,
        "tokens_per_second": meter.real_tokens / seconds if seconds else None,
        "peak_rss_bytes": meter.peak,
        "processes": trainer.args.world_size,
        "history": history,
        "data": data.account.as_dict(),
        "eval_data": data.eval_account and data.eval_account.as_dict(),
        "first_rows": [row_facts(row, tokenizer, data.labels) for row in data.first],
        "rows_held_out": None if data.evaluation is None else len(data.evaluation),
        "labels": data.labels,
        "recipe": recipe.model_dump(),
        "environment": environment(trainer.args.device),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def in_words(content: dict[str, Any]) -> str:
    """The main facts of a report as a Markdown list, for the adapter's card."""
    trainable = content["trainable_parameters"]
    facts = {
        "base model": Path(content["model"]).name,
        "trained": f"{trainable:,} of {content['total_parameters']:,} parameters",
        "data": f"{content['data']['kept']:,} rows, {content['supervised_tokens']:,} tokens learned",
        "steps": f"{content['steps']:,}",
        "evaluation loss": _loss_in_words(content["eval"]),
        "made with": f"veneer {content['environment']['veneer']}",
    }
    lines = [f"- {name}: {fact}" for name, fact in facts.items()]
    return "\n".join(lines) + "\n\n"


def _loss_in_words(evaluation: dict[str, Any] | None) -> str:
    if not evaluation:
        return "not evaluated"
    loss = f"{evaluation['loss']:.4f}"
    before = evaluation["before"]
    return f"{loss} (before: {before['loss']:.4f})" if before else loss


def write_report(folder: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(folder / REPORT_NAME, text.encode())


def environment(device: Any) -> dict[str, str]:
    """Versions of the libraries and facts of the machine."""
    from .. import __version__

    facts = {"veneer": __version__}
    facts |= {name: version(name) for name in LIBRARIES}
    facts["python"] = platform.python_version()
    facts["platform"] = platform.platform()
    facts["device"] = _device(device)
    return facts


def _device(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = _cpu() if device.type == "cpu" else device.type
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _cpu() -> str:
    """The processor's model name, as far as the platform reports it."""
    if CPU_NAMES.is_file():
        for line in CPU_NAMES.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip() or platform.processor() or platform.machine()
    return platform.processor() or platform.machine()


def _evaluation(state: Any) -> dict[str, Any] | None:
    """The measures of the result (the best checkpoint, else the last), those before training, and the whole history."""
    history = []
    for entry in state.log_history:
        if "eval_loss" in entry:
            measures = {name: entry[f"eval_{name}"] for name in EVALUATED if f"eval_{name}" in entry}
            history.append({"step": entry["step"]} | measures)
    if not history:
        return None
    before = next((entry for entry in history if entry["step"] == 0), None)
    result = history[-1]
    if state.best_model_checkpoint:
        best = [entry for entry in history if entry["step"] == state.best_global_step]
        result = (best or history)[-1]
    return {"before": before, **result, "history": history}
