"""report.html: report.json as one page that needs nothing else."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..terminal import duration, size

PAGE_NAME = "report.html"
MOST_POINTS = 400
"""Of a curve; longer ones are averaged down."""
MOST_BARS = 32
MARGIN = 0.06
"""Room above and below the values, as a share of their range."""
SMOOTHING = 0.9
"""How much of the running mean stays at each step."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Mark:
    """A point with a name of its own, in percent of the plot."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Curve:
    """A chart: paths in a square of 1000, ticks and marks in percent."""

    title: str
    lines: tuple[tuple[str, str], ...]
    """(class, path)."""
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class Cell:
    share: float
    """Of the largest value, 0 to 1; what its colour says."""
    text: str


@dataclass
class Heat:
    """A map of layers: a row for each kind of module, a column for each depth."""

    title: str
    most: str
    rows: list[tuple[str, list[Cell | None]]] = field(default_factory=list)


def render(content: dict[str, Any]) -> str:
    """The page of a report, from the content of report.json. Every value is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": _count, "size": size, "clock": duration, "share": _share, "short": _short}
    view = {
        "name": content["model"].rstrip("/").rpartition("/")[2],
        "curves": curves(content),
        "heats": heats(content["layers"]),
        "bars": bars(content["data"]["lengths"], content["recipe"]["max_length"]),
        "recipe_text": yaml.safe_dump(content["recipe"], sort_keys=False, allow_unicode=True),
        "output_text": repr(content["recipe"]["output"]),
    }
    return environment.get_template(f"{PAGE_NAME}.j2").render(r=content, **view)


# Curves


def curves(content: dict[str, Any]) -> list[Curve]:
    """Loss, learning rate, speed and memory, over the steps."""
    history = content["history"]

    def series(name: str, scale: float = 1.0) -> list[tuple[float, float]]:
        return [(entry["step"], entry[name] * scale) for entry in history if entry.get(name) is not None]

    loss, held = series("loss"), (content["eval"] or {}).get("history", [])
    points = [(entry["step"], entry["loss"]) for entry in held]
    found = [curve("Loss", [("raw", loss), ("main", smooth(loss))], points)]
    for title, name, scale in (
        ("Learning rate", "learning_rate", 1.0),
        ("Tokens per second", "tokens_per_second", 1.0),
        ("Memory, GB", "rss_bytes", 1e-9),
    ):
        values = series(name, scale)
        found.append(curve(title, [("main", values)], floor=0.0))
    return found


def curve(
    title: str, lines: list[tuple[str, list[tuple[float, float]]]], marks: Points = (), floor: float | None = None
) -> Curve:
    """A chart of some lines over the same steps, and marked points.

    Args:
        floor: what the vertical axis starts at; None: near the lowest value.
    """
    every = [point for _, line in lines for point in line] + list(marks)
    if not every:
        return Curve(title, (), (), ())
    (left, right), (low, high) = _span([x for x, _ in every], 0), _span([y for _, y in every], MARGIN, floor)

    def place(x: float, y: float) -> tuple[float, float]:
        return (x - left) / (right - left), 1 - (y - low) / (high - low)

    return Curve(
        title,
        tuple((kind, _path([place(*p) for p in thinned(line)])) for kind, line in lines),
        tuple((_percent(place(v, low))[0], text) for v, text in _axis(left, right, 6, whole=True)),
        tuple((_percent(place(left, v))[1], text) for v, text in _axis(low, high, 4 if floor is not None else 7)),
        tuple(Mark(*_percent(place(x, y)), f"step {x:g}: evaluation loss {y:.4f}") for x, y in marks),
    )


def _span(values: Sequence[float], margin: float, floor: float | None = None) -> tuple[float, float]:
    """(start, end) of an axis."""
    low, high = min(values) if floor is None else floor, max(values)
    if high <= low:
        low, high = (low - 0.5 * abs(low), high + 0.5 * abs(high)) if low else (0.0, 1.0)
    room = margin * (high - low)
    return low if floor is not None else low - room, high + room


def smooth(line: Points) -> list[tuple[float, float]]:
    """Running means, of fewer values at the start."""
    found, mean, weight = [], 0.0, 0.0
    for x, y in line:
        mean, weight = SMOOTHING * mean + (1 - SMOOTHING) * y, SMOOTHING * weight + 1 - SMOOTHING
        found.append((x, mean / weight))
    return found


def thinned(line: Points) -> list[tuple[float, float]]:
    """At most MOST_POINTS, each the mean of its neighbours."""
    size = math.ceil(len(line) / MOST_POINTS)
    groups = [line[i : i + size] for i in range(0, len(line), size)] if size > 1 else [[point] for point in line]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _path(points: Points) -> str:
    if len(points) == 1:  # a step alone: a line across, since a point has no length
        return f"M0 {1000 * points[0][1]:.1f}H1000"
    return "M" + "L".join(f"{1000 * x:.1f} {1000 * y:.1f}" for x, y in points)


