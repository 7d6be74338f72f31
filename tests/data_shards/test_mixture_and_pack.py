"""Mixtures, buckets and packing keep the promise of the plain order: content is a function of the position alone, without gap or
repetition."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.order import BucketOrder, MixtureOrder, SampleOrder, WeightedChoice
from data_shards.pack import Packer, best_fit, plan_window
from data_shards.schema import DataError

SEEDS = st.integers(0, 2**31)


@settings(max_examples=40, deadline=None)
@given(weights=st.lists(st.floats(0.5, 10), min_size=1, max_size=6), seed=SEEDS)
def test_choice_is_exact_and_consumes_every_stream_in_full(weights, seed):
    # the smallest share here is 200 * 0.5 / 50.5 places; smaller ones are refused, see test_bad_weights_are_refused
    choice = WeightedChoice(tuple(weights), seed, 0, window=200)
    taken = [choice.choose(position) for position in range(3 * 200)]
    assert len(set(taken)) == len(taken)
    for stream, share in enumerate(choice.shares):
        assert abs(share - 200 * weights[stream] / sum(weights)) < 1
        assert sorted(p for s, p in taken if s == stream) == list(range(3 * share))
    assert sum(choice.shares) == 200


def test_mixture_keeps_each_data_sets_epochs():
    order = MixtureOrder((10, 30), (1.0, 3.0), seed=1, stage_index=2, window=40)
    taken = Counter(order.sample(draw) for draw in range(80))
    assert taken == {**{(0, i): 2 for i in range(10)}, **{(1, i): 2 for i in range(30)}}
    first = [order.sample(draw)[0] for draw in range(40)]
    assert first != sorted(first)


def test_bad_weights_are_refused():
    for weights in ((), (1.0, 0.0), (1.0, float("nan")), (-1.0,)):
        with pytest.raises(DataError, match="expected positive numbers"):
            WeightedChoice(weights, 0, 0)
    with pytest.raises(DataError, match=r"number 1 has no place in a window of 1000. Fix: window=\d+"):
        WeightedChoice((1.0, 1e-5), 0, 0)
    with pytest.raises(DataError, match="2 data sets and 1 weights"):
        MixtureOrder((1, 2), (1.0,), 0, 0)
    with pytest.raises(DataError, match="2 buckets and 1 weights"):
        BucketOrder(([1], [2]), 1, 0, 0, weights=(1.0,))


@settings(max_examples=30, deadline=None)
@given(data=st.data(), seed=SEEDS)
def test_buckets_never_mix_shapes_and_ignore_the_world_size(data, seed):
    buckets = ([0, 1, 2, 3], [10, 11], [20, 21, 22, 23, 24, 25])
    order = BucketOrder(buckets, global_batch=12, seed=seed, stage_index=1, window=12)
    seen = Counter()
    for step in range(12):
        bucket, draws, clips = order.batch(step, range(12))
        assert set(clips) <= set(buckets[bucket])
        assert draws == tuple(range(step * 12, step * 12 + 12))
        ranks = data.draw(st.sampled_from([1, 2, 3, 4, 6]))
        each = 12 // ranks
        parts = [order.batch(step, range(r * each, (r + 1) * each)) for r in range(ranks)]
        assert sum((part[2] for part in parts), ()) == clips
        assert {part[0] for part in parts} == {bucket}
        seen.update(clips)
    assert set(seen.values()) == {12}  # 12 steps of 12 draws over 12 clips, each as often


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60), bins=st.integers(1, 20))
def test_best_fit_places_or_reports_every_item(lengths, bins):
    contents, left_out = best_fit(lengths, 20, bins)
    assert sorted([item for items in contents for item in items] + left_out) == list(range(len(lengths)))
    room = [20 - sum(lengths[item] for item in items) for items in contents]
    assert min(room) >= 0
    assert all(lengths[item] > max(room) for item in left_out)


def test_packed_sequences_are_a_function_of_their_number():
    lengths = [3 + i % 9 for i in range(500)]
    settings_of = {"order": SampleOrder(500, 7, 3), "lengths": lengths, "capacity": 32, "sequences_per_window": 16}
    packer, fresh = Packer(**settings_of), Packer(**settings_of)
    numbers = list(range(100))
    forward = [packer.sequence(number) for number in numbers]
    assert [fresh.sequence(number) for number in reversed(numbers)] == forward[::-1]
    for sequence in forward:
        ends = [start + lengths[clip] for start, clip in zip(sequence.starts, sequence.clips)]
        assert list(sequence.starts) == [0, *ends[:-1]]  # documents touch, none overlaps
        assert sequence.valid_frames == ends[-1] <= 32
        assert [SampleOrder(500, 7, 3).sample(draw) for draw in sequence.draws] == list(sequence.clips)


def test_every_draw_is_packed_once_or_reported_and_waste_is_small():
    lengths = [3 + i % 9 for i in range(500)]
    packer = Packer(SampleOrder(500, 7, 3), lengths, capacity=32, sequences_per_window=64)
    draws = [draw for number in range(10 * 64) for draw in packer.sequence(number).draws]
    missing = [draw for window in range(10) for draw in packer.left_out(window)]
    assert sorted(draws + missing) == list(range(10 * packer.draws_per_window))
    report = packer.report(10)
    assert report.packed_clips == len(draws)
    assert report.left_out_clips == len(missing)
    assert report.filled > 0.94
    assert report.left_out_clips < 0.01 * report.packed_clips


def test_clips_longer_than_a_sequence_are_refused():
    with pytest.raises(DataError, match="up to 40 latent frames, expected 1 to 32"):
        plan_window([3, 40], 32, 8)
    with pytest.raises(DataError, match="got 2 lengths"):
        Packer(SampleOrder(3, 0, 0), [1, 2], 32)
