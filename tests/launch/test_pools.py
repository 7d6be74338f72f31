"""Pools under one driver, with runners that only pretend: who is told to stop, by whom, and what
the exit code is."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from launch.pools import run_together
from launch.progress import ProgressView
from launch.signals import Caught
from launch.signed import PROGRESS, sign
from launch.spec import LaunchSpec


@pytest.fixture
def pools(spec) -> dict[str, LaunchSpec]:
    return {name: spec("", environment={"POOL": name}) for name in ("high", "low")}


def wait_for_stop(stop: Caught) -> int:
    until = time.monotonic() + 10
    while stop.number is None and time.monotonic() < until:
        time.sleep(0.01)
    return 128 + stop.number if stop.number else 99


def test_both_run_at_the_same_time_and_end_well(pools, view) -> None:
    met = threading.Barrier(2, timeout=10)

    def run(spec: LaunchSpec, part: ProgressView, stop: Caught) -> int:
        met.wait()
        part.text("two\nlines")
        part.feed(sign(PROGRESS, view.token, {"stage": "short", "step": 3, "steps": 9}))
        return 0 if part.step == 3 else 1

    assert run_together(pools, view, run) == 0
    shown = view.out.getvalue().splitlines()
    assert {
        "high | two",
        "high | lines",
        "low | two",
        "low | lines",
        "low | short  step 3/9",
    } <= set(shown)
    assert view.step is None, "each pool counts its own steps"


def test_a_pool_that_fails_is_named_and_the_other_may_save(pools, view) -> None:
    told: list[int] = []

    def run(spec: LaunchSpec, part: ProgressView, stop: Caught) -> int:
        if spec.environment["POOL"] == "low":
            return 5
        told.append(wait_for_stop(stop))
        return told[0]

    assert run_together(pools, view, run) == 5
    assert told == [128 + signal.SIGTERM]
    assert "pool low failed with exit code 5; asking high to save and leave" in view.out.getvalue()
    assert "pool high failed" not in view.out.getvalue()


def test_a_driver_that_breaks_counts_as_a_failure_of_its_pool(pools, view) -> None:
    def run(spec: LaunchSpec, part: ProgressView, stop: Caught) -> int:
        return 1 // 0 if spec.environment["POOL"] == "high" else wait_for_stop(stop)

    assert run_together(pools, view, run) == 1
    assert "high | ZeroDivisionError" in view.out.getvalue()
    assert "pool high failed with exit code 1" in view.out.getvalue()


def test_a_signal_stops_all(pools, view) -> None:
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert (
        run_together(pools, view, lambda spec, part, stop: wait_for_stop(stop))
        == 128 + signal.SIGTERM
    )
    assert "failed" not in view.out.getvalue()
