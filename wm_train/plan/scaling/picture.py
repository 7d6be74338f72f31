"""Draw a recipe from few to many devices: step time, MFU, useful share, days and cost.

Both axes of time and cost are logarithmic, and so are all numbers of devices.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

import numpy as np

from wm_train.plan.scaling.points import Point

INK, FAINT, GRID = (30, 30, 30), (150, 150, 150), (225, 225, 225)
COLOURS = (
    *((40, 110, 200), (220, 90, 30), (40, 150, 80), (150, 60, 160), (120, 110, 30)),
    *((20, 160, 170), (200, 40, 90), (110, 110, 110)),
)
BAND = (205, 220, 240)
PANEL_W, PANEL_H, LEFT, TOP = 520, 300, 64, 34
HEAD, ROW = 34, 16  # above the panels: the title and rows of stages' names
MARKS = 7  # of an axis, before they are powers of ten alone
Line = tuple[str, Sequence[float], tuple[int, int, int]]


def draw(points: Sequence[Point], title: str, notes: Sequence[str], path: Path) -> None:
    """Write a picture (PNG) of these points, with the notes below. Raises OSError."""
    from PIL import Image, ImageDraw

    stages = [one.stage for one in points[0].stages]
    colours = [COLOURS[n % len(COLOURS)] for n in range(len(stages))]
    wrapped = [line for note in notes for line in _wrapped(note, 150)]
    rows = _wrapped("  ".join(stages), 150)
    head = HEAD + ROW * len(rows)
    size = (2 * PANEL_W, head + 3 * PANEL_H + 14 * len(wrapped) + 20)
    sheet = Image.new("RGB", size, (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    pen.text((12, 10), title, fill=INK)
    names = dict(zip(stages, colours, strict=True))
    for number, listed in enumerate(rows):
        x = 12.0
        for name in listed.split():
            pen.text((x, HEAD - 4 + ROW * number), name, fill=names[name])
            x += pen.textlength(name) + 20
    devices = [one.devices for one in points]

    def of_stages(value: Callable[[Any], float]) -> list[Line]:
        return [
            (name, [value(one.stages[n]) for one in points], colour)
            for n, (name, colour) in enumerate(zip(stages, colours, strict=True))
        ]

    first = COLOURS[0]
    share: list[Line] = [("expected", [one.share for one in points], first)]
    band = ([one.low for one in points], [one.high for one in points])
    lines: list[tuple[str, list[Line], bool, Any]] = [
        ("seconds a step", of_stages(lambda one: one.ranked.time.seconds), True, None),
        ("MFU", with_values(of_stages(lambda one: one.ranked.time.mfu)), False, None),
        ("share of time in useful steps", share, False, band),
        ("days, failures included", [("days", [p.days for p in points], first)], True, None),
        ("cost", [("cost", [p.cost for p in points], first)], True, None),
        ("devices and date of the end", [], True, None),
    ]
    for place, (name, own, logarithmic, between) in enumerate(lines):
        x, y = place % 2 * PANEL_W, head + place // 2 * PANEL_H
        if place < len(lines) - 1:
            _panel(pen, (x, y), name, devices, own, logarithmic, between)
        else:
            _dates(pen, (x, y), points)
    for row, line in enumerate(wrapped):
        pen.text((12, head + 8 + 3 * PANEL_H + 14 * row), line, fill=INK)
    sheet.save(path, format="PNG")


def with_values(lines: Sequence[Line]) -> list[Line]:
    """Return the lines that have a value everywhere: turns of several networks have no MFU."""
    return [line for line in lines if not np.isnan(line[1]).any()]


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width, subsequent_indent="    ")


def _panel(
    pen: Any,
    corner: tuple[int, int],
    name: str,
    devices: Sequence[int],
    lines: Sequence[Line],
    logarithmic: bool,
    band: tuple[Sequence[float], Sequence[float]] | None,
) -> None:
    """Draw lines over numbers of devices, with a grid and the value of each end."""
    left, top = corner[0] + LEFT, corner[1] + TOP
    right, bottom = corner[0] + PANEL_W - 20, corner[1] + PANEL_H - 30
    values = np.array([value for _, line, _ in lines for value in line] or [0.0])
    if logarithmic:
        ticks = round_numbers(float(values.min()), float(values.max()))
        low, high = ticks[0], ticks[-1]
    else:
        low, high = 0.0, max(0.1, np.ceil(values.max() * 10) / 10)
        ticks = list(np.linspace(0, high, 6))

    def across(count: float) -> float:
        first, last = np.log(devices[0]), np.log(max(devices[-1], devices[0] + 1))
        return float(left + (np.log(count) - first) / (last - first) * (right - left))

    def up(value: float) -> float:
        place = np.log(value / low) / np.log(high / low) if logarithmic else value / high
        return float(bottom - place * (bottom - top))

    pen.text((left, corner[1] + 6), name, fill=INK)
    for tick in ticks:
        pen.line((left, up(tick), right, up(tick)), fill=GRID)
        pen.text((corner[0] + 8, up(tick) - 6), f"{tick:,.4g}", fill=INK)
    for count in devices:
        pen.line((across(count), top, across(count), bottom), fill=GRID)
    for count in (devices[0], devices[len(devices) // 2], devices[-1]):
        pen.text((across(count) - 12, bottom + 6), f"{count:,}", fill=INK)
    if band:
        edge = [(across(n), up(v)) for n, v in zip(devices, band[0], strict=True)]
        edge += [(across(n), up(v)) for n, v in zip(devices, band[1], strict=True)][::-1]
        pen.polygon(edge, fill=BAND)
    for _, line, colour in lines:
        places = [(across(n), up(v)) for n, v in zip(devices, line, strict=True)]
        pen.line(places, fill=colour, width=2)
        for x, y in places:
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)


def round_numbers(least: float, most: float) -> list[float]:
    """Return the marks of a logarithmic axis that holds both numbers: powers of ten, with twice and
    five times each where these are few."""
    powers = range(floor(log10(least)), ceil(log10(most)) + 2)
    every = [step * 10.0**power for power in powers for step in (1, 2, 5)]
    first = max(number for number in every if number <= least * (1 + 1e-9))
    last = min(number for number in every if number >= max(most, 1.5 * first) * (1 - 1e-9))
    fine = [number for number in every if first <= number <= last]
    if len(fine) <= MARKS:
        return fine
    return [10.0**power for power in range(floor(log10(least)), ceil(log10(most)) + 1)]


def _dates(pen: Any, corner: tuple[int, int], points: Sequence[Point]) -> None:
    """Write the date of the end for each number of devices, started today."""
    today = datetime.date.today()
    pen.text((corner[0] + LEFT, corner[1] + 6), f"end, if started on {today}", fill=INK)
    for row, one in enumerate(points):
        end = end_of(today, one.days)
        text = f"{one.devices:>7,} devices   {end}   {one.days:,.3g} days   cost {one.cost:,.0f}"
        pen.text((corner[0] + LEFT, corner[1] + TOP + 16 * row), text, fill=INK)


def end_of(start: datetime.date, days: float) -> str:
    """Return the date so many days later, in words where no calendar has it."""
    try:
        return str(start + datetime.timedelta(days=float(np.ceil(days))))
    except OverflowError:
        return "beyond the calendar"
