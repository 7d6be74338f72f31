"""Flow matching: the formula, the given first frame, the keyed choices, independence of the mesh."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from parallel.layout import ClipLayout
from parallel.sequence import GroupSequence, LocalSequence
from parallel.virtual import replicate, run_virtual
from wm_train.conditioning import Conditions
from wm_train.config import ModelConfig, ObjectiveConfig
from wm_train.models import build_model, initialise_
from wm_train.noise import NoiseKey, normal
from wm_train.objectives import OBJECTIVES
from wm_train.objectives.flow_matching import clip_sigma, shift_sigma

KEY = NoiseKey(3, 1)
CONFIG = ObjectiveConfig(image_condition=0.5, camera_dropout=0.5, flow_shift=3.0)


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


def batch(clips: int, frames: int) -> Batch:
    return Batch(torch.randn(clips, frames, 3, 2, 4, generator=torch.Generator().manual_seed(0)), torch.arange(clips) + 40)


def test_noisy_input_target_and_loss_are_those_of_the_formula():
    data, model = batch(64, 5), Recorder()
    sequence, conditions = LocalSequence(ClipLayout(5)), Conditions((96, 160), 8)
    out = OBJECTIVES["flow_matching"](model, data, KEY, CONFIG, sequence, conditions)
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
    assert OBJECTIVES["flow_matching"](model, data, KEY, CONFIG, sequence, conditions).loss.abs().max() == 0


def test_a_single_frame_is_never_given():
    model = Recorder()
    out = OBJECTIVES["flow_matching"](model, batch(8, 1), KEY, ObjectiveConfig(), LocalSequence(ClipLayout(1)), Conditions((96, 160), 8))
    assert (model.seen[1] > 0).all()
    assert (out.loss > 0).all()


def test_padding_has_no_weight():
    data = batch(2, 4)
    args = (Recorder(), data, KEY, ObjectiveConfig())
    conditions, cut = Conditions((96, 160), 8), Batch(data.latents[:, :2], data.draws)
    whole = OBJECTIVES["flow_matching"](*args, LocalSequence(ClipLayout(4, valid_frames=(2, 4))), conditions).loss
    short = OBJECTIVES["flow_matching"](args[0], cut, *args[2:], LocalSequence(ClipLayout(2)), conditions).loss
    assert torch.allclose(whole[0], short[0])


def test_noise_levels_are_logit_normal_and_shifted():
    config = ObjectiveConfig(sigma_mean=0.3, sigma_std=0.8, flow_shift=9.95)
    sigma = clip_sigma(KEY, torch.arange(20_000), config).double()
    plain = sigma / (9.95 - 8.95 * sigma)
    logits = torch.logit(plain)
    assert abs(logits.mean() - 0.3) < 4 * 0.8 / math.sqrt(20_000)
    assert abs(logits.std() - 0.8) < 4 * 0.8 / math.sqrt(2 * 20_000)
    assert shift_sigma(torch.tensor([0.0, 0.5, 1.0]), 3.0).tolist() == [0.0, 0.75, 1.0]


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 2), (3, 1)])
def test_loss_and_gradients_do_not_depend_on_the_mesh(camera_path, ring, ulysses):
    """Rows shared out over data-parallel members and frames over a sequence group: same loss per clip, same summed gradients."""
    config = ModelConfig(latent_channels=3, depth=2, width=16, heads=2, softmax_every=2)
    model = build_model(config)
    initialise_(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    data = batch(4, 7)
    c2w, intrinsics = camera_path(4, 49, torch.Generator().manual_seed(1))
    conditions, layout = Conditions((96, 160), 8, c2w, intrinsics), ClipLayout(7)
    whole = OBJECTIVES["flow_matching"](model, data, KEY, CONFIG, LocalSequence(layout), conditions)
    whole.loss.sum().backward()
    losses, grads = [], {}
    for rows in (slice(0, 3), slice(3, 4)):
        copies = replicate(model, ring * ulysses)

        def body(comm, rows=rows, copies=copies):
            sequence = GroupSequence(layout, comm)
            part = Batch(data.latents[rows, sequence.frames.start : sequence.frames.stop], data.draws[rows])
            seen = replace(conditions, c2w=c2w[rows], intrinsics=intrinsics[rows])
            return OBJECTIVES["flow_matching"](copies[comm.members[0].index], part, KEY, CONFIG, sequence, seen).loss

        results, _ = run_virtual(body, ring, ulysses)
        sum(loss.sum() for loss in results).backward()
        assert all(torch.equal(loss, results[0]) for loss in results)
        losses.append(results[0])
        for name in (n for n, p in model.named_parameters() if p.requires_grad):
            grads[name] = grads.get(name, 0) + sum(copy.get_parameter(name).grad for copy in copies)
    assert torch.allclose(torch.cat(losses), whole.loss, rtol=1e-5)
    for name, grad in grads.items():
        expected = model.get_parameter(name).grad
        assert (grad - expected).abs().max() <= 1e-5 * expected.abs().max().clamp_min(1e-6), name
