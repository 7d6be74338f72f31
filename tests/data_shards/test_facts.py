"""dataset.json with facts of other types, out of range or hostile; and pipes in place of files."""

import json
import os
from dataclasses import MISSING, fields

import numpy as np
import pytest

from data_shards import verify
from data_shards.schema import DataError, DatasetInfo, ShardError, plain, shown
from data_shards.storage.facts import NEWER, RULES, info_from_json
from data_shards.storage.files import NotRegular, open_regular
from data_shards.storage.read import open_dataset
from data_shards.storage.remote import RangeCache

OTHER_TYPES = (None, True, -1, 1.5, 2**64, 1e400, "x\x1b[2J", "", [], {}, [[1, 2]], {"train": "x"})
ESCAPE = "\x1b]0;owned\x07\n@progress {}"


@pytest.fixture(scope="module")
def facts(dataset_path):
    return json.loads((dataset_path / "dataset.json").read_text())


def test_every_fact_has_a_rule(facts):
    assert set(RULES) == set(facts)
    info_from_json(json.dumps(facts), "here")


@pytest.mark.parametrize("name", sorted(RULES))
def test_facts_of_other_types_are_one_error_on_one_line(facts, name):
    """Only what the rule allows is read, and nothing of it reaches a terminal."""
    right = 0
    for value in OTHER_TYPES:
        text = json.dumps({**facts, name: value})
        try:
            info_from_json(text, "here")
            right += 1
        except DataError as error:
            message = str(error)
            assert message.isprintable()
            assert name in message
            assert message.startswith("dataset.json: ")
    assert right <= 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temporal_stride": 0}, "temporal_stride = 0, expected a whole number from 1 to 1024"),
        ({"codec": ESCAPE}, r"codec = '\\x1b\]0;owned\\x07\\n@progress"),
        ({"clips": {"train": 6}}, "clips = a table of 1, expected a whole number for each of"),
        ({"clips": {"train": 1e400, "validation": 0}}, "clips = a table of 2"),
        ({"control_names": ["a", "a"]}, "control_names = a list of 2"),
        ({"control_names": "ab"}, "control_names = 'ab', expected a list"),
        ({"fps": "16"}, "fps = '16', expected a number"),
        ({"mean": [[0.0], [0.0]]}, "a mean that is not"),
        ({"std": 3}, "std = 3, expected two lists"),
        ({"null_text": "../../etc/passwd"}, "null_text = '../../etc/passwd', expected null, or"),
        ({"image_latents_every": 4}, "image_latents_every 4"),
        ({"schema_version": True}, "schema_version True"),
    ],
)
def test_what_contradicts_is_refused(facts, changes, message):
    with pytest.raises(DataError, match=message):
        info_from_json(json.dumps({**facts, **changes}), "here")


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"channels": ' + b"9" * 5000 + b"}",
        b"\xff\xfe\x00",
        b"null",
        b'{"fps": 1, "fps": 2}',
        b"",
    ],
)
def test_json_that_breaks_parsers_is_one_error(text):
    with pytest.raises(DataError, match=r"^dataset\.json: ") as caught:
        info_from_json(text, "here")
    assert str(caught.value).isprintable()


def test_values_in_messages_command_no_terminal():
    assert plain("a\x1b[31mb\tc\u202e\n@progress {}\n- d") == (
        "a\\x1b[31mb\\tc\\u202e\\n@progress {}\n- d"
    )
    assert str(DataError("key \x1b[2J\n@progress 1")) == "key \\x1b[2J\\n@progress 1"
    assert shown(np.array("a\x1b")) == "'a\\x1b'"
    assert len(shown("x" * 10**6)) == 60


@pytest.mark.parametrize("cached", [False, True])
def test_a_pipe_in_place_of_a_shard_is_damage_at_once(damaged, cached, tmp_path):
    shard = damaged / "shards/000000.tar"
    shard.unlink()
    os.mkfifo(shard)
    cache = RangeCache(tmp_path / "cache", 10**7) if cached else None
    dataset = open_dataset(str(damaged), cache=cache)
    entry = next(
        e for s in ("train", "validation") for e in dataset.clips(s) if "0000.tar" in e.shard
    )
    with pytest.raises(ShardError, match=r"it is a pipe.*shard shards/000000\.tar") as caught:
        dataset.read(entry)
    assert not caught.value.passing
    problems = verify.verify_dataset(str(damaged))[1]
    assert ["a pipe" in str(problem) for problem in problems] == [True]


@pytest.mark.parametrize("name", ["dataset.json", "index.parquet", "SHA256SUMS"])
def test_a_pipe_in_place_of_another_file_is_refused_at_once(damaged, name):
    (damaged / name).unlink()
    os.mkfifo(damaged / name)
    try:
        problems = [str(problem) for problem in verify.verify_dataset(str(damaged))[1]]
    except DataError as error:
        problems = [str(error)]
    assert any("it is a pipe" in problem for problem in problems)


def test_devices_and_folders_are_no_files(tmp_path):
    for path in ("/dev/zero", tmp_path):
        with pytest.raises(NotRegular, match="expected a regular file"):
            open_regular(path)


def test_sets_of_earlier_versions_are_read(facts):
    """Each fact that came later has a value for them; nothing else may be missing."""
    older = {name: value for name, value in facts.items() if name not in NEWER}
    assert info_from_json(json.dumps(older), "here").trajectories == {}
    with_default = {f.name for f in fields(DatasetInfo) if is_optional(f)}
    first = {"fields", "image_latents_every", "null_text_crc32c"}  # of the first version
    first |= {"text_encoder", "text_length", "text_width"}
    assert set(NEWER) == with_default - first


def is_optional(field) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING
