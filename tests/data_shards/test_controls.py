"""Event bucketing against a slow, obvious simulation in exact fractions; nothing lost, nothing
twice."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.controls import (
    BUTTONS,
    CONTROL_NAMES,
    KEY_DOWN,
    KEY_UP,
    MOUSE,
    REFOCUS,
    SCROLL,
    UNFOCUS,
    Events,
    bucket_controls,
    bucket_edges,
    bucket_events,
    control_divisors,
    unfocused_spans,
)
from data_shards.schema import DataError
from data_shards.time_layout import LAYOUTS, TimeLayout


def events_of(rows):
    """[(time_ns, kind, code, dx, dy)] -> Events, sorted by time."""
    columns = list(zip(*sorted(rows, key=lambda row: row[0]))) or [()] * 5
    dtypes = (np.int64, np.uint8, np.uint8, np.int32, np.int32)
    return Events(*(np.array(column, dtype) for column, dtype in zip(columns, dtypes)))


def last_frames(latent_frames, time):
    """The last raw frame of each latent, written out: one frame, then groups; or groups alone."""
    if time.layout == "grouped":
        return [time.stride * (t + 1) - 1 for t in range(latent_frames)]
    return [time.stride * t for t in range(latent_frames)]


def simulate(events, latent_frames, fps, time, keep_taps, offset=0):
    """The definition, one event at a time, with exact times."""
    out = np.zeros((latent_frames, BUTTONS + 3))
    held, away = set(), False
    ends = [Fraction(frame + offset) / fps for frame in last_frames(latent_frames, time)]
    before = (offset - 1) / fps
    for t, lower, upper in zip(range(-1, latent_frames), [None, before, *ends], [before, *ends]):
        tapped, scroll = set(), 0
        for moment, kind, code, dx, dy in zip(
            events.time_ns, events.kind, events.code, events.dx, events.dy
        ):
            seconds = Fraction(int(moment), 10**9)
            if seconds > upper or (lower is not None and seconds <= lower):
                continue
            if kind in (UNFOCUS, REFOCUS):
                away = kind == UNFOCUS
                held = set() if away else held
            elif away:
                continue
            elif kind == KEY_DOWN:
                held.add(int(code))
                tapped.add(int(code))
            elif kind == KEY_UP:
                held.discard(int(code))
            elif kind == MOUSE and t >= 0:
                out[t, BUTTONS] += dx
                out[t, BUTTONS + 1] += dy
            elif kind == SCROLL and t >= 0:
                scroll += int(dy)
        if t >= 0:
            out[t, list(held | tapped if keep_taps else held)] = 1
            out[t, BUTTONS + 2] = (scroll > 0) - (scroll < 0)
    return out


RATES = st.sampled_from([Fraction(60), Fraction(16), Fraction(30000, 1001), Fraction(35, 2)])
# many events on, or one nanosecond beside, the edges
TIMES = st.one_of(
    st.integers(-(10**8), 10**9),
    st.builds(lambda k, d: k * 4 * 10**9 // 60 + d, st.integers(-2, 12), st.integers(-1, 1)),
    st.builds(
        lambda k, d: k * 4 * 10**9 * 1001 // 30000 + d, st.integers(-2, 12), st.integers(-1, 1)
    ),
)


def rows_of(last_kind):
    amount, code = st.integers(-40, 40), st.integers(0, 5)
    row = st.tuples(TIMES, st.integers(0, last_kind), code, amount, amount)
    return st.lists(row, max_size=60)


@settings(max_examples=120, deadline=None)
@given(
    rows=rows_of(REFOCUS),
    fps=RATES,
    time=st.builds(TimeLayout, st.sampled_from([1, 4, 8]), st.sampled_from(LAYOUTS)),
    keep_taps=st.booleans(),
    offset=st.sampled_from([0, 0, -1, -4]),
)
def test_buckets_follow_the_definition(rows, fps, time, keep_taps, offset):
    events = events_of(rows)
    np.testing.assert_array_equal(
        bucket_events(events, 6, fps, time, keep_taps, offset),
        simulate(events, 6, fps, time, keep_taps, offset),
    )


def test_leaving_the_window_releases_all_keys_and_ends_its_events():
    ms, space, w = 10**6, 32, 87
    events = events_of(
        [
            (0, KEY_DOWN, w, 0, 0),
            (50 * ms, UNFOCUS, 0, 0, 0),
            (60 * ms, UNFOCUS, 0, 0, 0),
            (70 * ms, KEY_DOWN, space, 0, 0),  # typed in another window
            (75 * ms, MOUSE, 0, 500, 0),
            (150 * ms, REFOCUS, 0, 0, 0),
            (160 * ms, MOUSE, 0, 3, 0),
        ]
    )
    controls = bucket_events(events, 4, Fraction(80), TimeLayout(4, "grouped"))  # 50 ms a latent
    np.testing.assert_array_equal(controls[:, w], [1, 0, 0, 0])
    assert not controls[:, space].any()
    np.testing.assert_array_equal(controls[:, BUTTONS], [0, 0, 0, 3])
    assert unfocused_spans(events) == 1


def test_rows_per_raw_frame_cover_the_frames_of_their_latent():
    """Row i of a clip is i for an amount and for a state; latents of 1 + 4 + 4, and of 4 + 4."""
    frames = np.stack([np.arange(9), np.arange(9)], 1).astype(np.float32)
    causal = bucket_controls(frames, (True, False), TimeLayout(4))
    np.testing.assert_array_equal(causal, [[0, 0], [10, 2.5], [26, 6.5]])
    grouped = bucket_controls(frames[:8], (True, False), TimeLayout(4, "grouped"))
    np.testing.assert_array_equal(grouped, [[6, 1.5], [22, 5.5]])
    earlier = bucket_controls(frames[:8], (True, False), TimeLayout(4, "grouped"), -4)
    np.testing.assert_array_equal(earlier, [[0, 0], [6, 1.5]])


def test_amounts_are_divided_by_their_spread_and_states_by_one():
    squares = np.array([16.0, 36.0, 0.0])  # over 4 latent frames
    assert control_divisors((False, True, True), squares, 4) == (1.0, 3.0, 1.0)


@settings(max_examples=60, deadline=None)
@given(rows=rows_of(SCROLL), fps=RATES)
def test_nothing_is_lost_or_counted_twice(rows, fps):
    """The displacements add up to those of the events that the clip spans, whatever lies on its
    buckets' edges."""
    events = events_of(rows)
    whole = bucket_events(events, 7, fps, TimeLayout(4))
    edges = bucket_edges(7, fps, TimeLayout(4))
    spanned = (events.kind == MOUSE) & (events.time_ns > edges[0]) & (events.time_ns <= edges[-1])
    assert whole[:, BUTTONS].sum() == events.dx[spanned].sum()
    assert whole[:, BUTTONS + 1].sum() == events.dy[spanned].sum()


