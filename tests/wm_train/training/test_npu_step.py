"""No line between the loader and the optimizer names a device: a whole step runs on one that is not
there, and a stray literal raises."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


POOL = (
    "recipe.stages.short.objective={name:flow_matching,sigma_min:0.9,sigma_max:1.0,flow_shift:5.0}",
    "recipe.stages.short.model={name:wan,latent_channels:24,depth:2,width:32,heads:2,ffn_width:64,"
    "patch_size:1,text_width:0,camera:true,camera_stride:8,activation_checkpointing:block}",
    "parallel.cp=2",
    "backend.attention=npu_fusion",
)


@pytest.mark.full
@pytest.mark.parametrize(
    ("ranks", "settings"), [(1, ("backend.attention=plain",)), (2, POOL)], ids=["sana", "pool"]
)
def test_training_steps_run_on_a_fake_npu_by_its_own_operators(
    worker_config, tmp_path, ranks, settings
):
    config = worker_config(
        tmp_path, "backend=auto", f"launcher.workers={ranks}", "parallel.precision=bf16", *settings
    )
    command = [sys.executable, HERE / "npu_step.py", config, str(ranks)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, cwd=HERE.parent.parent, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    took, operators, planted, found = done.stdout.strip().splitlines()[-4:]
    assert took == "took 2 steps on npu:0 of True"
    assert operators == "unlisted: [] fp64: []"
    assert planted == "unlisted: ['special_ndtri'] fp64: True"
    assert found.startswith("found:")
    assert "cuda" in found
    assert "npu" in found
