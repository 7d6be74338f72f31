"""Goodput by formula against drawn lives, published fleets and limits."""

import math

import pytest

from wm_train.plan.scaling.goodput import (
    Failures,
    Saving,
    best_interval_s,
    draw_lives,
    useful_share,
)
from wm_train.plan.scaling.spares import Repair, draw_fleet, enough_spares, expected_broken

LLAMA3, RSC = 3.79e-3, 6.50e-3  # failures per node and day
CASES = [  # devices, per node and day, recovery, interval, blocking, valid after
    (16_384, LLAMA3, 600, 600, 20, 0),
    (16_384, LLAMA3, 300, 600, 1, 60),
    (10_000, LLAMA3, 300, 600, 1, 60),
    (100_000, LLAMA3, 600, 300, 1, 60),
]


@pytest.mark.parametrize(("devices", "per_day", "recovery", "interval", "save", "valid"), CASES)
def test_drawn_lives_agree_with_the_formula(devices, per_day, recovery, interval, save, valid):
    failures, saving = Failures(per_day, restart_s=recovery), Saving(interval, save, valid)
    drawn = draw_lives(failures, saving, devices // 8, days=54, lives=400)
    assert drawn.mean == pytest.approx(useful_share(failures, saving, devices // 8), rel=3e-3)
    hours = sum(drawn.lost_hours.values())
    assert drawn.mean * 54 * 24 + hours == pytest.approx(
        54 * 24
    )  # no hour is lost or counted twice
    assert drawn.low < drawn.mean < drawn.high


@pytest.mark.parametrize("case", CASES[:3])
def test_rare_failures_give_the_published_form(case):
    devices, per_day, recovery, interval, save, valid = case
    failures, saving = Failures(per_day, restart_s=recovery), Saving(interval, save, valid)
    rate = failures.rate(devices // 8)
    lost = rate * (recovery + interval / 2 + valid)
    assert lost < 0.15
    published = 1 / ((1 + save / interval) * (1 + lost))
    assert useful_share(failures, saving, devices // 8) == pytest.approx(published, rel=1e-2)


def test_rates_give_the_published_times_between_failures():
    hours = [1 / Failures(RSC).rate(n // 8) / 3600 for n in (16_384, 131_072, 1_024)]
    assert hours[0] == pytest.approx(1.8, rel=0.03)
    assert hours[1] == pytest.approx(0.23, rel=0.03)
    # A misfit that stays: 7.9 hours were seen at 1,024 devices, where software fails most.
    assert hours[2] == pytest.approx(28.8, rel=0.01)


def test_published_shares_are_consistent_with_stated_inputs():
    llama = useful_share(Failures(LLAMA3, restart_s=600), Saving(600, 1, 60), 2048)
    assert llama > 0.90
    hang = 0.1 * 120 + 0.9 * 10  # one failure in ten is a hang, found after two minutes
    robust = Failures(LLAMA3, detect_s=hang, restart_s=300)
    assert useful_share(robust, Saving(300, 1, 60), 1_200) == pytest.approx(0.97, abs=0.01)


def test_without_failures_only_saves_cost():
    never, saving = Failures(0.0, restart_s=600), Saving(600, 30)
    assert useful_share(never, saving, 100) == pytest.approx(1 / 1.05)
    drawn = draw_lives(never, saving, 100, days=54, lives=3)
    assert drawn.mean == pytest.approx(1 / 1.05, rel=1e-3)
    assert drawn.failures == 0
    assert best_interval_s(never, saving, 100) == math.inf


def test_more_of_anything_bad_is_worse():
    base, saving = Failures(LLAMA3, restart_s=300), Saving(600, 5, 30)
    share = useful_share(base, saving, 1000)
    assert useful_share(Failures(2 * LLAMA3, restart_s=300), saving, 1000) < share
    assert useful_share(Failures(LLAMA3, restart_s=600), saving, 1000) < share
    assert useful_share(base, Saving(600, 10, 30), 1000) < share
    assert useful_share(base, Saving(600, 5, 300), 1000) < share
    assert useful_share(base, saving, 2000) < share


@pytest.mark.parametrize("blocking", [1.0, 20.0, 120.0])
def test_the_best_interval_is_better_than_its_neighbours(blocking):
    failures, nodes = Failures(LLAMA3, restart_s=300), 2048
    best = best_interval_s(failures, Saving(1, blocking), nodes)
    young = math.sqrt(2 * blocking / failures.rate(nodes))
    assert best == pytest.approx(young, rel=0.1)
    shares = [useful_share(failures, Saving(best * f, blocking), nodes) for f in (0.97, 1, 1.03)]
    assert max(shares) == shares[1]


def test_an_interval_is_never_shorter_than_a_save_takes():
    failures = Failures(LLAMA3)
    assert best_interval_s(failures, Saving(1, 1, valid_after_s=500), 2048) == 500
    assert best_interval_s(failures, Saving(1, 1), 2048, shortest_s=900) == 900


def test_spares_bring_a_large_fleet_back():
    failures, saving, nodes = Failures(LLAMA3, restart_s=300), Saving(300, 1, 60), 1250
    assert expected_broken(failures, Repair(), nodes) == pytest.approx(7.8, abs=0.05)
    shares = {
        spares: draw_fleet(failures, saving, Repair(spares=spares), nodes, 54, lives=100)
        for spares in (0, 8, 12, enough_spares(failures, Repair(), nodes))
    }
    means = [fleet.mean for fleet in shares.values()]
    assert means == sorted(means)
    assert means[0] == pytest.approx(0.11, abs=0.02)
    assert means[1] == pytest.approx(0.82, abs=0.02)
    assert means[-1] == pytest.approx(useful_share(failures, saving, nodes), rel=5e-3)


def test_an_elastic_run_goes_on_with_fewer_replicas():
    failures, saving, nodes = Failures(LLAMA3, restart_s=300), Saving(300, 1, 60), 1250
    waiting = draw_fleet(failures, saving, Repair(), nodes, 54, lives=50)
    elastic = draw_fleet(failures, saving, Repair(replicas=64), nodes, 54, lives=50)
    assert elastic.mean > 5 * waiting.mean
    assert elastic.waiting == 0
    # 7.8 nodes are away on average, a sixty-fourth of the work each, less while it begins
    assert 0.07 < elastic.smaller < 7.8 / 64
