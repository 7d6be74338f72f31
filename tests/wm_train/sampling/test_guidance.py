"""Guidance by several named conditions: what each pass sees, and how the passes are added."""

from __future__ import annotations

import pytest
import torch

from wm_train.conditioning import Conditions
from wm_train.sampling.guidance import guidance_views, guided, without

DRAWS = torch.arange(2)
NULL, NEGATIVE = torch.full((1, 3), 7.0), torch.full((2, 3), 9.0)


@pytest.fixture
def conditions() -> Conditions:
    return Conditions(
        (16, 16),
        8,
        {
            "text": torch.ones(2, 4, 3),
            "text_mask": torch.ones(2, 4),
            "controls": torch.ones(2, 5, 6),
        },
        null_text=NULL,
        negative_text=NEGATIVE,
    )


def seen(conditions: Conditions) -> tuple[bool, float, bool]:
    """Return if the camera is kept, the first number of the text, and if controls are known."""
    keep = conditions.camera_keep
    controls = conditions.controls_keep
    assert bool(conditions.controls.any()) == (controls is None)
    return keep is None, float(conditions.text[0, 0, 0]), controls is None


def test_each_pass_sees_one_of_the_guided_conditions_and_all_the_others(conditions):
    views = guidance_views(conditions, {"camera": 2.0, "text": 3.0}, DRAWS)
    assert [seen(view) for view in views] == [
        (False, 7.0, True),
        (True, 7.0, True),
        (False, 1.0, True),
    ]
    (alone, controls) = guidance_views(conditions, {"controls": 15.0}, DRAWS)
    assert seen(alone) == (True, 1.0, False)
    assert seen(controls) == (True, 1.0, True)


def test_a_negative_prompt_takes_the_place_of_the_text_with_the_camera_kept(conditions):
    plain, positive = guidance_views(conditions, {"negative_text": 4.0}, DRAWS)
    assert seen(plain) == (True, 9.0, True)
    assert plain.text[0, :, 0].tolist() == [9.0, 9.0, 0.0, 0.0]
    assert plain.text_mask.tolist() == [[True, True, False, False]] * 2
    assert seen(positive) == (True, 1.0, True)


def test_a_single_weight_of_one_makes_one_pass_and_two_do_not(conditions):
    assert guidance_views(conditions, {"text": 1.0}, DRAWS) == [conditions]
    assert guidance_views(conditions, {}, DRAWS) == [conditions]
    assert len(guidance_views(conditions, {"text": 1.0, "camera": 1.0}, DRAWS)) == 3


def test_passes_add_up_to_plain_and_weighted_differences():
    passes = [torch.tensor(x) for x in (1.0, 3.0, -1.0)]
    assert guided(passes, {"controls": 15.0, "context": 2.0}) == 1 + 15 * 2 + 2 * -2
    assert guided(passes, {"controls": 1.0, "context": 0.0}) == passes[1]
    assert guided(passes[:1], {"camera": 1.0}) == 1


def test_conditions_are_taken_from_some_clips_and_stay_taken(conditions):
    where = torch.tensor([True, False])
    bare = without(conditions, {"camera", "text", "controls"}, where)
    assert bare.camera_keep.tolist() == bare.controls_keep.tolist() == [False, True]
    assert bare.text[:, 0, 0].tolist() == [7.0, 1.0]
    assert bare.controls[:, 0, 0].tolist() == [0.0, 1.0]
    rest = without(bare, {"camera"}, ~where)
    assert rest.camera_keep.tolist() == [False, False]
    rows = bare.rows(slice(1, 2))
    assert rows.camera_keep.tolist() == rows.controls_keep.tolist() == [True]
    assert rows.text.shape == (1, 4, 3)


def test_an_unknown_condition_is_refused(conditions):
    with pytest.raises(ValueError, match="got condition 'smell', expected one of camera, text"):
        without(conditions, {"smell"}, torch.ones(2, dtype=torch.bool))
