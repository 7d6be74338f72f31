"""Optimizers: the same step however weights are sharded, updates of the promised size, schedules
that are functions of the step."""

from pathlib import Path

import pytest
import torch

from wm_train.models.sana_wm.config import SanaWMConfig
from wm_train.models.spec import build_model
from wm_train.optim.adamw import adamw_groups, build_adamw, optimizer_tensors
from wm_train.optim.config import AdamWConfig, NorMuonConfig
from wm_train.optim.ema import ema_start, ema_update, ema_weights
from wm_train.optim.normuon import NorMuon, build_normuon, orthogonalise
from wm_train.optim.owners import deal
from wm_train.optim.schedule import learning_rate

WORKER = Path(__file__).with_name("optimizer_worker.py")


@pytest.mark.parametrize(
    "name", [pytest.param("adamw", marks=pytest.mark.full), "normuon"]
)  # which steps vectors with AdamW
def test_sharded_steps_equal_the_whole_one_to_the_bit_across_a_resume(tmp_path, run_ranks, name):
    """Two steps of one process; and one step of two processes, saved, then one of three, of which
    some hold fewer rows than others: whoever owns a matrix, its update is the same."""
    one, handed = tmp_path / "one", tmp_path / "handed"
    run_ranks(1, WORKER, name, tmp_path / "1.pt", one, 0, 2, 1)
    run_ranks(2, WORKER, name, tmp_path / "2.pt", handed, 0, 1, 1)
    run_ranks(3, WORKER, name, tmp_path / "3.pt", handed, 1, 2, 1)
    same_bits(tmp_path / "1.pt", tmp_path / "3.pt")


@pytest.mark.full
def test_replicas_step_alike_and_a_smaller_world_goes_on(tmp_path, run_ranks):
    one, handed = tmp_path / "one", tmp_path / "handed"
    run_ranks(1, WORKER, "normuon", tmp_path / "1.pt", one, 0, 3, 1)
    run_ranks(4, WORKER, "normuon", tmp_path / "4.pt", handed, 0, 2, 2)
    run_ranks(1, WORKER, "normuon", tmp_path / "5.pt", handed, 2, 3, 1)
    same_bits(tmp_path / "1.pt", tmp_path / "5.pt")


def same_bits(*files):
    one, other = (torch.load(file, weights_only=True) for file in files)
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(other[key], one[key]), (key, (other[key] - one[key]).abs().max())


def test_matrices_are_dealt_evenly_and_the_same_by_every_process():
    """Waypoint's blocks over 32 owners: no owner has more than 3 % above the mean."""
    width, depth = 2048, 24
    block = [(width, width), (width // 2, width), (width // 2, width), (width, width)]
    block += [(4 * width, width), (width, 4 * width)]
    shapes = block * depth + [(width, width)] * 24
    rounds = deal(shapes, 32)
    assert sorted(i for turn in rounds for i in turn if i is not None) == list(range(len(shapes)))
    work = [0.0] * 32
    for turn in rounds:
        for owner, i in enumerate(turn):
            if i is not None:
                small, large = sorted(shapes[i])
                work[owner] += small**2 * (2 * large + small)
    assert max(work) <= 1.03 * sum(work) / 32
    assert deal([(4, 4)], 3) == [(0, None, None)]
    assert deal([], 3) == []


@pytest.mark.parametrize("shape", [(40, 17), (17, 40), (24, 24)])
def test_orthogonalised_singular_values_are_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 7
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert values.min() > 0.3
    assert values.max() < 1.4
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    exact = u @ v
    cosine = (orthogonalise(matrix) * exact).sum() / (orthogonalise(matrix).norm() * exact.norm())
    assert cosine > 0.97


def stepped(gradient, scale, lr=0.5):
    """The step of a zero weight."""
    weight = torch.nn.Parameter(torch.zeros_like(gradient))
    weight.grad = gradient
    NorMuon([weight], lr, momentum=0.95, beta2=0.95, weight_decay=0.0, scale=scale).step()
    return weight.detach()


@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (24, 24)])
def test_both_scales_of_an_update_at_their_closed_forms(shape):
    """Of an orthogonal gradient: rms gives 0.2 times lr; muon lr · sqrt(max(1, R/C)) / sqrt(max(R,
    C)), as an orthogonal matrix has norm sqrt(min(R, C)). Newton-Schulz iterations end with
    singular values of 0.68 to 1.14, for an orthogonal matrix all the same one."""
    (rows, columns), draws = shape, torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=draws), full_matrices=False)
    gradient = u @ v * 1e-3
    reached = float(torch.linalg.svdvals(orthogonalise(gradient)).mean())
    assert 0.68 < reached < 1.14
    rms = stepped(gradient, "rms").square().mean().sqrt()
    assert float(rms) == pytest.approx(0.5 * 0.2, rel=1e-4)
    muon = stepped(gradient, "muon").square().mean().sqrt()
    closed = 0.5 * max(1, rows / columns) ** 0.5 / max(rows, columns) ** 0.5
    assert float(muon) == pytest.approx(closed * reached, rel=1e-3)


