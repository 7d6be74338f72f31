"""A student's rollout is the sampler's, and its late gradient is the whole graph's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from parallel.layout import ClipLayout
from parallel.reference import REFERENCE
from parallel.sequence import GroupSequence, LocalSequence
from parallel.streaming import StreamingSequence, StreamState, chunk_starts
from parallel.transpose import share_of, to_clips, to_frames
from parallel.virtual import replicate, run_virtual
from wm_train.conditioning import Conditions
from wm_train.models.init import initialise_
from wm_train.models.sana_wm.config import SanaWMConfig
from wm_train.models.spec import build_model
from wm_train.noise import NoiseKey, normal
from wm_train.sampling.chunks import late_losses, roll_out
from wm_train.sampling.config import StreamConfig
from wm_train.sampling.experts import Experts
from wm_train.sampling.levels import sampling_levels
from wm_train.sampling.sample import SampleStart, stream
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


def doubled(given):
    """A clip in fp64."""
    first, conditions, draws, layout = given
    fields = {name: value.double() for name, value in conditions.fields.items()}
    return first.double(), conditions.with_fields(**fields), draws, layout


def pull(layout, clips=1):
    """The gradient of some loss with respect to the clean predictions, fp64."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(clips, layout.frames, 4, *GRID, generator=generator, dtype=torch.float64)


def gradients(model, losses):
    """Back-propagate losses one by one -> the gradients of all parameters that take any."""
    model.zero_grad(set_to_none=True)
    for loss in losses:
        loss.backward()
    wanted = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {name: p.grad.clone() for name, p in wanted}


def whole_graph(model, given, g, sampler, exit):
    """The rollout written out once more, all exit passes in one graph -> sum of g times x0."""
    first, conditions, draws, layout = given
    clip, state, total = LocalSequence(layout), StreamState(), 0
    frames, shape = (0, layout.frames), tuple(first.shape[1:])
    noise = normal(KEY, "rollout", draws, frames, shape).double()
    fresh = [normal(KEY, f"rollout/step{k}", draws, frames, shape).double() for k in range(2, 6)]
    for start in layout.chunk_starts:
        local = slice(start, layout.chunk_of(start).stop)
        hold = torch.zeros(1, local.stop - start, 1, 1, 1, dtype=torch.bool)
        hold[:, 0] = start == 0
        x = torch.where(hold, first[:, None], noise[:, local])
        for k in range(exit):
            sigma, following = LEVELS[k], LEVELS[k + 1]
            level = torch.where(hold[:, :, 0, 0, 0], 0.0, sigma).expand(len(first), -1)
            with torch.set_grad_enabled(k == exit - 1):
                v = model(x, level, conditions, StreamingSequence(clip, state, remember=False))
            x0 = torch.where(hold, first[:, None], x - sigma * v)
            moved = x + (following - sigma) * v
            if sampler == "renoise":
                moved = (1 - following) * x0 + following * fresh[k][:, local]
            x = torch.where(hold, first[:, None], moved).detach()
        total = total + (g[:, local] * x0).sum()
        with torch.no_grad():
            view = StreamingSequence(clip, state)
            model(x0.detach(), torch.zeros_like(level), conditions, view)
            state = view.after()
    return total


def exits_of(model, given, sampler="renoise", exit=4, **how):
    first, conditions, draws, layout = given
    start = (first, conditions, LEVELS, KEY, draws, layout)
    return list(roll_out(model, *start, exit=exit, sampler=sampler, **how))


@pytest.mark.parametrize(("sampler", "context_sigma"), [("euler", 0.0), ("renoise", 0.15)])
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
    config = StreamConfig(step=sampler, context_sigma=context_sigma)
    alone = (Experts((0.0,), (model,)), *start[:-1], LocalSequence(layout), REFERENCE)
    assert torch.equal(stream(SampleStart(*alone), config), torch.cat(sampled, 1))
    other = list(stream_rollout(model, *start, sampler=sampler, context_sigma=0.3))
    assert torch.equal(other[0], sampled[0])  # the first chunk has no past
    assert not torch.equal(other[1], sampled[1])


