"""One training run, from a recipe to a directory: the adapter, recipe.yaml, report.json, checkpoints, logs."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from ..core.config import CONFIG_NAME, TaskType
from ..core.remainder import TRAINING_NAME
from ..data.collate import Collator, Rows, Shuffled
from ..data.packing import check as check_packing
from ..data.packing import goes_by_sequence
from ..data.preferences import plain
from ..data.prepare import Data, prepare
from ..errors import ConfigError, counted, listing
from ..files.lock import alone
from ..files.read import WEIGHTS_NAME
from ..files.recipe import RECIPE_NAME, read
from ..files.write import writing
from ..model.card import CARD_NAME
from ..model.loading import pad_of
from ..model.stages import START, keep_earlier
from ..model.verify import PROBE_NAME, digests
from ..terminal import quiet
from ..upstream.quantisation import quantisation
from . import loggers, preference, schedules
from .display import Display
from .finish import Run, finish
from .meter import Meter
from .optimizers import by_name
from .page import PAGE_NAME
from .push import check_token, push
from .recipe import Recipe, make
from .report import REPORT_NAME
from .setup import adapt, facts_of, is_continued, load_base, load_tokenizer, within_positions
from .stage import begun
from .stop import Stop
from .trainer import CHECKPOINTS, ExactTrainer, arguments, last_checkpoint, metrics
from .watch import Watch

LOGS = "logs"
OURS = (
    WEIGHTS_NAME,
    CONFIG_NAME,
    TRAINING_NAME,
    START,
    CARD_NAME,
    PROBE_NAME,
    RECIPE_NAME,
    REPORT_NAME,
    PAGE_NAME,
    CHECKPOINTS,
    LOGS,
)
"""Names of everything that a run writes into its output directory."""
MAY_CHANGE = {
    "output",
    "batch_size",
    "accumulate",
    "eval_batch_size",
    "keep",
    "log_every",
    "save_every",
    "samples",
    "report_to",
    "push_to_hub",
    "hub_private",
}
"""Recipe keys that may change when a run is resumed. The number of sequences per optimizer step must stay the same."""


def train(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Run a recipe and return the content of report.json.

    Args:
        resume: continue from the last checkpoint in the output directory, if there is one.
        overwrite: delete the results of an earlier run in the output directory.

    Raises:
        VeneerError: the recipe cannot be run, or its result cannot be trusted; the message says why.
    """
    console = console or Console(stderr=True, highlight=False)
    output = Path(recipe.output)
    with _locked(output):
        try:
            report = _train(recipe, resume, overwrite, console)
        except BaseException:
            with suppress(OSError):  # it is not there, or holds checkpoints
                (output / CHECKPOINTS).rmdir()
            raise
        if recipe.push_to_hub and _is_main():
            console.print(f"uploaded to {push(output, recipe.push_to_hub, recipe.hub_private)}")
    return report


def _locked(output: Path) -> AbstractContextManager[None]:
    """The lock on the output directory, which the main process holds for all processes of the run."""
    return alone(output) if _is_main() else nullcontext()


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _train(recipe: Recipe, resume: bool, overwrite: bool, console: Console) -> dict[str, Any]:
    output = Path(recipe.output)
    _silence_libraries()
    _check_choices(recipe)
    quantisation(recipe.quantise, recipe.quantise_options)  # fails before anything is loaded
    recipe = begun(recipe)
    _check_output(output, resume, overwrite)

    tokenizer = load_tokenizer(recipe)
    recipe = within_positions(recipe)
    data = prepare(recipe, tokenizer, facts_of(recipe))
    recipe, steps = _resolved(recipe, data)
    if resume:
        _check_recipe_unchanged(output, recipe)

    pad = pad_of(tokenizer)
    meter = Meter(data=data.fingerprint, batch=_sequences_per_step(recipe))
    trainer = _build_trainer(recipe, data, pad, steps, meter)
    initial_digests = digests(trainer.model)
    watch = Watch(trainer.model)

    is_main = trainer.is_world_process_zero()
    if is_main:
        _announce(console, recipe, trainer.model, data, steps)
    display = Display(meter, console)
    stop = Stop()
    for callback in (watch, display, stop):
        trainer.add_callback(callback)
    try:
        if is_main:
            _begin(recipe, trainer, output, overwrite and not resume)
        with stop.listening():
            _train_or_resume(trainer, meter, output, resume)
        display.close()
        if is_main:
            console.print("verifying: the adapter is loaded from disk onto a fresh base model")
        return finish(Run(recipe, trainer, meter, data, tokenizer, pad, initial_digests, watch), console)
    except BaseException as error:
        display.close()
        if is_main:
            _leave(output, trainer, resume, error, console)
        raise