@pytest.mark.parametrize("scale", ["rms", "muon"])
@pytest.mark.parametrize("shape", [(32, 48), (48, 32)])
def test_steps_against_the_svd_in_fp64(shape, scale):
    """Two steps by the paper's formulas. The iterations map each singular value by a polynomial and
    leave the singular vectors: by an SVD the steps agree to rounding; with all singular values 1,
    the exact polar factor, in direction."""
    for exact in (False, True):
        draws, momentum = torch.Generator().manual_seed(0), torch.zeros(shape, dtype=torch.float64)
        weight = torch.nn.Parameter(torch.zeros(shape))
        optimizer = NorMuon([weight], 0.5, momentum=0.95, beta2=0.95, weight_decay=0.1, scale=scale)
        expected, squares = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape[0]).double()
        for _ in range(2):
            weight.grad = torch.randn(shape, generator=draws)
            gradient = weight.grad.double()
            momentum = 0.95 * momentum + 0.05 * gradient
            u, s, v = torch.linalg.svd(0.05 * gradient + 0.95 * momentum, full_matrices=False)
            s = s / s.norm()
            for _ in range(5):
                s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
            polar = u @ v if exact else u * s @ v
            squares = 0.95 * squares + 0.05 * polar.square().mean(1)
            update = polar / squares.sqrt()[:, None]
            size = 0.2 * polar.numel() ** 0.5
            if scale == "muon":
                size = polar.norm() * max(1, shape[0] / shape[1]) ** 0.5
            expected = expected * (1 - 0.5 * 0.1) - 0.5 * update * size / update.norm()
            optimizer.step()
        found = weight.detach().double()
        if exact:
            assert (found * expected).sum() / (found.norm() * expected.norm()) > 0.98
        else:
            assert (found - expected).norm() / expected.norm() <= 1e-4


def test_a_matrix_without_gradient_or_with_a_zero_one_does_not_move():
    still = torch.nn.Parameter(torch.ones(16, 16))
    zero = torch.nn.Parameter(torch.ones(16, 16))
    zero.grad = torch.zeros(16, 16)
    optimizer = NorMuon([still, zero], 0.5, momentum=0.95, beta2=0.95, weight_decay=0.0)
    optimizer.step()
    assert torch.equal(still, torch.ones(16, 16))
    assert torch.equal(zero, torch.ones(16, 16))


def test_normuon_and_adamw_have_keys_of_their_own():
    with torch.device("meta"):
        model = build_model(SanaWMConfig(text_width=8))
    config = NorMuonConfig(
        lr=1e-3, weight_decay=0.02, beta2=0.9, adamw_eps=1e-15, adamw_weight_decay=1e-4
    )
    matrices, *rest = build_normuon(model, config).param_groups
    assert (matrices["lr"], matrices["weight_decay"], matrices["beta2"]) == (1e-3, 0.02, 0.9)
    assert {group["weight_decay"] for group in rest} == {1e-4, 0.0}
    assert {group["eps"] for group in rest} == {1e-15}
    assert {group["lr"] for group in rest} == {1e-4}


def test_which_weights_normuon_takes():
    with torch.device("meta"):
        model = build_model(SanaWMConfig(text_width=8))
    taken = model.matrix_parameters()
    assert {"blocks.0.attn.qkv.weight", "blocks.0.mlp.point_conv.conv.weight"} <= taken
    for name in (
        "blocks.0.mlp.depth_conv.conv.weight",
        "blocks.0.attn.beta_proj.weight",
        "blocks.0.scale_shift_table",
        "x_embedder.proj.weight",
        "blocks.0.attn.q_norm.weight",
    ):
        assert name in dict(model.named_parameters())
        assert name not in taken


def test_schedules():
    flat = AdamWConfig(lr=2.0, warmup_steps=4)
    assert [learning_rate(flat, s, 10) for s in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    cosine = AdamWConfig(lr=2.0, warmup_steps=0, schedule="cosine")
    assert learning_rate(cosine, 0, 10) == 2.0
    assert learning_rate(cosine, 5, 10) == pytest.approx(1.1)
    assert learning_rate(cosine, 10, 10) == pytest.approx(0.2)


def test_the_average_follows_the_weights_and_gives_them_back():
    model = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.zeros_(model.weight)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    ema = ema_start(model, weights)
    torch.nn.init.ones_(model.weight)
    ema_update(ema, weights, 0.9, step=0)  # the warm-up: d = 1/10
    assert torch.allclose(ema["weight"], torch.full((2, 2), 0.9))
    ema_update(ema, weights, 0.9, step=1000)
    assert torch.allclose(ema["weight"], torch.full((2, 2), 0.91))

    def fail_inside() -> None:
        with ema_weights(ema, weights):
            assert torch.allclose(model.weight, ema["weight"])
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert torch.equal(model.weight, torch.ones(2, 2))


def test_adamw_is_that_of_torch():
    config = AdamWConfig(lr=1e-2, weight_decay=0.1)
    torch.manual_seed(0)
    ours, theirs = (
        torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7)) for _ in range(2)
    )
    theirs.load_state_dict(ours.state_dict())
    groups = adamw_groups(list(theirs.parameters()), config)
    optimizers = (
        build_adamw(ours, config),
        torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps),
    )
    for _ in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(torch.arange(10.0).view(2, 5)).square().sum().backward()
            optimizer.step()
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


def test_an_optimizer_without_state_has_no_tensors_and_unknown_parameters_are_named():
    model = torch.nn.Linear(2, 2)
    assert optimizer_tensors(model, torch.optim.SGD(model.parameters())) == {}
    with pytest.raises(AssertionError, match="bias"):
        optimizer_tensors(model, torch.optim.SGD([model.weight]))
