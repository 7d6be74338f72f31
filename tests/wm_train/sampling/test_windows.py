"""A student's rollout in windows is the sampler's, and its late gradient is the whole graph's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from parallel.layout import ClipLayout
from parallel.reference import REFERENCE
from parallel.sequence import GroupSequence, LocalSequence
from parallel.virtual import run_virtual
from wm_train.config.kinds import HistoryConfig
from wm_train.models.examples import ExampleShape, example_conditions, example_latents
from wm_train.models.experts.config import ExpertsConfig
from wm_train.models.init import initialise_
from wm_train.models.spec import build_model
from wm_train.models.wan.config import WanConfig
from wm_train.noise import NoiseKey, normal
from wm_train.parity.case import wake_
from wm_train.sampling.config import WindowsConfig
from wm_train.sampling.experts import Experts
from wm_train.sampling.history import Window, window_noise
from wm_train.sampling.levels import sampling_levels
from wm_train.sampling.sample import SampleStart, windows
from wm_train.sampling.windows import window_losses, window_rollout

WAN = WanConfig(
    latent_channels=3, depth=1, width=12, heads=2, ffn_width=16, text_width=0, camera=True
)
SHAPE = ExampleShape(2, 9, 4, 4, 4)
HISTORY = HistoryConfig(chunk=3, recent=1, near=1)  # 8 frames to make: 1-3, 4-6, 6-8
LEVELS = sampling_levels([1.0, 0.9, 0.6])
KEY, DRAWS = NoiseKey(0, "student"), torch.tensor([3, 4])
PAIR = ExpertsConfig("experts", 3, "none", {"high": WAN, "low": WAN}, (0.9, 0.0))


def awake(config=WAN, seed: int = 0):
    model = build_model(config)
    initialise_(model, seed)
    wake_(model, seed)
    return model.double()


def given():
    first = example_latents(WAN.needs(), SHAPE, 2)[:, 0].double()
    return first, example_conditions(WAN.needs(), SHAPE, 2)


def rolled(model, exit=None, sampler="renoise", sequence=None, history=HISTORY):
    sequence = sequence or LocalSequence(ClipLayout(SHAPE.frames))
    how = {"sampler": sampler, "exit": exit}
    return list(window_rollout(model, *given(), LEVELS, KEY, DRAWS, sequence, history, **how))


def clip_of(exits) -> torch.Tensor:
    return torch.cat([one.clean for one in exits], dim=1)


def test_chunks_cover_the_clip_and_the_sampler_makes_the_same():
    model, (first, conditions) = awake(), given()
    exits = rolled(model)
    assert [(one.chunk.start, one.chunk.stop) for one in exits] == [(0, 4), (4, 6), (6, 9)]
    made = clip_of(exits)
    assert torch.equal(made[:, 0], first)
    start = SampleStart(
        Experts((0.0,), (model,)), first, conditions, LEVELS, KEY, DRAWS,
        LocalSequence(ClipLayout(SHAPE.frames)), REFERENCE,
    )  # fmt: skip
    assert torch.equal(windows(start, WindowsConfig(step="renoise", history=HISTORY)), made)
    # a clip's numbers are its own, whatever clips are beside it
    moved = replace(start, first_latent=first[1:], conditions=conditions.rows(slice(1, 2)))
    alone = windows(replace(moved, draws=DRAWS[1:]), WindowsConfig(step="renoise", history=HISTORY))
    assert torch.allclose(alone[0], made[1], rtol=1e-12)


@pytest.mark.parametrize(("time", "noise"), [("zero", 0.0), ("zero", 0.2), ("chunk", 0.0)])
def test_a_network_is_given_history_at_the_level_that_is_configured(time, noise):
    """Clean, at a fixed level, or noised like the chunk: (1 - sigma) x + sigma n, and told so."""
    seen = []

    def still(latents, level, conditions, sequence):
        seen.append((latents, level))
        return torch.zeros_like(latents)

    rolled(still, history=replace(HISTORY, time=time, noise=noise))
    first, slots = given()[0], HISTORY.slots
    window = Window(
        (0, 0, 0, 0, 1, 2, 3), slots
    )  # of the first chunk: nothing but frame 0 is known
    drawn = window_noise(KEY, "rollout", DRAWS[:1], window, tuple(first.shape[1:]), True)
    for sigma, (latents, level) in zip(LEVELS[:-1], seen[: len(LEVELS) - 1], strict=True):
        own = sigma if time == "chunk" else noise
        expected = (1 - own) * first[:1, None] + own * drawn[:, :slots]
        assert torch.allclose(latents[:, :slots], expected, rtol=1e-6)
        assert torch.allclose(level[:, :slots], torch.full_like(level[:, :slots], own))
        assert torch.allclose(level[:, slots:], torch.full_like(level[:, slots:], sigma))


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 2), (2, 2)])
def test_windows_split_over_ranks_make_the_same(ring, ulysses):
    model = awake()
    expected = clip_of(rolled(model))

    def body(comm):
        return clip_of(rolled(model, sequence=GroupSequence(ClipLayout(SHAPE.frames), comm)))

    for made in run_virtual(body, ring, ulysses)[0]:
        assert float((made - expected).abs().max()) < 1e-11


def written_out(model, exit, sampler, g):
    """The rollout once more without windows' code: indices by hand, for the first chunks' cameras
    chosen by the history's rules, exit passes in one graph -> sum of g times the clean latents."""
    first, conditions = given()
    exits, total = rolled(model, exit, sampler), 0.0
    known = clip_of(exits)
    for row in range(len(first)):
        for one in exits:
            ids = one.rows[row].view.ids
            x, level = one.rows[row].passed.noisy, one.rows[row].passed.level
            raw = [i for k in ids for i in ([0] * 4 if k == 0 else range(4 * k - 3, 4 * k + 1))]
            own = conditions.rows(slice(row, row + 1))
            own = own.with_fields(c2w=own.c2w[:, raw], intrinsics=own.intrinsics[:, raw])
            sequence = LocalSequence(ClipLayout(len(ids), time_ids=ids))
            assert torch.equal(x[0, :3], known[row, list(ids[:3])])
            clean = x - LEVELS[exit - 1] * model(x, level, replace(own, grouped=True), sequence)
            frames = range(max(1, one.chunk.start), one.chunk.stop)
            for frame in frames:
                total = total + (g[row, frame] * clean[0, 4 + frame - ids[4]]).sum()
    return total