def _begin(recipe: Recipe, trainer: ExactTrainer, output: Path, overwrite: bool) -> None:
    """Write the first files of a run into the output directory."""
    if overwrite:
        _remove_earlier_run(output)
    trainer.add_callback(_tensorboard(output))
    if recipe.start_from is not None:
        with writing("the earlier adapter", output):
            keep_earlier(recipe.start_from, output, merged=not is_continued(recipe))
    with writing("the recipe", output):
        recipe.save(output)


def _leave(output: Path, trainer: ExactTrainer, resume: bool, error: BaseException, console: Console) -> None:
    """After a failure, remove what cannot be used: half-written checkpoints, and all of a run without a step."""
    last = last_checkpoint(output)
    if last is None and trainer.state.global_step == 0 and not resume:
        _remove_earlier_run(output)
    if last is not None and isinstance(error, KeyboardInterrupt):
        step = last.name.rpartition("-")[2]
        console.print(f"the last checkpoint is that of step {step}; this continues the run:")
        console.print(f"  veneer train --output {shlex.quote(str(output))} --resume", markup=False)


def _silence_libraries() -> None:
    """Turn off the progress bars and warnings of the libraries; only our own display remains."""
    import datasets

    quiet()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def _check_choices(recipe: Recipe) -> None:
    """Refuse what cannot be used, before anything is loaded: loggers, the schedule, the optimizer, the hub's token."""
    from transformers import Trainer, TrainingArguments

    loggers.check(recipe.report_to)
    schedules.check(recipe)
    settings = TrainingArguments(output_dir=recipe.output, optim=by_name.argument_of(recipe), report_to=[])
    by_name.choose(recipe, lambda: Trainer.get_optimizer_cls_and_kwargs(settings))
    if recipe.push_to_hub and _is_main():
        check_token(recipe.push_to_hub)


