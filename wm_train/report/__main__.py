"""Write the page of a run: `python -m wm_train.report runs/demo [out=page.html]`.

One HTML file with curves, samples that play, evaluation, goodput, starts, checkpoints and settings;
it opens without a network. Exit code 2 when the folder holds no run or the page cannot be written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from launch.screen import print_result
from wm_train.errors import USER_ERROR
from wm_train.redact import clean_output


@clean_output()
def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m wm_train.report",
        description="Write the page of a run: one HTML file that opens without a network.",
    )
    parser.add_argument("run", type=Path, help="<out>/<name>, or the folder of one of its stages")
    parser.add_argument(
        "out", nargs="?", metavar="out=<file>", help="the page (default: <run>/report.html)"
    )
    arguments = parser.parse_args(argv)
    key, sign, given = (arguments.out or "").partition("=")
    if arguments.out is not None and not (key == "out" and sign and given):
        print(
            f"report: got {arguments.out}, expected out=<file>. Fix: out=page.html", file=sys.stderr
        )
        return USER_ERROR
    from wm_train.report.record import NoRunError
    from wm_train.report.write import write_page

    try:
        print(write_page(arguments.run, Path(given) if given else None))
    except NoRunError as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        print(
            f"report: got {error}, expected a file that can be written. Fix: out=<another file>",
            file=sys.stderr,
        )
        return USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(print_result(main))
