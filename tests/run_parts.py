"""Run the tests in five pytest processes at once and print one closing line for all.

    python tests/run_parts.py -m "not full and not drill and not slurm"

Every argument goes to all processes. pytest-xdist is not used: Ray's daemons inherit the pipes of
its workers and keep them open, so that it never ends. A part is a set of folders, because fixtures
that record a data set live as long as a process. Five keep two cores busy while a test waits for
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
LARGE = (  # a part each, without folders of the parts before it; the last part is all else
    ("wm_train/training",),
    (
        *("wm_train/models", "wm_train/objectives", "wm_train/sampling", "wm_train/report"),
        *("wm_train/plan", "wm_train/checks"),
    ),
    ("wm_train",),
    ("kernels", "parallel"),
)
CLOSING = re.compile(r"^=*\s*(\d+ \w+(?:, \d+ \w+)*) in [\d.]+s", re.MULTILINE)


def main(arguments: Sequence[str]) -> int:
    """Run the parts; print the first one's output as it comes and the others' at the end. Return
    the first exit code that is not 0."""
    started = time.monotonic()
    command = [sys.executable, "-m", "pytest", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{place}.log" for place in range(len(parts()))]
        processes = []
        for part, log in zip(parts(), logs, strict=True):
            with log.open("w") as file:
                processes.append(
                    subprocess.Popen(
                        [*command, *part], stdout=file, stderr=subprocess.STDOUT, cwd=TESTS.parent
                    )
                )
        show_until_end(logs[0], processes[0])
        codes = [process.wait() for process in processes]
        outputs = [log.read_text() for log in logs]
    print(*outputs[1:], sep="\n")
    print(closing_line(outputs, time.monotonic() - started))
    return next((code for code in codes if code), 0)


def show_until_end(log: Path, process: subprocess.Popen[bytes]) -> None:
    """Print a log while its process writes it."""
    with log.open() as file:
        while process.poll() is None:
            print(file.read(), end="", flush=True)
            time.sleep(0.2)
        print(file.read(), end="", flush=True)


def parts() -> list[list[str]]:
    """Return the arguments of pytest for each part; together they are all of tests/."""
    found, taken = [], []
    for folders in [[TESTS / name for name in names] for names in LARGE]:
        inside = [f"--ignore={path}" for path in taken if any(f in path.parents for f in folders)]
        found.append([*map(str, folders), *inside])
        taken += folders
    rest = [path for path in sorted(TESTS.iterdir()) if holds_tests(path) and path not in taken]
    return [*found, [str(path) for path in rest]]


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
