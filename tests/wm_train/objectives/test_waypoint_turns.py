"""Waypoint's post-training in turns: guidance by three passes, packed gradients, on any group."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from parallel.layout import ClipLayout
from parallel.reference import REFERENCE
from parallel.sequence import GroupSequence, LocalSequence
from parallel.streaming import chunk_starts
from parallel.virtual import replicate, run_virtual
from wm_train.conditioning import Conditions
from wm_train.config.roles import DistillConfig, ScoreSigmaConfig, Turn
from wm_train.models.spec import build_model
from wm_train.models.waypoint.config import WaypointConfig
from wm_train.noise import NoiseKey
from wm_train.objectives.clips import Clips, RoleTurn
from wm_train.objectives.config import DistributionMatchingConfig
from wm_train.objectives.distribution_matching import distribution_matching
from wm_train.sampling.guidance import frames_apart, guided, guided_passes, velocities

KEY, FRAMES = NoiseKey(7, "distill"), 7
LAYOUT = ClipLayout(FRAMES, chunk_starts=chunk_starts(FRAMES, 1))
MODEL = WaypointConfig(
    latent_channels=3,
    depth=4,
    width=32,
    heads=2,
    key_heads=1,
    mlp_ratio=2,
    noise_features=12,
    controls=6,
    window=3,
    dilation=2,
    reach=6,
)
LATENTS = torch.randn(2, FRAMES, 3, 2, 4, generator=torch.Generator().manual_seed(0)).double()
CONTROLS = torch.randn(2, FRAMES, 6, generator=torch.Generator().manual_seed(1)).double()
RECIPE = DistillConfig(
    (1.0, 0.9, 0.75, 0.3),
    sampler="euler",
    gradient="packed",
    guidance={"controls": 15.0, "context": 2.0},
    score_sigma=ScoreSigmaConfig(law="logit_normal", low=0.001, high=0.999, per="chunk"),
    ida=0.98,
    isg=0.5,
)


def awake(seed: int):
    model, g = build_model(MODEL).double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 10
            parameter.copy_(torch.randn(parameter.shape, generator=g).double() * fan_in**-0.5)
        model.unpatchify.weight.mul_(0.3)
    return model


@pytest.fixture(scope="module")
def networks():
    found = {"student": awake(0), "teacher": awake(1), "critic": awake(2)}
    found["teacher"].requires_grad_(False)
    return found


def take(networks, role, index=0, comm=None, distill=RECIPE):
    sequence = GroupSequence(LAYOUT, comm) if comm else LocalSequence(LAYOUT)
    local = slice(sequence.frames.start, sequence.frames.stop)
    conditions = Conditions((32, 64), 4, {"controls": CONTROLS})
    clips = Clips(LATENTS[:, local], torch.arange(2), conditions, sequence, KEY)
    roles = dict.fromkeys(("student", "teacher", "critic"), sequence)
    turn = RoleTurn(Turn(role, index), distill, roles, LATENTS[:, 0], REFERENCE)
    return distribution_matching(networks, clips, DistributionMatchingConfig(), turn)


def total(out):
    return out.loss.sum() if out.pieces is None else sum(out.pieces)


def gradients(model, out):
    model.zero_grad(set_to_none=True)
    total(out).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_packed_turns_are_late_turns(networks):
    """Loss, gradients and figures with guidance by controls and segments; fp64."""
    both = replace(RECIPE, guidance={"controls": 3.0})
    late, packed = (
        take(networks, "student", 1, distill=replace(both, gradient=name))
        for name in ("late", "packed")
    )
    expected, found = (gradients(networks["student"], out) for out in (late, packed))
    assert torch.equal(late.loss, packed.loss)
    assert (late.metrics["isg"] - packed.metrics["isg"]).abs().max() <= 1e-6
    assert float(late.metrics["isg"].min()) > 0
    assert packed.count == 2
    for name, grad in expected.items():
        assert (found[name] - grad).abs().max() <= 1e-11 * grad.abs().max(), name


@pytest.mark.parametrize("role", ["student", "critic"])
@pytest.mark.parametrize("ring", [2, pytest.param(4, marks=pytest.mark.full)])
def test_a_turn_does_not_depend_on_the_sequence_group(networks, role, ring):
    """All of the recipe. Two members roll out a clip each, four both; scores and packed passes are
    split over frames. Loss within 1e-11, every gradient within 1e-11."""
    whole = take(networks, role)
    expected = gradients(networks[role], whole)
    copies = replicate(networks[role], ring)

    def body(comm):
        mine = {**networks, role: copies[comm.members[0].index]}
        out = take(mine, role, comm=comm)
        return out.loss, total(out)

    results, _ = run_virtual(body, ring)
    sum(loss for _, loss in results).backward()
    for loss, _ in results:
        torch.testing.assert_close(loss, whole.loss, rtol=1e-11, atol=0)
    for name, grad in expected.items():
        found = sum(copy.get_parameter(name).grad for copy in copies)
        bound = 1e-11 * grad.abs().max() + 1e-18
        assert (found - grad).abs().max() <= bound, name


@torch.no_grad()
def test_the_teacher_makes_three_passes_each_with_one_condition_alone(networks):
    """Eq. 9: nothing, the controls, the context; without context each frame is a clip of its own,
    on every sequence group."""
    model, weights = networks["teacher"], RECIPE.guidance
    conditions, level = (
        Conditions((32, 64), 4, {"controls": CONTROLS}),
        torch.full((2, FRAMES), 0.5),
    )
    level = level.double()

    def run(sequence):
        local = slice(sequence.frames.start, sequence.frames.stop)
        passes = guided_passes(conditions, weights, torch.arange(2), sequence)
        out = velocities(model, LATENTS[:, local], level[:, local], *passes)
        return out, guided(out, weights)

    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(None))
    (none, controls, context), together = run(LocalSequence(LAYOUT))
    handle.remove()
    assert len(calls) == 3
    bare = replace(
        conditions.with_fields(controls=torch.zeros_like(CONTROLS)),
        controls_keep=torch.zeros(2, dtype=torch.bool),
    )
    whole = LocalSequence(LAYOUT)
    assert torch.equal(context, model(LATENTS, level, bare, whole))
    for frame in range(FRAMES):
        one = slice(frame, frame + 1)
        shown = conditions.with_fields(controls=CONTROLS[:, one])
        hidden = replace(shown, controls_keep=bare.controls_keep)
        alone = LocalSequence(ClipLayout(1))
        for found, seen in ((none, hidden), (controls, shown)):
            expected = model(LATENTS[:, one], level[:, one], seen, alone)
            assert (found[:, one] - expected).abs().max() <= 1e-12 * found.abs().max()
    expected = none + 15 * (controls - none) + 2 * (context - none)
    assert torch.equal(together, expected)
    results, _ = run_virtual(lambda comm: run(GroupSequence(LAYOUT, comm))[1], 3)
    split = torch.cat(results, dim=1)
    assert (split - together).abs().max() <= 1e-11 * together.abs().max()


def test_frames_apart_keep_padding():
    layout = replace(LAYOUT, valid_frames=(7, 5))
    assert frames_apart(layout).valid_frames == (7, 5)
    assert frames_apart(layout).document_starts == tuple(range(7))
