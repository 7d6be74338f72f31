"""A worker that is stopped in mid-run: the others leave after the time-out and say who it was and where."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 6


def test_a_stopped_rank_ends_the_run_and_is_named(worker_config, tmp_path):
    config = worker_config(tmp_path, "parallel.cp=2", f"backend.collective_timeout_s={TIMEOUT_S}", "recipe.stages.short.steps=5000")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    command = [sys.executable, "-m", "wm_train.worker", "--config", str(config)]
    ranks = [
        subprocess.Popen(command, cwd=ROOT, env={**common, "RANK": str(r)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    try:
        assert ranks[0].stdout is not None
        while "@progress" not in (line := ranks[0].stdout.readline()):
            assert line, "rank 0 ended before its first step"
        time.sleep(1.5)  # past the first steps, so that rank 1 has given signs of life
        ranks[1].send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        _, errors = ranks[0].communicate(timeout=60)
        took = time.monotonic() - stopped
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert ranks[0].returncode == 1
    assert "rank 1 has been silent for" in errors
    assert "section train" in errors or "section record" in errors or "section data" in errors
    assert "rank 0 has been silent" not in errors
    assert took < TIMEOUT_S + 10, "the exit itself takes a second or two on a busy machine"
    print(f"left {took:.1f} s after the stop, with a time-out of {TIMEOUT_S} s")