FRAME_NS = (
    20 * 10**6
)  # at 50 frames per second a raw frame starts at a whole nanosecond, so a clip may be cut at any
NEAR_FRAMES = st.builds(lambda k, d: k * FRAME_NS + d, st.integers(-3, 60), st.integers(-1, 1))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            NEAR_FRAMES,
            st.integers(0, 3),
            st.integers(0, 5),
            st.integers(-9, 9),
            st.integers(-9, 9),
        ),
        max_size=60,
    )
)
def test_two_clips_that_touch_share_no_event_and_miss_none(rows):
    """Raw frames 0 to 24, and 25 to 49 of one recording, against the events between."""
    events, parts = events_of(rows), []
    for first in (0, 25):
        shifted = dataclasses.replace(events, time_ns=events.time_ns - first * FRAME_NS)
        parts.append(bucket_events(shifted, 7, Fraction(50), TimeLayout(4)))
    both = np.concatenate(parts)
    spanned = (
        (events.kind == MOUSE) & (events.time_ns > -FRAME_NS) & (events.time_ns <= 49 * FRAME_NS)
    )
    assert both[:, BUTTONS].sum() == events.dx[spanned].sum()
    assert both[:, BUTTONS + 1].sum() == events.dy[spanned].sum()
    held = np.zeros(BUTTONS)
    for kind, code, time in zip(events.kind, events.code, events.time_ns):
        if kind <= KEY_UP and time <= 25 * FRAME_NS:
            held[code] = kind == KEY_DOWN
    np.testing.assert_array_equal(parts[1][0, :BUTTONS], held)  # the state goes on over the cut


def test_ten_kilohertz_for_a_minute():
    count = 600_000
    random = np.random.default_rng(0)
    dx = random.integers(-20, 21, count, dtype=np.int32)
    time = np.arange(count, dtype=np.int64) * 100_000
    events = Events(
        time, np.full(count, MOUSE, np.uint8), np.zeros(count, np.uint8), dx, dx[::-1].copy()
    )
    controls = bucket_events(events, 901, Fraction(60), TimeLayout(4))
    assert controls.shape == (901, len(CONTROL_NAMES))
    assert controls[:, BUTTONS].sum() == dx[time <= 60 * 10**9].sum()
    # the bucket of latent 1 ends with raw frame 4, at 66.67 ms: events 1 to 666, event 0 lying in
    # bucket 0
    assert controls[1, BUTTONS] == dx[1:667].sum()
    assert controls[0, BUTTONS] == dx[0]


def test_taps_and_held_keys():
    w, space, ms = 87, 32, 10**6
    rows = [
        (-1000 * ms, KEY_DOWN, w),
        (70 * ms, KEY_DOWN, space),
        (80 * ms, KEY_UP, space),
        (200 * ms, KEY_UP, w),
    ]
    events = events_of([(*row, 0, 0) for row in rows])
    kept, snapshots = (
        bucket_events(events, 5, Fraction(60), TimeLayout(4), keep_taps=keep)
        for keep in (True, False)
    )
    assert kept[:, 87].tolist() == [
        1,
        1,
        1,
        0,
        0,
    ]  # held since before the clip; released in (133, 200] ms
    assert kept[:, 32].tolist() == [0, 0, 1, 0, 0]
    assert snapshots[:, 32].tolist() == [0] * 5
    np.testing.assert_array_equal(
        bucket_events(events, 5, Fraction(60), TimeLayout(4)), snapshots
    )  # the paper's is the default


def test_bad_streams_are_refused():
    with pytest.raises(DataError, match="time going back at event 1"):
        Events(np.array([5, 3]), *(np.zeros(2, np.uint8) for _ in range(4)))
    with pytest.raises(DataError, match="columns of"):
        Events(np.array([5, 6]), *(np.zeros(3, np.uint8) for _ in range(4)))
    with pytest.raises(DataError, match="got kind 9"):
        Events(np.array([5]), np.array([9], np.uint8), *(np.zeros(1, np.uint8) for _ in range(3)))
    with pytest.raises(DataError, match="whole nanoseconds"):
        Events(np.array([0.5]), *(np.zeros(1, np.uint8) for _ in range(4)))
