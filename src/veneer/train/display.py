"""Progress of a run: one live line on a terminal, plain lines anywhere else."""

from __future__ import annotations

from time import monotonic
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from transformers import TrainerCallback

from ..terminal import clock, progress_lines
from .meter import Meter, rss

LINES = 20
"""Number of plain lines in a run."""


class Display(TrainerCallback):
    """Shows progress with loss, tokens per second, memory and time left."""

    def __init__(self, meter: Meter, console: Console) -> None:
        self.meter = meter
        self.console = console
        self.progress: Progress | None = None
        self.loss: float | None = None
        self.task: Any = None
        self.evaluated = 0
        """Batches of the running evaluation that are done."""
        self.evaluation_start = 0.0
        self.lines = progress_lines(console)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        self.progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[facts]}"),
            console=self.console,
            expand=True,
        )
        self.progress.start()
        self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step, facts="")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            self.loss = logs["loss"]
            self._show_step(state)
        elif "eval_loss" in logs:
            self._show_evaluation(state, logs)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or eval_dataloader is None:
            return
        if self.evaluated == 0:
            self.evaluation_start = monotonic()
        self.evaluated += 1
        batches = len(eval_dataloader)
        if self.progress is None:
            if self.evaluated < batches:  # the line with the result follows the last batch
                self.lines(f"step {state.global_step}/{state.max_steps}  evaluating", self.evaluated, batches)
            return
        # The first batch is not timed: it may include compilation and other work that is done once.
        seconds = (monotonic() - self.evaluation_start) / max(1, self.evaluated - 1)
        left = f"  {clock(seconds * (batches - self.evaluated))} left" if self.evaluated > 1 else ""
        self.progress.update(self.task, facts=f"evaluating {self.evaluated}/{batches}{left}")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluated = 0
        if self.progress is not None:
            self.progress.update(self.task, facts=self.facts(state))

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Stop the live line and leave the terminal as it was."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def facts(self, state: Any) -> str:
        """Loss, speed, memory and time left, in one line."""
        seconds = self.meter.seconds
        loss = "" if self.loss is None else f"loss {self.loss:.4f}  "
        speed = self.meter.real_tokens / seconds if seconds else 0.0
        steps_left = state.max_steps - state.global_step
        seconds_left = steps_left * seconds / max(1, state.global_step)
        return f"{loss}{speed:,.0f} tokens/s  {rss() / 1e9:.1f} GB  {clock(seconds_left)} left"

    def _show_step(self, state: Any) -> None:
        step = state.global_step
        if self.progress is not None:
            self.progress.update(self.task, completed=step, facts=self.facts(state))
            return
        interval = max(1, state.max_steps // LINES)
        if step % interval == 0 or step in (1, state.max_steps):
            self._print(f"step {step}/{state.max_steps}  {self.facts(state)}")

    def _show_evaluation(self, state: Any, logs: Any) -> None:
        line = f"step {state.global_step}/{state.max_steps}  evaluation loss {logs['eval_loss']:.4f}"
        if "eval_accuracy" in logs:
            line += f"  accuracy {logs['eval_accuracy']:.1%}"
        self._print(line)

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False)
