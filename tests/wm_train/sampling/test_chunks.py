"""A student's rollout is the sampler's, and its late gradient is the whole graph's."""

from __future__ import annotations

import pytest
import torch

from parallel.layout import ClipLayout
from parallel.streaming import chunk_starts
from wm_train.conditioning import Conditions
from wm_train.models.init import initialise_
from wm_train.models.sana_wm.config import SanaWMConfig
from wm_train.models.spec import build_model
from wm_train.noise import NoiseKey
from wm_train.sampling.chunks import roll_out
from wm_train.sampling.levels import sampling_levels
from wm_train.sampling.stream import stream_rollout

CONFIG = SanaWMConfig(
    latent_channels=4,
    depth=2,
    width=16,
    heads=2,
    softmax_every=2,
    text_width=6,
    causal=True,
    window_chunks=2,
    sink_frames=1,
)
GRID, LEVELS = (2, 3), sampling_levels([1.0, 0.9, 0.75, 0.3])
KEY = NoiseKey(0, "student")


def awake(config: SanaWMConfig, seed: int = 0) -> torch.nn.Module:
    """A model whose every parameter matters, with a tame flow: errors do not grow along it."""
    model = build_model(config)
    initialise_(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        model.final_layer.linear.weight.mul_(0.2)
    return model


@pytest.fixture
def clip(camera_path):
    """clip(frames, clips) -> (first latents, conditions, draws, layout); a shorter clip is the
    start of a longer one, and clip i is the same in every batch."""

    def make(frames: int, clips: int = 2):
        rows = []
        for i in range(clips):
            generator = torch.Generator().manual_seed(i)
            first = torch.randn(1, 4, *GRID, generator=generator)
            text = torch.randn(1, 3, 6, generator=generator)
            rows.append((first, text, *camera_path(1, 40 * 8 + 1, generator)))
        first, text, c2w, intrinsics = (torch.cat(parts) for parts in zip(*rows))
        raw = (frames - 1) * 8 + 1
        conditions = Conditions.of((96, 160), 8, c2w[:, :raw], intrinsics[:, :raw], text=text)
        layout = ClipLayout(frames, chunk_starts=chunk_starts(frames, 3))
        return first, conditions, torch.arange(3, 3 + clips), layout

    return make


def exits_of(model, given, sampler="renoise", exit=4, **how):
    first, conditions, draws, layout = given
    start = (first, conditions, LEVELS, KEY, draws, layout)
    return list(roll_out(model, *start, exit=exit, sampler=sampler, **how))


@pytest.mark.parametrize("sampler", ["euler", "renoise"])
@pytest.mark.parametrize("context_sigma", [0.0, 0.15])
def test_a_rollout_to_the_last_step_is_the_sampler_to_the_bit(clip, sampler, context_sigma):
    model, (first, conditions, draws, layout) = awake(CONFIG), clip(8, 1)
    start = (first, conditions, LEVELS, KEY, draws, layout)
    how = {"sampler": sampler, "context_sigma": context_sigma}
    sampled = list(stream_rollout(model, *start, **how))
    exits = list(roll_out(model, *start, exit=4, **how))
    assert [len(found.chunk) for found in exits] == [4, 3, 1]
    for chunk, found in zip(sampled, exits, strict=True):
        assert torch.equal(chunk, found.clean)
        assert not found.clean.requires_grad
    assert torch.equal(exits[0].clean[:, 0], first)
    other = list(stream_rollout(model, *start, sampler=sampler, context_sigma=0.3))
    assert torch.equal(other[0], sampled[0])  # the first chunk has no past
    assert not torch.equal(other[1], sampled[1])


def test_a_longer_clip_starts_with_the_same_chunks(clip):
    model = awake(CONFIG)
    short, long = exits_of(model, clip(7, 1)), exits_of(model, clip(10, 1))
    assert len(short) < len(long)
    for a, b in zip(short, long):
        assert torch.equal(a.clean, b.clean)
        assert torch.equal(a.noisy, b.noisy)


def test_an_earlier_exit_makes_fewer_passes_and_keeps_its_level(clip):
    """Also the forward passes per chunk, which all ranks must make alike: exit, and one for the
    past of the next chunk."""
    model, given = awake(CONFIG), clip(8, 1)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(None))
    for exit in (1, 3):
        calls.clear()
        exits = exits_of(model, given, exit=exit)
        assert len(calls) == len(exits) * exit + len(exits) - 1
        assert {found.sigma for found in exits} == {LEVELS[exit - 1]}
    handle.remove()


def test_two_clips_at_once_equal_one_after_the_other(clip):
    """Up to rounding: products of other shapes sum in another order."""
    model = awake(CONFIG)
    first, conditions, draws, layout = clip(8)
    both = torch.cat([x.clean for x in exits_of(model, (first, conditions, draws, layout))], 1)
    for i in range(2):
        own = conditions.with_fields(
            **{name: value[i : i + 1] for name, value in conditions.fields.items()}
        )
        one = exits_of(model, (first[i : i + 1], own, draws[i : i + 1], layout))
        alone = torch.cat([x.clean for x in one], 1)
        assert (both[i : i + 1] - alone).abs().max() <= 5e-7 * both.abs().max()
