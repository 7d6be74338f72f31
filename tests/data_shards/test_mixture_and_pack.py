"""Mixtures, buckets and packing keep the promise of the plain order: content is a function of the
position alone, without gap or repetition."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.loading.order import MixtureOrder, SampleOrder, WeightedChoice
from data_shards.loading.pack import Packer, best_fit
from data_shards.schema import DataError

SEEDS = st.integers(0, 2**31)


@settings(max_examples=40, deadline=None)
@given(weights=st.lists(st.floats(0.5, 10), min_size=1, max_size=6), seed=SEEDS)
def test_choice_is_exact_and_consumes_every_stream_in_full(weights, seed):
    # the smallest share here is 200 * 0.5 / 50.5 places; smaller ones are refused, see
    # test_bad_weights_are_refused
    choice = WeightedChoice(tuple(weights), seed, "short", window=200)
    taken = [choice.choose(position) for position in range(3 * 200)]
    assert len(set(taken)) == len(taken)
    for stream, share in enumerate(choice.shares):
        assert abs(share - 200 * weights[stream] / sum(weights)) < 1
        assert sorted(p for s, p in taken if s == stream) == list(range(3 * share))
    assert sum(choice.shares) == 200


def test_mixture_keeps_each_data_sets_epochs():
    order = MixtureOrder((10, 30), (1.0, 3.0), seed=1, stage="long", window=40)
    taken = Counter(order.sample(draw) for draw in range(80))
    assert taken == {**{(0, i): 2 for i in range(10)}, **{(1, i): 2 for i in range(30)}}
    first = [order.sample(draw)[0] for draw in range(40)]
    assert first != sorted(first)


def test_a_small_weight_gets_its_share_all_the_same():
    choice = WeightedChoice((1.0, 1e-5), 0, "short")
    assert choice.shares[1] / sum(choice.shares) == pytest.approx(1e-5, rel=0.06)
    assert min(choice.shares) >= 10


def test_a_mixture_of_one_is_the_plain_order():
    mixture, plain = MixtureOrder((50,), (2.0,), seed=4, stage="short"), SampleOrder(50, 4, "short")
    assert [mixture.sample(draw) for draw in range(120)] == [
        (0, plain.sample(draw)) for draw in range(120)
    ]
    assert [mixture.replacement(draw, 3) for draw in range(20)] == [
        (0, plain.replacement(draw, 3)) for draw in range(20)
    ]


def test_bad_weights_are_refused():
    for weights in ((), (1.0, 0.0), (1.0, float("nan")), (-1.0,)):
        with pytest.raises(DataError, match="expected positive numbers"):
            WeightedChoice(weights, 0, "short")
    with pytest.raises(
        DataError, match=r"number 1 has no place in a window of 1000. Fix: window=\d+"
    ):
        WeightedChoice((1.0, 1e-5), 0, "short", window=1000)
    with pytest.raises(DataError, match="2 data sets and 1 weights"):
        MixtureOrder((1, 2), (1.0,), 0, "short")


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60), bins=st.integers(1, 20))
def test_best_fit_places_or_reports_every_item(lengths, bins):
    contents, left_out = best_fit(lengths, 20, bins)
    assert sorted([item for items in contents for item in items] + left_out) == list(
        range(len(lengths))
    )
    room = [20 - sum(lengths[item] for item in items) for items in contents]
    assert min(room) >= 0
    assert all(lengths[item] > max(room) for item in left_out)


LENGTHS = [3 + i % 9 for i in range(500)]


def packer(sequences_per_window):
    return Packer(
        SampleOrder(500, 7, "long").sample,
        LENGTHS.__getitem__,
        sum(LENGTHS) / 500,
        32,
        sequences_per_window,
    )


def test_packed_sequences_are_a_function_of_their_number():
    first, fresh = packer(16), packer(16)
    numbers = list(range(100))
    forward = [first.sequence(number) for number in numbers]
    assert [fresh.sequence(number) for number in reversed(numbers)] == forward[::-1]
    for sequence in forward:
        ends = [start + LENGTHS[clip] for start, clip in zip(sequence.starts, sequence.clips)]
        assert list(sequence.starts) == [0, *ends[:-1]]  # documents touch, none overlaps
        assert sequence.valid_frames == ends[-1] <= 32
        assert [SampleOrder(500, 7, "long").sample(draw) for draw in sequence.draws] == list(
            sequence.clips
        )


def test_every_draw_is_packed_once_or_reported_and_waste_is_small():
    whole = packer(64)
    draws = [draw for number in range(10 * 64) for draw in whole.sequence(number).draws]
    missing = [draw for window in range(10) for draw in whole.left_out(window)]
    assert sorted(draws + missing) == list(range(10 * whole.draws_per_window))
    report = whole.report(10)
    assert report.packed_clips == len(draws)
    assert report.left_out_clips == len(missing)
    assert report.filled > 0.94
    assert report.left_out_clips < 0.01 * report.packed_clips


def test_clips_longer_than_a_sequence_are_refused():
    with pytest.raises(DataError, match="clips of 40 to 40 latent frames, expected 1 to 32"):
        Packer(SampleOrder(3, 0, "short").sample, lambda clip: 40, 40.0, 32).sequence(0)
