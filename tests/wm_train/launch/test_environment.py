"""The environment of workers on a cluster that was started without what their libraries read."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.full
def test_what_device_libraries_read_reaches_the_workers_of_a_cluster(
    token, arguments, environment, tmp_path: Path
) -> None:
    """The cluster was started without these variables, so only the launch can have brought them."""
    from ray.cluster_utils import Cluster

    given = {"HCCL_IF_IP": "10.1.2.3", "NCCL_DEBUG": "WARN", "ASCEND_RT_VISIBLE_DEVICES": "7"}
    given |= {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True", "A_KEY": "secret"}
    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}
    )
    try:
        more = [f"launcher.address={nodes.address}", "backend.collective_timeout_s=300"]
        run = subprocess.Popen(
            [sys.executable, "-m", *arguments(tmp_path, *more)],
            cwd=ROOT,
            env={**environment, **given},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said, seen = [], {}
        assert run.stdout is not None
        for line in run.stdout:
            said.append(line)
            for rank, process in re.findall(r"rank (\d): (\d+)", line) if not seen else ():
                text = Path(f"/proc/{process}/environ").read_text()
                seen[rank] = dict(word.split("=", 1) for word in text.split("\0") if "=" in word)
        assert run.wait(timeout=60) == 0, "".join(said)
    finally:
        nodes.shutdown()
    assert set(seen) == {"0", "1"}, "".join(said)
    for found in seen.values():
        assert found["HCCL_IF_IP"] == "10.1.2.3"
        assert found["NCCL_DEBUG"] == "WARN"
        assert found["PYTORCH_NPU_ALLOC_CONF"] == "expandable_segments:True"
        assert found["HCCL_EXEC_TIMEOUT"] == "300"
        assert found.get("ASCEND_RT_VISIBLE_DEVICES") != "7", "which devices is the launcher's"
        assert "A_KEY" not in found


def test_what_device_libraries_read_is_in_the_script_of_a_batch_job(
    arguments, environment, tmp_path: Path
) -> None:
    """A job starts in an environment of its own, so the script brings these variables. It is run
    here up to where it starts the workers, whose environment it is."""
    given = {"HCCL_IF_IP": "10.1.2.3", "NCCL_DEBUG": "it's WARN", "A_KEY": "secret"}
    given |= {"ASCEND_RT_VISIBLE_DEVICES": "7"}
    more = ["launcher=slurm", "backend.collective_timeout_s=300"]
    words = [sys.executable, "-m", *arguments(tmp_path / "runs", *more)]
    how = {"cwd": ROOT, "capture_output": True, "text": True}
    made = subprocess.run(words, env={**environment, **given}, **how)
    assert made.returncode == 0, made.stdout + made.stderr
    (script,) = (tmp_path / "runs").rglob("slurm.sh")
    assert "secret" not in script.read_text()
    for name, program in (("scontrol", "true"), ("srun", "env > seen")):
        (tmp_path / name).write_text(f"#!/bin/bash\ncd {tmp_path}\n{program}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{environment['PATH']}"
    job = {"PATH": path, "SLURM_JOB_ID": "78", "SLURM_JOB_NODELIST": "n1"}
    ended = subprocess.run(["bash", script], env=job, timeout=60, check=False, **how)
    assert ended.returncode == 0, ended.stderr
    seen = dict(line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines())
    assert seen["HCCL_IF_IP"] == "10.1.2.3"
    assert seen["NCCL_DEBUG"] == "it's WARN"
    assert seen["HCCL_EXEC_TIMEOUT"] == "300"
    assert "ASCEND_RT_VISIBLE_DEVICES" not in seen, "which devices is the job's"
