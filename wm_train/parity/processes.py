"""Run the parity command's `--processes` half: gloo processes on this machine, with FSDP2 and the
sequence mesh as in training."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from parallel.degrees import MeshDegrees
from parallel.mesh import Mesh, build_mesh
from parallel.sequence import make_sequence
from parallel.sharding import shard_model
from wm_train.boxes import whole_tensor
from wm_train.parity.case import ParityCase, forward, make_model
from wm_train.parity.compare import Outcome
from wm_train.worker import end_process

LIMIT_S = 600.0


def on_processes(case: ParityCase, degrees: MeshDegrees) -> Outcome:
    """Run the case over `degrees.world` processes, each with the rows of its data-parallel rank.
    Errors: those of `run_processes`."""
    return assemble(degrees, run_processes(work, degrees, case))


def run_processes(
    target: Callable[..., None], degrees: MeshDegrees, *given: Any
) -> list[dict[str, torch.Tensor]]:
    """Run target(degrees, rank, folder, *given) in `degrees.world` processes, and return by rank
    the tensors that each writes to `<folder>/<rank>.safetensors`.

    Raises RuntimeError if a process fails or all of them take too long; the others are stopped
    then.
    """
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="parity-") as name:
        folder = Path(name)
        workers = [
            context.Process(target=target, args=(degrees, rank, folder, *given), daemon=True)
            for rank in range(degrees.world)
        ]
        for worker in workers:
            worker.start()
        try:
            wait(workers)
        finally:
            for worker in workers:
                if worker.is_alive():
                    worker.kill()
                worker.join()
        return [load_file(folder / f"{rank}.safetensors") for rank in range(degrees.world)]


def wait(workers: Sequence[BaseProcess]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while any(worker.is_alive() for worker in workers):
        failed = {rank: worker.exitcode for rank, worker in enumerate(workers) if worker.exitcode}
        if failed or time.monotonic() > deadline:
            reason = f"exit codes {failed}" if failed else f"no end after {LIMIT_S:.0f} s"
            raise RuntimeError(
                f"parity processes failed: got {reason}, expected all to finish. Fix: see the"
                " tracebacks above"
            )
        time.sleep(0.05)
    failed = {rank: worker.exitcode for rank, worker in enumerate(workers) if worker.exitcode}
    if failed:
        raise RuntimeError(
            f"parity processes failed: got exit codes {failed}, expected 0. Fix: see the tracebacks"
            " above"
        )


def join(degrees: MeshDegrees, rank: int, folder: Path) -> Mesh:
    """Join the group of all processes of a run; return the mesh."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=degrees.world
    )
    return build_mesh(degrees, "cpu")


def leave(results: dict[str, torch.Tensor], rank: int, folder: Path) -> None:
    """Write this process's results, and end it when all have."""
    save_file({name: x.contiguous() for name, x in results.items()}, folder / f"{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()
    end_process(0)


def own_rows(batch: int, mesh: Mesh) -> slice:
    """Return the clips of this process's data-parallel rank."""
    each = batch // mesh.data_size
    return slice(mesh.data_index * each, (mesh.data_index + 1) * each)


def whole_gradients(model: torch.nn.Module, rank: int) -> dict[str, torch.Tensor]:
    """Return gradient/<name> of every parameter that has one, whole, on rank 0. Every process must
    call this."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            whole = whole_tensor(parameter.grad)  # every process takes part
            if rank == 0:
                found[f"gradient/{name}"] = whole
    return found


def work(degrees: MeshDegrees, rank: int, folder: Path, case: ParityCase) -> None:
    """Run one process: shard the model, run its rows and frames, write losses, velocity and (rank
    0) whole gradients."""
    mesh = join(degrees, rank, folder)
    model = make_model(case)
    shard_model(model, model.units(), mesh.fsdp)
    rows, valid = own_rows(case.batch, mesh), case.layout.valid_frames
    assert valid is not None
    layout = replace(case.layout, valid_frames=valid[rows])
    sequence = make_sequence(layout, mesh, case.kernels, exchange=case.exchange)
    losses, velocity = forward(case, model, sequence, rows)
    (losses.sum() / case.batch).backward()
    results = {"losses": losses.detach(), "velocity": velocity, **whole_gradients(model, rank)}
    leave(results, rank, folder)


def assemble(
    degrees: MeshDegrees, outputs: list[dict[str, torch.Tensor]], prefix: str = ""
) -> Outcome:
    """Concatenate rows over data-parallel ranks and frames over sequence ranks. prefix: of the
    names of one outcome among several."""
    groups = [outputs[start : start + degrees.cp] for start in range(0, degrees.world, degrees.cp)]
    gradients = {
        name.removeprefix(f"{prefix}gradient/"): x
        for name, x in outputs[0].items()
        if name.startswith(f"{prefix}gradient/")
    }
    velocity = None
    if f"{prefix}velocity" in outputs[0]:
        parts = [torch.cat([one[f"{prefix}velocity"] for one in group], 1) for group in groups]
        velocity = torch.cat(parts)
    losses = torch.cat([group[0][f"{prefix}losses"] for group in groups])
    return Outcome(losses, velocity, gradients)
