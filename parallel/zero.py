"""Offer DeepSpeed ZeRO-3 behind the same interface as FSDP2, for offload to host memory and NVMe.

Chosen by `parallel.sharding=zero3`. ZeRO-3 gives each process a flat shard of every parameter.
Checkpoints are made of rows, so `rows` and `fill` convert one into the other, one parameter at a
time; the files are those of FSDP2 and each reads the other's. DeepSpeed averages gradients over
processes and we sum them, so losses are multiplied by the number of processes, which is exact for
powers of two.
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

from parallel import compat

SLOTS = ("exp_avg", "exp_avg_sq")  # of AdamW, besides `step`
BUCKET = 50_000_000  # gradients that are averaged together
SWAP_GROUP = 50_000_000  # elements that move to or from a disk together
SWAP_BUFFERS = 4  # host buffers of that size


def check(offload: str, nvme_path: str | None) -> None:
    """Raise ValueError if this machine lacks what ZeRO-3 with this offload needs.

    That is DeepSpeed, and for nvme its async_io and the folder.
    """
    _deepspeed()
    if offload != "nvme":
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ValueError(
            "offload: got nvme where DeepSpeed's async_io cannot be built, expected libaio with its"
            " headers (key parallel.offload_state). Fix: install libaio-dev, or"
            " parallel.offload_state=cpu"
        )
    if not (os.path.isdir(nvme_path or "") and os.access(nvme_path or "", os.W_OK)):
        raise ValueError(
            f"offload: got {nvme_path}, expected a folder that can be written (key"
            " parallel.nvme_path). Fix: make it"
        )


def make_room(folder: Path, needed: int) -> None:
    """Remove what an earlier start left in this node's `folder`; every process must call this.

    Raises ValueError when `needed` bytes do not fit: DeepSpeed would abort the process.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        shutil.rmtree(folder / "zero_stage_3", ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    room = shutil.disk_usage(folder).free
    if room < needed:
        raise ValueError(
            f"offload: got {room / 2**30:.1f} GiB of room in {folder}, expected"
            f" {needed / 2**30:.1f} for the master weights and moments of this node's processes"
            " (key parallel.nvme_path). Fix: a folder on a larger disk, or more nodes"
        )


def zero_config(precision: str, offload: str, nvme_path: str | None) -> dict[str, Any]:
    """Return DeepSpeed's configuration; batch, clipping and accumulation stay the trainer's.

    With nvme, master weights and moments go to disk, in groups above a megabyte; gradients and the
    weights used for computing stay in host memory.
    """
    stage: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "overlap_comm": False,
        "reduce_bucket_size": BUCKET,
    }
    if offload != "none":
        host = {"device": "cpu", "pin_memory": torch.accelerator.is_available()}
        disk = (
            {"device": "nvme", "nvme_path": nvme_path, "buffer_count": SWAP_BUFFERS}
            if offload == "nvme"
            else {}
        )
        stage |= {"offload_param": host, "offload_optimizer": host | disk}
        stage |= {"sub_group_size": SWAP_GROUP} if offload == "nvme" else {}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # its default is 1.0, of the norm before the trainer's own clipping
        "gradient_clipping": 0.0,
        # torch's AdamW: DeepSpeed's own would be compiled at the first start
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # also when the update runs on the host
        "bf16": {"enabled": precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": stage,
    }


def building(config: dict[str, Any]) -> AbstractContextManager[Any]:
    """Return a context in which every new module is split over the processes at once.

    So no process ever holds the whole model.
    """
    # the type from the config: `dtype=` is not heeded on CPUs
    return _deepspeed().zero.Init(config_dict_or_path=config)


def _deepspeed() -> Any:
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            f"sharding: got zero3 ({error}), expected an installed deepspeed (key"
            " parallel.sharding). Fix: pip install 'wm-train[deepspeed]', or"
            " parallel.sharding=fsdp"
        ) from error
    import logging

    # it logs every line of its set-up
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(
            dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False
        )
    return deepspeed


