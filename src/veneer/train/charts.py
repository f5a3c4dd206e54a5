"""Line charts over the steps of a run, as SVG paths and positions: axes, ticks, and the smoothed line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MOST_POINTS = 400
"""Maximum number of points of a curve; longer curves are averaged down."""
MARGIN = 0.06
"""Room above and below the values of a curve, as a share of their range."""
REACH = 0.01
"""Width of the Gaussian window of the smoothed line, as a share of the steps."""
NARROWEST = 2.0
"""Minimum width of that window, in distances between neighbouring points."""
FLAT = 0.15
"""A run is mostly flat if the median of its values is in this share of their range, at its lower end..."""
STEEP = 5
"""... and the largest value is at least this many times the smallest."""
LOG_FACTORS = ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,))
"""The ticks of a logarithmic axis, from the densest choice to the sparsest."""
MOST_LOG_TICKS = 7
APART = 0.05
"""Minimum distance of other ticks from the first and the last step, as a share of the axis..."""
LETTER = 0.03
"""... and what it is more for each letter of the last step, on the narrowest charts."""

Point = tuple[float, float]
Points = Sequence[Point]
Tick = tuple[float, str]
"""A position in percent, and a text."""


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
    y_name: str
    lines: tuple[tuple[str, str], ...] = ()
    """(class, path)."""
    x_ticks: tuple[Tick, ...] = ()
    y_ticks: tuple[Tick, ...] = ()
    marks: tuple[Mark, ...] = ()
    is_log: bool = False
    """Whether the vertical axis is logarithmic."""
    group_size: int = 1
    """Number of steps that each point of the thin line is the mean of."""


@dataclass(frozen=True)
class Axis:
    """The range of values along one axis."""

    start: float
    end: float
    is_log: bool = False

    def share(self, value: float) -> float:
        """The position of a value between start (0) and end (1)."""
        if self.is_log:
            return math.log(value / self.start) / math.log(self.end / self.start)
        return (value - self.start) / (self.end - self.start)


def curve(
    title: str,
    y_name: str,
    line: Points,
    marks: Points = (),
    *,
    floor: float | None = None,
    is_noisy: bool = False,
    may_be_log: bool = False,
) -> Curve:
    """A chart of a line over the steps, with marked points.

    Args:
        floor: start of the vertical axis; None: near the lowest value.
        is_noisy: also draw a smoothed line.
        may_be_log: use a logarithmic vertical axis if the run is mostly flat (`is_mostly_flat`).
    """
    points = [*line, *marks]
    if not points:
        return Curve(title, y_name)
    steps, values = _columns(points)
    is_log = may_be_log and bool(line) and is_mostly_flat(_columns(line)[1])
    x_axis = axis(steps, margin=0)
    y_axis = log_axis(values, MARGIN) if is_log else axis(values, MARGIN, floor)

    thin = thinned(line)
    lines = [("raw", thin), ("main", smooth(thin, is_log))] if is_noisy else [("main", thin)]
    paths = []
    for css_class, shown in lines:
        if shown:
            paths.append((css_class, _path([(x_axis.share(x), 1 - y_axis.share(y)) for x, y in shown])))
    labelled = []
    for x, y in marks:
        text = f"step {x:,.0f}: evaluation {title.lower()} {y:.4f}"
        labelled.append(Mark(_percent(x_axis.share(x)), _percent(1 - y_axis.share(y)), text))
    y_values = log_ticks(y_axis) if is_log else round_ticks(y_axis, 7 if floor is None else 4)
    return Curve(
        title,
        y_name,
        tuple(paths),
        x_ticks=_placed(step_ticks(x_axis), x_axis),
        y_ticks=_placed(y_values, y_axis, is_downwards=True),
        marks=tuple(labelled),
        is_log=is_log,
        group_size=_group_size(line),
    )


def _columns(points: Points) -> tuple[list[float], list[float]]:
    """The steps and the values of points."""
    import numpy as np

    steps, values = np.array(points, dtype=np.float64).T.tolist()
    return steps, values


def _placed(ticks: list[Tick], along: Axis, is_downwards: bool = False) -> tuple[Tick, ...]:
    """Ticks at values, as ticks at positions in percent."""
    placed = []
    for value, text in ticks:
        share = along.share(value)
        placed.append((_percent(1 - share if is_downwards else share), text))
    return tuple(placed)


def is_mostly_flat(values: Sequence[float]) -> bool:
    """Whether a linear axis would press most values together at its lower end."""
    if not values or min(values) <= 0:
        return False
    low = min(values)
    high = max(values)
    if high < STEEP * low:
        return False
    limit = low + FLAT * (high - low)
    return sorted(values)[len(values) // 2] <= limit


# Axes and ticks


def axis(values: Sequence[float], margin: float, floor: float | None = None) -> Axis:
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


def log_axis(values: Sequence[float], margin: float) -> Axis:
    """The logarithmic axis for some positive values, with a margin."""
    low = min(values)
    high = max(values)
    room = (high / low) ** margin
    return Axis(low / room, high * room, is_log=True)


def step_ticks(steps: Axis) -> list[Tick]:
    """The first step, the last one, and round whole numbers between them."""
    from matplotlib.ticker import MaxNLocator

    first = math.ceil(steps.start)
    last = math.floor(steps.end)
    letters = len(f"{last:,}")
    apart = APART + LETTER * letters
    # matplotlib gives up on whole numbers rather than show fewer ticks
    locator = MaxNLocator(6 if letters < 5 else 5, steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1)
    chosen = [first]
    for value in locator.tick_values(steps.start, steps.end):
        share = steps.share(float(value))
        if float(value).is_integer() and first < value < last and apart / 2 <= share <= 1 - apart:
            chosen.append(int(value))
    if last > first:
        chosen.append(last)
    return [(value, f"{value:,}") for value in chosen]


def round_ticks(values: Axis, count: int) -> list[Tick]:
    """Round numbers along a linear axis, with their texts."""
    from matplotlib.ticker import MaxNLocator

    locator = MaxNLocator(count, steps=[1, 2, 2.5, 5, 10], min_n_ticks=2)
    places = list(map(float, locator.tick_values(values.start, values.end)))
    step = places[1] - places[0]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if f"{step:e}".startswith("2.5") and step < 25:
        digits += 1
    is_small = max(map(abs, places)) < 1e-3
    ticks = []
    for place in places:
        if values.start <= place <= values.end:
            ticks.append((place, _tick_text(place, digits, is_small)))
    return ticks


def log_ticks(values: Axis) -> list[Tick]:
    """As many round numbers as there is room for along a logarithmic axis: powers of ten, and some times 2, 3 or 5."""
    ticks: list[Tick] = []
    for factors in LOG_FACTORS:
        ticks = [(place, _plain(place)) for place in _log_places(values, factors)]
        if len(ticks) <= MOST_LOG_TICKS:
            break
    return ticks[:: math.ceil(len(ticks) / MOST_LOG_TICKS)] if ticks else []


def _log_places(values: Axis, factors: Sequence[int]) -> list[float]:
    """The factors times powers of ten along an axis."""
    first = math.floor(math.log10(values.start))
    last = math.ceil(math.log10(values.end))
    places = []
    for power in range(first, last + 1):
        for factor in factors:
            place = float(f"{factor}e{power}")
            if values.start <= place <= values.end:
                places.append(place)
    return places


def _tick_text(value: float, digits: int, scientific: bool) -> str:
    if value == 0:
        return "0"
    return _plain(value) if scientific else f"{value:,.{digits}f}"


def _plain(value: float) -> str:
    """A round number without superfluous zeros; below a thousandth as 2.5e-5."""
    if abs(value) >= 1e-3:
        return f"{value:,.12g}"
    mantissa, power = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"


# Lines


def smooth(line: Points, is_log: bool = False) -> list[Point]:
    """A straight line fitted around each point, with weights that fall with the distance (local linear regression).

    The neighbours on both sides count, and the fit follows a slope also at the two ends, so the result does not lag
    behind the values. On a logarithmic axis, the logarithms are smoothed.
    """
    import numpy as np

    if len(line) < 3:
        return list(line)
    x, y = np.array(line, dtype=np.float64).T
    if is_log:
        y = np.log(y)
    span = x[-1] - x[0]
    width = max(REACH * span, NARROWEST * span / (len(line) - 1))
    distances = x[None, :] - x[:, None]  # (points, points)
    weights = np.exp(-0.5 * (distances / width) ** 2)
    weights /= weights.sum(axis=1, keepdims=True)
    mean_x = (weights * distances).sum(axis=1)
    mean_y = weights @ y
    centred = distances - mean_x[:, None]
    slope = (weights * centred * y).sum(axis=1) / (weights * centred**2).sum(axis=1)
    fitted = np.clip(mean_y - slope * mean_x, y.min(), y.max())
    if is_log:
        fitted = np.exp(fitted)
    return list(zip(x.tolist(), fitted.tolist(), strict=True))


def thinned(line: Points) -> list[Point]:
    """At most MOST_POINTS points, each the mean of several neighbours."""
    import numpy as np

    group_size = _group_size(line)
    if group_size == 1:
        return list(line)
    means = []
    for start in range(0, len(line), group_size):
        group = np.array(line[start : start + group_size], dtype=np.float64)
        x, y = group.mean(axis=0).tolist()
        means.append((x, y))
    return means


def _group_size(line: Points) -> int:
    return max(1, math.ceil(len(line) / MOST_POINTS))


def _path(points: Points) -> str:
    """An SVG path through points of the unit square."""
    if len(points) == 1:  # a point has no length; draw a line across
        return f"M0 {1000 * points[0][1]:.1f}H1000"
    return "M" + "L".join(f"{1000 * x:.1f} {1000 * y:.1f}" for x, y in points)


def _percent(share: float) -> float:
    return round(100 * share, 2)
