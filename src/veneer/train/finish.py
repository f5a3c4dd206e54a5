"""The end of a run: the adapter is saved, loaded again onto a fresh base, held against what training saw, and shown.

All of it happens in a hidden folder of the output directory. Its files move to their places when everything is right;
otherwise they go, and the error says why.
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

from ..core.config import Config
from ..data.prepare import Data
from ..errors import TrainingError
from ..files.write import writing
from ..model.card import write_card
from ..model.verify import Verification, record, unmoved, verify
from .meter import Meter
from .page import PAGE_NAME, render
from .recipe import Recipe
from .report import REPORT_NAME, contents, in_words, write_report
from .samples import probe, samples
from .setup import load_base
from .trained import layers, outside
from .watch import Watch

STAGING = ".unfinished-"
LAST = (PAGE_NAME, REPORT_NAME)
"""Files that are put in place last: where they are, everything else is."""


@dataclass(frozen=True)
class Run:
    """A run whose training is over."""

    recipe: Recipe
    trainer: Any
    meter: Meter
    data: Data
    tokenizer: Any
    pad: int
    started: dict[str, str]
    """`veneer.model.verify.digests` of the adapter before training."""
    watch: Watch


def finish(run: Run) -> dict[str, Any]:
    """Save, verify and report; returns the content of report.json. Every process must take part.

    Raises:
        TrainingError: the adapter does not work. Then nothing of it is left in the output directory.
    """
    is_main, output = run.trainer.is_world_process_zero(), Path(run.recipe.output)
    content = contents(run.recipe, run.trainer, run.meter, run.data)
    with _staging(output, is_main) as folder:
        with writing("the adapter", output):
            run.trainer.save_model(str(folder))
        still = unmoved(folder, run.started) if is_main else []
        _record(run, folder, still, is_main)
        if is_main:
            content |= {"unchanged_tensors": still} | _examined(run, folder)
            with writing("the report", output):
                write_report(folder, content)
                write_card(folder, Config.from_pretrained(folder), in_words(content))
                (folder / PAGE_NAME).write_text(render(content), encoding="utf-8")
                _publish(folder, output)
    return content


@contextmanager
def _staging(output: Path, is_main: bool) -> Iterator[Path]:
    """A folder beside the result, gone afterwards; only the main process writes into it."""
    for left in output.glob(f"{STAGING}*") if is_main else ():  # by a run that was killed here
        shutil.rmtree(left)
    folder = Path(tempfile.mkdtemp(dir=output, prefix=STAGING)) if is_main else output
    try:
        yield folder
    finally:
        if is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _record(run: Run, folder: Path, still: list[str], is_main: bool) -> None:
    """Outputs of the trained model, and the starts of those tensors that must have moved: a gradient reached them."""
    state = run.trainer.state
    step = state.best_global_step if state.best_model_checkpoint else state.global_step
    excused = run.watch.unreached(step) & set(still)
    started = {key: digest for key, digest in run.started.items() if key not in excused}
    model = run.trainer.accelerator.unwrap_model(run.trainer.model, keep_torch_compile=False)
    with writing("the adapter", Path(run.recipe.output)):
        record(model, folder, probe(run.data, run.pad), started, is_main_process=is_main)


def _examined(run: Run, folder: Path) -> dict[str, Any]:
    """What is found of the adapter once it is loaded from disk onto a fresh base."""
    device = run.trainer.args.device
    _release(run.trainer)
    base = load_base(run.recipe, run.data.labels, run.pad).to(device)
    found = verify(folder, base)
    _check(found)
    assert found.model is not None
    return {
        "verified": found.passed,
        "verification": [vars(check) for check in found.checks],
        "samples": samples(found.model, run.tokenizer, run.data, run.recipe.samples, run.pad),
        "layers": layers(found.model),
        "outside": outside(found.model),
        "adapter_bytes": sum(file.stat().st_size for file in folder.glob("adapter_*")),
    }


def _release(trainer: Any) -> None:
    """Give the trained model's memory back: a second base is about to be loaded."""
    trainer.accelerator.free_memory()
    trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None
    trainer.callback_handler.model = trainer.callback_handler.optimizer = trainer.callback_handler.lr_scheduler = None
    gc.collect()


def _check(found: Verification) -> None:
    failed = [f"{check.name}: {check.detail}" for check in found.checks if check.passed is False]
    if failed:
        raise TrainingError(
            f"the trained adapter does not work, and was not kept ({'; '.join(failed)}); the checkpoints are there"
        )


def _publish(folder: Path, output: Path) -> None:
    """Move the files to their places; all of them, or none."""
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
