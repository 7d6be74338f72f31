"""Seconds of collectives: published tables, limits, and the shape of groups."""

import math
import runpy
from pathlib import Path

import pytest

from wm_train.plan.speed.network import (
    Group,
    Link,
    Network,
    collective_s,
    fit_link,
    group_of,
    predicted_s,
)

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
H100 = Network(8, 8e-6, Link(3.4e-6, 0.0, 360e9), Link(9.6e-6, 0.0, 45e9))


def test_held_out_rows_of_published_tables_are_predicted_within_twelve_percent():
    module = runpy.run_path(str(BENCHMARKS / "collective_model.py"))
    complete = [table for table in module["published"]() if "5 rows only" not in table["name"]]
    means = [sum(e) / len(e) for e in map(module["held_out_errors"], complete)]
    assert len(means) >= 3
    assert max(means) <= 0.12, means


def test_a_link_of_known_numbers_is_found_again():
    link = (12e-6, 9e-9, 240e9)
    sizes = [2.0**n for n in range(10, 31)]
    found = fit_link(sizes, [predicted_s(link, n) for n in sizes])
    assert found == pytest.approx(link, rel=1e-6)


def test_no_fitted_part_is_negative():
    sizes = [2.0**n for n in range(10, 24)]
    bent = [1e-5 + n / 1e9 - 2e-9 * n**0.5 for n in sizes]  # faster in the middle than any ramp
    latency, ramp, rate = fit_link(sizes, bent)
    assert min(latency, ramp, rate) >= 0


def test_two_sizes_do_not_make_a_link_of_three_numbers():
    with pytest.raises(ValueError, match="got 2, expected at least 3"):
        fit_link([1, 2], [1, 2])


def test_without_bytes_only_latency_is_left():
    group = Group(16, 2)
    expected = 8e-6 + 14 * 3.4e-6 + 1 * 9.6e-6
    assert collective_s("gather", 0, group, H100) == pytest.approx(expected)
    assert collective_s("all_reduce", 0, group, H100) == pytest.approx(
        8e-6 + 28 * 3.4e-6 + 2 * 9.6e-6
    )


def test_links_of_any_rate_leave_the_latency():
    endless = Network(8, 8e-6, Link(3.4e-6, 0.0, math.inf), Link(9.6e-6, 0.0, math.inf))
    for pattern in ("gather", "reduce", "all_reduce", "all_to_all", "shift"):
        for group in (Group(8, 1), Group(16, 2), Group(10_000, 1_250)):
            whole = collective_s(pattern, 1e9, group, endless)
            assert whole == collective_s(pattern, 0, group, endless)
            assert whole == collective_s(pattern, 0, group, H100)


def test_flat_sharding_over_ten_thousand_devices_dies_of_latency():
    flat = collective_s("gather", 260e6, Group(10_000, 1_250), H100)
    latency = collective_s("gather", 0, Group(10_000, 1_250), H100)
    assert latency == pytest.approx(42e-3, rel=0.02)  # 8,750 steps inside, 1,249 across
    in_nodes = collective_s("gather", 260e6, Group(64, 8), H100)
    assert flat > 20 * in_nodes


def test_bytes_leave_a_node_over_the_links_of_all_ranks_there():
    one = collective_s("gather", 1e9, Group(2, 2), H100)  # one rank a node: one link
    eight = collective_s("gather", 1e9, Group(16, 2), H100)  # 8 x 45 GB/s, as fast as inside
    assert one > 1e9 / 45e9
    assert eight == pytest.approx(1e9 / 360e9, rel=0.05)


def test_all_to_all_sends_each_part_over_its_own_link():
    inside = collective_s("all_to_all", 1e9, Group(8, 1), H100)
    across = collective_s("all_to_all", 1e9, Group(16, 2), H100)
    assert inside == pytest.approx(1e9 / 360e9, rel=0.05)
    assert across == pytest.approx(1e9 * 8 / 15 / 45e9, rel=0.05)


def test_one_rank_sends_nothing():
    assert collective_s("gather", 1e9, Group(1), H100) == 0


@pytest.mark.parametrize(
    ("ranks", "stride", "nodes"),
    [(8, 1, 1), (16, 1, 2), (4, 2, 1), (8, 8, 8), (8, 4, 4), (2, 16, 2), (64, 1, 8)],
)
def test_groups_lie_on_as_many_nodes_as_their_stride_says(ranks, stride, nodes):
    assert group_of(ranks, stride, node_size=8) == Group(ranks, nodes)
