"""report.html: the facts of report.json as one self-contained page."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..terminal import duration, size

PAGE_NAME = "report.html"
MOST_POINTS = 400
"""Maximum number of points of a curve; longer curves are averaged down."""
MOST_BARS = 32
"""Maximum number of bars of a histogram."""
MARGIN = 0.06
"""Room above and below the values of a curve, as a share of their range."""
SMOOTHING = 0.8
"""How much less each step weighs in the smoothed line than its neighbour nearer to the point."""

Point = tuple[float, float]
Points = Sequence[Point]
Tick = tuple[float, str]


@dataclass(frozen=True)
class Mark:
    """A labelled point, in percent of the plot."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Curve:
    """A chart: paths in a square of 1000, ticks and marks in percent."""

    title: str
    lines: tuple[tuple[str, str], ...]
    """(class, path)."""
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class Axis:
    """The range of values along one axis."""

    start: float
    end: float

    def share(self, value: float) -> float:
        """The position of a value between start (0) and end (1)."""
        return (value - self.start) / (self.end - self.start)


@dataclass(frozen=True)
class Cell:
    """One layer in a map of layers."""

    share: float
    """Share of the largest value, 0 to 1; it decides the colour."""
    text: str


@dataclass
class Heat:
    """A map of layers: a row for each kind of module, a column for each depth."""

    title: str
    most: str
    rows: list[tuple[str, list[Cell | None]]] = field(default_factory=list)


def render(content: dict[str, Any]) -> str:
    """The page as HTML, from the content of report.json. Every value is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": _count, "size": size, "clock": duration, "share": _share, "short": _short}
    recipe = content["recipe"]
    template = environment.get_template(f"{PAGE_NAME}.j2")
    return template.render(
        r=content,
        name=content["model"].rstrip("/").rpartition("/")[2],
        curves=curves(content),
        heats=heats(content["layers"]),
        bars=bars(content["data"]["lengths"], recipe["max_length"]),
        recipe_text=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
        output_text=repr(recipe["output"]),
    )


# Curves


def curves(content: dict[str, Any]) -> list[Curve]:
    """Charts of loss, learning rate, speed and memory over the steps."""
    history = content["history"]
    evaluations = (content["eval"] or {}).get("history", [])
    loss = _series(history, "loss")
    loss_lines = [("raw", loss), ("main", smooth(loss))]
    rate = _series(history, "learning_rate")
    speed = _series(history, "tokens_per_second")
    memory = _series(history, "rss_bytes", 1e-9)
    return [
        curve("Loss", loss_lines, _series(evaluations, "loss")),
        curve("Learning rate", [("main", rate)], floor=0.0),
        curve("Tokens per second", [("main", speed)], floor=0.0),
        curve("Memory, GB", [("main", memory)], floor=0.0),
    ]


def _series(history: list[dict[str, Any]], name: str, scale: float = 1.0) -> list[Point]:
    """(step, value) of each entry that has the value."""
    return [(entry["step"], entry[name] * scale) for entry in history if entry.get(name) is not None]


def curve(title: str, lines: list[tuple[str, list[Point]]], marks: Points = (), floor: float | None = None) -> Curve:
    """A chart of several lines over the same steps, with marked points.

    Args:
        floor: start of the vertical axis; None: near the lowest value.
    """
    points = list(marks)
    for _, line in lines:
        points.extend(line)
    if not points:
        return Curve(title, (), (), ())
    x_axis = _axis([x for x, _ in points], margin=0)
    y_axis = _axis([y for _, y in points], MARGIN, floor)

    paths = []
    for css_class, line in lines:
        path = _path([(x_axis.share(x), 1 - y_axis.share(y)) for x, y in thinned(line)])
        paths.append((css_class, path))
    x_ticks = [(_percent(x_axis.share(x)), text) for x, text in _ticks(x_axis, 6, whole=True)]
    y_ticks = [(_percent(1 - y_axis.share(y)), text) for y, text in _ticks(y_axis, 7 if floor is None else 4)]
    labelled = []
    for x, y in marks:
        text = f"step {x:g}: evaluation loss {y:.4f}"
        labelled.append(Mark(_percent(x_axis.share(x)), _percent(1 - y_axis.share(y)), text))
    return Curve(title, tuple(paths), tuple(x_ticks), tuple(y_ticks), tuple(labelled))


def _axis(values: Sequence[float], margin: float, floor: float | None = None) -> Axis:
    """The axis for some values, with a margin; never empty, also for equal values."""
    low = min(values) if floor is None else floor
    high = max(values)
    if high <= low and low == 0:
        high = 1.0
    elif high <= low:
        low -= 0.5 * abs(low)
        high += 0.5 * abs(high)
    room = margin * (high - low)
    return Axis(low if floor is not None else low - room, high + room)


class Sum(NamedTuple):
    """A weighted sum of values, and the sum of the weights."""

    total: float
    weight: float


def smooth(line: Points) -> list[Point]:
    """Weighted means over the neighbours on both sides, so that the line does not lag behind the values."""
    forward = _decaying_sums([y for _, y in line])
    backward = _decaying_sums([y for _, y in reversed(line)])[::-1]
    means = []
    for (x, y), before, after in zip(line, forward, backward, strict=True):
        total = before.total + after.total - y  # each of the two holds the value itself
        weight = before.weight + after.weight - 1
        means.append((x, total / weight))
    return means


def _decaying_sums(values: Sequence[float]) -> list[Sum]:
    """For each value, the sum of it and all before it, with weights that fall with the distance."""
    sums = []
    total = 0.0
    weight = 0.0
    for value in values:
        total = SMOOTHING * total + value
        weight = SMOOTHING * weight + 1
        sums.append(Sum(total, weight))
    return sums


def thinned(line: Points) -> list[Point]:
    """At most MOST_POINTS points, each the mean of several neighbours."""
    group_size = math.ceil(len(line) / MOST_POINTS)
    if group_size <= 1:
        return list(line)
    means = []
    for start in range(0, len(line), group_size):
        group = line[start : start + group_size]
        x_sum = sum(x for x, _ in group)
        y_sum = sum(y for _, y in group)
        means.append((x_sum / len(group), y_sum / len(group)))
    return means


def _path(points: Points) -> str:
    """An SVG path through points of the unit square."""
    if len(points) == 1:  # a point has no length; draw a line across
        return f"M0 {1000 * points[0][1]:.1f}H1000"
    return "M" + "L".join(f"{1000 * x:.1f} {1000 * y:.1f}" for x, y in points)


def _percent(share: float) -> float:
    return round(100 * share, 2)


def _ticks(axis: Axis, count: int, whole: bool = False) -> list[Tick]:
    """Round numbers along an axis, with their texts."""
    from matplotlib.ticker import MaxNLocator

    fewest = 1 if whole else 2  # matplotlib gives up on whole numbers rather than show fewer ticks
    locator = MaxNLocator(count, steps=[1, 2, 2.5, 5, 10], integer=whole, min_n_ticks=fewest)
    values = [float(value) for value in locator.tick_values(axis.start, axis.end)]
    step = values[1] - values[0]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if f"{step:e}".startswith("2.5"):
        digits += 1
    largest = max(abs(value) for value in values)
    ticks = []
    for value in values:
        if axis.start <= value <= axis.end:
            ticks.append((value, _tick_text(value, digits, scientific=largest < 1e-3)))
    return ticks


def _tick_text(value: float, digits: int, scientific: bool) -> str:
    if value == 0:
        return "0"
    return f"{value:.1e}" if scientific else f"{value:,.{digits}f}"


# Layers


def heats(layers: list[dict[str, Any]]) -> list[Heat]:
    """Maps of the size of each layer's update and of its effective rank."""
    if not layers:
        return []
    if all(layer["relative_norm"] is not None for layer in layers):
        maps = [_heat("Size of the update of each weight: |ΔW| / |W|", layers, "relative_norm", _portion)]
    else:
        maps = [_heat("Norm of each adapter's parameters", layers, "norm", _short)]
    if all(layer["effective_rank"] is not None for layer in layers):
        ranks = {layer["rank"] for layer in layers}
        limit = f" (of {ranks.pop()})" if len(ranks) == 1 else ""
        title = f"Effective rank of the update{limit}"
        maps.append(_heat(title, layers, "effective_rank", _one_digit))
    return maps


