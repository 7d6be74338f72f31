"""Check the horizontal shift of pictures of known shift, and what counts as a followed turn."""

import numpy as np
import pytest

from data_shards.time_layout import TimeLayout
from wm_train.evaluation.metrics.turns import best_shifts, mouse_column, shift_costs, turns_followed


def panned(shifts, width=96, height=48):
    """A smooth texture that moves to the right by so many pixels from frame to frame."""
    random = np.random.default_rng(0)
    rows, columns = np.arange(height)[:, None], np.arange(width)[None]
    waves = [(*random.uniform(0.05, 0.4, 2), *random.uniform(0, 6, 1)) for _ in range(12)]
    offsets = np.concatenate([[0.0], np.cumsum(shifts)])
    frames = [
        sum(np.sin(a * (columns - offset) + b * rows + c) for a, b, c in waves)
        for offset in offsets
    ]
    grey = 128 + 10 * np.stack(frames)
    return np.repeat(np.rint(grey)[..., None], 3, axis=3).astype(np.uint8)


def test_shifts_are_found_to_a_fraction_of_a_pixel():
    true = np.array([2.0, -3.0, 0.5, 0.0, -1.3, 5.0])
    np.testing.assert_allclose(best_shifts(shift_costs(panned(true))), true, atol=0.3)


def test_a_still_picture_does_not_move():
    assert not best_shifts(shift_costs(np.full((3, 48, 96, 3), 7, np.uint8))).any()


def test_a_near_thing_does_not_hide_the_shift_of_what_is_far():
    """A bright pillar moves the other way, as when the player walks past it."""
    video = panned([2.0])
    video[0, :, 20:44] = video[1, :, 17:41] = 255
    assert best_shifts(shift_costs(video)) == pytest.approx([2.0], abs=0.2)


@pytest.mark.parametrize("layout", ["causal", "grouped"])
def test_a_turn_is_followed_when_the_picture_moves_the_other_way(layout):
    """Two raw frames a latent; the mouse turns in latents 1 to 4, by too little in latent 5."""
    time = TimeLayout(2, layout)
    mouse = np.array([9.0, 2.0, -2.0, 2.0, 2.0, 0.9])
    moved = {0: 0.0, 1: -2.0, 2: 2.0, 3: 2.0, 4: 0.0, 5: 3.0}  # 3 the wrong way, 4 not at all
    frames = [t for t in range(6) for _ in range(time.start(t), time.start(t + 1))]
    video = panned([moved[t] for t in frames[1:]])
    score = turns_followed(video, mouse, time)
    assert (score.value, score.n) == (0.5, 4)
    assert turns_followed(video, -mouse, time).value == 0.25
    assert turns_followed(np.repeat(video[:1], len(video), 0), mouse, time).value == 0.0
    assert turns_followed(video, 0 * mouse, time).value is None


def test_the_mouse_is_found_by_its_name():
    assert mouse_column(("forward", "mouse_right_degrees", "mouse_down_degrees")) == 1
    assert mouse_column(("forward",)) is None