class Zero3:
    """Wrap a model built inside `building`, its optimizer and their DeepSpeed engine.

    It is also the optimizer that the trainer steps.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        mesh: DeviceMesh,
        config: dict[str, Any],
    ) -> None:
        """Initialise DeepSpeed's engine. mesh: one-dimensional, over all processes."""
        self.mesh, self.model = mesh, model
        stage = config["zero_optimization"]
        if stage.get("offload_optimizer", {}).get("device") == "nvme":
            folder = Path(stage["offload_optimizer"]["nvme_path"])
            trained: list[Any] = [p for p in model.parameters() if p.requires_grad]
            held = sum(p.ds_tensor.numel() for p in trained)
            make_room(
                folder, 4 * (1 + len(SLOTS)) * held * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            )
        self.engine = _deepspeed().initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )[0]
        self.inner = self.engine.optimizer
        self.param_groups: list[dict[str, Any]] = self.inner.optimizer.param_groups
        if self.inner.swap_optimizer:
            compat.keep_gradients_in_memory(self.inner)
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # index of a flat tensor -> the slices of its parameters
        self._groups = dict[int, list[tuple[str, slice]]]()
        for name, p in self._trained.items():
            group, place = compat.place_in_group(self.inner, p)
            self._groups.setdefault(group, []).append((name, place))
        for group in self._groups:  # now, so that every checkpoint has every name
            with self._flat(group, changes=True) as flat:
                slots = {slot: torch.zeros_like(flat) for slot in SLOTS}
                self.state[flat] = {"step": torch.zeros((), dtype=torch.float32), **slots}
        self.check_disk()

    def check_disk(self) -> None:
        """Raise ValueError unless the master weights, as built, are read back as they were written.

        DeepSpeed ignores what its reads and writes return.
        """
        for group in filter(self._on_disk, self._groups):
            for buffer in compat.swap_buffers(self.inner):
                buffer.fill_(torch.nan)  # else it still holds what was written
            with self._flat(group) as flat:
                weights = self.inner.fp16_partitioned_groups_flat[group]
                same = torch.equal(flat.data.to(weights.dtype), weights) and not any(
                    self.state[flat][slot].any() for slot in SLOTS
                )
            if not same:
                raise ValueError(
                    "offload: got other bytes back than were written to"
                    f" {self.inner.optimizer_swapper.swap_folder}, expected a local disk with"
                    " direct IO (key parallel.nvme_path). Fix: name a folder on another disk"
                )

    def _on_disk(self, group: int) -> bool:
        return compat.lies_on_disk(self.inner, group)

    @contextmanager
    def _flat(self, group: int, changes: bool = False) -> Iterator[Tensor]:
        """Yield the flat master weights of a group.

        If they are on disk, they are in memory while entered, with moments and gradients, and are
        written back if something `changes`.
        """
        if self._on_disk(group):
            compat.swap_in(self.inner, group)
        yield self.inner.fp32_partitioned_groups_flat[group]
        if self._on_disk(group):
            compat.swap_out(self.inner, group, changes)

    def close(self) -> None:
        """Remove this run's files on NVMe; the next start loads a checkpoint."""
        if self.inner.swap_optimizer:
            shutil.rmtree(self.inner.optimizer_swapper.swap_folder, ignore_errors=True)

    # the optimizer that the trainer steps

    @property
    def state(self) -> Any:
        return self.inner.optimizer.state

    def step(self) -> None:
        for group in filter(self._on_disk, self._groups):  # DeepSpeed expects some gradient in each
            compat.swapped_gradients(self.inner, group).setdefault(0, torch.zeros(0))
        self.engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set all gradients to zero.

        Otherwise DeepSpeed would reuse the last gradient of a parameter that has none in the next
        step.
        """
        self.inner.zero_grad(set_to_none)
        self.inner.grad_partitions_flat_buffer.zero_()
        for gradient in self.gradients():
            gradient.zero_()

    # gradients

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of one micro-batch; `last`: of this step.

        An offloaded gradient counts only if the last micro-batch contributes to that parameter,
        too.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)

    def gradients(self) -> list[Tensor]:
        """Return this process's flat shards of all gradients, fp32, which the step will use.

        They are zero beyond a parameter's end.
        """
        found: list[Tensor] = []
        for group, members in self._groups.items():
            if self._on_disk(group):
                found += compat.swapped_gradients(self.inner, group).values()
            else:
                found += [
                    compat.own_gradient(self.inner, self._trained[name]) for name, _ in members
                ]
        return found

    def scale_gradients(self, factor: float) -> None:
        for gradient in self.gradients():
            gradient.mul_(factor)

    # weights and moments, as flat shards: the engine's own tensors, or copies of those on a disk

    def weights(self) -> dict[str, Tensor]:
        """Return the fp32 master weights; of frozen parameters, the weights used for computing."""
        masters = dict[str, Tensor]()
        for group, members in self._groups.items():
            with self._flat(group) as flat:
                masters |= {name: self._held(group, flat.data[where]) for name, where in members}
        parameters: dict[str, Any] = dict(self.model.named_parameters())
        return {
            name: masters[name] if p.requires_grad else p.ds_tensor.data.view(-1)
            for name, p in parameters.items()
        }

    def moments(self) -> dict[str, Tensor]:
        """Return {"<parameter>/<slot>": flat shard}; `step` is one number."""
        found = dict[str, Tensor]()
        for group, members in self._groups.items():
            with self._flat(group) as flat:
                state = self.state[flat]
                found |= {
                    f"{name}/{slot}": self._held(group, state[slot][where])
                    for name, where in members
                    for slot in SLOTS
                }
                found |= {f"{name}/step": state["step"] for name, _ in members}
        return found

    def _held(self, group: int, stretch: Tensor) -> Tensor:
        return stretch.clone() if self._on_disk(group) else stretch

    def write(
        self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor] | None = None
    ) -> None:
        """Apply changes made in place to the results of `weights` and `moments`.

        They go to the disk where groups are stored there, and into the weights used for computing.
        """
        # what an evaluation has left gathered is out of date
        compat.drop_gathered_weights(self.inner)
        for group, members in self._groups.items():
            with self._flat(group, changes=True) as flat:
                for name, where in members if self._on_disk(group) else ():
                    flat.data[where].copy_(weights[name])
                    for slot in SLOTS if moments else ():
                        self.state[flat][slot][where].copy_((moments or {})[f"{name}/{slot}"])
                compat.copy_masters_to_weights(self.inner, group)

    # to and from rows

    def shape(self, parameter: str) -> torch.Size:
        return self.model.get_parameter(parameter).ds_shape  # type: ignore[attr-defined]

    def rows(self, stretch: Tensor, shape: torch.Size) -> DTensor:
        """Convert a flat shard per process, padded at the end, to the same tensor in rows.

        The result is fp32 and split as FSDP2 splits it.
        """
        # what is offloaded lies on the host, where its collectives may not work
        mine = stretch.to(self.mesh.device_type)
        everyone = [torch.empty_like(mine) for _ in range(self.mesh.size())]
        dist.all_gather(everyone, mine, group=self.mesh.get_group())
        return self._own_rows(torch.cat(everyone)[: shape.numel()].view(shape).float())

    def _own_rows(self, full: Tensor) -> DTensor:
        parts, rank = full.chunk(self.mesh.size()), self.mesh.get_local_rank()
        mine = parts[rank].clone() if rank < len(parts) else full[:0].clone()
        return DTensor.from_local(
            mine, self.mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.stride()
        )

    def empty_rows(self, shape: torch.Size) -> DTensor:
        """Return uninitialised rows of this process, to be filled."""
        return self._own_rows(torch.empty(shape, device=self.mesh.device_type))

    def fill(self, stretch: Tensor, rows: Tensor) -> None:
        """Copy rows into the flat shard in place, the inverse of `rows`."""
        full = rows.full_tensor().flatten() if isinstance(rows, DTensor) else rows.flatten()
        start = self.mesh.get_local_rank() * stretch.numel()
        mine = full[start : start + stretch.numel()]
        stretch[: mine.numel()].copy_(mine)
