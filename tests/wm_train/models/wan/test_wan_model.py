"""Check what the public class says nothing of: text, image, positions, types, units."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.layout import ClipLayout
from parallel.sequence import LocalSequence
from wm_train.config.rules import broken_rules
from wm_train.models.examples import ExampleShape
from wm_train.models.flops import forward_flops
from wm_train.models.wan.rope import check_positions, wan_rope
from wm_train.noise import NoiseKey
from wm_train.sampling.rollout import rollout


def with_text(clip, text, mask=None):
    return replace(clip, conditions=clip.conditions.with_fields(text=text, text_mask=mask))


def gap(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("tokens", [511, 513])
def test_a_text_of_another_length_is_refused(kinds, awake, make_clip, tokens):
    model, clip = awake(kinds["t2v"]), make_clip(kinds["t2v"])
    text = torch.zeros(2, tokens, clip.conditions.text.shape[2])
    with pytest.raises(ValueError, match=f"got {tokens} vectors, expected 512 .*text_length=512"):
        with_text(clip, text).whole(model)
    with pytest.raises(ValueError, match="got none"):
        with_text(clip, None).whole(model)


@torch.no_grad()
def test_zeros_behind_a_text_are_seen(kinds, awake, make_clip):
    """Vectors behind a text's end count as zeros, whatever an encoder put there, and 12 of them are
    not 512."""
    config = kinds["t2v"]
    model, clip = awake(config, torch.float64), make_clip(config, torch.float64)
    mask = (torch.arange(512) < 5)[None].expand(2, -1)
    zeros = torch.where(mask[:, :, None], clip.conditions.text, 0.0)
    expected = with_text(clip, zeros).whole(model)
    assert torch.equal(with_text(clip, clip.conditions.text, mask).whole(model), expected)
    assert gap(clip.whole(model), expected) > 0.01
    short = awake(replace(config, text_tokens=12), torch.float64)
    assert gap(with_text(clip, zeros[:, :12]).whole(short), expected) > 0.01


def test_positions_come_from_fp64_and_end_with_the_table():
    positions = torch.tensor([[0, 1, 499, 1023]])
    cos, sin = wan_rope(positions, (3, 5), 128, torch.float64, torch.device("cpu"))
    assert cos.shape == sin.shape == (1, 4, 15, 1, 64)
    angles = positions[0].double()[:, None] * 10000.0 ** -(torch.arange(22).double() / 22)
    assert gap(cos[0, :, 0, 0, :22], angles.cos()) < 1e-15
    rounded = wan_rope(positions, (3, 5), 128, torch.float32, torch.device("cpu"))
    assert torch.equal(rounded.sin, sin.float())
    assert torch.equal(sin[0, 0, :, 0, 43:], sin[0, 0, :5, 0, 43:].repeat(3, 1))  # columns
    check_positions(LocalSequence(ClipLayout(1024)), (3, 5))
    check_positions(LocalSequence(ClipLayout(1600, document_starts=(0, 800))), (3, 5))
    with pytest.raises(ValueError, match="got position 1024, expected at most 1023"):
        check_positions(LocalSequence(ClipLayout(1025)), (3, 5))


@pytest.mark.parametrize("kind", ["t2v", "clip"])
def test_flops_are_counted_without_values(kinds, kind):
    """As the trainer does before its first step; a frame more costs more."""
    config = replace(kinds[kind], camera=True)
    short, long = (forward_flops(config, ExampleShape(1, t, 6, 10, 4)) for t in (2, 3))
    assert 0 < short < long


@torch.no_grad()
def test_the_last_stored_latent_of_an_image_goes_on(kinds, awake, make_clip):
    """And a document's mask is 1 in its first frame only, wherever it lies in the clip."""
    config = kinds["i2v"]
    model, clip = awake(config), make_clip(config)
    layout = ClipLayout(5, document_starts=(0, 3))
    channels = model.image_channels(clip.latents, clip.conditions, LocalSequence(layout))
    assert channels[:, :, :4].amax((0, 2, 3, 4)).tolist() == [1, 0, 0, 1, 0]
    assert channels[:, :, :4].amin((0, 2, 3, 4)).tolist() == [1, 0, 0, 1, 0]
    stored = clip.conditions.fields["start_video"]
    assert torch.equal(channels[:, :, 4:], stored[:, [0, 1, 2, 0, 1]])
    longer = model.image_channels(clip.latents, clip.conditions, LocalSequence(ClipLayout(5)))
    assert torch.equal(longer[:, :, 4:], stored[:, [0, 1, 2, 2, 2]])
    without = replace(clip, conditions=clip.conditions.with_fields(start_video=None))
    with pytest.raises(ValueError, match="got clips without start_video"):
        without.whole(model)


