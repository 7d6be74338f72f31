"""Check which frames a chunk sees of those before it: no later ones, those whose camera is near."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.time_layout import TimeLayout
from parallel.layout import ClipLayout, FrameRange
from wm_train.config.kinds import HistoryConfig
from wm_train.sampling.history import camera_latents, mean_rays, raw_frames, window_of

TIME, SIZE = TimeLayout(4), (48, 64)
PINHOLE = np.array([60.0, 60.0, 32.0, 24.0])


def poses(angles: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Cameras that look along `angles` about the vertical, from `places` [F, 3]."""
    c2w = np.tile(np.eye(4), (len(angles), 1, 1))
    c2w[:, 0, 0], c2w[:, 0, 2] = np.cos(angles), np.sin(angles)
    c2w[:, 2, 0], c2w[:, 2, 2] = -np.sin(angles), np.cos(angles)
    c2w[:, :3, 3] = places
    return c2w


def cameras_of(c2w: np.ndarray) -> np.ndarray:
    return camera_latents(c2w, np.tile(PINHOLE, (len(c2w), 1)), SIZE, TIME, 1.0)


def wandering(latents: int, seed: int) -> np.ndarray:
    rng, raw = np.random.default_rng(seed), TIME.raw(latents)
    return poses(rng.normal(size=raw).cumsum() * 0.2, rng.normal(size=(raw, 3)).cumsum(0))


@settings(max_examples=20, deadline=None)
@given(
    st.integers(3, 40), st.integers(1, 9), st.integers(0, 5), st.integers(0, 5), st.integers(0, 99)
)
def test_a_window_holds_the_past_and_no_later_frame(frames, chunk, recent, near, seed):
    config = HistoryConfig(chunk, recent, near)
    c2w = wandering(frames, seed)
    chunks = config.chunks(frames)
    assert bool(chunks) == (frames > chunk)
    if chunks:  # every frame but the given one is made, the last ones by a chunk that moved
        assert {i for one in chunks for i in one} == set(range(1, frames))
    for one in chunks:
        window = window_of(cameras_of(c2w), one, config)
        history = window.ids[: window.slots]
        assert len(window.ids) == config.frames
        assert window.ids[window.slots] == one.start - 1
        assert window.ids[window.slots + 1 :] == tuple(one)
        assert max(history) < one.start
        assert history[0] == 0
        assert set(range(max(1, one.start - recent), one.start)) <= set(history)
        others = [i for i in history if i]
        assert len(others) == len(set(others))
        # nothing behind the chunk is looked at
        later = c2w.copy()
        later[TIME.raw(one.stop) :, :3, 3] += 100
        assert window_of(cameras_of(later), one, config) == window


def test_the_first_chunk_sees_the_first_frame_alone():
    window = window_of(cameras_of(wandering(12, 0)), range(1, 5), HistoryConfig(4, 3, 2))
    assert window.ids == (0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4)
    assert window.made == range(5)


def test_a_second_turn_of_a_circle_sees_the_first():
    """After a whole turn the nearest cameras are those one turn earlier."""
    turn, raw = 20, TIME.raw(41)
    angles = (np.arange(raw) - 1) * 2 * math.pi / (4 * turn)
    c2w = poses(angles, np.stack((np.sin(angles), 0 * angles, np.cos(angles)), 1))
    window = window_of(cameras_of(c2w), range(25, 28), HistoryConfig(3, 4, 3))
    assert window.ids[1:4] == (5, 6, 7)
    # and of several equally near ones the lower
    unmoved = cameras_of(poses(0 * angles, np.zeros((raw, 3))))
    still = window_of(unmoved, range(25, 28), HistoryConfig(3, 4, 3))
    assert still.ids[1:4] == (1, 2, 3)


def test_camera_latents_are_mean_pluecker_coordinates():
    """Against the mean over all points of a fine grid, of rays and moments one by one."""
    c2w = wandering(3, 5)
    relative = np.linalg.inv(c2w[0]) @ c2w
    n = 128
    y, x = ((np.arange(n) + 0.5) * side / n for side in SIZE)
    ray = np.stack(np.broadcast_arrays((x[None] - 32) / 60, (y[:, None] - 24) / 60, 1.0), -1)
    ray = ray / np.linalg.norm(ray, axis=-1, keepdims=True)
    found = cameras_of(c2w)
    assert found.shape == (3, 24)
    for latent, frames in enumerate(raw_frames(range(3), TIME)):
        for k, frame in enumerate(frames):
            direction = ray @ relative[frame, :3, :3].T
            moment = np.cross(relative[frame, :3, 3], direction)
            expected = np.concatenate((moment.mean((0, 1)), direction.mean((0, 1))))
            assert found[latent, 6 * k : 6 * k + 6] == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert raw_frames((0, 2), TIME) == [[0, 0, 0, 0], [5, 6, 7, 8]]
    zoomed = mean_rays(np.array([PINHOLE, 2 * PINHOLE * [1, 1, 0.5, 0.5]]), SIZE)
    assert zoomed[1, 2] > zoomed[0, 2]


def test_a_layout_gives_frames_their_own_positions():
    layout = ClipLayout(4, time_ids=(0, 7, 3, 3))
    assert [layout.position_of(i) for i in range(4)] == [0, 7, 3, 3]
    assert layout.cut(FrameRange(1, 3)).time_ids == (7, 3)
    assert layout.copied(2).time_ids == (0, 0, 7, 7, 3, 3, 3, 3)
    for ids in ((0, 1), (0, 1, 2, -1)):
        with pytest.raises(ValueError, match="time_ids"):
            ClipLayout(4, time_ids=ids)
