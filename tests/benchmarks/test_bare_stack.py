"""Check that kernels, models, plan and the trainer's step need torch, triton and numpy alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
BARE = Path(__file__).resolve().parent / "bare_stack"
PRODUCT = (
    "wm_train.kernels.dispatch",
    "wm_train.kernels.trial",
    "wm_train.backends.cuda",
    "wm_train.backends.check",
    "wm_train.models.sana_wm.model",
    "wm_train.objectives.flow_matching",
    "wm_train.optim.adamw",
    "wm_train.plan.memory",
    "wm_train.plan.report",
    "wm_train.training.step",
    "wm_train.training.state",
    "parallel.engines",
)
STEPS = ("facts", "exact", "layer", "attention", "whole", "tuning", "later", "demo")


@pytest.fixture
def run_bare():
    """run_bare(*arguments, timeout=seconds): Python without Hydra, Ray, MLflow and the rest."""

    def run(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(map(str, (BARE, ROOT, ROOT / "benchmarks")))
        return subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env={**os.environ, "PYTHONPATH": path},
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip

    return run


def test_the_product_imports_on_the_bare_stack(run_bare):
    names = (*PRODUCT, *(f"device_steps.{name}" for name in STEPS))
    code = f"import importlib\nfor name in {names!r}: importlib.import_module(name)\n"
    code += "for name in ('hydra', 'ray', 'mlflow', 'pyarrow', 'safetensors'):\n"
    code += "    try: importlib.import_module(name)\n    except ModuleNotFoundError: print(name)"
    done = run_bare("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["hydra", "ray", "mlflow", "pyarrow", "safetensors"]


@pytest.mark.full
def test_a_dry_run_reaches_the_last_line_of_every_step_on_the_bare_stack(run_bare, tmp_path):
    out = tmp_path / "day.json"
    command = ("benchmarks/device_day.py", "--dry-run", "--minutes", "30", "--out", str(out))
    done = run_bare(*command, timeout=1900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads(out.read_text())["rows"]
    assert {row["step"] for row in rows} == set("abcdefghi")
    assert (tmp_path / "step_trace.json").stat().st_size > 0
    ranges = [row for row in rows if row["step"] in "cde" and row["unit"] == "ms"]
    assert ranges
    assert all(row["low"] is not None or row["what"].startswith("goal") for row in ranges)
