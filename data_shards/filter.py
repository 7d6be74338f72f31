"""Select clips to train on: `python -m data_shards.filter path=… table=… out=selection.json`.

Nothing is encoded again or deleted: the result is a list of keys that `open_dataset(path,
selection=…)` applies, with the reasons for dropping the others. Measurements are kept in
`scores_cache`, so trying other thresholds takes seconds. Scores of external models (DOVER, a VLM,
UniMatch, scale CV) are joined by key from files: JSON {key: {metric: value}}, or CSV or Parquet
with a column `key`. A list of values (one per chunk or frame pair) counts as its mean; `scales`,
the per-frame metric scales of pose annotation, gives `scale_cv`. An empty cell is no score.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.arguments import Option, path, paths, run, text
from data_shards.codecs import decode_shown, make_codec
from data_shards.metrics import (
    CAMERA_METRICS,
    VIDEO_METRICS,
    camera_metrics,
    camera_words,
    scale_cv,
    video_metrics,
)
from data_shards.progress import track
from data_shards.schema import SPLITS, DataError
from data_shards.storage.files import read_json, write_durably
from data_shards.storage.read import ClipDataset, open_dataset

ABOUT = (
    "Choose the clips to train on by thresholds on camera, motion and quality; report what is"
    " dropped and why."
)
OPTIONS = {
    "path": Option(path, "data set folder or URL", required=True),
    "out": Option(path, "selection file to write", required=True),
    "table": Option(text, "which thresholds of the file, besides the camera's", "game"),
    "thresholds": Option(path, "YAML file of thresholds; the built-in one if not given", None),
    "scores": Option(
        paths, "JSON, CSV or Parquet files with scores of outside models, separated by commas", None
    ),
    "captions": Option(
        path,
        "JSON file {key: caption} to check for words that name camera motion; `shards`: those in"
        " the data set",
        None,
    ),
    "scores_cache": Option(path, "JSON file that keeps measurements between runs", None),
}
Range = tuple[float, float]


def load_thresholds(path: str | None, table: str) -> dict[str, Range]:
    """Read metric -> (lowest, highest): the file's `camera` section and one of its `tables`.

    Raises:
        DataError: no such file or table, or a range that is not two ordered numbers.
    """
    import yaml

    file = Path(path) if path else Path(__file__).with_name("filter_thresholds.yaml")
    try:
        content = yaml.safe_load(file.read_text())
        tables = content["tables"]
        raw = {**content["camera"], **tables[table]}
    except OSError as error:
        raise DataError(
            f"thresholds: cannot read {file} ({error.strerror}), expected a YAML file"
        ) from error
    except (yaml.YAMLError, TypeError) as error:
        raise DataError(
            f"thresholds: got {file}, expected YAML with `camera` and `tables` ({error})"
        ) from error
    except KeyError as error:
        known = sorted(content.get("tables", {}))
        raise DataError(
            f"thresholds: got no {error} in {file.name}, expected one of {known}. Fix: table=<one"
            " of them>"
        ) from error
    ranges = {}
    for metric, bounds in raw.items():
        good = (
            isinstance(bounds, list)
            and len(bounds) == 2
            and all(isinstance(b, (int, float)) and math.isfinite(b) for b in bounds)
        )
        if not good or bounds[0] > bounds[1]:
            raise DataError(
                f"thresholds: got {metric}: {bounds}, expected [lowest, highest] ({file.name})"
            )
        ranges[metric] = (float(bounds[0]), float(bounds[1]))
    return ranges


def load_scores(path: str) -> dict[str, dict[str, float]]:
    """Read key -> metric -> value from JSON, CSV or Parquet.

    Raises:
        DataError: a file that cannot be read, has no keys or a duplicate one, or a value that is
        not a number.
    """
    scores: dict[str, dict[str, float]] = {}
    for key, row in score_rows(path):
        if key in scores:
            raise DataError(
                f"scores: got key {key!r} twice in {path}, expected one row per clip. Fix: take"
                " one out"
            )
        scores[key] = {}
        for metric, value in row.items():
            if value is None or value == "":
                continue
            try:
                if metric == "scales":
                    scores[key]["scale_cv"] = scale_cv([float(scale) for scale in value])
                else:
                    scores[key][metric] = (
                        float(np.mean([float(part) for part in value]))
                        if isinstance(value, list)
                        else float(value)
                    )
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"scores: got {value!r}, expected a number or a list of them ({path}, key"
                    f" {key}, {metric})"
                ) from error
    return scores


def score_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (key, {metric: value}) of a score file."""
    if path.endswith(".json"):
        for key, row in read_json(Path(path), "scores").items():
            if not isinstance(row, dict):
                raise DataError(
                    f"scores: got {row!r}, expected an object {{metric: value}} ({path}, key {key})"
                )
            yield key, row
        return
    try:
        if path.endswith(".parquet"):
            import pyarrow.parquet as pq

            rows = pq.read_table(path).to_pylist()
        else:
            with open(path, newline="") as file:
                rows = list(csv.DictReader(file))
        yield from [(str(row.pop("key")), row) for row in rows]
    except (OSError, KeyError, ValueError, csv.Error) as error:
        raise DataError(
            f"scores: cannot use {path} ({error}), expected a column `key` and columns of numbers"
        ) from error


