"""Training steps on a device called npu that is not there: `python npu_step.py CONFIG`.
test_npu_step.py runs it.

PrivateUse1 is renamed to npu, and FakeTensorMode computes shapes and devices only. A tensor that
anything makes on another device meets the others in an operator and raises. What a step reads back
to the host (losses, norms) reads as one. At the end a stray literal is planted into a layer of the
model, and the same step is taken again.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode


class Npu(ModuleType):
    """Stand in for torch.npu: one device, whose queues are mocks."""

    Stream = Event = stream = MagicMock()

    def __getattr__(self, name: str) -> object:
        answers = {
            "is_available": True,
            "is_initialized": True,
            "_is_in_bad_fork": False,
            "device_count": 1,
            "current_device": 0,
        }
        answers |= {"memory_allocated": 1, "max_memory_allocated": 2}
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments, **keywords: answers.get(name, MagicMock())


class HostReads(TorchDispatchMode):
    """Fake tensors have no values: what the host reads is one."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        if (
            func is torch.ops.aten._to_copy.default
        ):  # fake mode would copy values it knows to the device for real
            source = args[0] if isinstance(args[0], FakeTensor) else self.mode.from_tensor(args[0])
            source.constant = None
            args = (source, *args[1:])
        return func(*args, **(kwargs or {}))


class Literals(TorchFunctionMode):
    """Numbers and lists of indices go to the device below fake mode's sight: make a tensor of the
    host first, then move it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(
                torch.tensor(i).to(args[0].device) if isinstance(i, list) else i for i in index
            )
            args = (args[0], index, *args[2:])
        return func(*args, **kwargs)


def plant() -> None:
    """A stray literal, as somebody might write it in a layer."""
    from wm_train.models.sana_wm.ffn import GatedConvFeedForward

    kept = GatedConvFeedForward.forward
    GatedConvFeedForward.forward = lambda self, x, *rest: (
        kept(self, x, *rest) + torch.zeros(1, device="cuda")
    )  # type: ignore[method-assign]


def main(config: Path) -> None:
    """The trainer's own data, mesh, model, step, guard, optimizer and average."""
    sys.modules["torch_npu"] = ModuleType("torch_npu")
    backend_registration._setup_privateuseone_for_python_backend(
        "npu", backend_module=Npu("torch.npu")
    )

    from wm_train.backends import get_backend
    from wm_train.config.curriculum import plan_stage
    from wm_train.config.typed import from_json
    from wm_train.resilience.guard import Guard
    from wm_train.resilience.preemption import StopRequest
    from wm_train.training.data import on_device, open_loader
    from wm_train.training.stage import open_stage
    from wm_train.training.state import build_state
    from wm_train.training.step import train_step
    from wm_train.training.step_clock import StepClock
    from wm_train.world import World

    run = from_json(config.read_text())
    plan = plan_stage(run, run.stage)
    backend = get_backend("auto")
    assert (backend.name, backend.device.type, backend.collectives) == ("npu", "npu", "hccl")
    backend = replace(
        backend, capabilities=backend.capabilities - {"pinned"}
    )  # there is no allocator to pin with
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    stage = open_stage(plan, backend, World(0, 1))
    with open_loader(stage, "train", stage.config.global_batch) as loader:
        batches = [next(loader) for _ in range(2)]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, HostReads(mode), Literals():
        state = build_state(plan, stage.mesh.fsdp, backend.device)
        guard, clock = Guard(plan.config.trainer, ()), StepClock(stage, state)
        for step, batch in enumerate(batches, 1):
            clock.begin()
            taken = train_step(
                stage, state, on_device(stage, batch), step, guard, StopRequest(), clock
            )
            figures = taken.figures | clock.end(batch.data_wait_s)
        assert {
            x.device.type
            for name, x in state.tensors().items()
            if not name.startswith("optimizer/")
        } == {"npu"}
        assert all(
            p.grad is not None and p.grad.device.type == "npu"
            for p in state.model.parameters()
            if p.requires_grad
        )
        assert {"loss", "grad_norm"} <= set(figures)
        print("took", step, "steps on", backend.device)
        plant()
        try:
            train_step(
                stage, state, on_device(stage, batches[0]), step + 1, guard, StopRequest(), clock
            )
        except RuntimeError as found:
            print("found:", str(found).splitlines()[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
