"""Training steps on a device called npu that is not there: `python npu_step.py CONFIG RANKS`.
test_npu_step.py runs it.

PrivateUse1 is renamed to npu, and FakeTensorMode computes shapes and devices only. A tensor that
anything makes on another device meets the others in an operator and raises. What a step reads back
to the host (losses, norms) reads as one. Every operator on the device is compared with the list of
those that the vendor computes there (npu_operators.txt; a composite of others needs no entry), and
none may see fp64. At the end a stray literal, an fp64 number and an operator outside the list
are planted, one after the other, and the same step is taken again.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock, patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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


class Operators(TorchDispatchMode):
    """Note the operators on the device that the vendor does not list, and those that see fp64."""

    def __init__(self) -> None:
        super().__init__()
        lines = (Path(__file__).with_name("npu_operators.txt")).read_text().splitlines()
        self.listed = {line for line in lines if not line.startswith("#")}
        self.unlisted: set[str] = set()
        self.double: set[str] = set()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        there = [x for x in leaves if x.device.type == "npu"]
        space, _, name = func._schema.name.partition("::")
        if there and space == "aten":
            self.seen += 1
            overload = func._schema.overload_name
            name = f"{name}.{overload}" if overload else name
            if any(x.dtype in (torch.float64, torch.complex64, torch.complex128) for x in there):
                self.double.add(name)
            if name not in self.listed and not composite(func) and not self.by_out(func):
                self.unlisted.add(name)
        return out

    def by_out(self, func) -> bool:
        """Return whether the vendor lists the form of an operator that writes to a given tensor, by
        which torch computes the other, or torch makes it of a copy and a view."""
        base = func._schema.name.partition("::")[2]
        key = "CompositeExplicitAutogradNonFunctional"
        made = torch._C._dispatch_has_kernel_for_dispatch_key(func._schema.name + suffix(func), key)
        forms = (f"{base}.{end}" for end in ("out", "grad_input"))
        return made and (base == "select_backward" or any(form in self.listed for form in forms))


def composite(func) -> bool:
    """Return whether torch computes an operator by others, on any device."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = ("CompositeExplicitAutograd", "CompositeImplicitAutograd")
    return any(has(func._schema.name + suffix(func), key) for key in keys)


def suffix(func) -> str:
    return f".{func._schema.overload_name}" if func._schema.overload_name else ""


def planted(what):
    """A line that somebody might write into a layer: the embedding of pictures adds `what`, 0."""
    from wm_train.models.layers.embed import PatchEmbed

    kept = PatchEmbed.forward

    def forward(self, x, *rest):
        out = kept(self, x, *rest)
        return out + what(out)

    return patch.object(PatchEmbed, "forward", forward)


def fused_attention() -> ModuleType:
    """The vendor's attention as shapes: rows' maximum and sum, eight times."""

    def forward(q, k, v, head_num, input_layout, *, scale):
        assert (head_num, input_layout) == (q.shape[2], "BSND")
        sums = q.new_empty(len(q), head_num, q.shape[1], 8, dtype=torch.float32)
        return torch.empty_like(q), sums, torch.empty_like(sums), None, 0, 0, 0

    def backward(q, k, v, grad, head_num, input_layout, **given):
        assert {x.dtype for x in (q, k, v, grad, given["attention_in"])} == {torch.bfloat16}
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None

    module = ModuleType("torch_npu")
    module.npu_fusion_attention, module.npu_fusion_attention_grad = forward, backward
    return module


def main(config: Path, ranks: int) -> None:
    """The trainer's own data, mesh, model, step, guard, optimizer and average."""
    sys.modules["torch_npu"] = fused_attention()
    sys.modules["torch_npu"].__spec__ = ModuleSpec("torch_npu", None)
    backend_registration._setup_privateuseone_for_python_backend(
        "npu", backend_module=Npu("torch.npu")
    )

    from parallel.timing import CommClock
    from wm_train.backends import get_backend
    from wm_train.config.curriculum import plan_stage
    from wm_train.config.typed import from_json
    from wm_train.kernels.attention import choose
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
    CommClock.seconds = lambda self: 0.0  # nor a clock
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    choose.defect = lambda *given: None  # a trial compares values
    stage = open_stage(plan, backend, World(0, ranks))
    with open_loader(stage, "train", stage.config.global_batch) as loader:
        batches = [next(loader) for _ in range(2)]
    operators = Operators()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, HostReads(mode), Literals(), operators:
        state = build_state(plan, stage.mesh.fsdp, backend.device)
        guard, clock = Guard(plan.config.trainer, ()), StepClock(stage, state)

        def take(step: int, batch) -> dict[str, float]:
            batch = on_device(stage, batch)
            return train_step(stage, state, batch, step, guard, StopRequest(), clock).figures

        for step, batch in enumerate(batches, 1):
            clock.begin()
            figures = take(step, batch) | clock.end(batch.data_wait_s)
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
        print("took", step, "steps on", backend.device, "of", operators.seen > 1000)
        print("unlisted:", sorted(operators.unlisted), "fp64:", sorted(operators.double))
        with planted(lambda x: torch.zeros(1, device=x.device, dtype=torch.float64).to(x.dtype)):
            take(step + 1, batches[0])
        with planted(lambda x: torch.special.ndtri(x.float().mean()).to(x.dtype) * 0):
            take(step + 2, batches[0])
        print("unlisted:", sorted(operators.unlisted), "fp64:", len(operators.double) > 0)
        try:
            with planted(lambda x: torch.zeros(1, device="cuda")):
                take(step + 3, batches[0])
        except RuntimeError as found:
            print("found:", str(found).splitlines()[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
