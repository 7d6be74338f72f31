"""Count the waits of a step for the device: each number that the host reads is one
synchronisation."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from wm_train.config.registry import builder
from wm_train.config.roles import turn_of
from wm_train.evaluation.held_out import held_out_loss
from wm_train.training.data import clips_of, micro_batches, open_loader
from wm_train.training.state import build_state
from wm_train.training.step import gradients, squared_norm


class HostReads(TorchDispatchMode):
    """Count what would wait for a device: scalars read by the host, and `Tensor.cpu`, here a no-op.

    `doubles` counts casts to fp64, which not every device has.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count, self.doubles, true = 0, 0, torch.Tensor.cpu

        def cpu(tensor):
            self.count += 1
            return true(tensor)

        monkeypatch.setattr(torch.Tensor, "cpu", cpu)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.count += function == torch.ops.aten._local_scalar_dense.default
        self.doubles += kwargs.get("dtype") == torch.float64
        return function(*args, **kwargs)


def metrics(stage, state, batch):
    """The sums that `gradients` should return, from one objective a micro-batch, added in fp64."""
    sums: dict[str, float] = {}
    for part in micro_batches(stage, batch):
        with torch.no_grad():
            config = stage.config.objective
            output = builder(config)(state.model, clips_of(stage, part), config)
        for name, value in {"loss": output.loss, **output.metrics}.items():
            sums[name] = sums.get(name, 0.0) + math.fsum(value.tolist())
    return sums


def test_the_metrics_of_a_step_are_read_once(stage_of, monkeypatch):
    stage = stage_of("trainer.accumulate=2", "recipe.stages.short.global_batch=4")
    state = build_state(stage.plan, stage.mesh.fsdp, stage.backend.device)
    with open_loader(stage, "train", 4) as loader:
        batch = next(loader)
    assert len(list(micro_batches(stage, batch))) == 2
    expected = metrics(stage, state, batch)
    with HostReads(monkeypatch) as reads:
        sums = gradients(stage, state, batch, turn_of("S", 0))
    assert set(sums) == {"loss", "sigma", "image_condition"}
    assert sums == pytest.approx(expected, rel=1e-12)
    assert (reads.count, reads.doubles) == (1, 0)


def test_the_norm_of_the_gradients_is_read_once(stage_of, monkeypatch):
    stage = stage_of()
    state = build_state(stage.plan, stage.mesh.fsdp, stage.backend.device)
    for parameter in state.model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    norm = 0.25 * sum(parameter.numel() for parameter in state.model.parameters())
    with HostReads(monkeypatch) as reads:
        assert squared_norm(state, stage.world) == pytest.approx(norm, rel=1e-6)
    assert (reads.count, reads.doubles) == (1, 0)


def test_the_held_out_loss_asks_no_fp64_of_the_device(stage_of, monkeypatch):
    stage = stage_of("trainer.validation_clips=2")
    state = build_state(stage.plan, stage.mesh.fsdp, stage.backend.device)
    with HostReads(monkeypatch) as reads:
        losses = held_out_loss(stage, state)
    assert math.isfinite(losses["validation_loss"])
    assert reads.doubles == 0
