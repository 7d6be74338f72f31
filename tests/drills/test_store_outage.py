"""An object store that stops answering for longer than a read is tried again: the run restarts
until it is back, and nothing is lost."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wm_train.tracking.tracker import read_steps

ROOT = Path(__file__).resolve().parents[2]
STEPS, OUTAGE_S = 30, 12


@pytest.mark.drill
def test_training_outlives_an_outage_of_the_store(gameplay, tmp_path, monkeypatch):
    """Two real workers under torchrun read from a real S3 server, which is away twice as long as
    `data.retry_s` and a restart together."""
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    access = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", **access}.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    S3FileSystem().mkdir("outage-test")
    S3FileSystem().put(str(gameplay), "outage-test/set", recursive=True)

    def command(folder, data):
        small = [
            "model.width=32",
            "model.depth=2",
            "recipe.stages.short.frames=41",
            "recipe.stages.short.global_batch=2",
        ]
        small += [
            f"recipe.stages.short.steps={STEPS}",
            "trainer.checkpoint_every=5",
            "trainer.validation_clips=0",
            "trainer.samples=0",
        ]
        where = [
            f"data.path={data}",
            f"out={folder}",
            "tracker=none",
            "launcher=torchrun",
            "launcher.max_restarts=8",
            "data.retry_s=2",
        ]
        return [
            sys.executable,
            "-m",
            "wm_train.launch",
            "experiment=demo",
            "recipe=demo",
            "stage=1",
            *where,
            *small,
        ]

    def losses(folder):
        return [
            (row["step"], row["loss"])
            for row in read_steps(folder / "demo" / "short" / "metrics.jsonl")
        ]

    log = tmp_path / "log"
    try:
        with log.open("w") as out:
            run = subprocess.Popen(
                command(tmp_path / "store", "s3://outage-test/set"),
                cwd=ROOT,
                stdout=out,
                stderr=out,
                env=os.environ,
            )
        record, deadline = (
            tmp_path / "store" / "demo" / "short" / "metrics.jsonl",
            time.monotonic() + 120,
        )
        while not record.exists() or len(read_steps(record)) < 7:
            assert time.monotonic() < deadline, log.read_text()
            assert run.poll() is None, log.read_text()
            time.sleep(0.1)
        server.stop()
        time.sleep(OUTAGE_S)
        server.start()
        assert run.wait(timeout=300) == 0, log.read_text()
    finally:
        run.kill()
        server.stop()
        S3FileSystem.clear_instance_cache()
    said = log.read_text()
    restarts = len(re.findall(r"restart \d+ of 8", said))
    assert restarts >= 1, said
    assert re.search(r"exit code 74", said), said
    subprocess.run(
        command(tmp_path / "disk", gameplay), cwd=ROOT, check=True, capture_output=True, timeout=300
    )
    assert losses(tmp_path / "store") == losses(tmp_path / "disk")
    assert len(losses(tmp_path / "store")) == STEPS
    print(f"away for {OUTAGE_S} s: {restarts} restarts, {STEPS} of {STEPS} losses equal to the bit")
