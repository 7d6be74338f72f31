"""Read dataset.json, and check each of its facts by type and range before anything uses it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from data_shards.schema import (
    ITEM_BYTES,
    NEGATIVE_TEXT,
    NULL_TEXT,
    SCHEMA_VERSION,
    SPLITS,
    DataError,
    DatasetInfo,
    shown,
)
from data_shards.storage.files import parse_json
from data_shards.time_layout import LAYOUTS

Rule = tuple[Callable[[Any], bool], str]  # whether a value keeps it, and its words
MOST_CHARACTERS, MOST_NAMES = 4096, 65536
MOST_BYTES = 2**50


def whole(low: int, high: int) -> Rule:
    rule = f"a whole number from {low} to {high}"
    return lambda value: type(value) is int and low <= value <= high, rule


def number(low: float, high: float) -> Rule:
    rule = f"a number from {low:g} to {high:g}"
    return lambda value: type(value) in (int, float) and low <= value <= high, rule


def optional(rule: Rule) -> Rule:
    keeps, words = rule
    return lambda value: value is None or keeps(value), f"null, or {words}"


def is_line(value: Any) -> bool:
    """Return True for text that shows as one line and commands no terminal."""
    return isinstance(value, str) and len(value) <= MOST_CHARACTERS and value.isprintable()


def are_names(value: Any) -> bool:
    """Return True for a list of different texts."""
    return (
        isinstance(value, list)
        and len(value) <= MOST_NAMES
        and all(is_line(name) and name for name in value)
        and len(set(value)) == len(value)
    )


def is_plain(value: Any) -> bool:
    """Return True for what an option of a codec may be."""
    if isinstance(value, list):
        return all(is_plain(item) for item in value)
    return value is None or is_line(value) or type(value) is bool or number(-1e300, 1e300)[0](value)


def are_options(value: Any) -> bool:
    return isinstance(value, dict) and all(is_line(k) and is_plain(v) for k, v in value.items())


def are_versions(value: Any) -> bool:
    return isinstance(value, dict) and all(is_line(k) and is_line(v) for k, v in value.items())


def are_levels(value: Any) -> bool:
    return isinstance(value, list) and all(number(1e-6, 1)[0](level) for level in value)


def are_divisors(value: Any) -> bool:
    return isinstance(value, list) and all(number(1e-30, 1e30)[0](each) for each in value)


def are_counts(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == set(SPLITS)
        and all(whole(0, 2**40)[0](count) for count in value.values())
    )


def are_statistics(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(
            isinstance(row, list) and all(number(-1e30, 1e30)[0](x) for x in row) for row in value
        )
    )


LINE: Rule = (is_line, "text on one line")
NAMES: Rule = (are_names, "a list of different names")
STATISTICS: Rule = (are_statistics, "two lists of finite numbers, one for each channel")
RULES: Mapping[str, Rule] = {
    "schema_version": whole(SCHEMA_VERSION, SCHEMA_VERSION),
    "codec": LINE,
    "codec_options": (are_options, "a table of names and values"),
    "channels": whole(1, 65536),
    "latent_height": whole(1, 2**40),
    "latent_width": whole(1, 2**40),
    "latent_dtype": (lambda value: value in tuple(ITEM_BYTES), f"one of {', '.join(ITEM_BYTES)}"),
    "temporal_stride": whole(1, 1024),
    "spatial_stride": whole(1, 1024),
    "image_height": whole(1, 2**40),
    "image_width": whole(1, 2**40),
    "fps": number(1e-3, 1e6),
    "metres_per_unit": number(1e-12, 1e12),
    "control_names": NAMES,
    "mean": STATISTICS,
    "std": STATISTICS,
    "clips": (are_counts, f"a whole number for each of {' and '.join(SPLITS)}"),
    "shards": whole(0, 10**6),
    "latent_frames": whole(0, 2**50),
    "raw_frames": whole(0, 2**50),
    "psnr_db": optional(number(-1e6, 1e6)),
    "null_text": optional((lambda value: value == NULL_TEXT, NULL_TEXT)),
    "index_bytes": whole(0, MOST_BYTES),
    "index_sha256": LINE,
    "source": LINE,
    "fingerprint": LINE,
    "fields": NAMES,
    "image_latents_every": whole(0, 2**31),
    "text_encoder": optional(LINE),
    "text_length": whole(0, 2**24),
    "text_width": whole(0, 2**24),
    "null_text_crc32c": whole(0, 2**32 - 1),
    "time_layout": (lambda value: value in LAYOUTS, f"one of {', '.join(LAYOUTS)}"),
    "shown_height": whole(0, 2**40),
    "shown_width": whole(0, 2**40),
    "control_std": (are_divisors, "a list of positive numbers"),
    "controls_offset": whole(-(2**20), 0),
    "negative_text": optional((lambda value: value == NEGATIVE_TEXT, NEGATIVE_TEXT)),
    "negative_text_crc32c": whole(0, 2**32 - 1),
    "ode_levels": (are_levels, "a list of noise levels from above 0 to 1"),
    "trajectories": (are_options, "a table of names and values"),
    "libraries": (are_versions, "a table of names and versions"),
}


NEWER: Mapping[str, Any] = {
    "libraries": {},
    "ode_levels": [],
    "trajectories": {},
    "negative_text": None,
    "negative_text_crc32c": 0,
    "time_layout": LAYOUTS[0],
    "shown_height": 0,
    "shown_width": 0,
    "control_std": [],
    "controls_offset": 0,
}


def info_from_json(text: str | bytes, where: str) -> DatasetInfo:
    """Parse and check dataset.json.

    Raises:
        DataError: not JSON, missing or unknown fields, another schema version, or a fact of another
        type, out of its range, or that contradicts another one.
    """
    data = text if isinstance(text, bytes) else text.encode(errors="replace")
    raw = parse_json(data, "dataset.json", where)
    if not RULES["schema_version"][0](raw.get("schema_version")):
        raise DataError(
            f"dataset.json: got schema_version {shown(raw.get('schema_version'))}, expected"
            f" {SCHEMA_VERSION} ({where}). Fix: encode again"
        )
    for name, usual in NEWER.items():  # sets of earlier versions do not state these
        raw.setdefault(name, usual)
    if wrong := sorted({field.name for field in dataclasses.fields(DatasetInfo)} ^ set(raw)):
        names = ", ".join(shown(name) for name in wrong[:5])
        raise DataError(
            f"dataset.json: got missing or unknown fields {names}, expected exactly those of"
            f" DatasetInfo ({where})"
        )
    for name, (keeps, rule) in RULES.items():
        if not keeps(raw[name]):
            raise DataError(
                f"dataset.json: got {name} = {shown(raw[name])}, expected {rule} ({where}). Fix:"
                " encode again"
            )
    for name in ("mean", "std"):
        raw[name] = tuple(tuple(float(x) for x in row) for row in raw[name])
    raw["control_names"], raw["fields"] = tuple(raw["control_names"]), tuple(raw["fields"])
    raw["control_std"] = tuple(float(each) for each in raw["control_std"])
    raw["ode_levels"] = tuple(float(level) for level in raw["ode_levels"])
    info = DatasetInfo(**raw)
    if problem := contradiction(info):
        raise DataError(f"dataset.json: {problem} ({where}). Fix: encode again")
    return info


def contradiction(info: DatasetInfo) -> str:
    """Return which facts contradict each other, '' if none do."""
    for name, table in (("mean", info.mean), ("std", info.std)):
        if [len(row) for row in table] != [info.channels] * 2:
            return f"got a {name} that is not [2][{info.channels}] finite numbers"
    if min(min(row) for row in info.std) <= 0:
        return "got a std of 0 or less, expected positive numbers"
    if info.control_std and len(info.control_std) != len(info.control_names):
        count = len(info.control_std)
        return f"got a control_std of {count} numbers, expected one for each of control_names"
    every, stride = info.image_latents_every, info.temporal_stride
    if every and info.time_layout == "grouped":
        return f"got image_latents_every {every}, expected 0 with the time layout grouped"
    if every % stride:
        return f"got image_latents_every {every}, expected 0 or a multiple of {stride}"
    return ""
