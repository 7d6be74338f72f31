"""The counted FLOPs of a model against the closed form of its layers."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from wm_train.models.examples import ExampleShape
from wm_train.models.flops import clip_flops, forward_flops, mfu
from wm_train.models.sana_wm.config import SanaWMConfig

HERE = Path(__file__).parent
SPEC = importlib.util.spec_from_file_location("closed_form", HERE / "closed_form.py")
closed_form = importlib.util.module_from_spec(SPEC)
sys.modules["closed_form"] = closed_form
SPEC.loader.exec_module(closed_form)

SHAPE = ExampleShape(1, 5, 6, 8, 8)
SMALL = SanaWMConfig(width=128, heads=4, depth=1, latent_channels=8)


@pytest.mark.parametrize("camera", [False, True])
@pytest.mark.parametrize("softmax_every", [0, 1])
def test_the_count_is_that_of_the_closed_form(camera, softmax_every):
    config = replace(SMALL, softmax_every=softmax_every, camera=camera, plucker=camera)
    expected = closed_form.forward_flops(config, SHAPE.frames, SHAPE.height * SHAPE.width).total
    assert forward_flops(config, SHAPE) == pytest.approx(expected, rel=0.05)


def test_a_hybrid_with_text_is_counted_to_one_percent():
    config = SanaWMConfig(width=256, heads=4, depth=4, latent_channels=16, text_width=32)
    shape = ExampleShape(1, 9, 8, 10, 8, text_tokens=20)
    expected = closed_form.forward_flops(config, 9, 80, 20).total
    assert forward_flops(config, shape) == pytest.approx(expected, rel=0.01)


def test_attention_is_counted_under_its_mask():
    """Seven frames in chunks of 3, 2, 2: what a causal model and a window of one chunk with one
    frame that stays leave out, against the closed form."""
    config = SanaWMConfig(width=64, heads=2, depth=1, latent_channels=8, softmax_every=1)
    shape, causal = ExampleShape(1, 7, 4, 4, 8), replace(config, causal=True)
    window = replace(causal, window_chunks=1)
    counted = [forward_flops(config, shape)]
    counted += [forward_flops(model, shape, 2) for model in (causal, window)]
    by_hand = [closed_form.forward_flops(config, 7, 16).softmax]
    by_hand += [
        closed_form.forward_flops(m, 7, 16, chunk_frames=2).softmax for m in (causal, window)
    ]
    assert counted[0] - counted[1] == pytest.approx(by_hand[0] - by_hand[1], rel=1e-6)
    assert counted[1] - counted[2] == pytest.approx(by_hand[1] - by_hand[2], rel=1e-6)


@pytest.mark.full
def test_between_the_counted_lengths_the_parabola_is_exact_for_a_bidirectional_model():
    config = SanaWMConfig(width=64, heads=2, depth=4, latent_channels=8)
    longest = ExampleShape(1, 9, 4, 4, 8)
    for frames in (2, 4, 7):
        exact = forward_flops(config, replace(longest, frames=frames))
        assert clip_flops(config, longest, frames) == pytest.approx(exact, rel=1e-3)


@pytest.mark.full
def test_the_released_model_at_one_minute():
    """About 1.54e15 forward at 60 s, of which five softmax layers of two branches make 1.02e15."""
    config = SanaWMConfig(width=2240, heads=20, depth=20, latent_channels=128)
    assert closed_form.forward_flops(config, 121, 880).softmax == pytest.approx(1.02e15, rel=0.01)
    assert forward_flops(config, ExampleShape(1, 121, 22, 40, 8)) == pytest.approx(1.54e15, rel=0.1)


def test_mfu_of_a_step():
    flops = 4 * 3 * forward_flops(SanaWMConfig(), ExampleShape(1, 6, 7, 10, 8))
    assert mfu(flops, 2.0, 3, 1e9) == pytest.approx(flops / 6e9)
