"""Compare this machine with the CPU in fp64: `python -m wm_train.backends check [--backend NAME]`.

Runs every entry of the backend's kernel table, values and gradients, in every dtype that training
uses there, and the services of the backend itself; prints a table. Run it first on a new kind of
device. Exit code 0: all agree; 1: something differs; 2: the backend is not available.
"""

from __future__ import annotations

import argparse
import logging
import sys

from launch.screen import print_result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m wm_train.backends", description=(__doc__ or "").split("\n\n", 1)[1]
    )
    parser.add_argument("command", choices=["check"])
    parser.add_argument("--backend", default="auto", help="auto, or a name (key backend.name)")
    parser.add_argument(
        "--kernels", default="auto", help="auto, triton or reference (key backend.kernels)"
    )
    parser.add_argument(
        "--attention", default="auto", help="auto or an engine's name (key backend.attention)"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    from wm_train.backends import get_backend
    from wm_train.backends.check import check, print_rows

    try:
        backend = get_backend(options.backend)
        rows = check(backend, options.kernels, options.attention)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print_rows(backend, rows)
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(print_result(main))
