"""report.json: what a run did, for people and for scripts."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..files import write_atomically
from .data import Data
from .meter import Meter
from .recipe import Recipe

REPORT_NAME = "report.json"
LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "safetensors")


def write_report(
    output: Path, recipe: Recipe, trainer: Any, meter: Meter, data: Data, unchanged: list[str]
) -> dict[str, Any]:
    """Write `report.json`, the last file of a run: it is there when the run came to its end."""
    log, (learned, total) = trainer.state.log_history, trainer.model.get_nb_trainable_parameters()
    seconds = meter.seconds
    content = {
        "model": recipe.model,
        "method": recipe.method,
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
        "unchanged_tensors": unchanged,
        "data": data.account.as_dict(),
        "eval_data": data.eval_account and data.eval_account.as_dict(),
        "labels": data.labels,
        "verified": verified(output, recipe),
        "recipe": recipe.model_dump(),
        "environment": environment(),
    }
    if trainer.is_world_process_zero():
        write_atomically(output / REPORT_NAME, (json.dumps(content, indent=2) + "\n").encode())
    return content


def verified(output: Path, recipe: Recipe) -> dict[str, Any] | None:
    """What a fresh process would find of the adapter on disk; None: nobody looked."""
    return None


def environment() -> dict[str, str]:
    from .. import __version__

    known = {name: version(name) for name in LIBRARIES}
    return {"veneer": __version__, "python": platform.python_version(), "platform": platform.platform(), **known}


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
