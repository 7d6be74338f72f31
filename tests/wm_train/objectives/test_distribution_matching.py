"""Both turns of distribution matching: where self-forcing ends on AR(1) data, independence of the
mesh, keyed exits, and who gets a gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import wm_train.objectives.score_levels as score_levels
from parallel.layout import ClipLayout
from parallel.reference import REFERENCE
from parallel.sequence import GroupSequence, LocalSequence
from parallel.streaming import chunk_starts
from parallel.virtual import replicate, run_virtual
from wm_train.conditioning import Conditions
from wm_train.config.roles import DistillConfig, ScoreSigmaConfig, Turn
from wm_train.models.init import initialise_
from wm_train.models.sana_wm.config import SanaWMConfig
from wm_train.models.spec import build_model
from wm_train.noise import NoiseKey
from wm_train.objectives.clips import Clips, ObjectiveOutput, RoleTurn
from wm_train.objectives.config import DistributionMatchingConfig
from wm_train.objectives.distribution_matching import distribution_matching
from wm_train.objectives.score_levels import judged, turn_choice
from wm_train.objectives.student_rollouts import SCHEDULES, make_rollouts
from wm_train.sampling.chunks import roll_out

KEY, CONFIG = NoiseKey(7, "distill"), DistributionMatchingConfig()
LEVELS = (1.0, 0.9, 0.5)
RHO, TAU, FRAMES = 0.8, 0.6, 6  # of the data: x_t = RHO x_(t-1) + TAU noise


class Autoregressive(nn.Module):
    """Predict the clean frame at level k as alpha_k h + beta_k x, h the frame before."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((3,), 0.3))
        self.beta = nn.Parameter(torch.full((3,), 0.3))

    def forward(self, x, level, conditions, sequence):
        before = sequence.halo([x], 1, 0)[0][0]
        place = (level[..., None] - torch.tensor(LEVELS)).abs().argmin(-1)
        alpha, beta = (p[place][:, :, None, None, None] for p in (self.alpha, self.beta))
        clean = alpha * before + beta * x
        return (x - clean) / level.clamp(min=1e-6)[:, :, None, None, None]

    def markov(self, exit_step: int) -> tuple[float, float]:
        """Return m and s of the rollout's x_t = m x_(t-1) + s noise with this exit."""
        m, variance = 0.0, 0.0
        for k in range(exit_step):
            a, sigma = 1 - LEVELS[k], LEVELS[k]
            alpha, beta = self.alpha[k].item(), self.beta[k].item()
            m, variance = alpha + beta * a * m, beta**2 * (a**2 * variance + sigma**2)
        return m, variance**0.5


def markov_velocity(m: float, s: float) -> Callable[..., torch.Tensor]:
    """Return the best velocity of whole clips x_t = m x_(t-1) + s noise behind a given frame 0:
    a joint Gaussian of frames 1 to T - 1, each number of a frame apart."""
    steps = torch.arange(FRAMES - 1, dtype=torch.float64)
    path = m ** (steps[:, None] - steps[None]).clamp(min=0) * (steps[:, None] >= steps[None])
    covariance, powers = s**2 * path @ path.T, m ** (steps + 1)

    def velocity(x, level, conditions, sequence):
        first, rest = x[:, :1, :, 0, 0].double(), x[:, 1:, :, 0, 0].double()
        sigma = level[:, 1, None, None].double()
        mean, a, eye = powers[:, None] * first, 1 - sigma, torch.eye(FRAMES - 1).double()
        lam = a**2 * covariance + sigma**2 * eye
        flow = (sigma * eye - a * covariance) @ torch.linalg.solve(lam, rest - a * mean)
        both = torch.cat([torch.zeros_like(first), flow - mean], dim=1)
        return both[..., None, None].float()

    return velocity


def clips_of(latents, layout, sequence=None, conditions=None, draws=None) -> Clips:
    draws = torch.arange(len(latents)) if draws is None else draws
    conditions = conditions or Conditions((16, 16), 8)
    return Clips(latents, draws, conditions, sequence or LocalSequence(layout), KEY)


