"""Diffusion forcing: its formula, a level for each frame, keyed choices, any mesh."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from parallel.layout import ClipLayout
from parallel.rows import RowsSequence
from parallel.sequence import GroupSequence, LocalSequence, SequenceShard
from parallel.virtual import replicate, run_virtual
from wm_train.conditioning import Conditions
from wm_train.config.registry import builder
from wm_train.config.rules import broken_rules
from wm_train.models.init import initialise_
from wm_train.models.spec import WorldModel, build_model
from wm_train.models.waypoint.config import WaypointConfig
from wm_train.noise import NoiseKey, normal
from wm_train.objectives import diffusion_forcing as forcing
from wm_train.objectives.clips import Clips
from wm_train.objectives.diffusion_forcing import frame_sigma
from wm_train.objectives.forcing_config import DiffusionForcingConfig

KEY = NoiseKey(3, "pretrain")
FIRST = 4  # from this draw on, of three clips some lose their controls and some keep them
CONFIG = DiffusionForcingConfig(sigma_mean=-0.5, sigma_std=1.5, flow_shift=3.0)


class Recorder(torch.nn.Module):
    """Stands for a model: keeps what it was given and answers zeros."""

    def forward(self, latents, sigma, conditions, sequence):
        self.seen = (latents, sigma, conditions)
        return torch.zeros_like(latents)


def clips_of(
    batch: int, frames: int, sequence: SequenceShard | None = None, first: int = 0
) -> Clips:
    """Clips of global draws first, first + 1, ..., with controls that say their frame."""
    sequence = sequence or LocalSequence(ClipLayout(frames))
    latents = torch.stack([torch.full((frames, 3, 2, 4), float(i)) for i in range(batch)])
    latents = latents + torch.arange(frames)[None, :, None, None, None] / 8
    controls = torch.arange(frames).expand(batch, frames)[..., None].repeat(1, 1, 7).float()
    conditions = Conditions((32, 64), 4, {"controls": controls})
    draws = torch.arange(first, first + batch)
    local = slice(sequence.frames.start, sequence.frames.stop)
    return Clips(latents[:, local], draws, conditions, sequence, KEY)


def run(model, clips: Clips, config: DiffusionForcingConfig = CONFIG):
    return builder(config)(model, clips, config)


def test_the_loss_is_the_closed_form():
    """Of a model that answers zero: the mean square of eps - x, over all frames, the first too."""
    model, clips = Recorder(), clips_of(3, 5)
    output = run(model, clips)
    noise = normal(KEY, "noise", clips.draws, (0, 5), (3, 2, 4))
    target = (noise - clips.latents).double()
    expected = target.square().flatten(1).mean(1)
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-6, atol=0)
    noisy, sigma, _ = model.seen
    level = sigma[:, :, None, None, None]
    torch.testing.assert_close(noisy, (1 - level) * clips.latents + level * noise)
    assert bool((sigma > 0).all())
    torch.testing.assert_close(output.metrics["sigma"], sigma.mean(1))


def test_levels_are_the_shifted_logit_normal():
    sigma = frame_sigma(clips_of(500, 40), CONFIG).double()
    plain = sigma / (3 - 2 * sigma)
    normals = (torch.logit(plain) + 0.5) / 1.5
    assert abs(float(normals.mean())) < 0.03
    assert abs(float(normals.std()) - 1) < 0.02
    inside = float((normals.abs() < 1).double().mean())
    assert abs(inside - math.erf(0.5**0.5)) < 0.01
    assert abs(float(torch.corrcoef(normals[:, :2].T)[0, 1])) < 0.15  # neighbours are independent


def test_a_level_belongs_to_its_draw_and_frame():
    """A later draw, a shorter clip and part of a clip see the same levels."""
    whole = frame_sigma(clips_of(4, 9), CONFIG)
    torch.testing.assert_close(frame_sigma(clips_of(2, 9, first=2), CONFIG), whole[2:])
    torch.testing.assert_close(frame_sigma(clips_of(4, 6), CONFIG), whole[:, :6])
    assert len(whole.unique()) == whole.numel()

    def body(comm):
        return frame_sigma(clips_of(4, 9, GroupSequence(ClipLayout(9), comm)), CONFIG)

    parts, _ = run_virtual(body, 2, 2)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_padding_weighs_nothing():
    layout = ClipLayout(6, valid_frames=(6, 2))
    output = run(Recorder(), clips_of(2, 6, LocalSequence(layout)))
    alone = run(Recorder(), clips_of(2, 2))
    torch.testing.assert_close(output.loss[1], alone.loss[1])
    torch.testing.assert_close(output.metrics["sigma"][1], alone.metrics["sigma"][1])


def test_controls_are_dropped_by_the_clip_in_their_share():
    model = Recorder()
    output = run(model, clips_of(2000, 1), replace(CONFIG, controls_dropout=0.3))
    kept = model.seen[2].controls_keep
    assert torch.equal(output.metrics["controls"], kept.float())
    assert abs(float(kept.float().mean()) - 0.7) < 0.03
    run(model, clips_of(50, 1))
    assert bool(model.seen[2].controls_keep.all())
    clips = clips_of(3, 1)
    dropped = replace(clips.conditions, controls_keep=torch.tensor([True, False, True]))
    run(model, replace(clips, conditions=dropped))
    assert model.seen[2].controls_keep.tolist() == [True, False, True]


def test_the_held_out_loss_is_of_one_level():
    model = Recorder()
    for sigma in CONFIG.held_out_levels():
        held = replace(CONFIG, controls_dropout=0.9).held_out(sigma)
        run(model, clips_of(4, 3), held)
        torch.testing.assert_close(model.seen[1], torch.full((4, 3), sigma))
        assert bool(model.seen[2].controls_keep.all())


def test_every_bad_value_is_one_report():
    bad = {"sigma_mean": math.nan, "sigma_std": 0.0, "flow_shift": -1.0, "controls_dropout": 1.5}
    for key, value in bad.items():
        (problem,) = broken_rules(replace(CONFIG, **{key: value}))
        assert problem.where == key
    with pytest.raises(ValueError, match=r"got 0\.0 to 0\.5 for objective diffusion_forcing"):
        CONFIG.narrowed(0.0, 0.5)


def waypoint() -> WorldModel:
    """Return a small Waypoint in fp64 with no weight at zero."""
    shape = {"latent_channels": 3, "width": 64, "depth": 4, "noise_features": 16}
    model = build_model(WaypointConfig(**shape, controls=7, window=2, dilation=2, reach=4))
    initialise_(model, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.where(parameter == 0, 0.1, 0.0))
    return model.double()


def doubled(clips: Clips) -> Clips:
    return replace(clips, latents=clips.latents.double())


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 2), (2, 1), (2, 2)])
def test_loss_and_gradients_do_not_depend_on_the_mesh(ring, ulysses):
    """Of Waypoint itself, in fp64, with some clips without their controls."""
    model, config = waypoint(), replace(CONFIG, controls_dropout=0.5)
    expected = run(model, doubled(clips_of(3, 7, first=FIRST)), config)
    expected.loss.sum().backward()
    assert 0 < float(expected.metrics["controls"].sum()) < 3
    copies = replicate(model, ring * ulysses)

    def body(comm):
        clips = doubled(clips_of(3, 7, GroupSequence(ClipLayout(7), comm), FIRST))
        return run(copies[comm.members[0].index], clips, config).loss

    losses, _ = run_virtual(body, ring, ulysses)
    torch.stack([loss.sum() for loss in losses]).sum().backward()
    for loss in losses:
        torch.testing.assert_close(loss, expected.loss, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parts = [copy.get_parameter(name).grad for copy in copies]
            error = (sum(parts) - parameter.grad).abs().max() / parameter.grad.abs().max()
            assert error < 1e-6, name


# of three rows of seven frames: first frames of their documents, and how many frames are real
ROWS = (((0,), 7), ((0, 3), 7), ((0, 2, 5), 6))


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 1), (1, 2), (2, 1)])
def test_rows_of_other_documents_in_one_batch_are_rows_one_by_one(ring, ulysses, monkeypatch):
    """Losses and gradients of Waypoint in fp64, on one device and split over two. Levels and noise
    are given, as drawn ones are fp32 and rounded by the shape of a batch."""
    model, config = waypoint(), replace(CONFIG, controls_dropout=0.5)
    sigma, noise = torch.rand(3, 7).double(), torch.randn(3, 7, 3, 2, 4).double()

    def own_part(x: Tensor, clips: Clips) -> Tensor:
        frames = clips.sequence.frames
        return x[clips.draws - FIRST, frames.start : frames.stop]

    monkeypatch.setattr(forcing, "frame_sigma", lambda clips, _: own_part(sigma, clips))
    monkeypatch.setattr(Clips, "normal", lambda clips, _: own_part(noise, clips))
    chunks = tuple(range(7))
    layouts = [ClipLayout(7, starts, chunks, (real,)) for starts, real in ROWS]
    losses = []
    for number, layout in enumerate(layouts):
        clips = doubled(clips_of(3, 7, LocalSequence(layout), FIRST))
        rows = slice(number, number + 1)
        own = replace(
            clips,
            latents=clips.latents[rows],
            draws=clips.draws[rows],
            conditions=clips.conditions.rows(rows),
        )
        losses.append(run(model, own, config).loss)
    expected = torch.cat(losses)
    expected.sum().backward()
    copies = replicate(model, ring * ulysses)

    def body(comm):
        sequence = RowsSequence([GroupSequence(layout, comm) for layout in layouts])
        clips = doubled(clips_of(3, 7, sequence, FIRST))
        return run(copies[comm.members[0].index], clips, config).loss

    found, _ = run_virtual(body, ring, ulysses)
    torch.stack([loss.sum() for loss in found]).sum().backward()
    for loss in found:
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parts = [copy.get_parameter(name).grad for copy in copies]
            error = (sum(parts) - parameter.grad).abs().max() / parameter.grad.abs().max()
            assert error < 1e-11, name


def test_rows_of_other_documents_have_no_layout_in_common():
    rows = [LocalSequence(ClipLayout(7, starts)) for starts, _ in ROWS]
    sequence = RowsSequence(rows)
    assert sequence.clip_frames == 7
    assert sequence.positions.tolist()[1:] == [[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 2, 0, 1]]
    with pytest.raises(ValueError, match="one layout was asked of 3 rows"):
        sequence.layout  # noqa: B018
    with pytest.raises(ValueError, match="a halo was asked of 3 rows"):
        sequence.halo([], 1, 1)
    with pytest.raises(ValueError, match=r"got \[\(7, 0, 7\), \(8, 0, 8\)\]"):
        RowsSequence([*rows, LocalSequence(ClipLayout(8))])
