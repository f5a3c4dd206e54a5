"""What a run costs: tokens, seconds and memory, counted on through checkpoints."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from transformers.trainer_callback import ExportableState, TrainerCallback


class Meter(TrainerCallback, ExportableState):
    """Counts over all processes. Saved in every checkpoint, so that a resumed run goes on counting."""

    def __init__(
        self,
        real_tokens: int = 0,
        supervised_tokens: int = 0,
        seconds: float = 0.0,
        peak: int = 0,
        data: str | None = None,
        batch: int | None = None,
    ) -> None:
        self.real_tokens, self.supervised_tokens = real_tokens, supervised_tokens
        self.seconds, self.peak = seconds, peak
        self.data, self.batch = data, batch
        self._started: float | None = None
        self._last = (self.real_tokens, self.seconds)

    def state(self) -> dict[str, Any]:
        names = ("real_tokens", "supervised_tokens", "seconds", "peak", "data", "batch")
        return {"args": {name: getattr(self, name) for name in names}, "attributes": {}}

    def add(self, real: int, supervised: int) -> None:
        """Count the tokens of one optimizer step; padding is not real."""
        self.real_tokens += real
        self.supervised_tokens += supervised

    def start(self) -> None:
        """The clock of training runs from the first batch of a step to its end: without evaluation and saving."""
        self._started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self._started is not None:
            self.seconds += time.perf_counter() - self._started
            self._started = None
        self.peak = max(self.peak, peak_rss())

    def speed(self) -> float:
        """Real tokens a second since the last call."""
        tokens, seconds = self.real_tokens - self._last[0], self.seconds - self._last[1]
        self._last = (self.real_tokens, self.seconds)
        return tokens / seconds if seconds > 0 else 0.0


def rss() -> int:
    """Memory of this process now, in bytes."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_rss() -> int:
    """The most memory this process has had, in bytes."""
    if sys.platform == "win32":
        return rss()
    status = Path("/proc/self/status")
    if status.is_file():  # what getrusage says outlives an exec: it may be of the program that began this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
