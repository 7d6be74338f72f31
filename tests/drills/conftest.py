"""Ranks of a run as a launcher would start them, with a fault in one of them."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAULTY = Path(__file__).with_name("faulty_worker.py")


@pytest.fixture
def start_ranks() -> Iterator[Callable[..., list[subprocess.Popen]]]:
    """start_ranks(config, count, fault=(kind, rank, step)): worker processes whose output and
    errors are kept; killed at the end."""
    started: list[subprocess.Popen] = []

    def start(
        config: Path, count: int, fault: tuple[str, int, int] | None = None
    ) -> list[subprocess.Popen]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        program = [str(FAULTY), *map(str, fault), "--"] if fault else ["-m", "wm_train.worker"]
        ranks = [
            subprocess.Popen(
                [sys.executable, *program, "--config", str(config)],
                cwd=ROOT,
                env={**common, "PYTHONPATH": str(ROOT), "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(count)
        ]
        started.extend(ranks)
        return ranks

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def outcome() -> Callable[..., list[tuple[int, str]]]:
    """outcome(ranks): exit code and output of every rank."""

    def wait(ranks: list[subprocess.Popen], timeout: float = 240) -> list[tuple[int, str]]:
        outputs = [rank.communicate(timeout=timeout)[0] for rank in ranks]
        return [(rank.returncode, output) for rank, output in zip(ranks, outputs)]

    return wait
