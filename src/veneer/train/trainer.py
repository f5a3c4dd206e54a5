"""A subclass of transformers' Trainer: the loss does not depend on the batch layout, and checkpoints are complete."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from .. import ops
from ..core.state import LOSS_TERMS
from ..data.collate import MOST_LOGITS, Shuffled, token_sums
from ..data.encode import IGNORED
from ..errors import ConfigError, TrainingError
from ..files.write import writing
from ..ops.allocator import keep_blocks
from ..ops.attention import by_sequence
from ..ops.optimizer import FlatAdamW
from . import loggers, schedules, sharded
from .meter import Meter, rss
from .optimizers import by_name
from .recipe import Recipe

CHECKPOINTS = "checkpoints"
"""Name of the directory of the checkpoints."""
WHOLE = "complete"
"""Name of the empty file that marks a checkpoint as completely written."""


DEAD = 3
"""So many logs in a row with a loss but a gradient of exactly 0 end a run: it learns nothing any more. Adapters that a
rate far too high has blown up do so, if they saturate the model instead of making it overflow."""


@dataclass
class Terms:
    """The sum of the method's own loss terms over some steps, such as AdaLoRA's orthogonality."""

    total: Any = 0.0
    steps: int = 0


class ExactTrainer(Trainer):
    """Trains on the mean loss over all learned tokens of an optimizer step, across its batches and processes."""

    model: Any
    """The PeftModel, or what accelerate wraps around it."""

    def __init__(
        self, *args: Any, recipe: Recipe, sampler: Shuffled | None, meter: Meter, flat: Any = None, **kwargs: Any
    ) -> None:
        """Take Trainer's arguments and our own.

        Args:
            recipe: names the optimizer and its rates, and whether the fast implementations are used.
            sampler: the order of the training rows; None: the order of the dataset.
            meter: counts tokens, seconds and memory.
            flat: collator that joins training rows without padding; None: rows are padded, as in evaluation.
        """
        self.recipe = recipe
        super().__init__(*args, **kwargs)
        self.flat = flat
        self.fast = recipe.fast
        self.model_accepts_loss_kwargs = True  # makes Trainer count learned tokens; `compute_loss` does the rest
        self.sampler = sampler
        self.meter = meter
        self.terms = Terms()
        self.dead = 0
        """Logs in a row with a loss and without a gradient."""
        self.add_callback(meter)
        self.add_callback(_Epochs(sampler))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch, unless the resumed run is already finished: Trainer would then take one step too many."""
        if self._is_over():
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _is_over(self) -> bool:
        if self.state.global_step >= self.state.max_steps:
            return True
        stoppers = [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
        return any(stopper.early_stopping_patience_counter >= stopper.early_stopping_patience for stopper in stoppers)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if self.fast else ops.plain():
            keep_blocks()
            return super().train(*args, **kwargs)

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> Any:  # type: ignore[override]
        """The recipe's optimizer. AdamW is replaced by ours over one flat buffer, except for sharded parameters."""
        choice = by_name.choose(self.recipe, lambda: Trainer.get_optimizer_cls_and_kwargs(args, model))
        settings = dict(choice.settings)
        optimizer_class = choice.kind
        if optimizer_class is torch.optim.AdamW and ops.is_fast("optimizer") and not self.is_sharded:
            optimizer_class = FlatAdamW
        adapted = self.accelerator.unwrap_model(self.model)
        decayed = self.get_decay_parameter_names(adapted)
        groups = by_name.groups(adapted, self.recipe, args.learning_rate, args.weight_decay, decayed)
        if groups is not None:
            settings["params"] = groups
        return optimizer_class, settings

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        is_new = self.optimizer is None
        if self.is_sharded and self.recipe.optimizer in by_name.OURS:
            raise ConfigError(
                f"optimizer {self.recipe.optimizer!r} does not support sharded models; choose another one"
            )
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new:
            by_name.correct_gradients(optimizer, self.accelerator.unwrap_model(self.model), self.recipe)
        return optimizer

    def get_train_dataloader(self) -> Any:
        padded = self.data_collator
        self.data_collator = self.flat or padded
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = padded

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self.flat is None:
            return super().training_step(model, inputs, *args, **kwargs)
        with by_sequence(self.accelerator.unwrap_model(self.model), self.continued(inputs)):
            return super().training_step(model, inputs, *args, **kwargs)

    def continued(self, inputs: Any) -> Sequence[int]:
        """How many tokens of the one before it each sequence of a batch continues (see `by_sequence`)."""
        return ()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        self.meter.start()
        self.terms.steps += 1
        batches, learned_tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum(_real_tokens(batch) for batch in batches)
        real_tokens = torch.tensor(count, device=self.args.device)
        if self.args.world_size > 1:
            real_tokens = self.accelerator.reduce(real_tokens, "sum")
        self.meter.add(int(real_tokens), int(learned_tokens or 0))
        return batches, learned_tokens

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss of the batch, in training weighted by the batch's share of the learned tokens of the step."""
        learned_tokens = _learned_tokens(inputs["labels"])
        if learned_tokens == 0:  # the mean over no tokens would be nan
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
            loss = outputs.logits.sum() * 0.0
            return (loss, outputs) if return_outputs else loss
        outputs = model(**inputs)
        loss = outputs.loss
        if num_items_in_batch is not None:
            share = learned_tokens / num_items_in_batch * self.accelerator.num_processes
            loss = loss * share
            adapted = self.accelerator.unwrap_model(model, keep_torch_compile=False)
            self.terms.total = self.terms.total + adapted._state.facts.get(LOSS_TERMS, 0.0) * share
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does, with speed and memory; raise TrainingError if the run cannot learn any more.

        The loss is that of the data. What the method's own terms add to it is logged as `method_loss`.
        """
        for name in ("loss", "grad_norm", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise self._hopeless(f"{name} is {logs[name]}")
        if "loss" in logs:
            self.dead = self.dead + 1 if logs["loss"] > 0 and logs.get("grad_norm") == 0 else 0
            if self.dead == DEAD:
                raise self._hopeless(f"the loss is {logs['loss']:g} but its gradient 0, as in the steps before,")
            logs = logs | {"tokens_per_second": self.meter.speed(), "rss_bytes": rss()}
            added = self._mean_terms()
            if added:
                logs = logs | {"loss": logs["loss"] - added, "method_loss": added}
        super().log(logs, start_time)

    def _hopeless(self, what: str) -> TrainingError:
        return TrainingError(
            f"{what} at step {self.state.global_step}: the run stops. Try a lower learning_rate (now "
            f"{self.args.learning_rate:g}), a longer warmup, or dtype: float32, and check the data"
        )

    def _mean_terms(self) -> float:
        """What the method's loss terms added to the loss, per step since the last call, over all processes."""
        terms = self.terms
        self.terms = Terms()
        total = torch.as_tensor(terms.total, dtype=torch.float32, device=self.args.device)
        if self.args.world_size > 1:  # every process takes part, also one whose batches had nothing to learn
            total = self.accelerator.reduce(total, "mean")
        return float(total) / terms.steps if terms.steps else 0.0

    def _load_callback_state(self) -> None:
        """Restore our Meter in place: Trainer replaces it by a new object, but the display refers to ours."""
        super()._load_callback_state()
        callbacks = self.callback_handler.callbacks
        for position, callback in enumerate(callbacks):
            if isinstance(callback, Meter):
                self.meter.__dict__.update(callback.__dict__)
                callbacks[position] = self.meter

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The mean loss of a batch, the sums that `metrics` needs in the place of logits, and the labels."""
        inputs = self._prepare_inputs(inputs)
        sums = []
        with torch.no_grad(), self.compute_loss_context_manager():
            for part in self._parts(inputs):
                labels = part.pop("labels")
                sums.append(token_sums(model(**part).logits, labels))
        totals = torch.cat(sums)
        loss = totals[:, 0].sum() / totals[:, 1].sum().clamp_min(1)
        return loss, totals, inputs["labels"]

    def _parts(self, inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """A batch in parts of several rows, whose logits are no larger than `MOST_LOGITS`, or of one row.

        Processes that share the model's weights must call it equally often, so they take the batch as a whole.
        """
        labels = inputs["labels"]
        if labels.dim() == 1 or self.is_sharded:
            return [dict(inputs)]
        config = self.accelerator.unwrap_model(self.model).config
        row_bytes = labels.shape[1] * config.get_text_config().vocab_size * 4
        rows = max(1, MOST_LOGITS // row_bytes)
        parts = []
        for start in range(0, labels.shape[0], rows):
            parts.append({name: t[start : start + rows] for name, t in inputs.items()})
        return parts

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; the loss is the mean over all tokens, where Trainer's is a mean over batches."""
        output = super().evaluation_loop(*args, **kwargs)
        exact_loss = output.metrics.pop("eval_exact_loss", None)
        if exact_loss is not None:
            output.metrics["eval_loss"] = exact_loss
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save only the adapter. The main process writes; all processes take part, to gather sharded tensors."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        model.save_pretrained(output_dir or str(self.args.output_dir), is_main_process=self.args.should_save)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.is_sharded = sharded.shards(self.accelerator)
        self.is_fsdp_enabled = False  # else Trainer saves the whole base with each checkpoint, in FSDP's own layout

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer_state = sharded.gathered(self.optimizer)
        if self.args.should_save:
            torch.save(optimizer_state, os.path.join(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_sharded and checkpoint is not None:
            sharded.take_shares_(self.optimizer.optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        with sharded.plain_as_shares() if self.is_sharded else nullcontext():
            super()._load_best_model()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint, and mark it as complete once every process has written its part."""
        step = self.state.global_step
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{step}"
        with writing(f"the checkpoint of step {step}", folder, RuntimeError):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (folder / WHOLE).touch()


class _Epochs(TrainerCallback):
    """Sets the sampler's epoch number, also after a resume."""

    def __init__(self, sampler: Shuffled | None) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.sampler is not None:
            self.sampler.epoch = int(state.epoch or 0)


def metrics(prediction: Any) -> dict[str, float]:
    """Loss, perplexity and accuracy over all learned tokens."""
    sums = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    total_loss, tokens, hits = sums
    loss = float(total_loss / tokens)
    perplexity = math.exp(min(loss, 700.0))  # exp overflows a float64 above 709
    return {"exact_loss": loss, "perplexity": perplexity, "accuracy": float(hits / tokens)}


def arguments(recipe: Recipe, steps: int) -> Any:
    """The TrainingArguments for a resolved recipe and a number of optimizer steps."""
    assert recipe.learning_rate is not None, "the recipe is resolved"
    evaluates = bool(recipe.eval_every)
    on_cpu = not torch.accelerator.is_available()
    several_processes = int(os.environ.get("WORLD_SIZE", "1")) > 1
    warmup = round(recipe.warmup * steps) if recipe.warmup < 1 else int(recipe.warmup)
    return TrainingArguments(
        output_dir=str(Path(recipe.output) / CHECKPOINTS),
        max_steps=steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.eval_batch_size or recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=schedules.name_of(recipe),
        warmup_steps=warmup,
        lr_scheduler_kwargs=recipe.schedule_options,
        optim=by_name.argument_of(recipe),
        neftune_noise_alpha=recipe.neftune_alpha,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        gradient_checkpointing=recipe.gradient_checkpointing,
        seed=recipe.seed,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=recipe.eval_every,
        eval_on_start=evaluates,
        save_strategy="steps",
        save_steps=recipe.save_every or steps,
        save_total_limit=recipe.keep,
        load_best_model_at_end=evaluates and recipe.best,
        metric_for_best_model="loss" if evaluates else None,
        greater_is_better=False if evaluates else None,
        remove_unused_columns=False,
        accelerator_config={"dispatch_batches": False},  # rows of several lengths cannot be dispatched as one tensor
        dataloader_pin_memory=not on_cpu,
        ddp_find_unused_parameters=False,
        ddp_backend="gloo" if on_cpu and several_processes else None,
        use_cpu=on_cpu,
        restore_callback_states_from_checkpoint=True,
        report_to=list(recipe.report_to),
        run_name=Path(recipe.output).name,
        disable_tqdm=True,
        **loggers.LOCAL,
    )


def last_checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint. Incomplete ones, left by a killed run, are removed."""
    newest = None
    newest_step = -1
    for folder in (output / CHECKPOINTS).glob("checkpoint-*"):
        if (folder / WHOLE).is_file():
            step = int(folder.name.rpartition("-")[2])
            if step > newest_step:
                newest = folder
                newest_step = step
        elif int(os.environ.get("RANK", "0")) == 0:
            shutil.rmtree(folder)
    return newest


def _real_tokens(batch: dict[str, Tensor]) -> int:
    """Number of tokens of a batch without the padding."""
    mask = batch.get("attention_mask")
    if mask is None:
        return batch["input_ids"].numel()
    return int(mask.sum())


def _learned_tokens(labels: Tensor) -> int:
    """Number of labels that count in the loss. The first token of a sequence is never predicted; classes have one label
    per row."""
    if labels.dim() > 1:
        labels = labels[..., 1:]
    return int(labels.ne(IGNORED).sum())
