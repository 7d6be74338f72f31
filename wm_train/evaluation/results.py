"""Combine the records of clips into results: summaries, JSON and a page of text.

A number stands beside its coverage, its ceiling and its floor, or it does not appear.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wm_train.evaluation.metrics.score import Score, Summary, summarise
from wm_train.evaluation.scoring import COLUMNS, METRICS

FORMAT = 1
Record = Mapping[str, Any]


def combine(records: Sequence[Record], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results of all clips. The order of the clips decides, not who scored them."""
    ordered = sorted(records, key=lambda record: (record["number"], record["key"]))
    present = [name for name in METRICS if any(name in r["scores"] for r in ordered)]
    return {
        "format": FORMAT,
        **facts,
        "summary": {name: summary_of(ordered, name) for name in present},
        "seconds": seconds_of(ordered),
        "clips": ordered,
    }


def summary_of(records: Sequence[Record], name: str) -> dict[str, Any]:
    """Return a metric's summary by column; `gain`: of the differences to the floor, clip by clip,
    above 0 where the sample is better; `own_better`: the share of clips that suit their own truth
    better than another's."""
    rows = [record["scores"].get(name, {}) for record in records]
    better = METRICS[name].better
    columns = {
        column: summarise([as_score(row.get(column)) for row in rows]).as_json()
        for column in COLUMNS
    }
    gains = [difference(row, "floor", better) for row in rows]
    against = [difference(row, "other", better) for row in rows]
    known = [score.value > 0 for score in against if score.value is not None]
    return {
        "unit": METRICS[name].unit,
        "better": "more" if better > 0 else "less",
        **columns,
        "gain": summarise(gains).as_json(),
        "own_better": sum(known) / len(known) if known else None,
        "own_better_n": len(known),
    }


def as_score(plain: Mapping[str, Any] | None) -> Score:
    """Return a stored score, one without a value where none is stored."""
    return Score(None, 0, 0.0, "not measured") if plain is None else Score(**plain)


def difference(row: Mapping[str, Any], column: str, better: int) -> Score:
    """Return how much better the sample is than a column of the same clip."""
    sample, against = as_score(row.get("sample")), as_score(row.get(column))
    if sample.value is None or against.value is None:
        return Score(None, 0, 0.0, sample.reason or against.reason)
    return Score(better * (sample.value - against.value), 1, min(sample.coverage, against.coverage))


