"""DeepSpeed ZeRO-3 behind the same interface as FSDP2 (`parallel.sharding=zero3`), for its offload to host memory and to NVMe.

ZeRO-3 gives each process a flat stretch of every parameter. Checkpoints are made of rows, so `rows` and `fill` turn one into the other,
one parameter at a time; the files are those of FSDP2 and each reads the other's. DeepSpeed averages gradients over processes and we sum
them, so losses are multiplied by the number of processes, which a power of two makes exact.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

SLOTS = ("exp_avg", "exp_avg_sq")  # of AdamW, besides `step`
SWAP_GROUP, SWAP_BUFFERS = 50_000_000, 4  # numbers that are on the way to or from a disk together, in buffers of so many in host memory


def check(offload: str, nvme_path: str | None) -> None:
    """Raises ValueError when this machine lacks what ZeRO-3 with this offload needs: DeepSpeed; for nvme its async_io and the folder."""
    _deepspeed()
    if offload != "nvme":
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ValueError(
            "offload: got nvme where DeepSpeed's async_io cannot be built, expected libaio with its headers (key parallel.offload_state). "
            "Fix: install libaio-dev, or parallel.offload_state=cpu"
        )
    if not (os.path.isdir(nvme_path or "") and os.access(nvme_path or "", os.W_OK)):
        raise ValueError(f"offload: got {nvme_path}, expected a folder that can be written (key parallel.nvme_path). Fix: make it")


def check_room(folder: Path, needed: int) -> None:
    """Raises ValueError when so many bytes do not fit into `folder`, where what an earlier start has left is overwritten. DeepSpeed would
    abort the process."""
    folder.mkdir(parents=True, exist_ok=True)
    room = shutil.disk_usage(folder).free + sum(file.stat().st_size for file in folder.rglob("*.swp"))
    if room < needed:
        raise ValueError(
            f"offload: got {room / 2**30:.1f} GiB of room in {folder}, expected {needed / 2**30:.1f} for the master weights and moments of "
            "this node's processes (key parallel.nvme_path). Fix: a folder on a larger disk, or more nodes"
        )


def zero_config(precision: str, offload: str, nvme_path: str | None) -> dict[str, Any]:
    """What DeepSpeed is told. Batch, clipping and accumulation stay the trainer's. To nvme go master weights and moments, in groups above
    a megabyte; gradients and the weights that are computed with wait in host memory."""
    stage: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0, "overlap_comm": False}
    if offload != "none":
        host = {"device": "cpu", "pin_memory": torch.accelerator.is_available()}
        disk = {"device": "nvme", "nvme_path": nvme_path, "buffer_count": SWAP_BUFFERS} if offload == "nvme" else {}
        stage |= {"offload_param": host, "offload_optimizer": host | disk}
        stage |= {"sub_group_size": SWAP_GROUP} if offload == "nvme" else {}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # its default is 1.0, of the norm before the trainer's own clipping
        "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed's own would be compiled at the first start
        "zero_force_ds_cpu_optimizer": False,  # nor where the update runs on the host
        "bf16": {"enabled": precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": stage,
    }


def building(config: dict[str, Any]) -> AbstractContextManager[Any]:
    """While entered, every module that is made is split over the processes at once: none ever holds the whole model."""
    return _deepspeed().zero.Init(config_dict_or_path=config)  # the type from the config: `dtype=` is not heeded on CPUs


def _deepspeed() -> Any:
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            f"sharding: got zero3 ({error}), expected an installed deepspeed (key parallel.sharding). "
            "Fix: pip install 'wm-train[deepspeed]', or parallel.sharding=fsdp"
        ) from error
    import logging

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # it reports its own set-up line by line
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed


def _keep_gradients_in_memory(swapper: Any) -> None:
    """DeepSpeed would write the gradients of large parameters to files and read each back to where its parameter begins, which direct IO
    refuses for most; nobody looks, and the gradient is what the memory held before. They are in host memory anyway, so there they stay.
    What lies between them (a stretch that ends short, a parameter without a gradient) is zero: it would count in the norm."""
    read = swapper._swap_in_gradients

    def swap_out_gradients(parameter: Tensor, gradient_offsets: list[int], gradient_tensors: list[Tensor]) -> None:
        held = swapper.swap_params_info[swapper.parameter_id(parameter)].unswapped_gradients
        held |= {offset: tensor.cpu() for offset, tensor in zip(gradient_offsets, gradient_tensors, strict=True)}

    def into_zeros(aio_handle: Any, parameter: Tensor, dest_buffer: Tensor) -> None:
        read(aio_handle, parameter, dest_buffer.zero_())

    swapper.swap_out_gradients, swapper._swap_in_gradients = swap_out_gradients, into_zeros


class Zero3:
    """A model built inside `building`, its optimizer and their engine; also the optimizer that the trainer steps."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, mesh: DeviceMesh, config: dict[str, Any]) -> None:
        """mesh: one-dimensional, over all processes."""
        self.mesh, self.model = mesh, model
        stage = config["zero_optimization"]
        if stage.get("offload_optimizer", {}).get("device") == "nvme":
            held = sum(p.ds_tensor.numel() for p in model.parameters() if p.requires_grad)  # type: ignore[attr-defined]
            node = held * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            check_room(Path(stage["offload_optimizer"]["nvme_path"]), 4 * (1 + len(SLOTS)) * node)
        self.engine = _deepspeed().initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
        self.inner = self.engine.optimizer
        self.param_groups: list[dict[str, Any]] = self.inner.optimizer.param_groups
        if self.inner.swap_optimizer:
            _keep_gradients_in_memory(self.inner.optimizer_swapper)
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._groups = dict[int, list[tuple[str, slice]]]()  # number of a flat tensor -> the stretches in it, by parameter
        for name, p in self._trained.items():
            group, start, count = self.inner.grad_position[self.inner.get_param_id(p)]
            self._groups.setdefault(group, []).append((name, slice(start, start + count)))
        for group in self._groups:  # made at once, so that a checkpoint always has every name
            with self._flat(group, changes=True) as flat:
                slots = {slot: torch.zeros_like(flat) for slot in SLOTS}
                self.state[flat] = {"step": torch.zeros((), dtype=torch.float32), **slots}
        self.check_disk()

    def check_disk(self) -> None:
        """Raises ValueError when master weights, as they are after building, do not come back as they were written: DeepSpeed does not look
        at what its reads and writes have returned."""
        for group in filter(self._on_disk, self._groups):
            for buffer in self.inner.optimizer_swapper.swap_buffer_manager.all_buffers:
                buffer.fill_(torch.nan)  # else it still holds what was written
            with self._flat(group) as flat:
                weights = self.inner.fp16_partitioned_groups_flat[group]
                same = torch.equal(flat.data.to(weights.dtype), weights) and not any(self.state[flat][slot].any() for slot in SLOTS)
            if not same:
                raise ValueError(
                    f"offload: got other bytes back than were written to {self.inner.optimizer_swapper.swap_folder}, expected a local disk "
                    "with direct IO (key parallel.nvme_path). Fix: name a folder on another disk"
                )

    def _on_disk(self, group: int) -> bool:
        return bool(self.inner._swappable_optimizer_subgroup(group))

    @contextmanager
    def _flat(self, group: int, changes: bool = False) -> Iterator[Tensor]:
        """The flat master weights of a group. If they lie on a disk they are in memory while entered, with moments and gradients, and are
        written back if something `changes`."""
        if self._on_disk(group):
            self.inner._optimizer_states_and_gradient_swap_in(group)
        yield self.inner.fp32_partitioned_groups_flat[group]
        if self._on_disk(group):
            (self.inner._optimizer_states_and_gradient_swap_out if changes else self.inner._release_swap_buffers)(group)

    # the optimizer that the trainer steps

    @property
    def state(self) -> Any:
        return self.inner.optimizer.state

    def step(self) -> None:
        self.engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    # gradients

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of one micro-batch; `last`: of this step."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)

    def gradients(self) -> list[Tensor]:
        """This process's stretches of all gradients, fp32; zero beyond a parameter's end."""
        found: list[Tensor] = []
        for group, members in self._groups.items():
            if self._on_disk(group):
                with self._flat(group) as flat:
                    found += [] if flat.grad is None else [flat.grad.clone()]
            else:
                found += [self.inner.get_local_fp32_grad_for_param(self._trained[name]) for name, _ in members]
        return found

    def scale_gradients(self, factor: float) -> None:
        for group, members in self._groups.items():
            if self._on_disk(group):
                self.inner._optimizer_states_and_gradient_swap_in(group)
                self.inner.fp32_partitioned_groups_flat[group].grad.mul_(factor)
                self.inner._writeback_swap_state(group, write_opt_state=False, write_gradients=True)
                continue
            for name, _ in members:
                parameter = self._trained[name]
                self.inner.set_local_grad_for_param(self.inner.get_local_fp32_grad_for_param(parameter) * factor, parameter)

    # weights and moments, as flat stretches: those that live in the engine, copies of those that lie on a disk

    def weights(self) -> dict[str, Tensor]:
        """The fp32 master weights; of what is not trained, the weights that are computed with."""
        masters = self._stretches(None)
        return {
            name: masters[name] if p.requires_grad else p.ds_tensor.data.view(-1)  # type: ignore[attr-defined]
            for name, p in self.model.named_parameters()
        }

    def moments(self) -> dict[str, Tensor]:
        """{"<parameter>/<slot>": stretch}; `step` is one number."""
        found = {f"{name}/{slot}": stretch for slot in SLOTS for name, stretch in self._stretches(slot).items()}
        for group, members in self._groups.items():
            step = self.state[self.inner.fp32_partitioned_groups_flat[group]]["step"]
            found |= {f"{name}/step": step for name, _ in members}
        return found

    def _stretches(self, slot: str | None) -> dict[str, Tensor]:
        """Of the weights (None) or of one of their moments."""
        found = dict[str, Tensor]()
        for group, members in self._groups.items():
            with self._flat(group) as flat:
                held = flat.data if slot is None else self.state[flat][slot]
                found |= {name: held[where].clone() if self._on_disk(group) else held[where] for name, where in members}
        return found

    def write(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor] | None = None) -> None:
        """What `weights`, and perhaps `moments`, gave has been changed in place: take it to the disk where it lies there, and into the
        weights that are computed with."""
        self.inner._partition_all_parameters()  # what an evaluation has left gathered is out of date
        for group, members in self._groups.items():
            with self._flat(group, changes=True) as flat:
                for name, where in members if self._on_disk(group) else ():
                    flat.data[where].copy_(weights[name])
                    for slot in SLOTS if moments else ():
                        self.state[flat][slot][where].copy_((moments or {})[f"{name}/{slot}"])
                self.inner._reassign_or_swap_out_partitioned_parameters(group)

    # to and from rows

    def shape(self, parameter: str) -> torch.Size:
        return self.model.get_parameter(parameter).ds_shape  # type: ignore[attr-defined]

    def rows(self, stretch: Tensor, shape: torch.Size) -> DTensor:
        """A stretch on each process, the ends padded -> the same tensor in rows, fp32, split as FSDP2 splits it."""
        size, rank = self.mesh.size(), self.mesh.get_local_rank()
        everyone = [torch.empty_like(stretch) for _ in range(size)]
        dist.all_gather(everyone, stretch.contiguous(), group=self.mesh.get_group())
        full = torch.cat(everyone)[: shape.numel()].view(shape).float()
        parts = full.chunk(size)
        mine = parts[rank].clone() if rank < len(parts) else full[:0].clone()
        return DTensor.from_local(mine, self.mesh, [Shard(0)], run_check=False, shape=shape, stride=full.stride())

    def empty_rows(self, shape: torch.Size) -> DTensor:
        """Rows to be filled."""
        return self.rows(torch.zeros(-(-shape.numel() // self.mesh.size())), shape)

    def fill(self, stretch: Tensor, rows: Tensor) -> None:
        """The inverse of `rows`, into `stretch` in place."""
        full = rows.full_tensor().flatten() if isinstance(rows, DTensor) else rows.flatten()
        start = self.mesh.get_local_rank() * stretch.numel()
        mine = full[start : start + stretch.numel()]
        stretch[: mine.numel()].copy_(mine)
