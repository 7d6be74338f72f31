from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Bitwise comparisons need one order of summation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"parallel_test_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def oracles():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE)  # it imports oracle_cases, as in gloo_worker.py
        return load("oracles")


@pytest.fixture(scope="session")
def hybrid():
    return load("hybrid")


@pytest.fixture(scope="session")
def zero_worker():
    return load("zero_worker")


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    """processes(task, world) -> what each gloo process returned, in rank order; run once. The
    result files decide, not the exit codes."""
    done: dict[str, list] = {}

    def run(task: str, world: int, limit_s: float = 180.0) -> list:
        if task not in done:
            done[task] = launch(task, world, tmp_path_factory.mktemp(task), limit_s)
        return done[task]

    return run


def launch(task: str, world: int, folder: Path, limit_s: float) -> list:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    children = [
        subprocess.Popen(
            [
                sys.executable,
                str(HERE / "gloo_worker.py"),
                task,
                str(rank),
                str(world),
                str(folder),
            ],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    deadline = time.monotonic() + limit_s
    try:
        logs = [
            child.communicate(timeout=max(0.1, deadline - time.monotonic()))[1]
            for child in children
        ]
    except subprocess.TimeoutExpired:
        pytest.fail(f"{task} on {world} processes took longer than {limit_s} s")
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
    missing = [rank for rank in range(world) if not (folder / f"{rank}.pt").exists()]
    assert not missing, f"{task}: no result from ranks {missing}\n" + "\n".join(
        log[-3000:] for log in logs
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