def seconds_of(records: Sequence[Record]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return metric -> column -> the summary of each second over clips."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name in dict.fromkeys(name for record in records for name in record["seconds"]):
        rows = [record["seconds"][name] for record in records if name in record["seconds"]]
        for column in dict.fromkeys(column for row in rows for column in row):
            series = [row[column] for row in rows if column in row]
            longest = max(map(len, series), default=0)
            found.setdefault(name, {})[column] = [
                summarise([at(values, second) for values in series]).as_json()
                for second in range(longest)
            ]
    return found


def at(values: Sequence[float | None], second: int) -> Score:
    """Return the value of one second as a score."""
    value = values[second] if second < len(values) else None
    return Score(value, int(value is not None), float(value is not None))


def shown(summary: Mapping[str, Any]) -> bool:
    """Return whether a metric has all that a number needs to appear."""
    needed = (summary["sample"], summary["ceiling"], summary["floor"])
    return all(part["mean"] is not None for part in needed)


def figures(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the results as figures of a step, for the tracker: `eval/<metric>`, with
    `.coverage`, `.ceiling`, `.floor`, `.other`, `.gain` behind it."""
    found: dict[str, float] = {}
    for name, summary in results["summary"].items():
        if not shown(summary):
            continue
        found[f"eval/{name}"] = summary["sample"]["mean"]
        found[f"eval/{name}.coverage"] = summary["sample"]["coverage"]
        for column in ("ceiling", "floor", "other", "gain"):
            if summary[column]["mean"] is not None:
                found[f"eval/{name}.{column}"] = summary[column]["mean"]
        if summary["gain"]["standard_error"] is not None:
            found[f"eval/{name}.gain_se"] = summary["gain"]["standard_error"]
        if summary["own_better"] is not None:
            found[f"eval/{name}.own_better"] = summary["own_better"]
    return found


def table_of_clips(results: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return a row per clip and metric as columns and data, the layout of MLflow's tables; None
    where there is no value. `reason` says why the sample has none."""
    names = [f"{column}{part}" for column in COLUMNS for part in ("", "_coverage")]
    rows = []
    for clip in results["clips"]:
        for name, scores in clip["scores"].items():
            found = [as_score(scores.get(column)) for column in COLUMNS]
            values = [number for score in found for number in (score.value, score.coverage)]
            rows.append([clip["key"], name, METRICS[name].unit, *values, found[0].reason])
    return {"columns": ["clip", "metric", "unit", *names, "reason"], "data": rows}


def write_json(file: Path, results: Mapping[str, Any]) -> None:
    """Write results as JSON, whole or not at all."""
    draft = file.with_name(f"{file.name}.tmp-draft")
    draft.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    draft.replace(file)


def earlier(folder: Path, step: int) -> dict[str, Any] | None:
    """Return the newest stored results before `step`, None without any."""
    files = sorted(file for file in folder.glob("step_*.json") if step_in(file) < step)
    return json.loads(files[-1].read_text(encoding="utf-8")) if files else None


def history_file(folder: Path, step: int) -> Path:
    """Return where the results of a step are kept."""
    return folder / f"step_{step:08d}.json"


def step_in(file: Path) -> int:
    """Return the step of a kept file."""
    return int(file.stem.removeprefix("step_"))


def report(results: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    """Return the results as a page of Markdown."""
    clips, step = results["clips"], results["step"]
    reference = "Pictures are compared with the decoded latents of the true clip (its own ceiling)."
    lines = [
        f"# Evaluation of {results['name']} at step {step}",
        "",
        f"{len(clips)} held-out clips. {reference} Camera paths: `{results['poses']}`.",
        "Sample: mean ± standard error over videos, and the 95 % bootstrap interval. Ceiling: the"
        " decoded truth in the sample's place. Floor: the first frame frozen. Other: the sample"
        " judged by another clip's truth. Gain: better than the floor, clip by clip.",
        "",
        "| metric | sample | interval | median | ceiling | floor | gain | other | own better"
        " | before | n | coverage |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        row_of(name, summary, before)
        for name, summary in results["summary"].items()
        if shown(summary)
    ]
    lacking = {n: s for n, s in results["summary"].items() if not shown(s)}
    if lacking:
        lines += [
            "",
            "Without a number, as it, its ceiling or its floor could not be measured:",
            "",
        ]
        lines += [f"- {name}: {why(summary)}" for name, summary in lacking.items()]
    if before is not None:
        lines += ["", f"Before: step {before['step']}{unlike(results, before)}."]
    lines += weights_of(results) + seconds_table(results) + clips_table(results)
    return "\n".join(lines) + "\n"


def row_of(name: str, summary: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    """Return a metric's line of the table."""
    sample, arrow = summary["sample"], "↑" if summary["better"] == "more" else "↓"
    old = (before or {}).get("summary", {}).get(name, {}).get("sample", {}).get("mean")
    interval = sample["interval"]
    own, n = summary["own_better"], summary["own_better_n"]
    cells = [
        f"{name} {arrow} {summary['unit']}".strip(),
        with_error(sample),
        "—" if interval is None else f"{number(interval[0])} to {number(interval[1])}",
        number(sample["median"]),
        number(summary["ceiling"]["mean"]),
        number(summary["floor"]["mean"]),
        with_error(summary["gain"]),
        number(summary["other"]["mean"]),
        "—" if own is None else f"{own:.0%} of {n}",
        number(old),
        f"{sample['n']} of {sample['videos']}",
        f"{sample['coverage']:.0%}",
    ]
    return f"| {' | '.join(cells)} |"


def number(value: float | None) -> str:
    """Return a value with as many digits as can be read."""
    return "—" if value is None else f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def with_error(summary: Mapping[str, Any]) -> str:
    """Return a mean with its standard error."""
    error = summary["standard_error"]
    return number(summary["mean"]) + ("" if error is None else f" ± {number(error)}")


def why(summary: Mapping[str, Any]) -> str:
    """Return why a metric has no number."""
    parts = [(column, summary[column]) for column in ("sample", "ceiling", "floor")]
    return "; ".join(
        f"{column}: {part['reason'] or 'no value'} (coverage {part['coverage']:.0%})"
        for column, part in parts
        if part["mean"] is None
    )


def unlike(results: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """Return a warning where other clips or other means were used before."""
    same = [clip["key"] for clip in results["clips"]] == [clip["key"] for clip in before["clips"]]
    return "" if same and results["poses"] == before["poses"] else ", of other clips or estimator"


def weights_of(results: Mapping[str, Any]) -> list[str]:
    """Return lines that name the weights of learned scorers."""
    weights = results.get("weights", {})
    rows = [f"- {name}: {file} sha256 {digest}" for name, held in sorted(weights.items())
            for file, digest in sorted(held.items())]  # fmt: skip
    return ["", "Weights:", "", *rows] if rows else []


def seconds_table(results: Mapping[str, Any]) -> list[str]:
    """Return the tables by second."""
    lines: list[str] = []
    for name, columns in results["seconds"].items():
        if not {"sample", "floor"} <= set(columns) or not shown(results["summary"].get(name, NONE)):
            continue
        length = max(map(len, columns.values()))
        lines += ["", f"## {name} by second", "", "| column | " + " | ".join(
            f"{second}–{second + 1} s" for second in range(length)) + " |"]  # fmt: skip
        lines.append("|---" * (length + 1) + "|")
        for column, values in columns.items():
            cells = " | ".join(f"{number(value['mean'])} ({value['n']})" for value in values)
            lines.append(f"| {column} | {cells} |")
        lines += ["", "In brackets: the clips measured in that second."]
    return lines


EMPTY: Mapping[str, Any] = Summary(None, None, None, None, 0, 0, 0.0).as_json()
NONE: Mapping[str, Any] = dict.fromkeys(("sample", "ceiling", "floor"), EMPTY)


def clips_table(results: Mapping[str, Any]) -> list[str]:
    """Return the table of all clips: sample / floor / coverage of each shown metric."""
    names = [name for name, summary in results["summary"].items() if shown(summary)]
    lines = ["", "## Clips", "", "Each cell: sample / ceiling / floor (coverage).", ""]
    lines += ["| clip | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for clip in results["clips"]:
        cells = []
        for name in names:
            row = clip["scores"].get(name, {})
            held = [as_score(row.get(column)) for column in ("sample", "ceiling", "floor")]
            values = " / ".join(number(score.value) for score in held)
            cells.append(f"{values} ({held[0].coverage:.0%})")
        lines.append(f"| {clip['key']} | {' | '.join(cells)} |")
    return lines