def test_self_forcing_ends_at_the_closed_form_on_autoregressive_data():
    """b_1 = TAU, a_1 = RHO; b_k = TAU / sqrt((1 - s_k)^2 TAU^2 + s_k^2),
    a_k = RHO (1 - b_k (1 - s_k)), with a bidirectional teacher and a critic that is exact."""
    student = Autoregressive()
    layout = ClipLayout(FRAMES, chunk_starts=tuple(range(FRAMES)))
    distill = DistillConfig(LEVELS, weight="velocity", score_sigma=ScoreSigmaConfig())
    sequences = {
        "student": LocalSequence(layout),
        "critic": LocalSequence(ClipLayout(FRAMES)),
        "teacher": LocalSequence(ClipLayout(FRAMES)),
    }
    teacher, turns, clips = markov_velocity(RHO, TAU), 140, 12
    optimizer = torch.optim.Adam(student.parameters(), lr=0.1, betas=(0.0, 0.9))
    generator = torch.Generator().manual_seed(0)
    for index in range(turns):
        exit_step = 1 + turn_choice(KEY, "exit/student", index, 3)
        with torch.no_grad():
            critic = markov_velocity(*student.markov(exit_step))
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - index / turns) + 1e-3
        latents = torch.randn(clips, FRAMES, 4, 1, 1, generator=generator)
        data = clips_of(latents, layout, draws=torch.arange(clips) + clips * index)
        turn = RoleTurn(Turn("student", index), distill, sequences, latents[:, 0], REFERENCE)
        networks = {"student": student, "teacher": teacher, "critic": critic}
        optimizer.zero_grad()
        out = distribution_matching(networks, data, CONFIG, turn)
        for piece in out.pieces:
            (piece / clips).backward()
        optimizer.step()
    for k, sigma in enumerate(LEVELS):
        a = 1 - sigma
        beta = TAU / (a**2 * TAU**2 + sigma**2) ** 0.5
        assert student.beta[k].item() == pytest.approx(beta, abs=5e-3)
        assert student.alpha[k].item() == pytest.approx(RHO * (1 - beta * a), abs=5e-3)
    assert float(out.loss.mean()) < 1e-3


# ---- a real model -----------------------------------------------------------------------------
MODEL = SanaWMConfig(latent_channels=3, depth=2, width=16, heads=2, softmax_every=2)


