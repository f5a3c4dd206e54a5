"""One training run, from a recipe to a directory: the adapter, recipe.yaml, report.json, checkpoints, logs."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from ..core import checkpoint
from ..core.config import CONFIG_NAME, TaskType
from ..data.collate import Collator, Rows, Shuffled, token_sums
from ..data.packing import check as check_packing
from ..data.packing import goes_by_sequence
from ..data.prepare import Data, prepare
from ..errors import CheckpointError, ConfigError, listing
from ..files.read import WEIGHTS_NAME
from ..files.recipe import RECIPE_NAME, read
from ..files.write import writing
from ..model.card import CARD_NAME
from ..model.loading import pad_of
from ..model.verify import PROBE_NAME, digests
from ..terminal import quiet
from .display import Display
from .finish import Run, finish
from .meter import Meter
from .page import PAGE_NAME
from .recipe import Recipe, make
from .report import REPORT_NAME
from .setup import adapt, facts_of, load_base, load_tokenizer
from .trainer import ExactTrainer, arguments, last_checkpoint, metrics
from .watch import Watch

OURS = (WEIGHTS_NAME, CONFIG_NAME, CARD_NAME, PROBE_NAME, RECIPE_NAME, REPORT_NAME, PAGE_NAME, "checkpoints", "logs")
"""What a run writes into its output directory."""
FREE = {"output", "batch_size", "accumulate", "eval_batch_size", "keep", "log_every", "save_every", "samples", "wandb"}
"""Keys that may differ when a run is resumed; of the batch, the global size must stay."""


def train(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Run a recipe; returns the content of report.json.

    Args:
        resume: go on from the last checkpoint in the output directory, if there is one.
        overwrite: throw away what an earlier run left there.

    Raises:
        VeneerError: the recipe cannot be run, or its result cannot be trusted; says why.
    """
    console = console or Console(stderr=True, highlight=False)
    _quiet()
    if recipe.wandb:
        _check_wandb()
    output = Path(recipe.output)
    _check_output(output, resume, overwrite)
    tokenizer = load_tokenizer(recipe)
    data = prepare(recipe, tokenizer, facts_of(recipe))
    recipe, steps = _resolved(recipe, data)
    _check_resumed(output, recipe, resume)
    trainer, meter = _build(recipe, tokenizer, data, steps, output)
    started, watch = _start(trainer.model)
    if recipe.best and data.evaluation is not None:
        _check_returns(recipe, trainer.model)
    _announce(console, recipe, trainer, data, steps)
    if trainer.is_world_process_zero():
        if overwrite and not resume:
            _clear(output)
        trainer.add_callback(_tensorboard(output))
        with writing("the recipe", output):
            recipe.save(output)
    display = Display(meter, console)
    for callback in (watch, display):
        trainer.add_callback(callback)
    try:
        _run(trainer, meter, output, resume)
    finally:
        display.close()
        last_checkpoint(output)  # removes what was left half-written
    if trainer.is_world_process_zero():
        console.print("verifying: the adapter is loaded from disk onto a fresh base model")
    return finish(Run(recipe, trainer, meter, data, tokenizer, pad_of(tokenizer), started, watch))


def _quiet() -> None:
    """The display speaks; the libraries keep quiet, also about what they lack for hardware that is not here."""
    import datasets

    quiet()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def _check_wandb() -> None:
    """Before anything is read: Trainer would end in the middle of its start."""
    from transformers.integrations import integration_utils

    try:
        integration_utils.INTEGRATION_TO_CALLBACK["wandb"]()
    except RuntimeError as error:
        raise ConfigError(f"wandb: {error}") from None


