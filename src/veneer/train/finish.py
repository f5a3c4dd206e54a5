"""The end of a run: save the adapter, verify it on a fresh base model, and write the report.

All files are first written to a hidden folder in the output directory. They move to their places once every check has
passed; otherwise they are deleted, and the error says why.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ..core.config import CONFIG_NAME, Config
from ..data.prepare import Data
from ..errors import TrainingError
from ..files.read import WEIGHTS_NAME
from ..files.write import writing
from ..model.card import write_card
from ..model.verify import PARTS, Verification, record, unmoved, verify
from ..ops.allocator import return_blocks
from ..terminal import Step, showing
from .meter import Meter, peak_rss
from .page import PAGE_NAME, example_of, render
from .recipe import Recipe
from .report import REPORT_NAME, contents, in_words, write_report
from .samples import probe, samples
from .setup import load_base
from .trained import layers, outside
from .watch import Watch

STAGING = ".unfinished-"
"""Prefix of the hidden folder's name."""
LAST = (PAGE_NAME, REPORT_NAME)
"""Files that are moved last: once they are in the output directory, all other files are too."""


@dataclass(frozen=True)
class Run:
    """A run whose training is over."""

    recipe: Recipe
    trainer: Any
    meter: Meter
    data: Data
    tokenizer: Any
    pad: int
    initial_digests: dict[str, str]
    """`veneer.model.verify.digests` of the adapter before training."""
    watch: Watch

    @property
    def output(self) -> Path:
        return Path(self.recipe.output)


def finish(run: Run, console: Console) -> dict[str, Any]:
    """Save, verify and report; returns the content of report.json. Every process must take part.

    Raises:
        TrainingError: the adapter does not work. Its files are then removed from the output directory.
    """
    is_main = run.trainer.is_world_process_zero()
    content = contents(run.recipe, run.trainer, run.meter, run.data, run.tokenizer)
    content["chat_template"] = bool(run.recipe.chat_template or run.tokenizer.chat_template)
    with _staging(run.output, is_main) as folder:
        with writing("the adapter", run.output):
            run.trainer.save_model(str(folder))
        unchanged = unmoved(folder, run.initial_digests) if is_main else []
        _record_outputs(run, folder, unchanged, is_main)
        if is_main:
            content["unchanged_tensors"] = unchanged
            with showing(console) as progress:
                content |= _verified_facts(run, folder, progress)
            content["peak_rss_bytes"] = max(run.meter.peak, peak_rss())
            with writing("the report", run.output):
                write_report(folder, content)
                config = Config.from_pretrained(folder)
                write_card(folder, config, in_words(content), name=run.recipe.output, example=example_of(content))
                (folder / PAGE_NAME).write_text(render(content), encoding="utf-8")
                _publish(folder, run.output)
    return content


@contextmanager
def _staging(output: Path, is_main: bool) -> Iterator[Path]:
    """Yield a hidden folder in the output directory, removed on exit; other processes get the directory itself."""
    if not is_main:
        yield output
        return
    for leftover in output.glob(f"{STAGING}*"):  # left by a run that was killed in this function
        shutil.rmtree(leftover)
    folder = Path(tempfile.mkdtemp(dir=output, prefix=STAGING))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _record_outputs(run: Run, folder: Path, unchanged: list[str], is_main: bool) -> None:
    """Record the trained model's outputs, and the initial digests of the tensors that must have changed.

    A tensor may be unchanged if no gradient had reached it by the step whose checkpoint is the result.
    """
    state = run.trainer.state
    step = state.best_global_step if state.best_model_checkpoint else state.global_step
    excused = run.watch.unreached(step) & set(unchanged)
    must_change = {key: digest for key, digest in run.initial_digests.items() if key not in excused}
    model = run.trainer.accelerator.unwrap_model(run.trainer.model, keep_torch_compile=False)
    with writing("the adapter", run.output):
        record(model, folder, probe(run.data, run.pad), must_change, is_main_process=is_main)


def _verified_facts(run: Run, folder: Path, progress: Step) -> dict[str, Any]:
    """The part of the report that needs the adapter loaded from disk onto a fresh base model."""
    progress("verifying", 0, PARTS + 1)
    device = run.trainer.args.device
    _release(run.trainer)
    base = load_base(run.recipe, run.data.labels, run.pad).to(device)
    progress("verifying", 1, PARTS + 1)
    verification = verify(folder, base, progress=lambda done, of: progress("verifying", done + 1, of + 1))
    _check(verification)
    model = verification.model
    assert model is not None
    return {
        "verified": verification.passed,
        "verification": [vars(check) for check in verification.checks],
        "samples": samples(model, run.tokenizer, run.data, run.recipe, run.pad, progress),
        "layers": layers(model, progress=progress),
        "outside": outside(model),
        "adapter_bytes": sum((folder / name).stat().st_size for name in (CONFIG_NAME, WEIGHTS_NAME)),
    }


def _release(trainer: Any) -> None:
    """Free the memory of the trained model and its optimizer: a second base model is about to be loaded."""
    trainer.accelerator.free_memory()
    trainer.model_wrapped = None
    for holder in (trainer, trainer.callback_handler):
        holder.model = None
        holder.optimizer = None
        holder.lr_scheduler = None
    gc.collect()
    return_blocks()


def _check(verification: Verification) -> None:
    failures = [f"{check.name}: {check.detail}" for check in verification.checks if check.passed is False]
    if failures:
        raise TrainingError(
            f"the trained adapter does not work and was not kept ({'; '.join(failures)}); the checkpoints remain"
        )


def _publish(folder: Path, output: Path) -> None:
    """Move all files into the output directory; after an error, none of them remains there."""
    names = [file.name for file in folder.iterdir() if file.name not in LAST]
    moved: list[Path] = []
    try:
        for name in (*names, *LAST):
            os.replace(folder / name, output / name)
            moved.append(output / name)
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        raise
