"""Fit latency, ramp and rate on every other row of published all-reduce tables, and predict the
rows between.

    python benchmarks/collective_model.py

The error is that of the rows which the fit has not seen, beside that of latency and rate alone.
Misfits stay in the table.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wm_train.plan.speed.network import fit_link, predicted_s

TABLES = Path(__file__).with_name("published_collectives.json")


def published() -> list[dict[str, Any]]:
    """Return the tables: name, source, ranks, nodes, rows of (bytes, microseconds)."""
    tables: list[dict[str, Any]] = json.loads(TABLES.read_text())["tables"]
    return tables


def held_out_errors(table: dict[str, Any], with_ramp: bool = True) -> list[float]:
    """Return |predicted / published - 1| of each second row, fitted on the others."""
    rows = table["rows"]
    sizes, seconds = [n for n, _ in rows[::2]], [us * 1e-6 for _, us in rows[::2]]
    link = fit_link(sizes, seconds, with_ramp)
    return [abs(predicted_s(link, n) / (us * 1e-6) - 1) for n, us in rows[1::2]]


def main() -> None:
    print(f"{'table':36}{'fitted':>8}{'held out':>9}{'mean, max':>16}{'without ramp':>16}")
    for table in published():
        rows, cells = len(table["rows"]), []
        for with_ramp in (True, False):
            errors = held_out_errors(table, with_ramp)
            cells.append(f"{sum(errors) / len(errors):.1%}, {max(errors):.1%}")
        fitted = (rows + 1) // 2
        print(f"{table['name']:36}{fitted:8}{rows - fitted:9}{cells[0]:>16}{cells[1]:>16}")
        print(f"  {table['source']}")


if __name__ == "__main__":
    main()
