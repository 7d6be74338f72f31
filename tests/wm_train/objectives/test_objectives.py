"""Flow matching: the formula, the given first frame, the keyed choices, independence of the
mesh."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from parallel.layout import ClipLayout
from parallel.sequence import GroupSequence, LocalSequence
from parallel.virtual import replicate, run_virtual
from wm_train.conditioning import Conditions
from wm_train.config.registry import builder
from wm_train.models.init import initialise_
from wm_train.models.sana_wm.config import SanaWMConfig
from wm_train.models.spec import build_model
from wm_train.noise import NoiseKey, normal
from wm_train.objectives.chunk_mixture import (
    ANCHORED,
    CLEAN_PAST,
    INCREMENTAL,
    SAME,
    chunk_levels,
    draw_pattern,
)
from wm_train.objectives.clips import Clips
from wm_train.objectives.config import ChunkMixtureConfig, FlowMatchingConfig
from wm_train.objectives.flow_matching import clip_sigma
from wm_train.sampling.levels import shift_sigma

KEY = NoiseKey(3, "first")
SETTINGS = {"image_condition": 0.5, "camera_dropout": 0.5, "flow_shift": 3.0}
CONFIG, MIXTURE = FlowMatchingConfig(**SETTINGS), ChunkMixtureConfig(**SETTINGS)
CONFIGS = {config.name: config for config in (CONFIG, MIXTURE)}


@dataclass(frozen=True)
class Batch:
    latents: torch.Tensor
    draws: torch.Tensor


class Recorder(torch.nn.Module):
    """Stands for a model: keeps what it was given and answers `answer`."""

    def forward(self, latents, sigma, conditions, sequence):
        self.seen = (latents, sigma, conditions)
        return torch.zeros_like(latents) if self.answer is None else self.answer

    answer = None


def run_objective(model, data, key, config, sequence, conditions):
    """Call the configuration's objective as the trainer does."""
    clips = Clips(data.latents, data.draws, conditions, sequence, key)
    return builder(config)(model, clips, config)


def batch(clips: int, frames: int) -> Batch:
    return Batch(
        torch.randn(clips, frames, 3, 2, 4, generator=torch.Generator().manual_seed(0)),
        torch.arange(clips) + 40,
    )


def test_noisy_input_target_and_loss_are_those_of_the_formula():
    data, model = batch(64, 5), Recorder()
    sequence, conditions = LocalSequence(ClipLayout(5)), Conditions((96, 160), 8)
    out = run_objective(model, data, KEY, CONFIG, sequence, conditions)
    noisy, sigma, seen = model.seen
    noise = normal(KEY, "noise", data.draws, (0, 5), (3, 2, 4))
    given = out.metrics["image_condition"].bool()
    assert 16 < int(given.sum()) < 48
    assert torch.equal(sigma[given, 0], torch.zeros(int(given.sum())))
    assert torch.equal(noisy[given, 0], data.latents[given, 0])
    assert torch.equal(sigma[:, 1:], out.metrics["sigma"][:, None].expand(64, 4))
    level = sigma[:, :, None, None, None]
    assert torch.allclose(noisy, (1 - level) * data.latents + level * noise)
    error = (noise - data.latents).square().mean((2, 3, 4))
    expected = torch.where(given, error[:, 1:].mean(1), error.mean(1))
    assert torch.allclose(out.loss, expected, rtol=1e-5)
    assert 16 < int(seen.camera_keep.sum()) < 48
    model.answer = noise - data.latents
    assert run_objective(model, data, KEY, CONFIG, sequence, conditions).loss.abs().max() == 0


def test_a_single_frame_is_never_given():
    model = Recorder()
    out = run_objective(
        model,
        batch(8, 1),
        KEY,
        FlowMatchingConfig(),
        LocalSequence(ClipLayout(1)),
        Conditions((96, 160), 8),
    )
    assert (model.seen[1] > 0).all()
    assert (out.loss > 0).all()


