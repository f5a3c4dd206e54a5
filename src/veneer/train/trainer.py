"""transformers' Trainer, made exact: one loss whatever the layout of the batch, counted tokens, whole checkpoints."""

from __future__ import annotations

import math
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from .. import ops
from ..data.collate import Shuffled
from ..data.encode import IGNORED
from ..errors import TrainingError
from ..files.write import writing
from ..ops.allocator import keep_blocks
from ..ops.attention import by_sequence
from ..ops.optimizer import FlatAdamW
from . import sharded
from .meter import Meter, rss
from .recipe import Recipe

WHOLE = "complete"
"""A file that a checkpoint gets when everything else of it is written."""


class ExactTrainer(Trainer):
    """Trains on the mean over all learned tokens of an optimizer step, over all its batches and processes."""

    def __init__(
        self, *args: Any, sampler: Shuffled | None, meter: Meter, flat: Any = None, fast: bool = True, **kwargs: Any
    ) -> None:
        """Args beyond those of Trainer.

        flat: the collator of training batches that lays rows end to end; None: they are padded, as in evaluation.
        fast: take the fast paths.
        """
        super().__init__(*args, **kwargs)
        self.flat, self.fast = flat, fast
        self.model_accepts_loss_kwargs = True  # learned tokens are counted; `compute_loss` does the rest itself
        self.sampler, self.meter = sampler, meter
        self.add_callback(meter)
        self.add_callback(_Epochs(sampler))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing, where a run that is resumed had come to its end; Trainer would take one step too many."""
        if self._is_over():
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _is_over(self) -> bool:
        stoppers = [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
        stopped = any(c.early_stopping_patience_counter >= c.early_stopping_patience for c in stoppers)
        return stopped or self.state.global_step >= self.state.max_steps

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if self.fast else ops.plain():
            keep_blocks()
            return super().train(*args, **kwargs)

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> Any:  # type: ignore[override]
        """One flat buffer for AdamW; sharded parameters stay what they are."""
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
        is_flat = kind is torch.optim.AdamW and ops.is_fast("optimizer") and not self.is_sharded
        return (FlatAdamW if is_flat else kind), settings

    def get_train_dataloader(self) -> Any:
        padded, self.data_collator = self.data_collator, self.flat or self.data_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = padded

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with nullcontext() if self.flat is None else by_sequence(self.accelerator.unwrap_model(self.model)):
            return super().training_step(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        self.meter.start()
        batches, learned = super().get_batch_samples(epoch_iterator, num_batches, device)
        real = torch.tensor(sum(_real_tokens(batch) for batch in batches), device=self.args.device)
        if self.args.world_size > 1:
            real = self.accelerator.reduce(real, "sum")
        self.meter.add(int(real), int(learned or 0))
        return batches, learned

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own mean, weighed by its share of the learned tokens of the step (all of them, in evaluation)."""
        own = _learned(inputs["labels"])
        outputs = model(**inputs) if own else model(**{k: v for k, v in inputs.items() if k != "labels"})
        if own == 0:  # a batch of blanks: its mean would be nan
            loss = outputs.logits.sum() * 0.0
        elif num_items_in_batch is None:
            loss = outputs.loss
        else:
            loss = outputs.loss * (own / num_items_in_batch * self.accelerator.num_processes)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        bad = [name for name in ("loss", "grad_norm", "eval_loss") if not math.isfinite(logs.get(name, 0.0))]
        if bad:
            raise TrainingError(
                f"{bad[0]} is {logs[bad[0]]} at step {self.state.global_step}: the run cannot go on. Try a lower "
                f"learning_rate (now {self.args.learning_rate:g}), more warmup, or dtype: float32, and look at the data"
            )
        if "loss" in logs:
            logs = logs | {"tokens_per_second": self.meter.speed(), "rss_bytes": rss()}
        super().log(logs, start_time)

    def _load_callback_state(self) -> None:
        """Trainer puts a new Meter in the place of ours; ours, which others hold too, takes its counts over."""
        super()._load_callback_state()
        handler = self.callback_handler
        for restored in [callback for callback in handler.callbacks if isinstance(callback, Meter)]:
            self.meter.__dict__.update(restored.__dict__)
            handler.callbacks[handler.callbacks.index(restored)] = self.meter

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, **kwargs)
        exact = output.metrics.pop("eval_exact_loss", None)
        if exact is not None:  # of all tokens alike, where Trainer's is a mean of batches
            output.metrics["eval_loss"] = exact
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter alone, whole and written once; every process takes part, as sharded tensors need."""
        inner = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        inner.save_pretrained(output_dir or str(self.args.output_dir), is_main_process=self.args.should_save)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.is_sharded = sharded.shards(self.accelerator)
        self.is_fsdp_enabled = False  # Trainer would save the whole base with each checkpoint, in FSDP's own layout

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = sharded.gathered(self.optimizer)
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_sharded and checkpoint is not None:
            sharded.take_shares_(self.optimizer.optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        with sharded.plain_as_shares() if self.is_sharded else nullcontext():
            super()._load_best_model()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        with writing(f"the checkpoint of step {self.state.global_step}", folder, RuntimeError):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (folder / WHOLE).touch()


class _Epochs(TrainerCallback):
    """Tells the sampler which epoch it is, also after a resume."""

    def __init__(self, sampler: Shuffled | None) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.sampler is not None:
            self.sampler.epoch = int(state.epoch or 0)


def metrics(prediction: Any) -> dict[str, float]:
    """Loss, perplexity and accuracy over all learned tokens."""
    total, count, hits = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    loss = float(total / count)
    return {"exact_loss": loss, "perplexity": math.exp(min(loss, 700.0)), "accuracy": float(hits / count)}


def arguments(recipe: Recipe, output: Path, steps: int, warmup: int, eval_every: int | None, save_every: int) -> Any:
    """The recipe in Trainer's words."""
    on_cpu = not torch.accelerator.is_available()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    assert recipe.learning_rate is not None, "the recipe is resolved"
    return TrainingArguments(
        output_dir=str(output / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.eval_batch_size or recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule,
        warmup_steps=warmup,
        optim=recipe.optimizer,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        gradient_checkpointing=recipe.gradient_checkpointing,
        seed=recipe.seed,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if eval_every else "no",
        eval_steps=eval_every,
        eval_on_start=eval_every is not None,
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=recipe.keep,
        load_best_model_at_end=bool(eval_every) and recipe.best,
        metric_for_best_model="loss" if eval_every else None,
        greater_is_better=False if eval_every else None,
        remove_unused_columns=False,
        accelerator_config={"dispatch_batches": False},  # rows of several lengths do not fit in one batch to share out
        dataloader_pin_memory=not on_cpu,
        ddp_find_unused_parameters=False,
        ddp_backend="gloo" if on_cpu and several else None,
        use_cpu=on_cpu,
        restore_callback_states_from_checkpoint=True,
        report_to=["wandb"] if recipe.wandb else [],
        disable_tqdm=True,
    )


def last_checkpoint(output: Path) -> Path | None:
    """The newest whole checkpoint; what a killed run left half-written is removed."""
    whole: list[tuple[int, Path]] = []
    for folder in (output / "checkpoints").glob("checkpoint-*"):
        if (folder / WHOLE).is_file():
            whole.append((int(folder.name.rpartition("-")[2]), folder))
        elif int(os.environ.get("RANK", "0")) == 0:
            shutil.rmtree(folder)
    return max(whole)[1] if whole else None


def _real_tokens(batch: dict[str, Tensor]) -> int:
    mask = batch.get("attention_mask")
    return int(batch["input_ids"].numel() if mask is None else mask.sum())


def _learned(labels: Tensor) -> int:
    return int((labels[..., 1:] if labels.dim() > 1 else labels).ne(IGNORED).sum())
