"""The gradient of a packed pass is the late one and that of the whole graph (attention model)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from parallel.layout import ClipLayout
from parallel.sequence import GroupSequence, LocalSequence
from parallel.streaming import StreamingSequence, StreamState, chunk_starts
from parallel.virtual import replicate, run_virtual
from wm_train.conditioning import Conditions
from wm_train.models.spec import build_model
from wm_train.models.waypoint.config import WaypointConfig
from wm_train.noise import NoiseKey, normal
from wm_train.sampling.chunks import ChunkExit, late_losses, roll_out
from wm_train.sampling.levels import sampling_levels
from wm_train.sampling.packed import packed_losses

CONFIG = WaypointConfig(
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
KEY, FRAMES, SIZE = NoiseKey(0, "student"), 9, (3, 2, 4)
LEVELS = sampling_levels([1.0, 0.9, 0.75, 0.3])


@pytest.fixture(scope="module")
def model():
    """Every parameter matters, and the flow is tame: errors do not grow along it."""
    found, g = build_model(CONFIG).double(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in found.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 10
            parameter.copy_(torch.randn(parameter.shape, generator=g).double() * fan_in**-0.5)
        found.unpatchify.weight.mul_(0.3)
    return found


def given(clips: int = 1):
    g = torch.Generator().manual_seed(2)
    first = torch.randn(clips, *SIZE, generator=g).double()
    controls = torch.randn(clips, FRAMES, 6, generator=g).double()
    keep = torch.tensor([True, False])[:clips]
    return first, Conditions((32, 64), 4, {"controls": controls}, controls_keep=keep)


def pull(clips: int = 1):
    g = torch.Generator().manual_seed(1)
    return torch.randn(clips, FRAMES, *SIZE, generator=g, dtype=torch.float64)


def rolled(model, layout, clips=1, exit=2, **how):
    first, conditions = given(clips)
    start = (first, conditions, LEVELS, KEY, torch.arange(3, 3 + clips), layout)
    return list(roll_out(model, *start, exit=exit, sampler="euler", **how)), conditions


def joined(exits, frames: slice = slice(None), number: int = 0) -> ChunkExit:
    """One clip of a rollout, these frames of it, as one."""
    own = slice(number, number + 1)

    def rows(name):
        return torch.cat([getattr(one, name) for one in exits], 1)[own, frames]

    maps = (rows("noisy"), rows("level"), exits[0].sigma, rows("clean"))
    return ChunkExit(None, *maps, None, rows("context"), rows("context_level"))


def gradients(model, losses):
    model.zero_grad(set_to_none=True)
    total = 0.0
    for loss in losses:
        loss.backward()
        total += float(loss.detach())
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def whole_graph(model, layout, g, exit, context_sigma):
    """The rollout written out once more, all exit passes in one graph -> sum of g times x0."""
    first, conditions = given()
    clip, state, total = LocalSequence(layout), StreamState(), 0
    draws = torch.arange(3, 4)
    noise, other = (
        normal(KEY, f"rollout{name}", draws, (0, FRAMES), SIZE).double()
        for name in ("", "/context")
    )
    for start in layout.chunk_starts:
        local = slice(start, layout.chunk_of(start).stop)
        hold = torch.zeros(1, local.stop - start, dtype=torch.bool)
        hold[:, 0] = start == 0
        held = hold[:, :, None, None, None]
        x = torch.where(held, first[:, None], noise[:, local])
        for k in range(exit):
            level = torch.where(hold, 0.0, LEVELS[k])
            with torch.set_grad_enabled(k == exit - 1):
                v = model(x, level, conditions, StreamingSequence(clip, state, remember=False))
            x0 = torch.where(held, first[:, None], x - LEVELS[k] * v)
            moved = x + (LEVELS[k + 1] - LEVELS[k]) * v
            x = torch.where(held, first[:, None], moved).detach()
        total = total + (g[:, local] * x0).sum()
        past = x0.detach()
        if context_sigma:
            mixed = (1 - context_sigma) * past + context_sigma * other[:, local]
            past = torch.where(held, past, mixed)
        with torch.no_grad():
            view = StreamingSequence(clip, state)
            model(past, torch.where(hold, 0.0, context_sigma), conditions, view)
            state = view.after()
    return total


@pytest.mark.parametrize(("chunk_frames", "exit", "context_sigma"), [(1, 2, 0.15), (3, 1, 0.0)])
def test_packed_is_late_is_the_whole_graph(model, chunk_frames, exit, context_sigma):
    """Every parameter in fp64, with histories kept and made again: facts of three gradients."""
    layout, g = ClipLayout(FRAMES, chunk_starts=chunk_starts(FRAMES, chunk_frames)), pull()
    whole, expected = gradients(model, [whole_graph(model, layout, g, exit, context_sigma)])
    still = [name for name, grad in expected.items() if not grad.any()]
    assert still == ["ctrl_cfg.null_emb"]  # this clip's controls are known
    exits, conditions = rolled(model, layout, exit=exit, context_sigma=context_sigma)
    bare, _ = rolled(model, layout, exit=exit, context_sigma=context_sigma, keep_history=False)
    packed = packed_losses(model, [joined(bare)], conditions, g, LocalSequence(layout))
    for name, losses in (
        ("kept", late_losses(model, exits, conditions, g, layout)),
        ("made again", late_losses(model, bare, conditions, g, layout)),
        ("packed", packed),
    ):
        total, found = gradients(model, losses)
        assert abs(total - whole) <= 1e-12 * abs(whole), name
        for parameter, grad in expected.items():
            error = (found[parameter] - grad).abs().max()
            assert error <= 1e-12 * grad.abs().max(), (name, parameter)


def test_the_clean_copies_take_no_gradient_and_leave_no_graph(model):
    """Two forward passes a clip; the first records nothing, and its input gets no gradient."""
    layout = ClipLayout(FRAMES, chunk_starts=chunk_starts(FRAMES, 1))
    exits, conditions = rolled(model, layout, keep_history=False)
    clip = joined(exits)
    moved = replace(clip, context=clip.context.clone().requires_grad_())
    modes = []
    handle = model.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    sequence = LocalSequence(layout)
    (loss,) = packed_losses(model, [moved], conditions, pull(), sequence)
    loss.backward()
    handle.remove()
    assert modes == [False, True]
    assert moved.context.grad is None
    with torch.no_grad():
        moved.context.add_(0.1)
        (other,) = packed_losses(model, [moved], conditions, pull(), sequence)
    assert other != loss


@pytest.mark.full
def test_recomputation_changes_no_bit_of_the_packed_gradient(model):
    layout = ClipLayout(FRAMES, chunk_starts=chunk_starts(FRAMES, 1))
    exits, conditions = rolled(model, layout, keep_history=False)
    again = build_model(replace(CONFIG, activation_checkpointing="block")).double()
    again.load_state_dict(model.state_dict())
    found = []
    for one in (model, again):
        losses = packed_losses(one, [joined(exits)], conditions, pull(), LocalSequence(layout))
        found.append(gradients(one, losses)[1])
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


@pytest.mark.parametrize("grid", [(2, 1), pytest.param((4, 1), marks=pytest.mark.full)])
def test_two_clips_over_a_sequence_group_equal_one_device(model, grid):
    """Nine frames split unevenly; one loss per clip on every rank."""
    layout, g = ClipLayout(FRAMES, chunk_starts=chunk_starts(FRAMES, 1)), pull(2)
    exits, conditions = rolled(model, layout, clips=2, keep_history=False)
    clips = [joined(exits, number=i) for i in range(2)]
    losses = packed_losses(model, clips, conditions, g, LocalSequence(layout))
    whole, expected = gradients(model, losses)
    copies = replicate(model, grid[0] * grid[1])

    def body(comm):
        sequence = GroupSequence(layout, comm)
        local = slice(sequence.frames.start, sequence.frames.stop)
        mine = [joined(exits, local, i) for i in range(2)]
        one = copies[comm.members[0].index]
        return sum(packed_losses(one, mine, conditions, g[:, local], sequence))

    results, _ = run_virtual(body, *grid)
    sum(results).backward()
    assert abs(float(sum(results).detach()) - whole) <= 1e-11 * abs(whole)
    for name, grad in expected.items():
        found = sum(copy.get_parameter(name).grad for copy in copies)
        assert (found - grad).abs().max() <= 1e-11 * grad.abs().max(), name