def awake(config: SanaWMConfig, seed: int) -> nn.Module:
    """Return a model whose every parameter matters: one that equals the teacher proves nothing."""
    model = build_model(config)
    initialise_(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.double()


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    causal = replace(MODEL, causal=True, window_chunks=2)
    found = {"student": awake(causal, 0), "teacher": awake(MODEL, 1), "critic": awake(MODEL, 2)}
    found["teacher"].requires_grad_(False)
    return found


@pytest.fixture
def conditions(camera_path) -> Conditions:
    c2w, intrinsics = (x.double() for x in camera_path(2, 65, torch.Generator().manual_seed(1)))
    return Conditions.of((96, 160), 8, c2w, intrinsics)


LAYOUT = ClipLayout(9, chunk_starts=chunk_starts(9, 3))
LATENTS = torch.randn(2, 9, 3, 2, 2, generator=torch.Generator().manual_seed(0)).double()
SETTINGS = DistillConfig(LEVELS, guidance={"camera": 3.0}, normaliser="chunk")


def take(networks, role, conditions, index=0, comm=None, distill=SETTINGS) -> ObjectiveOutput:
    """Run one turn on one device, or on one member of a sequence group."""

    def shard(layout):
        return GroupSequence(layout, comm) if comm else LocalSequence(layout)

    whole = ClipLayout(9)
    sequences = {"student": shard(LAYOUT), "critic": shard(whole), "teacher": shard(whole)}
    local = sequences["student"].frames
    data = clips_of(LATENTS[:, local.start : local.stop], LAYOUT, sequences["student"], conditions)
    turn = RoleTurn(Turn(role, index), distill, sequences, LATENTS[:, 0], REFERENCE)
    return distribution_matching(networks, data, CONFIG, turn)


def total(out: ObjectiveOutput) -> torch.Tensor:
    return out.loss.sum() if out.pieces is None else sum(out.pieces)


FULL = pytest.mark.full


@pytest.mark.parametrize(
    ("role", "ring", "ulysses"),
    [
        *((role, *mesh) for role in ("student", "critic") for mesh in ((2, 1), (3, 1))),
        *(
            pytest.param(role, *mesh, marks=FULL)
            for role in ("student", "critic")
            for mesh in ((4, 1), (2, 2), (1, 2))
        ),
    ],
)
def test_loss_and_gradients_do_not_depend_on_the_sequence_group(
    networks, conditions, role, ring, ulysses
):
    """Nine frames and two clips: two members roll out a clip each, more roll out both and deal out
    the gradients of their chunks. No draw changes the collectives of a rank."""
    model, members = networks[role], ring * ulysses
    model.zero_grad()
    whole = take(networks, role, conditions)
    total(whole).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert expected
    copies, counted = replicate(model, members), []

    def body(comm, index=0):
        mine = {**networks, role: copies[comm.members[0].index]}
        out = take(mine, role, conditions, index, comm)
        return out.loss, total(out)

    results, traffic = run_virtual(body, ring, ulysses)
    sum(loss for _, loss in results).backward()
    for loss, _ in results:
        torch.testing.assert_close(loss, whole.loss, rtol=1e-11, atol=0)
    for name, grad in expected.items():
        found = sum(copy.get_parameter(name).grad for copy in copies)
        bound = 1e-11 * grad.abs().max() + 1e-18
        assert (found - grad).abs().max() <= bound, name
    counted += [one.collectives for one in traffic]
    assert counted[0]["transpose forward" if members == 2 else "mean forward"]
    if role == "critic":  # another turn, with other levels, noise and exit; forward is enough
        with torch.no_grad():
            _, first = run_virtual(body, ring, ulysses)
            _, other = run_virtual(partial(body, index=5), ring, ulysses)
        assert len({str(one.collectives) for one in (*first, *other)}) == 1


def test_only_the_network_whose_turn_it_is_gets_a_gradient(networks, conditions):
    for role, other in (("student", "critic"), ("critic", "student")):
        for model in networks.values():
            model.zero_grad()
        total(take(networks, role, conditions)).backward()
        assert any(p.grad is not None and p.grad.any() for p in networks[role].parameters())
        assert all(p.grad is None for p in networks[other].parameters())


def test_exits_are_drawn_by_the_turn_and_cover_all_levels(networks, conditions):
    exits = [int(take(networks, "critic", conditions, i).metrics["exit"][0]) for i in range(8)]
    assert set(exits) == {1, 2, 3}
    last = replace(SETTINGS, exit="last")
    assert int(take(networks, "critic", conditions, distill=last).metrics["exit"][0]) == 3


def test_roles_and_turns_draw_exits_and_windows_of_their_own(networks, conditions, monkeypatch):
    monkeypatch.setitem(SCHEDULES, "chunk", lambda *_, **__: iter(()))  # only what is drawn counts
    exits, windows = [], []
    for role in ("student", "critic"):
        turns = [made_turn(conditions, i, replace(SETTINGS, scored_frames="window 2"), role)
                 for i in range(12)]  # fmt: skip
        exits.append(
            [make_rollouts(networks["student"], clips, turn).exit_step for clips, _, turn in turns]
        )
        windows.append([found.counted.start for _, found, _ in turns])
    assert exits[0] != exits[1]
    assert len(set(windows[0])) > 2


def made_turn(conditions, index=0, distill=SETTINGS, role="critic"):
    """Return the clips of a turn on one device, what is judged of them, and the turn."""
    shards = {"student": LocalSequence(LAYOUT), "critic": LocalSequence(ClipLayout(9))}
    clips = clips_of(LATENTS, LAYOUT, shards["student"], conditions)
    turn = RoleTurn(Turn(role, index), distill, shards, LATENTS[:, 0], REFERENCE)
    return clips, judged(clips, turn), turn


@pytest.mark.parametrize(
    "changed", [{"sampler": "euler", "exit": "last"}, {"context_sigma": 0.3}, {}], ids=str
)
def test_a_turn_rolls_out_as_distill_says(networks, conditions, changed):
    distill = replace(SETTINGS, **changed)
    clips, _, turn = made_turn(conditions, distill=distill)
    made = make_rollouts(networks["student"], clips, turn)
    how = {"sampler": distill.sampler, "context_sigma": distill.context_sigma}
    given = (LATENTS[:, 0], conditions, [*LEVELS, 0.0], KEY, clips.draws, LAYOUT)
    plain = roll_out(networks["student"], *given, exit=made.exit_step, **how)
    assert torch.equal(made.clean(), torch.cat([one.clean for one in plain], dim=1))
    assert distill.exit == "turn" or made.exit_step == 3


def test_the_noise_of_scores_is_not_that_of_rollouts(networks, conditions):
    """The critic sees (1 - s) clean + s noise: find the noise, and compare it with rollouts."""
    seen = {}

    def critic(x, level, *_):
        seen["noisy"], seen["level"] = x, level[:, :, None, None, None]
        return torch.zeros_like(x)

    take({**networks, "critic": critic}, "critic", conditions)
    clips, _, turn = made_turn(conditions)
    clean = make_rollouts(networks["student"], clips, turn).clean()
    free = seen["level"] > 0
    assert free[:, 1:].all()
    assert not free[:, 0].any()
    assert torch.equal(seen["noisy"][:, 0], LATENTS[:, 0])  # the given frame stays clean
    noise = (seen["noisy"] - (1 - seen["level"]) * clean) / seen["level"]
    noise = noise[free.expand_as(noise)]
    assert abs(float(noise.mean())) < 0.2
    assert 0.8 < float(noise.std()) < 1.2
    for purpose in ("rollout", *(f"rollout/step{k}" for k in (2, 3)), "rollout/context"):
        other = clips.normal(purpose)[free.expand_as(clean)].double()
        assert abs(float(torch.corrcoef(torch.stack([noise, other]))[0, 1])) < 0.3


def test_weights_and_scopes_are_in_the_ratios_of_the_closed_form(networks, conditions):
    """At one noise level per clip score over velocity is a^2 / sigma, and normalised over velocity
    sigma / N: one number for a clip, or with a scope per chunk another in each."""

    def direction(weight, normaliser="clip"):
        distill = replace(SETTINGS, weight=weight, normaliser=normaliser)
        return take(networks, "student", conditions, distill=distill)

    plain, score = direction("velocity"), direction("score")
    sigma = score.metrics["sigma"][:, None].double()
    ratio = score.direction / plain.direction
    torch.testing.assert_close(
        ratio, ((1 - sigma) ** 2 / sigma).expand_as(ratio), rtol=1e-5, atol=0
    )
    whole, chunks = (
        direction("normalised", scope).direction / plain.direction for scope in ("clip", "chunk")
    )
    assert torch.allclose(whole, whole[:, :1].expand_as(whole), rtol=1e-9)
    assert not torch.allclose(chunks, chunks[:, :1].expand_as(chunks), rtol=1e-3)


def test_scored_frames_limit_the_loss_and_the_gradient(networks, conditions):
    """With the last frame alone, chunks before the last pass on nothing."""
    distill = replace(SETTINGS, scored_frames="last 2", normaliser="clip")
    pieces = list(take(networks, "student", conditions, distill=distill).pieces)
    assert [bool(piece != 0) for piece in pieces] == [False, False, True]
    critic = take(networks, "critic", conditions, distill=distill).loss
    assert (critic != take(networks, "critic", conditions).loss).all()


def test_each_clip_is_judged_by_the_expert_of_its_noise_level(networks, conditions):
    """g of each clip is that of a turn whose only teacher is the expert of the clip's level."""
    levels = take(networks, "student", conditions).metrics["sigma"].tolist()
    middle, last = sum(levels) / 2, (1 + max(levels)) / 2  # no clip is above the last
    models = {"teacher": networks["teacher"], "high": awake(MODEL, 5), "top": awake(MODEL, 6)}
    distill = replace(SETTINGS, experts={"top": last, "high": middle})
    found = take({**networks, **models}, "student", conditions, distill=distill).direction
    for clip, level in enumerate(levels):
        expert = models["high" if level >= middle else "teacher"]
        alone = take({**networks, "teacher": expert}, "student", conditions).direction
        assert torch.equal(found[clip], alone[clip]), level


def test_replayed_histories_give_the_same_gradient(networks, conditions):
    found = []
    for how in ("keep", "replay"):
        networks["student"].zero_grad()
        total(
            take(networks, "student", conditions, distill=replace(SETTINGS, history_states=how))
        ).backward()
        found.append([p.grad.clone() for p in networks["student"].parameters() if p.requires_grad])
    for kept, replayed in zip(*found, strict=True):
        assert torch.allclose(kept, replayed, rtol=1e-12, atol=1e-18)


def test_a_turn_reads_no_number_back_from_the_device(networks, conditions, monkeypatch):
    """Each would wait for it; choices of the turn, which are made on the host, are fixed here."""
    monkeypatch.setattr(score_levels, "turn_share", lambda *_: 0.5)
    reads = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function == torch.ops.aten._local_scalar_dense.default:
                reads.append(function)
            return function(*args, **kwargs or {})

    with Reads():
        out = take(networks, "student", conditions)
        list(out.pieces)
        take(networks, "critic", conditions, distill=replace(SETTINGS, scored_frames="window 3"))
    assert not reads
