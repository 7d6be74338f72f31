"""Intra-segment guidance in a student's turn: written out once more, on every sequence group, and
what it asks of the teacher."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from parallel.layout import ClipLayout
from parallel.reference import REFERENCE
from parallel.sequence import GroupSequence, LocalSequence
from parallel.streaming import StreamingSequence, StreamState, chunk_starts
from parallel.virtual import replicate, run_virtual
from wm_train.conditioning import Conditions
from wm_train.config.roles import DistillConfig, Turn
from wm_train.models.init import initialise_
from wm_train.models.sana_wm.config import SanaWMConfig
from wm_train.models.spec import build_model
from wm_train.noise import NoiseKey
from wm_train.objectives.alignment import SOFT
from wm_train.objectives.clips import Clips, RoleTurn
from wm_train.objectives.config import DistributionMatchingConfig
from wm_train.objectives.distribution_matching import distribution_matching
from wm_train.objectives.student_rollouts import make_rollouts

KEY = NoiseKey(3, "distill")
LEVELS, FRAMES = (1.0, 0.9, 0.75), 8
LAYOUT = ClipLayout(FRAMES, chunk_starts=chunk_starts(FRAMES, 3))
LATENTS = torch.randn(2, FRAMES, 3, 2, 2, generator=torch.Generator().manual_seed(0)).double()
MODEL = SanaWMConfig(
    latent_channels=3, depth=2, width=16, heads=2, softmax_every=2, causal=True, window_chunks=2
)
SETTINGS = DistillConfig(LEVELS, guidance={"camera": 3.0}, isg=0.5, scored_frames="last 6")


def awake(config: SanaWMConfig, seed: int):
    model = build_model(config)
    initialise_(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.double()


@pytest.fixture
def conditions(camera_path):
    c2w, intrinsics = (x.double() for x in camera_path(2, 57, torch.Generator().manual_seed(1)))
    return Conditions.of((96, 160), 8, c2w, intrinsics)


@pytest.fixture(scope="module")
def networks():
    found = {"student": awake(MODEL, 0), "teacher": awake(MODEL, 1)}
    found["critic"] = awake(replace(MODEL, causal=False, window_chunks=0), 2)
    found["teacher"].requires_grad_(False)
    return found


def turn_of(distill, index, comm=None):
    def shard(layout):
        return GroupSequence(layout, comm) if comm else LocalSequence(layout)

    sequences = {"student": shard(LAYOUT), "teacher": shard(LAYOUT)}
    sequences["critic"] = shard(ClipLayout(FRAMES))
    return RoleTurn(Turn("student", index), distill, sequences, LATENTS[:, 0], REFERENCE)


def take(networks, conditions, distill=SETTINGS, index=0, comm=None):
    turn = turn_of(distill, index, comm)
    local = turn.sequences["student"].frames
    latents = LATENTS[:, local.start : local.stop]
    clips = Clips(latents, torch.arange(2), conditions, turn.sequences["student"], KEY)
    return clips, distribution_matching(networks, clips, DistributionMatchingConfig(), turn)


def gradient_of(model, pieces):
    model.zero_grad()
    for piece in pieces:
        piece.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def written_out(networks, conditions, exits, key_share):
    """Return the loss of both clips, [2], with the student's graph: every chunk with the past that
    its own chunks make, the teacher with both views of the camera."""
    student, teacher, total = networks["student"], networks["teacher"], 0
    no_camera = replace(conditions, camera_keep=torch.zeros(2, dtype=torch.bool))
    runs = {"s": (student, conditions), "t": (teacher, conditions), "p": (teacher, no_camera)}
    past = dict.fromkeys(runs, StreamState())

    def ask(name, x, level, remember=False):
        model, seen = runs[name]
        view = StreamingSequence(LocalSequence(LAYOUT), past[name], remember)
        return model(x, level, seen, view), view

    for chunk in exits:
        sigma = chunk.sigma
        following = [*LEVELS, 0.0][LEVELS.index(sigma) + 1]
        room = min(0.05, (sigma - following) / 4)
        middle = sigma - room - key_share * (sigma - following - 2 * room)
        x, free = chunk.noisy, (chunk.level > 0)[..., None, None, None].double()
        with torch.no_grad():
            plain, seen = (ask(name, x, chunk.level)[0] for name in "pt")
            halfway = x + (middle - sigma) * free * (plain + 3.0 * (seen - plain))
            there = ask("s", halfway, middle * free[..., 0, 0, 0])[0]
            target = halfway + (following - middle) * free * there
        one = x + (following - sigma) * free * ask("s", x, chunk.level)[0]
        each = (((one - target) ** 2 + SOFT**2).sqrt() - SOFT).mean(dim=(2, 3, 4))
        first = max(0, FRAMES - 6 - chunk.chunk.start)  # the last six frames count
        total = total + (each * free[..., 0, 0, 0])[:, first:].sum(1) / 6
        with torch.no_grad():
            views = {n: ask(n, chunk.context, chunk.context_level, True)[1] for n in runs}
        past = {name: view.after() for name, view in views.items()}
    return total


def test_guidance_adds_its_weight_times_the_distance_from_the_teachers_path(
    networks, conditions, monkeypatch
):
    import wm_train.objectives.student_rollouts as rollouts

    monkeypatch.setattr(rollouts, "turn_share", lambda *_: 0.3)
    student, gradients = networks["student"], []
    for isg in (0.5, 0.0):
        _, out = take(networks, conditions, replace(SETTINGS, isg=isg), index=1)
        gradients.append(gradient_of(student, out.pieces))
        if isg:
            figure = out.metrics["isg"]
    clips, _ = take(networks, conditions, index=1)
    exits = make_rollouts(student, clips, turn_of(SETTINGS, 1)).exits
    loss = written_out(networks, conditions, exits, 0.3)
    expected = gradient_of(student, [0.5 * loss.sum()])
    assert torch.allclose(figure.double(), loss.detach(), rtol=1e-5)
    for name, grad in expected.items():
        difference = gradients[0][name] - gradients[1][name]
        assert (difference - grad).abs().max() <= 1e-11 * grad.abs().max(), name


@pytest.mark.parametrize("ring", [2, 3])
def test_guidance_does_not_depend_on_the_sequence_group(networks, conditions, ring):
    """Two members take a clip each, three the chunks of both; the teacher makes equal passes."""
    student, teacher = networks["student"], networks["teacher"]
    _, whole = take(networks, conditions)
    expected = gradient_of(student, whole.pieces)
    copies, teachers = replicate(student, ring), replicate(teacher, ring)
    passes = [0] * ring
    for place, model in enumerate(teachers):

        def count(*_, place=place):
            passes[place] += 1

        model.register_forward_hook(count)

    def body(comm):
        me = comm.members[0].index
        mine = {**networks, "student": copies[me], "teacher": teachers[me]}
        _, out = take(mine, conditions, comm=comm)
        return sum(out.pieces), out.metrics["isg"]

    results, _ = run_virtual(body, ring=ring)
    sum(loss for loss, _ in results).backward()
    figure = sum(isg for _, isg in results) / ring
    assert torch.allclose(figure, whole.metrics["isg"], rtol=1e-5)
    assert len(set(passes)) == 1, passes
    for name, grad in expected.items():
        found = sum(copy.get_parameter(name).grad for copy in copies)
        assert (found - grad).abs().max() <= 1e-11 * grad.abs().max() + 1e-18, name