class Types(TorchDispatchMode):
    """Record the types of the matrix products, by their inputs' last dimension."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.addmm.default:
            self.seen.setdefault((args[2].shape[0], args[2].shape[1]), set()).add(args[1].dtype)
        return out


def test_time_and_modulation_stay_in_fp32(kinds, awake, make_clip):
    """As FSDP2 has it in bf16: fp32 weights in the exact units, bf16 in all others."""
    config = kinds["t2v"]
    model, clip = awake(config, torch.bfloat16), make_clip(config)
    exact = {id(p) for unit in model.exact_units() for p in unit.parameters()}
    names = {name for name, p in model.named_parameters() if id(p) in exact}
    endings = {name.split(".", 2)[-1] if name.startswith("blocks.") else name for name in names}
    assert endings == {
        *(
            f"condition_embedder.time_embedder.linear_{i}.{p}"
            for i in (1, 2)
            for p in ("weight", "bias")
        ),
        *(f"condition_embedder.time_proj.{p}" for p in ("weight", "bias")),
        "output_scales.scale_shift_table",
        *(f"scales.{name}" for name in ("scale_shift_table", "norm2.weight", "norm2.bias")),
    }
    for unit in model.exact_units():
        unit.float()
    seen = []
    for block in model.blocks:
        block.scales.register_forward_hook(lambda _, args, out: seen.extend([args[0], *out]))
    with Types() as products:
        out = clip.whole(model)
    assert {x.dtype for x in seen} == {torch.float32}
    width, hidden = config.width, config.ffn_width
    assert products.seen[(256, width)] == products.seen[(width, 6 * width)] == {torch.float32}
    assert products.seen[(width, hidden)] == products.seen[(hidden, width)] == {torch.bfloat16}
    assert out.dtype == torch.bfloat16


def test_a_configuration_that_fits_no_model_is_refused(kinds):
    wrong = replace(kinds["t2v"], clip_width=8)
    assert [p.where for p in broken_rules(wrong)] == ["clip_width"]
    assert [p.where for p in broken_rules(replace(kinds["t2v"], width=98))] == ["width"]
    assert not [*broken_rules(kinds["clip"])]


@torch.no_grad()
def test_every_frame_is_sampled_where_the_image_comes_by_channels(kinds, awake, make_clip):
    """The first latent is neither given clean nor read: the model sees noise at sigma 1 there."""
    config = kinds["i2v"]
    model, clip = awake(config), make_clip(config)
    seen = []

    def velocity(latents, level, conditions, sequence):
        seen.append((latents[:, 0], level))
        return model(latents, level, conditions, sequence)

    def sample(first, clean_first):
        layout, draws = ClipLayout(5), torch.arange(2)
        given = (first, clip.conditions, [1.0, 0.5, 0.0], NoiseKey(0, 0), draws)
        return rollout(velocity, *given, LocalSequence(layout), clean_first=clean_first)

    first = torch.full_like(clip.latents[:, 0], 7.0)
    free = sample(first, clean_first=False)
    assert seen[0][1].min() == 1.0
    assert not (seen[0][0] == 7.0).any()
    assert torch.equal(sample(first + 1, clean_first=False), free)
    assert torch.equal(sample(first, clean_first=True)[:, 0], first)