def test_padding_has_no_weight():
    data = batch(2, 4)
    args = (Recorder(), data, KEY, FlowMatchingConfig())
    conditions, cut = Conditions((96, 160), 8), Batch(data.latents[:, :2], data.draws)
    whole = run_objective(*args, LocalSequence(ClipLayout(4, valid_frames=(2, 4))), conditions).loss
    short = run_objective(args[0], cut, *args[2:], LocalSequence(ClipLayout(2)), conditions).loss
    assert torch.allclose(whole[0], short[0])


def test_noise_levels_are_logit_normal_and_shifted():
    config = FlowMatchingConfig(sigma_mean=0.3, sigma_std=0.8, flow_shift=9.95)
    sigma = clip_sigma(KEY, torch.arange(20_000), config).double()
    plain = sigma / (9.95 - 8.95 * sigma)
    logits = torch.logit(plain)
    assert abs(logits.mean() - 0.3) < 4 * 0.8 / math.sqrt(20_000)
    assert abs(logits.std() - 0.8) < 4 * 0.8 / math.sqrt(2 * 20_000)
    assert shift_sigma(torch.tensor([0.0, 0.5, 1.0]), 3.0).tolist() == [0.0, 0.75, 1.0]


# Between meshes only the order of sums differs. In fp64 (2e-16 per operation) that is 1e-14; any
# fault in the mathematics is far above 1e-11. fp32 (6e-8 per operation) is the arithmetic of
# training: there a gradient, a sum of thousands of terms that partly cancel, is off by up to 1.1e-5
# of its largest element, depending on the processor's instructions, so its bound is a thousand
# operations' rounding.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
@pytest.mark.parametrize(
    ("objective", "ring", "ulysses"),
    [("flow_matching", 1, 2), ("flow_matching", 3, 1), ("chunk_mixture", 1, 3)],
)
def test_loss_and_gradients_do_not_depend_on_the_mesh(
    camera_path, objective, ring, ulysses, dtype, bound
):
    """Rows shared out over data-parallel members and frames over a sequence group: same loss per
    clip, same summed gradients."""
    config = SanaWMConfig(
        latent_channels=3,
        depth=2,
        width=16,
        heads=2,
        softmax_every=2,
        causal=objective == "chunk_mixture",
    )
    model = build_model(config)
    initialise_(model, 0)
    model.to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    data = batch(4, 7)
    data = replace(data, latents=data.latents.to(dtype))
    c2w, intrinsics = (x.to(dtype) for x in camera_path(4, 49, torch.Generator().manual_seed(1)))
    conditions, layout = (
        Conditions.of((96, 160), 8, c2w, intrinsics),
        ClipLayout(7, chunk_starts=(0, 4) if config.causal else (0,)),
    )
    whole = run_objective(model, data, KEY, CONFIGS[objective], LocalSequence(layout), conditions)
    whole.loss.sum().backward()
    losses, grads = [], {}
    for rows in (slice(0, 3), slice(3, 4)):
        copies = replicate(model, ring * ulysses)

        def body(comm, rows=rows, copies=copies):
            sequence = GroupSequence(layout, comm)
            part = Batch(
                data.latents[rows, sequence.frames.start : sequence.frames.stop], data.draws[rows]
            )
            seen = conditions.with_fields(c2w=c2w[rows], intrinsics=intrinsics[rows])
            return run_objective(
                copies[comm.members[0].index], part, KEY, CONFIGS[objective], sequence, seen
            ).loss

        results, _ = run_virtual(body, ring, ulysses)
        sum(loss.sum() for loss in results).backward()
        assert all(torch.equal(loss, results[0]) for loss in results)
        losses.append(results[0])
        for name in (n for n, p in model.named_parameters() if p.requires_grad):
            grads[name] = grads.get(name, 0) + sum(copy.get_parameter(name).grad for copy in copies)
    torch.testing.assert_close(torch.cat(losses), whole.loss, rtol=bound, atol=0)
    for name, grad in grads.items():
        expected = model.get_parameter(name).grad
        assert (grad - expected).abs().max() <= bound * expected.abs().max().clamp_min(1e-6), name


