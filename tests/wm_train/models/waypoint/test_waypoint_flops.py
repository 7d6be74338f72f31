"""Counted FLOPs against the closed form of every layer: what meets frames and what meets tokens,
and the pairs of each kind of block."""

from __future__ import annotations

from dataclasses import replace

import pytest

from wm_train.config.compose import compose
from wm_train.models.examples import ExampleShape
from wm_train.models.flops import forward_flops
from wm_train.models.waypoint.config import WaypointConfig


def pairs(config: WaypointConfig, block: int, frames: int) -> int:
    """Return how many (frame, seen frame) a block of a clip without documents has."""
    if not config.is_global(block):
        return sum(min(i + 1, config.window) for i in range(frames))
    return sum(
        i - j < config.global_window or (j % config.dilation == 0 and i - j < config.reach)
        for i in range(frames)
        for j in range(i + 1)
    )


def closed_form(config: WaypointConfig, frames: int, tokens: int) -> tuple[int, int]:
    """Return the FLOPs of the linear layers and of attention."""
    d, ratio, n = config.width, config.mlp_ratio, frames * tokens
    keys = d * config.key_heads // config.heads
    per_token = 2 * d * d + 2 * d * keys + 2 * ratio * d * d
    fused = sum(config.is_fused(block) for block in range(config.depth))
    tall = n * (config.depth * per_token + fused * 2 * d * d)
    patch = config.patch_size**2 * config.latent_channels * d
    tall += 2 * n * patch
    flat = frames * (
        4 * d * (config.noise_features + d)
        + ratio * d * (config.controls + d)
        + config.depth * 6 * d * d
        + fused * d * d
        + 2 * d * d
    )
    seen = sum(pairs(config, block, frames) for block in range(config.depth))
    return 2 * (tall + flat), 4 * seen * tokens**2 * d


@pytest.mark.parametrize("frames", [1, 13])
def test_the_count_is_the_closed_form(config, frames):
    config = replace(config, depth=4)
    shape = ExampleShape(1, frames, 4, 8, 4)
    assert forward_flops(config, shape) == sum(closed_form(config, frames, 8))


def test_a_window_more_costs_its_pairs(config):
    config = replace(config, depth=2)
    shape, wider = ExampleShape(1, 13, 4, 8, 4), replace(config, window=5)
    extra = closed_form(wider, 13, 8)[1] - closed_form(config, 13, 8)[1]
    assert forward_flops(wider, shape) - forward_flops(config, shape) == extra


@pytest.mark.full
def test_the_released_model_at_720p():
    """192 latent frames of 512 tokens: attention is a third of the forward pass, not four fifths
    as if all frames of the past were seen."""
    released = compose(["experiment=waypoint", "data.path=x"]).model
    dense, attention = closed_form(released, 192, 512)
    assert dense == pytest.approx(2.31e14, rel=5e-3)
    assert attention == pytest.approx(1.44e14, rel=5e-3)
    shape = ExampleShape(1, 192, 32, 64, 4)
    assert forward_flops(released, shape) == dense + attention
