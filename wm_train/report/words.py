"""Write times, sizes and figures as a reader wants them."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from wm_train.report.record import StageRecord

FIXED = "\N{NO-BREAK SPACE}"  # between a figure and its unit
SILENT_S = 120.0  # without a step, after which a stage that has not ended may have been killed


def when(seconds: float) -> str:
    """Return a Unix time as a date in UTC, "–" for none."""
    if not seconds or not math.isfinite(seconds):
        return "–"
    moment = datetime.fromtimestamp(seconds, UTC)
    return f"{moment.day} {moment:%b %Y, %H:%M:%S} UTC"


def lasting(seconds: float) -> str:
    """Return a length of time: 42 s, 5 min 10 s, 3 h 20 min, 2 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{FIXED}s"
    for size, larger, smaller in ((86400, "d", "h"), (3600, "h", "min"), (60, "min", "s")):
        if whole >= size:
            rest = whole % size // {"d": 3600, "h": 60, "min": 1}[larger]
            first = f"{whole // size}{FIXED}{larger}"
            return f"{first} {rest}{FIXED}{smaller}" if rest else first
    raise AssertionError(whole)


def size_of(count: float) -> str:
    """Return bytes in decimal units."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def figure(value: float | None, digits: int = 4) -> str:
    """Return a number with as many digits as a reader needs, "–" for none."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def with_error(mean: float | None, error: float | None) -> str:
    """Return a mean with its standard error, both with as many decimals: 11.6 ± 0.3."""
    if mean is None or error is None:
        return figure(mean, 3)
    size = math.floor(math.log10(abs(mean))) if mean else 0
    decimals = min(max(2 - size, 0), 4)
    return f"{mean:.{decimals}f} ± {error:.{decimals}f}"


def status_of(stage: StageRecord, now: float) -> dict[str, str]:
    """Return the status of a stage as `label` and `tone`."""
    known = {
        "FINISHED": ("finished", "good"),
        "FAILED": ("failed", "bad"),
        "KILLED": ("stopped", "wait"),
        "": ("not started", "plain"),
    }
    label, tone = known.get(stage.status, ("running", "plain"))
    if stage.status not in known and now - stage.last_seen > SILENT_S:
        label, tone = "no sign of life", "wait"
    return {"label": label, "tone": tone}