@pytest.mark.parametrize("exit", [1, 3])
@pytest.mark.parametrize("of", [1, 2])
def test_late_losses_have_the_whole_graphs_gradient(exit, of):
    model = awake()
    g = torch.randn(2, 9, 3, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    expected = torch.autograd.grad(written_out(model, exit, "renoise", g), list(model.parameters()))
    exits, conditions = rolled(model, exit), given()[1]
    for turn in range(of):  # each of `of` ranks back-propagates its own chunks
        how = {"turn": turn, "of": of}
        pieces = list(window_losses(model, exits, conditions, DRAWS, g, HISTORY, **how))
        assert len(pieces) == 2 * -(-len(exits) // of)
        for loss in pieces:
            loss.backward()
    for want, parameter in zip(expected, model.parameters(), strict=True):
        found = torch.zeros_like(want) if parameter.grad is None else parameter.grad
        size = max(float(want.abs().max()), 1e-9)
        assert float((found - want).abs().max()) / size < 1e-9


@pytest.mark.parametrize("noise", [0.0, 0.3], ids=["clean", "noised"])
def test_a_network_of_experts_is_its_experts_and_trains_one(noise):
    """The history of a window may have a level of its own."""
    pair, history = awake(PAIR), replace(HISTORY, noise=noise)
    high, low = pair.high, pair.low
    apart = clip_of(rolled(Experts((0.9, 0.0), (high, low)), history=history))
    assert torch.equal(clip_of(rolled(pair, history=history)), apart)
    g = torch.ones(2, 9, 3, 4, 4).double()
    for exit, trained in ((2, high), (3, low)):  # levels 0.9 and 0.6
        pair.zero_grad(set_to_none=True)
        exits = rolled(pair, exit, history=history)
        for loss in window_losses(pair, exits, given()[1], DRAWS, g, history):
            loss.backward()
        assert pair.passes_at(exits[0].sigma) == {"high": trained is high, "low": trained is low}
        moved = {n.partition(".")[0] for n, p in pair.named_parameters() if p.grad is not None}
        assert moved == {"high" if trained is high else "low"}
    latents = normal(KEY, "x", DRAWS, (0, 9), (3, 4, 4)).double()
    mixed = torch.tensor([[0.95], [0.2]]).expand(2, 9)
    with pytest.raises(ValueError, match=r"0\.2 to 0\.95.*score_sigma\.per=turn"):
        pair(latents, mixed, given()[1], LocalSequence(ClipLayout(9)))
    edge = torch.full((2, 9), 0.9)
    edge[:, 0] = 0  # a given frame has no say
    assert pair.expert_at(edge, LocalSequence(ClipLayout(9))) == "high"
    names = {name for name, _ in pair.named_parameters()}
    own = {name for name, _ in high.named_parameters()}
    assert names == {f"{expert}.{name}" for expert in ("high", "low") for name in own}
    assert len(pair.units()) == 2