def _check_output(output: Path, resume: bool, overwrite: bool) -> None:
    """Nothing of an earlier run is lost unless that is asked for."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output {str(output)!r} is a file; give a directory")
    present = [name for name in OURS if (output / name).exists()]
    if present and not resume and not overwrite:
        raise ConfigError(
            f"output {str(output)!r} already holds {', '.join(present)}; go on with --resume, "
            "begin afresh with --overwrite, or give another directory"
        )
    if os.environ.get("RANK", "0") == "0":
        output.mkdir(parents=True, exist_ok=True)


def _clear(output: Path) -> None:
    """Throw away what an earlier run left; only once the new one has its data and its model."""
    for path in [output / name for name in OURS if (output / name).exists()]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _check_resumed(output: Path, recipe: Recipe, resume: bool) -> None:
    """A run goes on as it began, or not at all."""
    if not resume or not (output / RECIPE_NAME).is_file():
        return
    before, now = make(read(output / RECIPE_NAME)).model_dump(), recipe.model_dump()
    other = [f"{k}: {before[k]!r}, now {now[k]!r}" for k in now if k not in FREE and before[k] != now[k]]
    if other:
        raise ConfigError(f"cannot resume with another recipe than {output / RECIPE_NAME}:{listing(other)}")


def _resolved(recipe: Recipe, data: Data) -> tuple[Recipe, int]:
    """The recipe with every default filled in, and the number of optimizer steps."""
    from ..model.catalogue import page

    batch = recipe.batch_size * recipe.accumulate * _processes()
    an_epoch = None if recipe.streaming else math.ceil(len(data.train) / batch)
    steps = recipe.max_steps or math.ceil(recipe.epochs * (an_epoch or 0))
    evaluates = data.evaluation is not None
    eval_every = (recipe.eval_every or min(an_epoch or steps, steps)) if evaluates else None
    save_every = recipe.save_every or eval_every or min(100, an_epoch or steps, steps)
    if evaluates and recipe.best and save_every % (eval_every or 1):
        raise ConfigError(
            f"save_every = {save_every} must be a multiple of eval_every = {eval_every}: the best checkpoint is one "
            "that was evaluated (or set best: false)"
        )
    filled = recipe.changed(
        learning_rate=recipe.learning_rate or page(recipe.method).learning_rate,
        task="text" if data.labels is None else "classification",
        labels=data.labels,
        eval_every=eval_every,
        save_every=save_every,
    )
    return filled, steps


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _build(recipe: Recipe, tokenizer: Any, data: Data, steps: int, output: Path) -> tuple[ExactTrainer, Meter]:
    """Model, adapter and trainer, the same for the same seed."""
    from transformers import EarlyStoppingCallback, PrinterCallback, set_seed

    warmup = round(recipe.warmup * steps) if recipe.warmup < 1 else int(recipe.warmup)
    settings = arguments(recipe, output, steps, warmup, recipe.eval_every, recipe.save_every or steps)
    pad = pad_of(tokenizer)
    set_seed(recipe.seed)
    base = load_base(recipe, data.labels, pad)
    model = adapt(base, recipe, TaskType.CAUSAL_LM if data.labels is None else TaskType.SEQ_CLS, steps)
    flat = _flat(recipe, model, data, pad)
    meter = Meter(data=data.fingerprint, batch=recipe.batch_size * recipe.accumulate * _processes())
    trainer = ExactTrainer(
        model,
        settings,
        train_dataset=data.train if recipe.streaming else Rows(data.train),
        eval_dataset=None if data.evaluation is None else Rows(data.evaluation),
        data_collator=Collator(pad),
        compute_metrics=metrics,
        preprocess_logits_for_metrics=token_sums,
        sampler=None if recipe.streaming else Shuffled(len(data.train), recipe.seed, recipe.batch_size * _processes()),
        meter=meter,
        flat=flat,
        fast=recipe.fast,
    )
    trainer.remove_callback(PrinterCallback)
    if recipe.early_stopping is not None:
        trainer.add_callback(EarlyStoppingCallback(recipe.early_stopping))
    return trainer, meter


def _start(model: Any) -> tuple[dict[str, str], Watch]:
    """How the adapter begins: for the files, and for the steps."""
    return digests(model), Watch(model)


def _check_returns(recipe: Recipe, model: Any) -> None:
    """The best checkpoint can only come back if the method can go on from its file."""
    try:
        checkpoint.absorb(model._state, "default", checkpoint.slots(model._state, "default"))
    except CheckpointError:
        raise ConfigError(
            f"{recipe.method} cannot go on from its file, so that no best checkpoint can come back; set best: false"
        ) from None


def _flat(recipe: Recipe, model: Any, data: Data, pad: int) -> Collator | None:
    """What lays training rows end to end, where the model and the method allow it; packed ones are already.

    Raises:
        TrainingError: packed rows would see each other.
    """
    if recipe.packing:
        check_packing(model, data.train)
    apart = recipe.fast and not recipe.streaming and goes_by_sequence(model, data.train)
    return Collator(pad, flat=True) if apart else None


def _tensorboard(output: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(output / "logs")))


def _announce(console: Console, recipe: Recipe, trainer: ExactTrainer, data: Data, steps: int) -> None:
    if not trainer.is_world_process_zero():
        return
    learned, total = trainer.model.get_nb_trainable_parameters()
    console.print(f"{recipe.method} on {recipe.model}: {learned:,} of {total:,} parameters learn")
    account = data.account
    if not recipe.streaming:
        share = account.supervised_tokens / account.tokens
        count = f"{steps:,} step{'s' * (steps != 1)}"
        console.print(f"{_rows(account.kept)}, {account.tokens:,} tokens, {share:.0%} of them learned; {count}")
    for line in _losses_of_data(recipe, data):
        console.print(line, style="yellow")


def _losses_of_data(recipe: Recipe, data: Data) -> list[str]:
    """What was cut and dropped, in words."""
    account, lines = data.account, []
    where = f" (the first: {account.examples[0]})" if account.examples else ""
    if account.cut_rows:
        lines.append(
            f"{_rows(account.cut_rows)} cut to {recipe.max_length} tokens, {account.cut_tokens} tokens lost{where}"
        )
    if account.too_long_rows:
        lines.append(f"{_rows(account.too_long_rows)} dropped, longer than {recipe.max_length} tokens{where}")
    if account.unlearned_rows:
        lines.append(f"{_rows(account.unlearned_rows)} dropped without a token to learn{where}")
    return lines


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"


def _run(trainer: ExactTrainer, meter: Meter, output: Path, resume: bool) -> None:
    last = last_checkpoint(output) if resume else None
    trainer.accelerator.wait_for_everyone()
    if last is not None:
        _check_same(last, meter)
        trainer.args.eval_on_start = False
    trainer.train(resume_from_checkpoint=None if last is None else str(last))


def _check_same(folder: Path, meter: Meter) -> None:
    """A run goes on with the data and the batches that it began with; on how many processes is free."""
    import json

    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    before = state["stateful_callbacks"]["Meter"]["args"]
    if before["data"] != meter.data:
        raise ConfigError(
            "cannot resume: the data is not what the run began with; put it back, or begin with --overwrite"
        )
    if before["batch"] != meter.batch:
        raise ConfigError(
            f"cannot resume: a step was {before['batch']} sequences, and is now {meter.batch} (batch_size x accumulate "
            "x processes); set batch_size or accumulate so that it stays the same"
        )
