"""The simulator calibrated by a run's own records: what was put into them is found again, and the
run's share lies in the band of drawn lives."""

from __future__ import annotations

import numpy as np
import pytest

from wm_train.plan.scaling.goodput import DAY_S
from wm_train.plan.scaling.records import METRICS, recorded, share_lines
from wm_train.tracking.goodput import STARTS, Life, write_life
from wm_train.tracking.rows import to_line

STEP, SAVE, EVERY, DETECT, RESTART, BEGUN = 1.0, 0.5, 20, 6.0, 25.0, 1000.0


def live(folder, steps, mean, seed=0):
    """Leave the records of a run as the tracker would: steps of a second, half a second of saving
    after every twentieth, failures at exponential times, also while it starts. Return how many of
    its failures a start followed."""
    generator = np.random.default_rng(seed)
    rows, starts, redone, now = [], [], 0, BEGUN
    fails = now + generator.exponential(mean)
    while True:
        kept = len(rows) // EVERY * EVERY
        starts.append({"step": kept, "time": now, "workers": 1, "redone": len(rows) - kept})
        redone, rows, now = redone + len(rows) - kept, rows[:kept], now + RESTART
        while len(rows) < steps:
            end = now + STEP + SAVE * (len(rows) > kept and len(rows) % EVERY == 0)
            if end > fails:
                break
            rows, now = [*rows, {"step": len(rows) + 1, "time": end, "step_s": STEP}], end
        if len(rows) == steps:
            break
        failed, fails = fails, fails + generator.exponential(mean)
        while fails < failed + DETECT:
            failed, fails = fails, fails + generator.exponential(mean)
        now = failed + DETECT
    folder.mkdir()
    write_life(folder, Life(BEGUN, len(starts), redone, 0.0, "FINISHED", now, len(rows) * STEP))
    (folder / METRICS).write_text("".join(map(to_line, rows)))
    (folder / STARTS).write_text("".join(map(to_line, starts)))
    return len(starts) - 1


def test_records_tell_failures_recovery_and_saves(tmp_path):
    again = live(tmp_path / "run", 3000, mean=200.0, seed=1)
    found = recorded(tmp_path / "run", EVERY)
    assert again > 8
    assert found.failures.per_node_day * found.days == pytest.approx(again)
    assert found.failures.per_node_day == pytest.approx(DAY_S / 200, rel=0.5)
    assert found.failures.restart_s == RESTART
    assert found.failures.detect_s == pytest.approx(DETECT, abs=2 * STEP)
    assert found.saving.interval_s == pytest.approx(EVERY * STEP)
    assert found.saving.blocking_s == pytest.approx(SAVE, rel=0.1)
    assert found.share == pytest.approx(3000 / (found.days * DAY_S))


@pytest.mark.parametrize("mean", [120.0, 400.0, 3000.0])
def test_a_runs_share_lies_in_the_band_of_drawn_lives(tmp_path, mean):
    """Of six runs at most two are outside of the 5th to 95th percentile (0.6 are expected)."""
    outside = 0
    for seed in range(6):
        live(tmp_path / str(seed), 2000, mean, seed)
        found = recorded(tmp_path / str(seed), EVERY)
        drawn = found.drawn()
        outside += not drawn.low <= found.share <= drawn.high
        assert found.share == pytest.approx(drawn.mean, abs=0.12)
    assert outside <= 2


def test_a_run_that_never_failed_loses_its_saves_alone(tmp_path):
    live(tmp_path / "run", 400, mean=1e9)
    found = recorded(tmp_path / "run", EVERY)
    assert found.starts == 1
    assert found.drawn().mean == pytest.approx(found.share, abs=1e-3)
    assert "in 1 starts" in share_lines(found)[0]


def test_a_run_that_has_not_ended_says_nothing(tmp_path):
    assert recorded(tmp_path, EVERY) is None
    assert share_lines(None) == []
    live(tmp_path / "run", 400, mean=1e9)
    write_life(tmp_path / "run", Life(BEGUN))
    assert recorded(tmp_path / "run", EVERY) is None
