"""Prove on a first device, in about nine minutes, what a CPU cannot: every kernel, the attention
engines, a training step, the demo.

    # on a machine with one CUDA device; needs torch, triton and numpy
    python benchmarks/device_day.py --out day.json
    # every step to its last line on a CPU, at small sizes, in Triton's interpreter
    python benchmarks/device_day.py --dry-run
    # some steps, in less time
    python benchmarks/device_day.py --only b,c --minutes 4 --out again.json

Steps, in order of value: (a) facts of the machine; (b) every kernel against fp64; (c) the GDN layer
against its reference and FLA; (d) attention engines; (e) a block and a whole step of the 2.66 B
model; (f) its profile; (g) tuning; (h) what does not exist yet; (i) the demo's losses. Each runs in
a process of its own, for its share of the time that is left. The file is written anew after every
figure, so a cut loses only what comes later. Each figure stands beside the range that a roofline of
this device expects (`measuring.py`). Exit code 0: everything held; 1: something is wrong, slow,
faster than possible, failed or cut; the last lines say what.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MARK = "DEVICE_DAY_ROW "
MINUTES, DRY_MINUTES = 9.0, 5.0
SHORTEST_S = 5.0  # of a step, so that the last ones start even when time is up
MOST_BYTES = 64 * 2**20  # what some machines take along
CARRIED = (
    "wm_train", "parallel", "data_shards", "launch", "benchmarks", "tests/kernels",
    "tests/conftest.py", "pyproject.toml", "LICENSE",
)  # fmt: skip
README = """# What a first GPU must prove

On a machine with one NVIDIA GPU (Hopper, or any of capability 8.0 and more), in this folder:

    python3 benchmarks/device_day.py --out day.json

It takes at most {minutes:g} minutes; `--minutes 4` takes less, `--only b,c` some steps. It needs
Python 3.11 or newer with torch 2.10 or newer, triton 3.6 or newer and numpy, and fetches nothing.
flash_attn, flash_attn_3, xfuser and flash-linear-attention are measured where they are installed.
Bring back day.json and step_trace.json. A cut loses only the steps that had not come yet.

Here are:

{listing}
"""
BAD = ("wrong", "slow", "fast", "failed", "cut")


@dataclass(frozen=True)
class Step:
    """Name a step's function, and its share of the time."""

    module: str
    function: str
    share: float


STEPS = {
    "a": Step("facts", "rows", 3),
    "b": Step("exact", "rows", 10),
    "c": Step("layer", "rows", 11),
    "d": Step("attention", "rows", 7),
    "e": Step("whole", "rows", 11),
    "f": Step("whole", "profile_rows", 4),
    "g": Step("tuning", "rows", 6),
    "h": Step("later", "rows", 1),
    "i": Step("demo", "rows", 3),
}
HIDDEN = {"sanitized": Step("exact", "small", 0)}  # what (b) runs under compute-sanitizer


def main(arguments: list[str] | None = None) -> int:
    """Run the steps, each in its own process, or one of them in this one."""
    options = parsed(arguments)
    if options.pack:
        return pack(options.pack)
    if options.run:
        return run_here(options.run, options.dry_run, options.folder)
    results = Results(options.out, options.dry_run)
    folder = options.out.parent if options.out else Path(tempfile.mkdtemp(prefix="device_day_"))
    ends = time.monotonic() + 60 * options.minutes
    for place, letter in enumerate(options.only):
        later = sum(STEPS[other].share for other in options.only[place:])
        limit = max(SHORTEST_S, (ends - time.monotonic()) * STEPS[letter].share / later)
        for row in run_step(letter, limit, options.dry_run, folder):
            results.add(row)
    print(results.closing())
    return 1 if results.bad else 0


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, at small sizes")
    parser.add_argument("--only", type=letters, default=list(STEPS), metavar="a,b")
    parser.add_argument("--minutes", type=float, help="for all steps together")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="written as figures come")
    parser.add_argument(
        "--pack", type=Path, metavar="FOLDER", help="make the folder of what must be carried there"
    )
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=Path(), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.minutes is None:
        options.minutes = DRY_MINUTES if options.dry_run else MINUTES
    if not options.minutes > 0:
        parser.error(f"--minutes: got {options.minutes}, expected more than 0")
    return options


def letters(text: str) -> list[str]:
    """Read `a,b`, kept in order of value."""
    asked = {part.strip() for part in text.split(",")}
    if not asked <= set(STEPS):
        raise argparse.ArgumentTypeError(f"got {text}, expected some of {','.join(STEPS)}")
    return [letter for letter in STEPS if letter in asked]


