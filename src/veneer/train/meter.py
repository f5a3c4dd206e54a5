"""Counts of a run's tokens, seconds and memory, which checkpoints store."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from transformers.trainer_callback import ExportableState, TrainerCallback


class Meter(TrainerCallback, ExportableState):
    """Counts tokens, seconds and memory. Checkpoints store the counts, and a resumed run continues from them."""

    def __init__(
        self,
        real_tokens: int = 0,
        supervised_tokens: int = 0,
        seconds: float = 0.0,
        peak: int = 0,
        data: str | None = None,
        batch: int | None = None,
    ) -> None:
        """Start from the counts of a checkpoint, or from zero.

        Args:
            real_tokens: tokens without padding, over all processes.
            supervised_tokens: tokens that count in the loss, over all processes.
            seconds: time spent in training steps.
            peak: peak memory of this process, in bytes.
            data: fingerprint of the training data, which must be the same when a run is resumed.
            batch: sequences per optimizer step, which must be the same when a run is resumed.
        """
        self.real_tokens = real_tokens
        self.supervised_tokens = supervised_tokens
        self.seconds = seconds
        self.peak = peak
        self.data = data
        self.batch = batch
        self._step_start: float | None = None
        self._last_tokens = real_tokens
        self._last_seconds = seconds

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores: the arguments that recreate this meter."""
        names = ("real_tokens", "supervised_tokens", "seconds", "peak", "data", "batch")
        return {"args": {name: getattr(self, name) for name in names}, "attributes": {}}

    def add(self, real: int, supervised: int) -> None:
        """Count the tokens of one optimizer step; `real` excludes padding."""
        self.real_tokens += real
        self.supervised_tokens += supervised

    def start(self) -> None:
        """Start the clock for a step. It runs until the end of the step, which excludes evaluation and saving."""
        self._step_start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self._step_start is not None:
            self.seconds += time.perf_counter() - self._step_start
            self._step_start = None
        self.peak = max(self.peak, peak_rss())

    def speed(self) -> float:
        """Tokens per second, without padding, since the last call."""
        tokens = self.real_tokens - self._last_tokens
        seconds = self.seconds - self._last_seconds
        self._last_tokens = self.real_tokens
        self._last_seconds = self.seconds
        return tokens / seconds if seconds > 0 else 0.0


def rss() -> int:
    """Current memory of this process in bytes."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_rss() -> int:
    """Peak memory of this process in bytes; on Windows the current memory."""
    if sys.platform == "win32":
        return rss()
    status = Path("/proc/self/status")
    if status.is_file():  # preferred: the peak of getrusage survives exec and may belong to the previous program
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
