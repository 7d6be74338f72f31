"""Run the parity command's `--processes` half: gloo processes on this machine, with FSDP2 and the
sequence mesh as in training."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from parallel.degrees import MeshDegrees
from parallel.mesh import build_mesh
from parallel.sequence import make_sequence
from parallel.sharding import shard_model
from wm_train.boxes import whole_tensor
from wm_train.parity.case import ParityCase, forward, make_model
from wm_train.parity.compare import Outcome
from wm_train.worker import end_process

LIMIT_S = 600.0


def on_processes(case: ParityCase, degrees: MeshDegrees) -> Outcome:
    """Run the case over `degrees.world` processes, each with the rows of its data-parallel rank.

    Raises RuntimeError if a process fails or all of them take too long; the others are stopped
    then.
    """
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="parity-") as name:
        folder = Path(name)
        workers = [
            context.Process(target=work, args=(case, degrees, rank, folder), daemon=True)
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
        outputs = [load_file(folder / f"{rank}.safetensors") for rank in range(degrees.world)]
    return assemble(degrees, outputs)


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


def work(case: ParityCase, degrees: MeshDegrees, rank: int, folder: Path) -> None:
    """Run one process: shard the model, run its rows and frames, write losses, velocity and (rank
    0) whole gradients."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=degrees.world
    )
    mesh = build_mesh(degrees, "cpu")
    model = make_model(case)
    shard_model(model, model.units(), mesh.fsdp)
    each = case.batch // mesh.data_size
    rows = slice(mesh.data_index * each, (mesh.data_index + 1) * each)
    valid = case.layout.valid_frames
    assert valid is not None
    layout = replace(case.layout, valid_frames=valid[rows])
    sequence = make_sequence(layout, mesh, case.kernels, exchange=case.exchange)
    losses, velocity = forward(case, model, sequence, rows)
    (losses.sum() / case.batch).backward()
    results = {"losses": losses.detach(), "velocity": velocity}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            whole = whole_tensor(parameter.grad)  # every process takes part
            if rank == 0:
                results[f"gradient/{name}"] = whole
    save_file({name: x.contiguous() for name, x in results.items()}, folder / f"{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()
    end_process(0)


def assemble(degrees: MeshDegrees, outputs: list[dict[str, torch.Tensor]]) -> Outcome:
    """Concatenate rows over data-parallel ranks and frames over sequence ranks."""
    groups = [outputs[start : start + degrees.cp] for start in range(0, degrees.world, degrees.cp)]
    gradients = {
        name.removeprefix("gradient/"): x
        for name, x in outputs[0].items()
        if name.startswith("gradient/")
    }
    return Outcome(
        torch.cat([group[0]["losses"] for group in groups]),
        torch.cat([torch.cat([output["velocity"] for output in group], 1) for group in groups]),
        gradients,
    )
