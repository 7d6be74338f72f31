"""Check when a run is tried again: the rules alone, with simulated attempts."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace

import pytest

from launch.progress import ProgressView
from launch.restart import Death, Growth, run_attempts
from launch.signals import Caught
from launch.signed import PROGRESS, sign
from launch.spec import LaunchSpec

Run = Callable[..., tuple[int, list[int], list[float]]]
Outcome = tuple[Death | Growth | None, int | None]


@pytest.fixture
def run(spec, view) -> Run:
    """run(outcomes, ...): attempts end as (death or None, last step) in turn; returns exit code,
    attempts made, seconds slept."""

    def go(*outcomes: Outcome, **changes: object) -> tuple[int, list[int], list[float]]:
        made: list[int] = []
        slept: list[float] = []

        def attempt(
            spec: LaunchSpec, number: int, view: ProgressView, stop: Caught
        ) -> Death | Growth | None:
            made.append(number)
            death, step = outcomes[number]
            if step is not None:
                view.feed(sign(PROGRESS, view.token, {"step": step, "steps": 100}))
            return death

        code = run_attempts(replace(spec(""), **changes), view, attempt, slept.append)
        return code, made, slept

    return go


def crash(code: int | None = 5) -> Death:
    return Death(1, code, "its last words")


def test_success_after_two_crashes_with_growing_pauses(run: Run, view) -> None:
    code, made, slept = run(
        (crash(), 10), (crash(-9), 20), (None, 100), max_restarts=5, backoff_s=1.0
    )
    assert (code, made) == (0, [0, 1, 2])
    assert sum(slept) == pytest.approx(1 + 2)
    shown = view.out.getvalue()
    assert "rank 1 died: exit code 5 at step 10" in shown
    assert "rank 1 died: killed by SIGKILL at step 20" in shown
    assert "its last words" in shown


def test_pauses_have_a_limit(run: Run) -> None:
    outcomes = [(crash(), step) for step in range(9)]
    _, made, slept = run(*outcomes, max_restarts=8, backoff_s=1.0, backoff_limit_s=5.0)
    assert len(made) == 9
    assert sum(slept) == pytest.approx(1 + 2 + 4 + 5 * 5)


@pytest.mark.parametrize(("code", "exit_code"), [(5, 5), (-9, 137), (None, 1), (75, 75)])
def test_the_budget_ends_with_the_code_of_the_last_death(
    run: Run, view, code: int | None, exit_code: int
) -> None:
    assert run((crash(code), 1), (crash(code), 2), max_restarts=1)[:2] == (exit_code, [0, 1])
    assert "given up after 1 restarts" in view.out.getvalue()


def test_a_users_mistake_is_final(run: Run) -> None:
    assert run((crash(2), None), max_restarts=9)[:2] == (2, [0])


def test_two_deaths_at_one_step_are_final_and_two_before_any_step_are_not(run: Run, view) -> None:
    assert run((crash(), 7), (crash(), 7), max_restarts=9)[:2] == (5, [0, 1])
    assert "two deaths at step 7" in view.out.getvalue()


def test_storage_that_does_not_answer_is_no_fault_of_the_step(run: Run) -> None:
    assert run((crash(74), 7), (crash(74), 7), (None, 9), max_restarts=9)[:2] == (0, [0, 1, 2])
    assert run((crash(74), 7), (crash(74), 7), max_restarts=1)[:2] == (74, [0, 1])


def test_deaths_before_the_first_step_do_not_count_as_one_step(run: Run) -> None:
    assert run((crash(), None), (crash(), None), (None, 3), max_restarts=9)[:2] == (0, [0, 1, 2])


def test_a_signal_between_attempts_ends_the_run(spec, view) -> None:
    made: list[int] = []

    def attempt(
        spec: LaunchSpec, number: int, view: ProgressView, stop: Caught
    ) -> Death | Growth | None:
        made.append(number)
        return crash()

    asked = replace(spec(""), max_restarts=9, backoff_s=60.0)
    calls: list[float] = []

    def sleep(seconds: float) -> None:
        calls.append(seconds)
        os.kill(os.getpid(), signal.SIGTERM)

    assert run_attempts(asked, view, attempt, sleep) == 128 + signal.SIGTERM
    assert (len(calls), made) == (1, [0])


def test_growing_uses_up_no_restart_and_a_lost_node_is_not_the_steps_fault(run: Run, view) -> None:
    code, made, slept = run(
        (crash(None), 7),
        (Growth(4), 7),
        (crash(None), 7),
        (Growth(4), 9),
        (None, 20),
        max_restarts=2,
        backoff_s=1.0,
    )
    assert (code, made) == (0, [0, 1, 2, 3, 4])
    assert sum(slept) == pytest.approx(1 + 2), "no pause before growing"
    assert view.out.getvalue().count("room for 4 workers: growing") == 2
