"""Check that the clips of a step depend on the step only: for any ranks, after any change of them,
with mixtures, buckets, cuts and packing."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.loading.order import SampleOrder
from data_shards.loading.schedule import Schedule, ShortClip, Source, shares
from data_shards.schema import DataError

BATCH = 24
SMALL, WIDE = (4, 6), (4, 8)


def source(lengths, weight=1.0, size=SMALL, cut_every=0):
    return Source(np.array(lengths, np.int64), weight, size, cut_every)


def plain():
    return Schedule([source([7] * 40)], (7,), 3, "short", BATCH)


def rich(pack=False):
    sizes = (SMALL, SMALL) if pack else (SMALL, WIDE)
    first = source([5, 11, 12, 30, 8] * 9, 3.0, sizes[0], cut_every=3)
    return Schedule(
        [first, source([11] * 7 + [6] * 5, 1.0, sizes[1])], (5, 11), 3, "short", BATCH, pack
    )


@settings(max_examples=25, deadline=None)
@given(data=st.data(), made=st.sampled_from([plain, rich, lambda: rich(pack=True)]))
def test_8_6_12_3_ranks_changed_at_any_step_see_the_same_global_batches(data, made):
    """No duplicate and no gap: joined over ranks, each step's rows are those of one rank, whoever
    asks and wherever it began."""
    whole = [made().rows(step, range(BATCH)) for step in range(8)]
    for step, expected in enumerate(whole):
        ranks = data.draw(st.sampled_from([8, 6, 12, 3]))
        each, restarted = BATCH // ranks, made()  # a new process knows nothing but the step
        found = [
            row
            for rank in range(ranks)
            for row in restarted.rows(step, range(rank * each, (rank + 1) * each))
        ]
        assert tuple(found) == expected
        assert [row.draw for row in found] == list(range(step * BATCH, (step + 1) * BATCH))


def test_of_one_data_set_and_length_it_is_the_plain_order():
    order = SampleOrder(40, 3, "short")
    taken = [row.takes for step in range(5) for row in plain().rows(step, range(BATCH))]
    assert [takes[0].clip for takes in taken] == [order.sample(draw) for draw in range(5 * BATCH)]
    assert {(len(takes), takes[0].start, takes[0].frames) for takes in taken} == {(1, 0, 7)}


def test_a_step_never_mixes_shapes_and_each_clip_is_cut_to_the_longest_it_fills():
    schedule, steps = rich(), Counter()
    for step in range(400):
        rows = schedule.rows(step, range(BATCH))
        (shape,) = {(row.frames, schedule.sources[row.takes[0].source].size) for row in rows}
        steps[shape] += 1
        for row in rows:
            (take,) = row.takes
            held = schedule.sources[take.source].latent_frames[take.clip]
            assert take.frames == row.frames == (11 if held >= 11 else 5)
            assert take.start + take.frames <= held
    # three quarters of the draws are the first data set's, of whose clips three in five fill 11
    # frames
    expected = {
        (11, SMALL): 0.45,
        (5, SMALL): 0.3,
        (11, WIDE): 0.25 * 7 / 12,
        (5, WIDE): 0.25 * 5 / 12,
    }
    assert {shape: count / 400 for shape, count in steps.items()} == pytest.approx(
        expected, abs=0.05
    )


def test_a_mixtures_weights_hold_inside_a_bucket():
    schedule = Schedule([source([9] * 10, 3.0), source([9] * 1000, 1.0)], (9,), 0, "short", 40)
    taken = Counter(
        row.takes[0].source for step in range(100) for row in schedule.rows(step, range(40))
    )
    assert taken == {0: 3000, 1: 1000}


def test_cuts_start_where_image_latents_are_and_differ_from_draw_to_draw():
    schedule = Schedule([source([30], cut_every=3)], (11,), 0, "short", 1)
    starts = Counter(schedule.rows(step, [0])[0].takes[0].start for step in range(700))
    assert set(starts) == {0, 3, 6, 9, 12, 15, 18}  # 18 + 11 <= 30
    assert min(starts.values()) > 60
    assert Schedule([source([30])], (11,), 0, "short", 1).rows(5, [0])[0].takes[0].start == 0


@pytest.mark.parametrize(
    "made", [plain, rich, lambda: rich(pack=True)], ids=["plain", "buckets", "packed"]
)
def test_quarantine_moves_nothing_but_the_clips_that_are_left_out(made):
    """Each replaced take has the length of the one it replaces, so not even its own row changes
    shape."""

    def bad(number, clip):
        return clip % 4 == 0

    moved = 0
    for step in range(20):
        for before, after in zip(
            made().rows(step, range(BATCH)), made().rows(step, range(BATCH), bad), strict=True
        ):
            assert (before.draw, before.frames, before.starts) == (
                after.draw,
                after.frames,
                after.starts,
            )
            for old, new in zip(before.takes, after.takes, strict=True):
                assert not bad(new.source, new.clip)
                assert (new == old) == (not bad(old.source, old.clip))
                assert (new.source, new.frames) == (old.source, old.frames)
                moved += new != old
    assert moved > 50
    with pytest.raises(
        DataError, match="got no clip of 7 latent frames outside the quarantined shards"
    ):
        plain().rows(0, [0], lambda number, clip: True)


def test_packed_rows_hold_whole_clips_and_little_else():
    schedule = rich(pack=True)
    rows = [row for step in range(40) for row in schedule.rows(step, range(BATCH))]
    for row in rows:
        assert row.frames == 11 >= row.valid_frames
        assert len(row.starts) == len(row.takes)
        for take in row.takes:
            assert take.frames == min(11, schedule.sources[take.source].latent_frames[take.clip])
    assert max(len(row.takes) for row in rows) == 2
    with pytest.raises(DataError, match="one size"):
        Schedule([source([9]), source([9], size=WIDE)], (9,), 0, "short", 1, pack=True)


@settings(max_examples=60, deadline=None)
@given(
    costs=st.lists(st.integers(1, 1000), min_size=24, max_size=24),
    members=st.sampled_from([1, 2, 3, 6, 8, 12]),
)
def test_shares_are_equally_many_rows_of_nearly_equal_cost(costs, members):
    dealt = shares(costs, members)
    assert sorted(row for rows in dealt for row in rows) == list(range(24))
    assert {len(rows) for rows in dealt} == {24 // members}
    loads = [sum(costs[row] for row in rows) for rows in dealt]
    assert max(loads) - min(loads) <= max(costs)
    assert shares([5] * 24, members)[0] == tuple(range(24 // members))


def test_a_clip_too_short_for_every_cut_is_named():
    with pytest.raises(ShortClip) as caught:
        Schedule([source([9, 4, 9])], (5, 9), 0, "short", 1)
    assert (caught.value.source, caught.value.clip, caught.value.frames, caught.value.wanted) == (
        0,
        1,
        4,
        5,
    )
    with pytest.raises(DataError, match="empty split"):
        Schedule([source([])], (5,), 0, "short", 1)


def test_a_million_clips_and_a_distant_step_cost_nothing():
    schedule = Schedule([source(np.full(10**6, 9))], (9,), 0, "short", 64)
    assert (
        len(
            {
                row.takes[0].clip
                for step in range(10**9, 10**9 + 3)
                for row in schedule.rows(step, range(64))
            }
        )
        == 192
    )
