"""The whole backbone on kernels equals the backbone on references, on one device and on virtual
ranks: outputs and every gradient."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch

from parallel.layout import ClipLayout
from parallel.reference import REFERENCE
from parallel.sequence import GroupSequence, LocalSequence
from parallel.virtual import replicate, run_virtual
from wm_train.conditioning import Conditions
from wm_train.kernels import dispatch
from wm_train.models.init import initialise_
from wm_train.models.sana_wm import attention
from wm_train.models.sana_wm.config import SanaWMConfig as ModelConfig
from wm_train.models.spec import build_model

CONFIG = ModelConfig(
    latent_channels=4, depth=2, width=48, heads=2, softmax_every=2
)  # D = 24: a padded head
FRAMES, GRID = 4, (2, 3)
INTERPRETER = threading.Lock()


def awake() -> torch.nn.Module:
    """A model whose zero-initialised parts are not zero."""
    model = build_model(CONFIG)
    initialise_(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def one_at_a_time(function: Callable) -> Callable:
    """Virtual ranks are threads, and Triton's interpreter has one program counter for all of
    them."""

    def call(*arguments, **keywords):
        with INTERPRETER:
            return function(*arguments, **keywords)

    return call


@pytest.fixture
def clip():
    """Latents, noise levels and a camera that turns and walks."""
    raw = (FRAMES - 1) * 8 + 1
    angle = torch.linspace(0, 0.5, raw)
    c2w = torch.eye(4).repeat(1, raw, 1, 1)
    c2w[0, :, 0, 0], c2w[0, :, 0, 2], c2w[0, :, 2, 0], c2w[0, :, 2, 2] = (
        angle.cos(),
        angle.sin(),
        -angle.sin(),
        angle.cos(),
    )
    c2w[0, :, 2, 3] = torch.linspace(0, 2.0, raw)
    intrinsics = torch.tensor([80.0, 80.0, 48.0, 32.0]).expand(1, raw, 4)
    return (
        torch.randn(1, FRAMES, 4, *GRID),
        torch.rand(1, FRAMES),
        Conditions.of((64, 96), 8, c2w, intrinsics),
    )


def on_virtual_ranks(
    model, clip, layout, table, ranks
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    latents, sigma, conditions = clip
    copies = replicate(model, ranks)

    def body(comm):
        sequence = GroupSequence(layout, comm, table)
        local = slice(sequence.frames.start, sequence.frames.stop)
        return copies[comm.members[0].index](
            latents[:, local], sigma[:, local], conditions, sequence
        )

    results, _ = run_virtual(body, ranks)
    torch.cat(results, 1).square().sum().backward()
    named = [dict(copy.named_parameters()) for copy in copies]
    grads = {
        name: torch.stack([own[name].grad for own in named]).sum(0)
        for name, p in named[0].items()
        if p.grad is not None
    }
    return torch.cat([x.detach() for x in results], 1), grads


def on_one_device(model, clip, layout, table) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    out = model(*clip, LocalSequence(layout, table))
    out.square().sum().backward()
    return out.detach(), {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, ClipLayout(FRAMES)),
        (2, ClipLayout(FRAMES, valid_frames=(3,))),
        pytest.param(3, ClipLayout(FRAMES), marks=pytest.mark.full),
    ],
    ids=["one-device", "two-ranks-padded", "three-ranks"],
)
def test_model_on_kernels_equals_model_on_references(ranks, layout, clip, monkeypatch, rms_ratio):
    model = awake()
    expected, expected_grads = on_one_device(model, clip, layout, REFERENCE)
    model.zero_grad()
    for name in ("short_convolution", "gdn_gram", "gdn_output", "camera_gram", "camera_output"):
        monkeypatch.setattr(attention, name, one_at_a_time(getattr(dispatch, name)))
    model.use_kernels("triton")  # on CPUs `auto` never picks the interpreter
    run = on_one_device if ranks == 1 else partial(on_virtual_ranks, ranks=ranks)
    actual, grads = run(
        model, clip, layout, dispatch.sequence_kernels(torch.device("cpu"), "triton")
    )
    assert rms_ratio(actual, expected) <= 1e-4
    assert grads.keys() == expected_grads.keys()
    total = torch.stack([g.norm() for g in expected_grads.values()]).norm()
    assert max((grads[name] - g).norm() / total for name, g in expected_grads.items()) <= 1e-4
