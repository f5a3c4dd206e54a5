"""What a person sees while a run goes on: one live line on a terminal, plain lines anywhere else."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from transformers import TrainerCallback

from ..terminal import clock
from .meter import Meter, rss

LINES = 20
"""Plain lines in a run."""


class Display(TrainerCallback):
    """Progress with loss, tokens a second, time left and memory."""

    def __init__(self, meter: Meter, console: Console) -> None:
        self.meter, self.console = meter, console
        self.progress: Progress | None = None
        self.loss: float | None = None
        self.task: Any = None

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
            self._step(state)
        elif "eval_loss" in logs:
            self._evaluated(state, logs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def facts(self, state: Any) -> str:
        loss = "" if self.loss is None else f"loss {self.loss:.4f}  "
        speed = self.meter.real_tokens / self.meter.seconds if self.meter.seconds else 0.0
        left = (state.max_steps - state.global_step) * self.meter.seconds / max(1, state.global_step)
        return f"{loss}{speed:,.0f} tokens/s  {rss() / 1e9:.1f} GB  {clock(left)} left"

    def _step(self, state: Any) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step, facts=self.facts(state))
        elif state.global_step % max(1, state.max_steps // LINES) == 0 or state.global_step in (1, state.max_steps):
            self._say(f"step {state.global_step}/{state.max_steps}  {self.facts(state)}")

    def _evaluated(self, state: Any, logs: Any) -> None:
        accuracy = f"  accuracy {logs['eval_accuracy']:.1%}" if "eval_accuracy" in logs else ""
        self._say(f"step {state.global_step}/{state.max_steps}  evaluation loss {logs['eval_loss']:.4f}{accuracy}")

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False)