def load_captions(path: str, dataset: ClipDataset) -> dict[str, str]:
    """Read key -> caption from a JSON file, or for `shards` from the clips themselves."""
    if path == "shards":
        described = (
            (entry.key, dataset.description(entry).get("caption"))
            for split in SPLITS
            for entry in dataset.clips(split)
        )
        return {key: str(caption) for key, caption in described if caption is not None}
    return {key: str(value) for key, value in read_json(Path(path), "captions").items()}


def measure(
    dataset: ClipDataset, wanted: set[str], known: dict[str, dict[str, float]], progress: Any = iter
) -> None:
    """Fill `known` (key -> metric -> value) with measurements that it lacks."""
    info = dataset.info
    codec = make_codec(info.codec, info.codec_options)
    picture, camera = set(VIDEO_METRICS) & wanted, set(CAMERA_METRICS) & wanted
    for entry in progress([entry for split in SPLITS for entry in dataset.clips(split)]):
        scores = known.setdefault(entry.key, {})
        if (picture | camera) <= set(scores):
            continue
        clip = dataset.read(entry)
        if camera and clip.c2w is not None and clip.intrinsics is not None:
            scores |= camera_metrics(clip.c2w, clip.intrinsics, info.image_width, info.image_height)
        if picture - set(scores):
            video = decode_shown(codec, clip.latents, info)
            scores |= video_metrics(video, info.fps, picture - set(scores))


def judge(scores: Mapping[str, float], ranges: Mapping[str, Range]) -> list[str]:
    """Return why a clip is dropped: one line per violated range; empty = kept.

    NaN is outside every range.
    """
    return [
        f"{metric} {scores[metric]:.4g} is not in [{low:g}, {high:g}]"
        for metric, (low, high) in ranges.items()
        if not low <= scores[metric] <= high
    ]


def select(
    dataset: ClipDataset, ranges: Mapping[str, Range], scores: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """Return the content of the selection file.

    Raises:
        DataError: a metric with a range was neither measured nor given for some clip.
    """
    keys = [entry.key for split in SPLITS for entry in dataset.clips(split)]
    missing = Counter(
        metric for key in keys for metric in ranges if metric not in scores.get(key, {})
    )
    if missing:
        listed = ", ".join(f"{metric} ({count} clips)" for metric, count in sorted(missing.items()))
        raise DataError(
            f"scores: got none for {listed}, expected one per clip. Fix: scores=<file with them>,"
            " or a table without them"
        )
    dropped = {key: reasons for key in keys if (reasons := judge(scores[key], ranges))}
    return {
        "dataset_fingerprint": dataset.info.fingerprint,
        "thresholds": {metric: list(bounds) for metric, bounds in ranges.items()},
        "kept": [key for key in keys if key not in dropped],
        "dropped": dropped,
    }


def filter_clips(
    path: str,
    out: str,
    table: str,
    thresholds: str | None,
    scores: str | None,
    captions: str | None,
    scores_cache: str | None,
) -> int:
    """Write the selection and print the report; return 1 if a caption names camera motion."""
    ranges = load_thresholds(thresholds, table)
    dataset = open_dataset(path)
    cache = Path(scores_cache) if scores_cache else None
    known: dict[str, dict[str, float]] = {}
    if cache and cache.exists():
        kept = read_json(cache, "scores_cache")
        known = (
            kept["scores"] if kept.get("dataset_fingerprint") == dataset.info.fingerprint else {}
        )
    measure(dataset, set(ranges), known, lambda items: track(items, "measure"))
    if cache:
        write_durably(
            cache,
            json.dumps({"dataset_fingerprint": dataset.info.fingerprint, "scores": known}).encode(),
        )
    outside: dict[str, dict[str, float]] = {}
    for file in scores.split(",") if scores else ():
        for key, values in load_scores(file).items():
            outside.setdefault(key, {}).update(values)
    selection = select(
        dataset, ranges, {key: {**values, **outside.get(key, {})} for key, values in known.items()}
    )
    written = load_captions(captions, dataset) if captions else {}
    flagged = {key: words for key, caption in written.items() if (words := camera_words(caption))}
    selection["captions_that_name_camera_motion"] = flagged
    data = (json.dumps(selection, indent=1) + "\n").encode()
    write_durably(Path(out), data)
    total = len(selection["kept"]) + len(selection["dropped"])
    print(
        f"kept {len(selection['kept'])} of {total} clips; {out} sha256"
        f" {hashlib.sha256(data).hexdigest()[:16]}"
    )
    for metric, count in Counter(
        reason.split()[0] for reasons in selection["dropped"].values() for reason in reasons
    ).most_common():
        print(f"  {count} clips outside {metric} {selection['thresholds'][metric]}")
    for key, words in flagged.items():
        print(f"  caption of {key} names camera motion: {', '.join(repr(word) for word in words)}")
    return 1 if flagged else 0


def main(arguments: list[str]) -> int:
    return run("python -m data_shards.filter", ABOUT, OPTIONS, filter_clips, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
