"""A spec for tiny fake workers, and one Ray cluster for all tests of this folder."""

from __future__ import annotations

import importlib.util
import io
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from launch.progress import ProgressView
from launch.spec import LaunchSpec

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def spec(tmp_path: Path, view: ProgressView) -> Callable[..., LaunchSpec]:
    """spec(program, workers=..., ...): workers that run `program`; the usual modules, `rank` and
    the scratch folder `place` are there, and progress(step, steps) tells the view of it."""

    def make(program: str, workers: int = 1, **changes: object) -> LaunchSpec:
        config = tmp_path / "config.json"
        config.write_text("{}")
        prelude = (
            f"import os, sys, time, signal, json, pathlib; place = pathlib.Path({str(tmp_path)!r});"
            " rank = int(os.environ['RANK']); progress = lambda step, steps: print('@progress',"
            " os.environ['LAUNCH_PROGRESS'], json.dumps({'step': step, 'steps': steps}))\n"
        )
        command = ("{python}", "-S", "-c", prelude + program, "{config}")
        values = {
            "logs": tmp_path / "logs",
            "directory": ROOT,
            "backoff_s": 0.1,
            "grace_s": 5.0,
            "place_s": 20.0,
            **changes,
            # as launch.run adds it
            "environment": {**changes.pop("environment", {}), **view.variables},
        }
        return LaunchSpec(command, workers, config, "{}", **values)  # type: ignore[arg-type]

    return make


@pytest.fixture
def view() -> ProgressView:
    """A view into a text buffer: `view.out.getvalue()`."""
    return ProgressView(io.StringIO(), every_s=0)


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Ray cluster of one node with four CPUs, with token authentication, as a cluster should be
    run."""
    token = tmp_path_factory.mktemp("ray") / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster

        nodes = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False}
        )
        yield nodes
        nodes.shutdown()


@pytest.fixture(scope="session")
def cluster(nodes: Any) -> str:
    """The address of `nodes`."""
    return nodes.address


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """`slurm_nodes.py` while its two nodes are up."""
    file = Path(__file__).parent / "slurm_nodes.py"
    found = importlib.util.spec_from_file_location("slurm_nodes", file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    with module.two_nodes(tmp_path_factory.mktemp("slurm")):
        yield module