def _percent(place: tuple[float, float]) -> tuple[float, float]:
    return round(100 * place[0], 2), round(100 * place[1], 2)


def _axis(low: float, high: float, ticks: int, whole: bool = False) -> list[tuple[float, str]]:
    """Round numbers between two values, and how they are written."""
    from matplotlib.ticker import MaxNLocator

    least = 1 if whole else 2  # of ticks, before matplotlib gives up on whole numbers
    locator = MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10], integer=whole, min_n_ticks=least)
    values = [float(v) for v in locator.tick_values(low, high)]
    step = values[1] - values[0]
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) + f"{step:e}".startswith("2.5")
    small = max(map(abs, values)) < 1e-3
    texts = [f"{v:.1e}" if small and v else f"{v:,.{digits if v else 0}f}" for v in values]
    return [(v, text) for v, text in zip(values, texts, strict=True) if low <= v <= high]


# Layers


def heats(layers: list[dict[str, Any]]) -> list[Heat]:
    """Maps of how far each layer moved, and in how many directions."""
    if not layers:
        return []
    relative = all(layer["relative_norm"] is not None for layer in layers)
    name = "relative_norm" if relative else "norm"
    title = "How far each weight moved: |ΔW| / |W|" if relative else "Size of each adapter's own numbers"
    found = [_heat(title, layers, name, _portion if relative else _short)]
    if all(layer["effective_rank"] is not None for layer in layers):
        most = {layer["rank"] for layer in layers}
        of = f" (of {most.pop()})" if len(most) == 1 else ""
        found.append(
            _heat(f"In how many directions: effective rank{of}", layers, "effective_rank", lambda v: f"{v:.1f}")
        )
    return found


def _heat(title: str, layers: list[dict[str, Any]], name: str, spell: Any) -> Heat:
    most = max(layer[name] for layer in layers)
    heat, places = Heat(title, spell(most)), [_place(layer["path"]) for layer in layers]
    depths = sorted({depth for _, depth in places if depth is not None})
    rows: dict[str, dict[int | None, Cell]] = {}
    for layer, (kind, depth) in zip(layers, places, strict=True):
        text = f"{layer['path']}: {spell(layer[name])}, {layer['parameters']:,} parameters"
        rows.setdefault(kind, {})[depth] = Cell(round(layer[name] / most, 3) if most else 0.0, text)
    names = _shortest(list(rows))
    for kind, cells in rows.items():
        across: list[int | None] = [None] if None in cells else list(depths)
        heat.rows.append((names[kind], [cells.get(depth) for depth in across]))
    return heat


def _place(path: str) -> tuple[str, int | None]:
    """(kind of module, depth): model.layers.3.mlp.up_proj is (mlp.up_proj, 3)."""
    found = re.match(r"(?:.*?\.)??(\d+)(?:\.(.+))?$", path)
    return (path, None) if found is None else (found[2] or "block", int(found[1]))


def _shortest(kinds: list[str]) -> dict[str, str]:
    """The last part of each name, where that tells them apart."""
    ends = [kind.rpartition(".")[2] for kind in kinds]
    return {kind: end if ends.count(end) == 1 else kind for kind, end in zip(kinds, ends, strict=True)}


# Data


def bars(lengths: dict[str, int], limit: int) -> dict[str, Any]:
    """A histogram of row lengths in tokens: heights in percent of the tallest, and which lie above the limit."""
    counts = {int(length): count for length, count in lengths.items()}
    if not counts:
        return {"bars": [], "low": 0, "high": 0}
    low, high = min(counts), max(counts)
    width = max(1, math.ceil((high - low + 1) / MOST_BARS))
    sums = [0] * ((high - low) // width + 1)
    for length, count in counts.items():
        sums[(length - low) // width] += count
    found = [
        {
            "height": round(100 * total / max(sums), 1),
            "text": f"{low + i * width} to {low + (i + 1) * width - 1} tokens: {total:,} rows",
            "over": low + i * width > limit,
        }
        for i, total in enumerate(sums)
    ]
    return {"bars": found, "low": low, "high": low + len(sums) * width - 1}


# Words


def _count(value: int) -> str:
    """12,345 up to a hundred thousand, then 1.23 M."""
    for scale, unit in ((1e9, " B"), (1e6, " M")):
        if value >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:,}"


def _share(value: float) -> str:
    return f"{value:.1%}"


def _portion(value: float) -> str:
    return f"{value:.2%}" if value < 1 else _short(value)


def _short(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