def test_the_context_is_the_prediction_at_its_own_noise_level_and_replays_to_the_bit(clip):
    model, given = awake(CONFIG), clip(7, 1)
    _, conditions, draws, layout = given
    g = pull(layout).float()
    how = {"exit": 2, "context_sigma": 0.15}
    kept, bare = (exits_of(model, given, keep_history=keep, **how) for keep in (True, False))
    for found in kept:
        noise = normal(
            KEY, "rollout/context", draws, (found.chunk.start, found.chunk.stop), (4, 2, 3)
        )
        expected, level = 0.85 * found.clean + 0.15 * noise, torch.full(found.level.shape, 0.15)
        if found.chunk.start == 0:  # the given frame stays as it is
            expected[:, 0], level[:, 0] = found.clean[:, 0], 0.0
        assert torch.equal(found.context_level, level)
        assert (found.context - expected).abs().max() <= 1e-6
    with torch.no_grad():
        losses = [list(late_losses(model, x, conditions, g, layout)) for x in (kept, bare)]
    assert losses[0] == losses[1]


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


@pytest.mark.parametrize(("sampler", "exit"), [("euler", 2), ("renoise", 4)])
def test_the_late_gradient_is_that_of_the_whole_graph(clip, sampler, exit):
    """Every parameter, with the history kept and made again; fp64, hybrid, window, sink, camera."""
    model, given = awake(CONFIG).double(), doubled(clip(8, 1))
    _, conditions, _, layout = given
    g = pull(layout)
    whole = whole_graph(model, given, g, sampler, exit)
    expected = gradients(model, [whole])
    assert all(grad.abs().max() > 0 for grad in expected.values())
    for keep in (True, False):
        exits = exits_of(model, given, sampler, exit, keep_history=keep)
        assert all((found.history is not None) == keep for found in exits)
        losses = []

        def each(exits=exits, losses=losses):
            for loss in late_losses(model, exits, conditions, g, layout):
                losses.append(loss.detach())
                yield loss

        found = gradients(model, each())
        assert len(losses) == len(layout.chunk_starts)
        assert abs(sum(losses) - whole) <= 1e-12 * abs(whole)
        for name, grad in expected.items():
            assert (found[name] - grad).abs().max() <= 1e-12 * grad.abs().max(), name


def test_the_late_gradient_is_the_difference_quotient_with_a_constant_history(clip):
    model, given = awake(CONFIG).double(), doubled(clip(8, 1))
    _, conditions, _, layout = given
    g, exits = pull(layout), exits_of(model, given, exit=2)
    found = gradients(model, late_losses(model, exits, conditions, g, layout))
    generator, step = torch.Generator().manual_seed(2), 1e-7
    along = {
        name: torch.randn(grad.shape, generator=generator, dtype=torch.float64)
        for name, grad in found.items()
    }
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in along:
                    p.add_(along[name], alpha=sign * step)
            values.append(sum(late_losses(model, exits, conditions, g, layout)))
            for name, p in model.named_parameters():
                if name in along:
                    p.sub_(along[name], alpha=sign * step)
    quotient = (values[0] - values[1]) / (2 * step)
    expected = sum((grad * along[name]).sum() for name, grad in found.items())
    assert abs(quotient - expected) <= 2e-7 * abs(expected)


def test_a_chunk_depends_on_the_one_before_but_takes_no_gradient_from_it(clip):
    model, given = awake(CONFIG).double(), doubled(clip(7, 1))
    _, conditions, _, layout = given
    g, exits = pull(layout), exits_of(model, given, exit=1, keep_history=False)
    g[:, :4] = 0  # only the second chunk counts

    def losses(exits):
        return list(late_losses(model, exits, conditions, g, layout))

    moved = [replace(exits[0], context=exits[0].context.clone().requires_grad_()), exits[1]]
    before = losses(exits)
    again = losses(moved)
    assert before == again
    sum(again).backward()
    assert moved[0].context.grad is None
    with torch.no_grad():
        moved[0].context.add_(0.1)
    assert losses(moved)[0] == before[0] == 0
    assert losses(moved)[1] != before[1]


