"""Checks that help and configurations come at once: without torch, Ray, MLflow or a game engine."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run_python():
    def run(code: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


@pytest.mark.parametrize(
    "modules",
    [
        "wm_train.kernels.names",
        "wm_train.models.sana_wm.config, wm_train.objectives.config",
        "wm_train.optim.config, wm_train.sampling.config",
        "wm_train.launch",
    ],
)
def test_names_and_configurations_come_without_torch(run_python, modules):
    done = run_python(f"import sys, {modules}; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(
    "module",
    [
        "wm_train.launch",
        "wm_train.plan",
        "wm_train.parity",
        "wm_train.report",
        "wm_train.evaluate",
        "data_shards.record",
        "data_shards.encode",
    ],
)
def test_help_is_instant(module, run_python):
    """Help must not pay for torch, Ray, MLflow or a game engine."""
    heavy = ("torch", "ray", "mlflow", "vizdoom", "av", "diffusers", "pyarrow")
    code = (
        f"import sys, runpy; sys.argv = ['{module}', '--help']\n"
        f"try: runpy.run_module('{module}', run_name='__main__', alter_sys=True)\n"
        f"except SystemExit as e: assert not e.code, e.code\n"
        f"print('HEAVY', [m for m in {heavy!r} if m in sys.modules])"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("HEAVY []"), done.stdout[-300:]


@pytest.mark.parametrize(
    "module",
    [
        "wm_train.launch",
        "wm_train.plan",
        "wm_train.parity",
        "wm_train.evaluate",
        "wm_train.checkpoint",
        "wm_train.backends",
        "wm_train.tracking",
        "wm_train.report",
        "data_shards.record",
        "data_shards.encode",
        "data_shards.verify",
        "data_shards.inspect",
        "data_shards.stats",
        "data_shards.filter",
        "launch.token",
    ],
)
def test_every_command_shows_its_usage(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"python -m {module}" in done.stdout, done.stdout[:300]