class Results:
    """Hold the rows so far; print each, and write all to the file again."""

    def __init__(self, out: Path | None, dry: bool) -> None:
        self.out, self.rows = out, list[dict[str, Any]]()
        self.started, self.dry = datetime.now(UTC), dry

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        print(line_of(row), flush=True)
        if self.out is None:
            return
        content = {
            "started": self.started.isoformat(timespec="seconds"),
            "dry_run": self.dry,
            "command": " ".join(["python", "benchmarks/device_day.py", *sys.argv[1:]]),
            "rows": self.rows,
        }
        beside = self.out.with_name(self.out.name + ".part")
        beside.write_text(json.dumps(content, indent=1, ensure_ascii=False))
        os.replace(beside, self.out)

    @property
    def bad(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["verdict"] in BAD]

    def closing(self) -> str:
        """Return what a reader must see last."""
        lines = [line_of(row) for row in self.bad]
        absent = sum(row["verdict"] == "absent" for row in self.rows)
        counts = f"{len(self.rows)} rows, {len(lines)} to look at, {absent} absent"
        return "\n".join(["", counts, *lines])


def line_of(row: dict[str, Any]) -> str:
    """Format a row for the terminal."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    value = f"{number(row['value'])} {row['unit']}".strip()
    ends = [number(row[end]) for end in ("low", "high")]
    expected = f"[{ends[0] or '-'}, {ends[1] or '-'}]" if any(ends) else ""
    parts = [f"({row['step']}) {row['what']}", value, expected, row["verdict"], row["note"]]
    return " | ".join(part for part in parts if part)


def run_step(letter: str, limit: float, dry: bool, folder: Path) -> Iterator[dict[str, Any]]:
    """Run a step in its own process and yield its rows as they come; a last row says if it was cut
    or died."""
    command = [sys.executable, "-u", str(HERE / "device_day.py"), "--run", letter]
    command += ["--folder", str(folder.resolve()), *(["--dry-run"] if dry else [])]
    before = [path for path in [os.environ.get("PYTHONPATH")] if path]
    paths = os.pathsep.join([str(ROOT), str(HERE), *before])
    environment = {**os.environ, "PYTHONPATH": paths}
    if dry:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        environment["PYTHONWARNINGS"] = "ignore::UserWarning"
    else:
        environment.pop("TRITON_INTERPRET", None)
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
        start_new_session=True,
    )  # fmt: skip
    cut = threading.Event()

    def stop() -> None:
        cut.set()
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # the process that we started, and its own

    timer = threading.Timer(limit, stop)
    timer.start()
    try:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith(MARK):
                yield json.loads(line.removeprefix(MARK))
            else:
                print(line, end="", flush=True)
        code = child.wait()
    finally:
        timer.cancel()
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    if cut.is_set():
        yield last_row(letter, "cut", f"after its {limit:.0f} s; what came before stands")
    elif code:
        yield last_row(letter, "failed", f"its process ended with {code}; see what it printed")


def last_row(letter: str, verdict: str, note: str) -> dict[str, Any]:
    empty = dict.fromkeys(("value", "low", "high"))
    return {
        "step": letter, "what": "the step", "unit": "", **empty, "verdict": verdict, "note": note,
    }  # fmt: skip


def run_here(letter: str, dry: bool, folder: Path) -> int:
    """Run one step in this process, its rows printed as JSON; 9 if a hidden one found a wrong
    value."""
    sys.path[:0] = [str(ROOT)]
    step = (STEPS | HIDDEN)[letter]
    from device_steps.day import Day

    rows = getattr(importlib.import_module(f"device_steps.{step.module}"), step.function)
    wrong = False
    for row in rows(Day(dry, folder)):
        print(MARK + json.dumps(row.as_json(), ensure_ascii=False), flush=True)
        wrong |= row.bad
    return 9 if wrong and letter in HIDDEN else 0


def pack(folder: Path) -> int:
    """Copy what a device needs into a new folder, with a README of the one command. Only files that
    git knows or does not ignore are taken."""
    if folder.exists():
        print(
            f"pack: got {folder}, which exists, expected a new folder. Fix: make device-day"
            f" DEVICE_DAY=<another>, or rm -r {folder}",
            file=sys.stderr,
        )
        return 2
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *CARRIED]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sizes = dict.fromkeys(CARRIED, 0)
    for name in listed.splitlines():
        source, target = ROOT / name, folder / name
        if not source.is_file():  # deleted, and not yet committed
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        owner = next(kept for kept in CARRIED if name == kept or name.startswith(kept + "/"))
        sizes[owner] += target.stat().st_size
    total = sum(sizes.values())
    if total > MOST_BYTES:
        shutil.rmtree(folder)
        print(
            f"pack: got {total / 2**20:.1f} MiB, expected at most {MOST_BYTES >> 20}. Fix: leave"
            " large files out of git",
            file=sys.stderr,
        )
        return 2
    listing = "\n".join(f"- {name}: {size / 2**10:.0f} KiB" for name, size in sizes.items())
    (folder / "README.md").write_text(README.format(listing=listing, minutes=MINUTES))
    print(f"{folder}: {total / 2**20:.1f} MiB\n{listing}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
