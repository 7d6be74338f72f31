"""Run the tests in three pytest processes at once and print one closing line for all.

    python tests/run_parts.py -m "not full and not drill and not slurm"

Every argument goes to all processes. pytest-xdist is not used: Ray's daemons inherit the pipes of
its workers and keep them open, so that it never ends. A part is a set of folders, because fixtures
that record a data set live as long as a process. Three keep two cores busy while a test waits for
processes of its own. Exits with 0 only if all parts do.
"""

import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).resolve().parent
LARGE = ("wm_train/training", "wm_train")  # a part each, without the parts before it
CLOSING = re.compile(r"^=*\s*(\d+ \w+(?:, \d+ \w+)*) in [\d.]+s", re.MULTILINE)


def main(arguments: Sequence[str]) -> int:
    """Run the parts; print the first one's output as it comes and the others' at the end. Return
    the first exit code that is not 0."""
    started = time.monotonic()
    command = [sys.executable, "-m", "pytest", *arguments]
    logs, processes = [], []
    for part in parts():
        logs.append(tempfile.TemporaryFile("w+"))
        processes.append(
            subprocess.Popen(
                [*command, *part],
                stdout=logs[-1] if processes else subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=TESTS.parent,
            )
        )
    outputs = [""]
    assert processes[0].stdout
    for line in processes[0].stdout:
        print(line, end="", flush=True)
        outputs[0] += line
    codes = [process.wait() for process in processes]
    for log in logs[1:]:
        log.seek(0)
        outputs.append(log.read())
        print(outputs[-1])
    print(closing_line(outputs, time.monotonic() - started))
    return next((code for code in codes if code), 0)


def parts() -> list[list[str]]:
    """Return the arguments of pytest for each part; together they are all of tests/."""
    large = [TESTS / folder for folder in LARGE]
    others = [path for path in sorted(TESTS.iterdir()) if holds_tests(path) and path not in large]
    found = [
        [str(folder), *(f"--ignore={inner}" for inner in large[:place] if folder in inner.parents)]
        for place, folder in enumerate(large)
    ]
    return [*found, [str(path) for path in others]]


def holds_tests(path: Path) -> bool:
    return path.name.startswith("test_") or (path.is_dir() and any(path.rglob("test_*.py")))


def closing_line(outputs: Sequence[str], seconds: float) -> str:
    """Add up the closing lines of several pytest runs: "12 passed, 1 failed in 3.20s"."""
    total: Counter[str] = Counter()
    for output in outputs:
        found = CLOSING.findall(output)
        if not found:
            total["error"] += 1
            continue
        for count, kind in re.findall(r"(\d+) (\w+)", found[-1]):
            total[kind] += int(count)
    return ", ".join(f"{count} {kind}" for kind, count in total.items()) + f" in {seconds:.2f}s"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
