"""Two ways to do one thing, timed in alternation in one process, and what becomes of the numbers."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

DOCS = Path(__file__).parent.parent / "docs"


@dataclass
class Pair:
    """Seconds of both ways, taken in turn, and the ratio that is wanted at most."""

    what: str
    first: str
    second: str
    limit: float | None = None
    seconds: list[tuple[float, float]] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in self.seconds]

    def line(self) -> str:
        """A row of the table: medians, the ratio's median, its least and greatest."""
        a, b = (statistics.median(column) for column in zip(*self.seconds, strict=True))
        low, middle, high = min(self.ratios), statistics.median(self.ratios), max(self.ratios)
        limit = "" if self.limit is None else f"{self.limit:g}"
        cells = [self.what, f"{self.first} {_time(a)}", f"{self.second} {_time(b)}"]
        return "| " + " | ".join([*cells, f"{middle:.3g} ({low:.3g} to {high:.3g})", limit]) + " |"


def alternate(pair: Pair, first: Callable[[], float], second: Callable[[], float], times: int, warm: int = 1) -> Pair:
    """Fill in a pair's seconds; each way is called `warm` times before, and gives the seconds it took."""
    for _ in range(warm):
        first(), second()
    pair.seconds = [(first(), second()) for _ in range(times)]
    print(pair.line(), flush=True)
    return pair


def timed(function: Callable[[], Any]) -> float:
    """Seconds of one call, without garbage collection in it."""
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    try:
        function()
        return time.perf_counter() - start
    finally:
        gc.enable()


def matrix_rate() -> float:
    """GFLOP/s of this machine's matrix product in fp32, the best of ten."""
    a, b = torch.randn(1600, 1536), torch.randn(1536, 1536)
    best = min(timed(lambda: a @ b) for _ in range(10))
    return 2 * 1600 * 1536 * 1536 / best / 1e9


def write(name: str, pairs: list[Pair], out: Path = DOCS) -> None:
    """docs/performance-<name>.json with every measurement, and the table beside it."""
    rate = matrix_rate()
    head = [
        f"{torch.get_num_threads()} threads, fp32, matrix products at {rate:.0f} GFLOP/s. "
        "Each ratio: the median of pairs taken in alternation (least to greatest).",
        "",
        "| what | | | ratio | at most |",
        "|---|--:|--:|--:|--:|",
    ]
    out.mkdir(exist_ok=True)
    content = {"gflops": rate, "threads": torch.get_num_threads(), "pairs": [asdict(pair) for pair in pairs]}
    (out / f"performance-{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    (out / f"performance-{name}.md").write_text("\n".join([*head, *(pair.line() for pair in pairs)]) + "\n")


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
