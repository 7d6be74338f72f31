"""Optimizers: the same step however weights are sharded, updates of the promised size, schedules
that are functions of the step."""

from pathlib import Path

import pytest
import torch

from wm_train.models.sana_wm.config import SanaWMConfig
from wm_train.models.spec import build_model
from wm_train.optim.adamw import adamw_groups, build_adamw, optimizer_tensors
from wm_train.optim.config import AdamWConfig
from wm_train.optim.ema import ema_start, ema_update, ema_weights
from wm_train.optim.normuon import NorMuon, orthogonalise
from wm_train.optim.schedule import learning_rate

WORKER = Path(__file__).with_name("optimizer_worker.py")


@pytest.mark.parametrize(
    "name", [pytest.param("adamw", marks=pytest.mark.full), "normuon"]
)  # which steps vectors with AdamW
def test_sharded_steps_equal_the_whole_one(tmp_path, run_ranks, name):
    for count in (1, 3):
        run_ranks(count, WORKER, name, tmp_path / f"{count}.pt")
    one, three = (
        torch.load(tmp_path / "1.pt", weights_only=True),
        torch.load(tmp_path / "3.pt", weights_only=True),
    )
    assert one.keys() == three.keys()
    for key in one:
        torch.testing.assert_close(three[key], one[key], rtol=1e-6, atol=1e-7, msg=key)


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


def test_a_normuon_update_has_the_root_mean_square_of_an_adamw_update():
    weight = torch.nn.Parameter(torch.zeros(32, 48))
    weight.grad = torch.randn(32, 48, generator=torch.Generator().manual_seed(0)) * 1e-3
    NorMuon([weight], lr=0.5, momentum=0.95, beta2=0.95, weight_decay=0.0).step()
    assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.5 * 0.2, rel=1e-4)


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
