"""Compute the geometry of a chart: points in percent of the plot, ticks with their labels.

The page draws them as SVG stretched to the plot's size with lines that keep their width, and the
labels as text beside it, so they stay readable on a narrow screen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

MOST_POINTS = 400  # of a line: as many as a screen shows
SMOOTH = 0.05  # of the points, that the running mean is over
LOG_FROM = 50.0  # largest over smallest figure from which the axis is logarithmic
OUTSIDE = 0.01  # of the figures, at each end, that may lie outside the plot

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """Hold one line of a chart. kind: "faint", "bold", "dashed" or "dots", how it is drawn; colour:
    its place in the page's palette, from 0; points: (x, y) as measured."""

    label: str
    points: Points
    kind: str = "bold"
    colour: int = 0
    path: Markup | str = ""  # of SVG, in a box of 100 x 100

    @property
    def numbers(self) -> Markup:
        """Return the points as JSON of nothing but numbers."""
        return Markup(json.dumps([[float(f"{x:.6g}"), float(f"{y:.6g}")] for x, y in self.points]))


@dataclass(frozen=True)
class Tick:
    """Locate a label, `at` percent from the left or the top."""

    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    """Hold a chart, ready to be drawn. ends: x at the left and the right; marks: percent from the
    left, each a line upright."""

    title: str
    lines: list[Line]
    ends: tuple[float, float]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    x_label: str = "step"
    unit: str = ""
    log: bool = False
    marks: list[float] = field(default_factory=list)
    note: str = ""


def make_chart(
    title: str,
    lines: Sequence[Line],
    x_label: str = "step",
    unit: str = "",
    marks: Sequence[float] = (),
    log: bool | None = None,
) -> Chart | None:
    """Return a chart of lines over the same axis; None without a finite figure.

    marks: x of events. log: None for an axis that is logarithmic when figures need it.
    """
    finite = [
        Line(line.label, finite_points(line.points), line.kind, line.colour) for line in lines
    ]
    drawn = [line for line in finite if line.points]
    if not drawn:
        return None
    lost = sum(len(line.points) for line in lines) - sum(len(line.points) for line in finite)
    xs = [x for line in drawn for x, _ in line.points]
    left, right = min(xs), max(xs)
    if right == left:
        left, right = left - 0.5, right + 0.5
    low, high = y_range([[y for _, y in line.points] for line in drawn])
    if log is None:
        log = low > 0 and high / low >= LOG_FROM
    scale = math.log10 if log else float
    bottom, top = padded(scale(low), scale(high))
    if not log and low >= 0:
        bottom = max(bottom, 0.0)

    def place(x: float, y: float) -> tuple[float, float]:
        height = scale(y) if not log or y > 0 else bottom
        return 100 * (x - left) / (right - left), 100 * (top - height) / (top - bottom)

    placed = [
        Line(
            line.label,
            [(x, y) for x, y in line.points],
            line.kind,
            line.colour,
            svg_path([place(x, y) for x, y in line.points], dots=line.kind == "dots"),
        )
        for line in drawn
    ]
    y_values = log_ticks(bottom, top) if log else nice_ticks(bottom, top)
    # a mark at the very start says nothing
    inside = [100 * (x - left) / (right - left) for x in marks if left < x <= right]
    return Chart(
        title,
        placed,
        (left, right),
        [Tick(place(x, low)[0], short(x)) for x in nice_ticks(left, right, whole=True)],
        [Tick(place(left, y)[1], short(y)) for y in y_values],
        x_label,
        unit,
        log,
        inside,
        f"{lost} figures are not finite" if lost else "",
    )


def finite_points(points: Points) -> Points:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def y_range(series: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the range of the figures without the outermost of long series, which would flatten the
    rest."""
    lows, highs = [], []
    for values in series:
        ordered = sorted(values)
        cut = math.floor(OUTSIDE * len(ordered))
        lows.append(ordered[cut])
        highs.append(ordered[-1 - cut])
    return min(lows), max(highs)


def padded(low: float, high: float) -> tuple[float, float]:
    """Return a range with room above and below it."""
    room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return low - room, high + room


def thin(points: Points, most: int = MOST_POINTS) -> Points:
    """Return at most `most` points, each the mean of as many neighbours."""
    if len(points) <= most:
        return points
    size = -(-len(points) // most)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(mean([x for x, _ in group]), mean([y for _, y in group])) for group in groups]


def running_mean(points: Points, share: float = SMOOTH) -> Points:
    """Return the mean of the last `share` of the points at each of them."""
    window = max(1, round(share * len(points)))
    total, result = 0.0, []
    for place, (x, y) in enumerate(points):
        total += y - (points[place - window][1] if place >= window else 0.0)
        result.append((x, total / min(place + 1, window)))
    return result


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def svg_path(points: Points, dots: bool = False) -> Markup:
    """Return an SVG path. dots: lines of no length, which round caps make into dots."""
    near = [(f"{x:.2f}", f"{min(max(y, 0.0), 100.0):.2f}") for x, y in points]
    if dots:
        return Markup("".join(f"M{x} {y}h0" for x, y in near))
    return Markup("M" + "L".join(f"{x} {y}" for x, y in near))


def nice_ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """Return at most `count` or so multiples of 1, 2, 2.5 or 5 times a power of ten, inside the
    range."""
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    steps = (size * factor for factor in (1, 2, 2.5, 5, 10))
    step = next(step for step in steps if step >= raw * 0.999 and not (whole and step % 1))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [place * step for place in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten inside a range of exponents; with 2 and 5 times them in a short one."""
    factors = (1, 2, 5) if high - low < 2.5 else (1,)
    powers = range(math.floor(low), math.ceil(high) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    found = [tick for tick in ticks if low <= math.log10(tick) <= high]
    every = -(-len(found) // 6)
    return found[::every]


def short(value: float) -> str:
    """Return a figure in few letters: 0.004, 1.5, 20k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            value, unit = value / (1e3 if letter == "k" else size), letter
            return f"{value:.3g}{unit}"
    if value and abs(value) < 1e-3:
        digits, _, power = f"{value:.2g}".partition("e")
        return f"{digits}e{int(power)}" if power else digits
    return f"{value:.4g}"
