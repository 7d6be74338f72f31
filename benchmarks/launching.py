"""From the command to the first step on the demo, with a Ray head that is running already, and what
the time goes to.

    python benchmarks/launching.py --rounds 5

Every round starts the launch command anew and stamps its lines as they come; what happens inside
rank 0's process it says itself. Prints seconds of each part in each round, their medians, and the
same in share of the whole. `--torchrun` measures that launcher beside it, in alternation, and
prints the ratio.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
MARKS = (  # the line that ends a part
    ("imports, config and its checks", r"^stage short "),
    ("joining Ray", r"^joined the Ray cluster"),
    ("placing the workers", r"^\d+ workers? (on|under) "),
    ("starting them", r"^process ids "),
)
INSIDE = re.compile(r"^first step after [\d.]+ s: (.*)")
QUICK = ("steps=2", "optimizer.warmup_steps=0")


@contextmanager
def ray_head(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of a client of a Ray head on loopback, with a token and without
    statistics."""
    (folder / "token").touch(mode=0o600)
    (folder / "token").write_text(secrets.token_hex(32))
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    port = 20000 + secrets.randbelow(
        12000
    )  # below those that connections take; this file's name hides our package of that name
    ray = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
        "--num-cpus=4",
    ]
    places = [
        "--node-ip-address=127.0.0.1",
        f"--port={port}",
        f"--temp-dir={folder / 'ray'}",
        "--include-dashboard=false",
    ]
    places += ["--min-worker-port=0", "--max-worker-port=0"]  # any that is free
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen([*ray, *places], env=environment, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 60
        while "Ray runtime started" not in (folder / "head.log").read_text():
            assert head.poll() is None, (folder / "head.log").read_text()
            assert time.monotonic() < until, "the head did not come up in a minute"
            time.sleep(0.2)
        yield {**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    finally:
        head.terminate()
        head.wait(timeout=60)


def measure(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Seconds of each part, in order, and the whole as `command to first step`."""
    started = last = time.perf_counter()
    parts: dict[str, float] = {}
    run = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.stdout is not None
    said = []
    for line in run.stdout:
        said.append(line)
        now = time.perf_counter()
        for name, pattern in MARKS:
            if name not in parts and re.match(pattern, line):
                parts[name], last = now - last, now
        if inside := INSIDE.match(line):
            own = {
                name: float(seconds)
                for name, seconds in re.findall(r"([a-z ]+) ([\d.]+)(?:, |$)", inside[1])
            }
            parts |= {f"rank 0: {name.strip()}": seconds for name, seconds in own.items()}
            parts["the rest"] = now - last - sum(own.values())
            parts["command to first step"] = now - started
    assert run.wait() == 0, "".join(said)
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=ROOT / "data" / "demo",
        help="a data set; `make train` records one",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--torchrun", action="store_true")
    parser.add_argument("overrides", nargs="*", help="key=value, as for wm_train.launch")
    options = parser.parse_args()
    rounds: dict[str, list[dict[str, float]]] = {"ray": []} | (
        {"torchrun": []} if options.torchrun else {}
    )
    with (
        tempfile.TemporaryDirectory(prefix="wm", ignore_cleanup_errors=True) as folder,
        ray_head(Path(folder)) as environment,
    ):
        for number in range(options.rounds + 1):  # the first one fills caches
            for launcher, results in rounds.items():
                what = [
                    "experiment=demo",
                    "recipe=demo",
                    "stage=1",
                    f"launcher={launcher}",
                    f"data.path={options.data.resolve()}",
                    "tracker=none",
                ]
                where = [
                    f"out={folder}/{launcher}_{number}",
                    "trainer.samples=0",
                    "trainer.validation_clips=0",
                ]
                quick = [f"recipe.stages.short.{setting}" for setting in QUICK]
                results.append(
                    measure(
                        [
                            sys.executable,
                            "-m",
                            "wm_train.launch",
                            *what,
                            *where,
                            *quick,
                            *options.overrides,
                        ],
                        environment,
                    )
                )
    for launcher, results in rounds.items():
        results = results[1:]
        whole = median(result["command to first step"] for result in results)
        print(f"{launcher}: seconds in {len(results)} rounds, median, share")
        for name in results[0]:
            values = [result.get(name, 0.0) for result in results]
            print(
                f"  {name:32} {' '.join(f'{value:6.2f}' for value in values)} "
                f" {median(values):6.2f}  {median(values) / whole:4.0%}"
            )
    if options.torchrun:
        ours, theirs = (
            median(result["command to first step"] for result in rounds[name][1:])
            for name in ("ray", "torchrun")
        )
        print(f"ray / torchrun: {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