@pytest.mark.parametrize("how", ["block", pytest.param("selective", marks=pytest.mark.full)])
def test_recomputation_changes_no_bit_of_the_late_gradient(clip, how):
    given = clip(8, 1)
    _, conditions, _, layout = given
    found = []
    for mode in ("none", how):
        model = awake(replace(CONFIG, activation_checkpointing=mode))
        exits = exits_of(model, given, exit=2, keep_history=mode == "none")
        losses = late_losses(model, exits, conditions, pull(layout).float(), layout)
        found.append(gradients(model, losses))
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


@pytest.mark.parametrize(("of", "keep"), [(2, True), (3, False)])
def test_chunks_dealt_over_callers_sum_to_the_whole_with_equal_passes(clip, of, keep):
    """Four chunks over two and three: all make the same passes, with gradients in the same places,
    as sharded parameters are gathered in each."""
    model, given = awake(CONFIG).double(), doubled(clip(11, 1))
    _, conditions, _, layout = given
    g, exits = pull(layout), exits_of(model, given, exit=1, keep_history=keep)
    expected = gradients(model, late_losses(model, exits, conditions, g, layout))
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    parts, seen = [], []
    for turn in range(of):
        passes.clear()
        losses = late_losses(model, exits, conditions, g, layout, turn=turn, of=of)
        parts.append(gradients(model, losses))
        seen.append(list(passes))
    handle.remove()
    assert all(one == seen[0] for one in seen)
    assert seen[0].count(True) == -(-4 // of)
    for name, grad in expected.items():
        total = sum(part[name] for part in parts)
        assert (total - grad).abs().max() <= 1e-12 * grad.abs().max(), name


def rows(given, clips: range):
    first, conditions, draws, layout = given
    own = slice(clips.start, clips.stop)
    fields = {name: value[own] for name, value in conditions.fields.items()}
    return first[own], conditions.with_fields(**fields), draws[own], layout


def student_turn(model, given, comm=None):
    """A student's turn with made-up score differences of single frames, on one rank of a group that
    shares the clips -> gradients of this rank."""
    first, _, _, layout = given
    whole = ClipLayout(layout.frames)
    scores = LocalSequence(whole) if comm is None else GroupSequence(whole, comm)
    share = share_of(scores, len(first))
    own = rows(given, share.clips)
    exits = exits_of(model, own, exit=2, keep_history=False)
    made = torch.cat([found.clean for found in exits], 1)
    local = to_frames(scores, share, made)
    frames = scores.positions.double()[..., None, None, None]
    g = to_clips(scores, share, torch.sin(3 * local) * (1 + frames))
    deal = {"turn": share.turn, "of": share.of}
    return gradients(model, late_losses(model, exits, own[1], g, layout, **deal))


@pytest.mark.parametrize(
    ("members", "clips"),
    [(2, 2), (3, 1), *(pytest.param(*grid, marks=pytest.mark.full) for grid in [(3, 3), (4, 1)])],
)
def test_a_turn_on_ranks_equals_one_device_with_collectives_that_no_draw_changes(
    clip, members, clips
):
    """Transposed (as many clips as ranks) and replicated (fewer), four chunks, eleven frames; fp64.
    The student itself needs no collective."""
    model, given = awake(CONFIG).double(), doubled(clip(11, clips))
    first, conditions, draws, layout = given
    counted = []
    for shift in (0, 7):
        moved = (first, conditions, draws + shift, layout)
        models = replicate(model, members)

        def body(comm, models=models, moved=moved):
            return student_turn(models[comm.members[0].index], moved, comm)

        parts, traffic = run_virtual(body, members)
        counted += [one.collectives for one in traffic]
        if shift:
            continue
        for name, grad in student_turn(model, moved).items():
            total = sum(part[name] for part in parts)
            assert (total - grad).abs().max() <= 1e-11 * grad.abs().max(), name
    transposed = clips == members
    forward = {"transpose forward": 2} if transposed else {"gather forward": 1}
    assert all(one == forward for one in counted), counted