def _check_output(output: Path, resume: bool, overwrite: bool) -> None:
    """Create the output directory; refuse one with an earlier run unless `resume` or `overwrite` is set."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output {str(output)!r} is a file; give a directory")
    present = [name for name in OURS if (output / name).exists()]
    if present and not resume and not overwrite:
        raise ConfigError(
            f"output {str(output)!r} already holds {', '.join(present)}; continue it with --resume, replace it with "
            "--overwrite, or give another directory"
        )
    if _is_main():
        output.mkdir(parents=True, exist_ok=True)


def _remove_earlier_run(output: Path) -> None:
    """Delete the results of an earlier run. Called only once the new run has its data and its model."""
    for name in OURS:
        path = output / name
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()


def _check_recipe_unchanged(output: Path, recipe: Recipe) -> None:
    """Refuse to resume a run with other settings than it was started with."""
    path = output / RECIPE_NAME
    if not path.is_file():
        return
    before = make(read(path)).model_dump()
    now = recipe.model_dump()
    changed = [key for key in now if key not in MAY_CHANGE and before[key] != now[key]]
    if changed:
        changes = [f"{key}: {before[key]!r}, now {now[key]!r}" for key in changed]
        raise ConfigError(f"cannot resume: the recipe differs from {path} in:{listing(changes)}")


def _resolved(recipe: Recipe, data: Data) -> tuple[Recipe, int]:
    """The recipe with every default filled in, and the number of optimizer steps."""
    from ..model.catalogue import page

    epoch_steps = None
    if not recipe.streaming:
        epoch_steps = math.ceil(len(data.train) / _sequences_per_step(recipe))
    steps = recipe.max_steps or math.ceil(recipe.epochs * (epoch_steps or 0))

    eval_every = None
    if data.evaluation is not None:
        eval_every = recipe.eval_every or min(epoch_steps or steps, steps)
    save_every = recipe.save_every or eval_every or min(100, epoch_steps or steps, steps)
    if eval_every and recipe.best and save_every % eval_every:
        raise ConfigError(
            f"save_every = {save_every} must be a multiple of eval_every = {eval_every}, because only an evaluated "
            "checkpoint can be the best one; change one of them, or set best: false"
        )

    rate = page(recipe.method).learning_rate
    if recipe.reads_pairs:
        rate *= recipe.preference().rate
    filled = recipe.changed(
        learning_rate=recipe.learning_rate or rate,
        task="text" if data.labels is None else "classification",
        labels=data.labels,
        eval_every=eval_every,
        save_every=save_every,
    )
    return filled, steps


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _sequences_per_step(recipe: Recipe) -> int:
    """Sequences of one optimizer step, over all processes."""
    return recipe.batch_size * recipe.accumulate * _processes()


def _build_trainer(recipe: Recipe, data: Data, pad: int, steps: int, meter: Meter) -> ExactTrainer:
    """Build the model, its adapter and the trainer. The same seed gives the same result."""
    from transformers import EarlyStoppingCallback, PrinterCallback, set_seed

    settings = arguments(recipe, steps)
    set_seed(recipe.seed)
    base = load_base(recipe, data.labels, pad)
    task = TaskType.CAUSAL_LM if data.labels is None else TaskType.SEQ_CLS
    model = adapt(base, recipe, task, steps)
    by_name.freeze_(model, recipe)
    sampler = None
    if not recipe.streaming:
        sampler = Shuffled(len(data.train), recipe.seed, recipe.batch_size * _processes())
    build = _on_pairs if recipe.reads_pairs else _on_answers
    parts: dict[str, Any] = {
        "train_dataset": data.train if recipe.streaming else Rows(data.train),
        "eval_dataset": None if data.evaluation is None else Rows(data.evaluation),
        "data_collator": Collator(pad),
        "compute_metrics": metrics,
        "sampler": sampler,
        "meter": meter,
        "flat": _flat_collator(recipe, model, data, pad),
        "recipe": recipe,
    }
    trainer = build(recipe, model, settings, parts)
    trainer.remove_callback(PrinterCallback)
    if recipe.early_stopping is not None:
        trainer.add_callback(EarlyStoppingCallback(recipe.early_stopping))
    return trainer


def _on_answers(recipe: Recipe, model: Any, settings: Any, parts: dict[str, Any]) -> ExactTrainer:
    return ExactTrainer(model, settings, **parts)


def _on_pairs(recipe: Recipe, model: Any, settings: Any, parts: dict[str, Any]) -> ExactTrainer:
    """The trainer for pairs of answers, from the parts of one for single answers."""
    flat = parts["flat"]
    if flat is not None:
        flat = preference.PairCollator(flat, preference.shares_prompts(model, parts["train_dataset"][0], flat))
    parts |= {
        "data_collator": preference.PairCollator(parts["data_collator"]),
        "flat": flat,
        "compute_metrics": preference.metrics,
    }
    return preference.PreferenceTrainer(
        model, settings, objective=recipe.preference(), continues=is_continued(recipe), **parts
    )


def _flat_collator(recipe: Recipe, model: Any, data: Data, pad: int) -> Collator | None:
    """The collator that joins training rows without padding; None if the rows, the model or the method do not allow it.

    Raises:
        TrainingError: packed rows would attend to each other.
    """
    if recipe.packing:
        check_packing(model, data.train)
    if recipe.neftune_alpha is not None:  # its noise is scaled by the length of a padded row
        return None
    if recipe.fast and not recipe.streaming and goes_by_sequence(model, [plain(row) for row in data.train]):
        return Collator(pad, flat=True)
    return None


def _tensorboard(output: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(output / LOGS)))


def _announce(console: Console, recipe: Recipe, model: Any, data: Data, steps: int) -> None:
    """Print what will be trained, on how much data, and which rows were cut or dropped."""
    if recipe.start_from is not None:
        how = "is trained on" if is_continued(recipe) else "is merged into the base model"
        console.print(f"{recipe.start_from} {how}", markup=False)
    trainable, total = model.get_nb_trainable_parameters()
    base = recipe.model if recipe.quantise is None else f"{recipe.model} in {recipe.quantise}"
    console.print(f"{recipe.method} on {base}: {trainable:,} of {total:,} parameters are trained")
    if not recipe.streaming:
        account = data.account
        share = account.supervised_tokens / account.tokens
        tokens = f"{account.tokens:,} tokens, {share:.0%} of them learned"
        console.print(f"{counted(account.kept, 'row')}, {tokens}; {counted(steps, 'step')}")
    for line in data.account.warnings(recipe.max_length):
        console.print(line, style="yellow")


def _train_or_resume(trainer: ExactTrainer, meter: Meter, output: Path, resume: bool) -> None:
    last = last_checkpoint(output) if resume else None
    trainer.accelerator.wait_for_everyone()
    if last is None:
        trainer.train()
        return
    _check_same_batches(last, meter)
    trainer.args.eval_on_start = False
    trainer.train(resume_from_checkpoint=str(last))


def _check_same_batches(folder: Path, meter: Meter) -> None:
    """Refuse a checkpoint of other data or other batch sizes. The number of processes may differ."""
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    before = state["stateful_callbacks"]["Meter"]["args"]
    if before["data"] != meter.data:
        raise ConfigError(
            "cannot resume: the data has changed since the run was started; restore it, or start again with --overwrite"
        )
    if before["batch"] != meter.batch:
        raise ConfigError(
            f"cannot resume: a step had {before['batch']} sequences (batch_size x accumulate x processes), now "
            f"{meter.batch}; set batch_size or accumulate so that the product stays the same"
        )