def test_dropped_text_is_the_null_text():
    data, model = batch(64, 2), Recorder()
    text, null = torch.randn(64, 5, 6), torch.randn(3, 6)
    seen = Conditions.of(
        (96, 160), 8, text=text, text_mask=torch.ones(64, 5, dtype=torch.bool), null_text=null
    )
    config = FlowMatchingConfig(text_dropout=0.3)
    run_objective(model, data, KEY, config, LocalSequence(ClipLayout(2)), seen)
    given = model.seen[2]
    dropped = ~given.text_mask.all(1)
    assert 8 < int(dropped.sum()) < 32
    assert torch.equal(given.text[~dropped], text[~dropped])
    assert torch.equal(given.text[dropped][:, :3], null.expand(int(dropped.sum()), 3, 6))
    assert given.text_mask[dropped].sum(1).tolist() == [3] * int(dropped.sum())
    with pytest.raises(ValueError, match="null text"):
        run_objective(
            model, data, KEY, config, LocalSequence(ClipLayout(2)), replace(seen, null_text=None)
        )


def test_chunk_levels_follow_their_pattern():
    draws, chunks = torch.arange(4000), 5
    sigma = torch.full((4000,), 0.4)
    levels = {
        p: chunk_levels(KEY, draws, torch.full((4000,), p), sigma, chunks)
        for p in (SAME, INCREMENTAL, ANCHORED, CLEAN_PAST)
    }
    assert (levels[SAME] == 0.4).all()
    assert torch.equal(levels[CLEAN_PAST], torch.tensor([0.0, 0.0, 0.0, 0.0, 0.4]).expand(4000, 5))
    for pattern in (INCREMENTAL, ANCHORED):
        assert (levels[pattern].diff(dim=1) >= 0).all()
        assert 0 < levels[pattern].min() < levels[pattern].max() < 1
        assert (levels[pattern] == 0.4).any(dim=1).all()
    assert (levels[ANCHORED][:, -1] == 0.4).all()
    # four sorted uniforms below 0.4 have means 0.4 * k / 5
    assert (levels[ANCHORED][:, :4].mean(0) - 0.4 * torch.arange(1, 5) / 5).abs().max() < 0.01
    # any chunk may be the anchor, each as often
    anchored = (levels[INCREMENTAL] == 0.4).float().mean(0)
    assert (anchored - 0.2).abs().max() < 0.03


def test_patterns_come_in_their_shares():
    pattern = draw_pattern(
        KEY, torch.arange(20_000), ChunkMixtureConfig(chunk_mixture=(1.0, 4.0, 4.0, 1.0))
    )
    shares = torch.bincount(pattern, minlength=4) / 20_000
    assert (shares - torch.tensor([0.1, 0.4, 0.4, 0.1])).abs().max() < 0.015


def test_chunk_mixture_gives_every_frame_its_chunks_level_and_weighs_no_clean_frame():
    data, model = batch(32, 8), Recorder()
    sequence, conditions = (
        LocalSequence(ClipLayout(8, chunk_starts=(0, 4, 7))),
        Conditions((96, 160), 8),
    )
    out = run_objective(
        model, data, KEY, replace(MIXTURE, chunk_mixture=(0.0, 0.0, 0.0, 1.0)), sequence, conditions
    )
    noisy, sigma, _ = model.seen
    assert torch.equal(noisy[:, :7], data.latents[:, :7])
    assert torch.equal(sigma[:, 7], out.metrics["sigma"])
    noise = normal(KEY, "noise", data.draws, (7, 8), (3, 2, 4))[:, 0]
    assert torch.allclose(
        out.loss, (noise - data.latents[:, 7]).square().mean((1, 2, 3)), rtol=1e-5
    )
    run_objective(model, data, KEY, replace(MIXTURE, image_condition=0.0), sequence, conditions)
    sigma = model.seen[1]
    assert all(
        torch.equal(sigma[:, a:b], sigma[:, a : a + 1].expand(32, b - a))
        for a, b in ((0, 4), (4, 7), (7, 8))
    )
    assert len(sigma[:, 0].unique()) > 20
    with pytest.raises(ValueError, match="one chunk"):
        run_objective(model, data, KEY, MIXTURE, LocalSequence(ClipLayout(8)), conditions)
