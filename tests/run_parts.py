"""Run the tests in two pytest processes at once and print one closing line for both.

    python tests/run_parts.py -m "not full and not drill and not slurm"

Every argument goes to both processes. pytest-xdist is not used: Ray's daemons inherit the pipes of
its workers and keep them open, so that it never ends. A part is a set of folders, because fixtures
that record a data set live as long as a process. Exits with 0 only if both parts do.
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
ALONE = "wm_train"  # takes about as long as all others together
CLOSING = re.compile(r"^=*\s*(\d+ \w+(?:, \d+ \w+)*) in [\d.]+s", re.MULTILINE)


def main(arguments: Sequence[str]) -> int:
    """Run both parts; return the first exit code that is not 0."""
    started = time.monotonic()
    others = [
        path
        for path in sorted(TESTS.iterdir())
        if path.name != ALONE
        and (path.name.startswith("test_") or (path.is_dir() and any(path.rglob("test_*.py"))))
    ]
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "pytest", *arguments]
        behind = subprocess.Popen(
            [*command, *map(str, others)], stdout=log, stderr=subprocess.STDOUT, cwd=TESTS.parent
        )
        ahead = subprocess.Popen(
            [*command, str(TESTS / ALONE)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=TESTS.parent,
        )
        outputs = [""]
        assert ahead.stdout
        for line in ahead.stdout:
            print(line, end="", flush=True)
            outputs[0] += line
        codes = [ahead.wait(), behind.wait()]
        log.seek(0)
        outputs.append(log.read())
    print(outputs[1])
    print(closing_line(outputs, time.monotonic() - started))
    return next((code for code in codes if code), 0)


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