def _heat(title: str, layers: list[dict[str, Any]], measure: str, spell: Callable[[float], str]) -> Heat:
    """The map of one measure, whose values `spell` turns into text."""
    most = max(layer[measure] for layer in layers)
    rows: dict[str, dict[int | None, Cell]] = {}
    depths: set[int] = set()
    for layer in layers:
        kind, depth = _place(layer["path"])
        if depth is not None:
            depths.add(depth)
        share = round(layer[measure] / most, 3) if most else 0.0
        text = f"{layer['path']}: {spell(layer[measure])}, {layer['parameters']:,} parameters"
        rows.setdefault(kind, {})[depth] = Cell(share, text)
    names = _shortest(list(rows))
    heat = Heat(title, spell(most))
    for kind, cells in rows.items():
        columns: list[int | None] = [None] if None in cells else [*sorted(depths)]
        heat.rows.append((names[kind], [cells.get(depth) for depth in columns]))
    return heat


def _place(path: str) -> tuple[str, int | None]:
    """(kind of module, depth): model.layers.3.mlp.up_proj becomes (mlp.up_proj, 3)."""
    match = re.match(r"(?:.*?\.)??(\d+)(?:\.(.+))?$", path)
    if match is None:
        return path, None
    return match[2] or "block", int(match[1])


def _shortest(kinds: list[str]) -> dict[str, str]:
    """The last part of each name, or the whole name if several names have the same last part."""
    ends = [kind.rpartition(".")[2] for kind in kinds]
    return {kind: end if ends.count(end) == 1 else kind for kind, end in zip(kinds, ends, strict=True)}


# Data


def bars(lengths: dict[str, int], limit: int) -> dict[str, Any]:
    """A histogram of row lengths in tokens: heights in percent of the tallest, and which bars exceed the limit."""
    counts = {int(length): count for length, count in lengths.items()}
    if not counts:
        return {"bars": [], "low": 0, "high": 0}
    low = min(counts)
    high = max(counts)
    width = max(1, math.ceil((high - low + 1) / MOST_BARS))
    totals = [0] * ((high - low) // width + 1)
    for length, count in counts.items():
        totals[(length - low) // width] += count
    tallest = max(totals)
    histogram = []
    for i, total in enumerate(totals):
        first = low + i * width
        last = first + width - 1
        text = f"{first} to {last} tokens: {total:,} rows"
        histogram.append({"height": round(100 * total / tallest, 1), "text": text, "over": first > limit})
    return {"bars": histogram, "low": low, "high": low + len(totals) * width - 1}


# Words


def _count(value: int) -> str:
    """12,345 up to a million, then 1.23 M."""
    if value >= 1e9:
        return f"{value / 1e9:.3g} B"
    if value >= 1e6:
        return f"{value / 1e6:.3g} M"
    return f"{value:,}"


def _share(value: float) -> str:
    return f"{value:.1%}"


def _portion(value: float) -> str:
    return f"{value:.2%}" if value < 1 else _short(value)


def _one_digit(value: float) -> str:
    return f"{value:.1f}"


def _short(value: float | None) -> str:
    """Three digits, or a whole number from 100 on; empty for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
