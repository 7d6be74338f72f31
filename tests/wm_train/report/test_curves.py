"""The geometry of charts, against values worked out by hand and by NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from wm_train.report.curves import (
    MOST_POINTS,
    Line,
    log_ticks,
    make_chart,
    nice_ticks,
    running_mean,
    short,
    thin,
)
from wm_train.report.words import figure, lasting, size_of, when, with_error


def test_points_lie_in_percent_of_the_plot():
    chart = make_chart("loss", [Line("", [(0.0, 1.0), (50.0, 2.0), (200.0, 3.0)])], marks=[0, 100])
    assert chart
    # 8 % of the range of 2 is free above and below: 0.84 to 3.16
    assert chart.lines[0].path == "M0.00 93.10L25.00 50.00L100.00 6.90"
    assert chart.marks == [50.0]
    assert [(tick.at, tick.label) for tick in chart.x_ticks][1] == (25.0, "50")
    assert chart.ends == (0.0, 200.0)


def test_a_wide_range_gets_a_logarithmic_axis_and_one_outlier_does_not():
    wide = make_chart("norm", [Line("", [(float(x), 10.0**x) for x in range(5)])])
    assert wide
    assert wide.log
    heights = [float(part.split()[1]) for part in wide.lines[0].path[1:].split("L")]
    assert np.diff(heights) == pytest.approx([np.diff(heights)[0]] * 4, abs=0.02)
    spiked = [(float(x), 1e6 if x == 100 else 1 + x / 200) for x in range(200)]
    flat = make_chart("norm", [Line("", spiked)])
    assert flat
    assert not flat.log
    assert float(flat.lines[0].path[1:].split("L")[0].split()[1]) > 90


def test_figures_that_are_not_finite_are_left_out_and_counted():
    chart = make_chart("loss", [Line("", [(1.0, 1.0), (2.0, math.nan), (3.0, math.inf), (4.0, 2)])])
    assert chart
    assert chart.lines[0].path.count("L") == 1
    assert chart.note == "2 figures are not finite"
    assert make_chart("loss", [Line("", [(1.0, math.nan)])]) is None


def test_means_are_those_of_numpy():
    values = np.random.default_rng(0).normal(size=1000)
    points = list(enumerate(values.tolist()))
    mean = [y for _, y in running_mean(points)]
    assert mean[99:] == pytest.approx(np.convolve(values, np.ones(50) / 50, "valid")[50:])
    assert mean[:3] == pytest.approx([values[:n].mean() for n in (1, 2, 3)])
    thinned = thin(points)
    assert len(thinned) <= MOST_POINTS
    assert thinned[0] == pytest.approx((1.0, values[:3].mean()))
    assert thinned[-1] == pytest.approx((999.0, values[999]))


def test_ticks_are_round_and_inside():
    assert nice_ticks(1, 120, whole=True) == [25, 50, 75, 100]
    assert nice_ticks(1, 16, whole=True) == [5, 10, 15]
    assert nice_ticks(0.84, 3.16) == pytest.approx([1, 1.5, 2, 2.5, 3])
    assert log_ticks(-1.0, 1.0) == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5, 10][::2])
    assert log_ticks(-3.0, 3.0) == pytest.approx([1e-3, 0.1, 10, 1e3])


def test_words():
    assert [short(x) for x in (0.004, 1.5, 20_000, 3e6, 1e-4)] == [
        "0.004",
        "1.5",
        "20k",
        "3M",
        "0.0001",
    ]
    seconds = (42, 59.6, 3600, 12_000, 187_200)
    texts = ["42 s", "1 min", "1 h", "3 h 20 min", "2 d 4 h"]
    assert [lasting(s).replace("\N{NO-BREAK SPACE}", " ") for s in seconds] == texts
    assert size_of(26_541_836) == "26.5 MB"
    assert [figure(x) for x in (None, 27.125, 123456.0, math.inf)] == ["–", "27.12", "123,456", "∞"]
    assert when(1795908544.0) == "28 Nov 2026, 23:29:04 UTC"
    assert when(0.0) == "–"
    pairs = [(11.62, 0.31), (-0.0316, 0.00004), (1234.0, 5.6), (2.0, None), (None, 1.0)]
    said = ["11.6 ± 0.3", "-0.0316 ± 0.0000", "1234 ± 6", "2", "–"]
    assert [with_error(*pair) for pair in pairs] == said
