"""A field of another package, `depth`, which data_shards does not know: from a recording through a
shard into cuts, packed rows and the ranks of a sequence group."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_shards import encode, fields, verify
from data_shards.fields import Field
from data_shards.loading.load import ClipLoader
from data_shards.schema import DataError, ShardError
from data_shards.sources.recording import RecordingSource
from data_shards.storage.read import open_dataset
from data_shards.time_layout import TimeLayout

# A picture for each raw frame: larger than the clip's latents, so a rank of a sequence group reads
# those of its own frames only.
DEPTH = Field(
    "depth", ("image_height", "image_width"), ("uint8",), "raw", by_row=True, padding="zero"
)
# The same, whole on all ranks: what a small field at raw rate does.
WHOLE_DEPTH = Field("depth", ("image_height", "image_width"), ("uint8",), "raw", padding="zero")
R = 8  # raw frames in a latent after the first


class Point:
    """Install a package that declares `depth = "laboratory:DEPTH"`."""

    name, value = "depth", "laboratory:DEPTH"

    def __init__(self, field):
        self.field = field

    def load(self):
        return self.field


@pytest.fixture
def install(monkeypatch):
    """install(field, …): as if a package with these entry points, and no other, were installed."""

    def declare(*found):
        points = [Point(field) for field in found]
        monkeypatch.setattr(
            "importlib.metadata.entry_points",
            lambda group: points if group == "data_shards.fields" else [],
        )
        fields.registered.cache_clear()

    yield declare
    monkeypatch.undo()
    fields.registered.cache_clear()


@pytest.fixture(params=["by row", "whole"])
def field(request, install):
    field = DEPTH if request.param == "by row" else WHOLE_DEPTH
    install(field)
    return field


@pytest.fixture
def made(recording, tmp_path):
    """made(container): the recording with its depth, an image latent for every 8th frame."""

    def make(container="tar"):
        arguments = [f"source={recording}", f"out={tmp_path / 'set'}", "fields=depth", "psnr=no"]
        arguments += ["image_latents_every=8", "validation=0", "shard_mb=0.03", "channels=16"]
        assert encode.main([*arguments, f"container={container}"]) == 0
        return open_dataset(str(tmp_path / "set"))

    return make


@pytest.fixture
def truth(recording):
    """truth(key): depth [F,H,W] as recorded, cropped like the video."""
    source = RecordingSource(recording)
    return lambda key: source.array(key, "depth")[:, 4:116]


def batch_of(dataset, step=0, **changed):
    options = {"seed": 2, "stage": "short", "global_batch": 6, "rows": range(6), **changed}
    with ClipLoader(dataset, **options) as loader:
        rows = loader.schedule.rows(step, range(6))
        return loader.make_batch(step), rows


def raw_frames(low, high):
    """The raw frames of the latent frames [low, high) of a cut, counted one by one."""
    return [f for f in range(R * high) if low <= -(-f // R) < high]


@pytest.mark.parametrize("container", ["tar", "zarr"])
def test_it_is_stored_and_every_frame_of_it_verified(field, made, truth, container):
    dataset = made(container)
    assert "depth.npy" in dataset.info.fields
    for entry in dataset.clips("train"):
        stored = dataset.read(entry).fields["depth"]
        assert stored.dtype == np.uint8
        np.testing.assert_array_equal(stored, truth(entry.key))
        part = dataset.read(entry, (1, 2)).fields["depth"]
        np.testing.assert_array_equal(part, stored[1:9] if field.by_row else stored)
        member = dataset.members(entry)["depth.npy"]
        assert len(member.row_crc32c) == (17 if field.by_row else 0)
    assert verify.main([f"path={dataset.path}"]) == 0


def test_one_wrong_bit_is_found_in_its_frame_and_hurts_no_other(install, made, capsys):
    install(DEPTH)
    dataset = made()
    entry = dataset.clips("train")[0]
    member = dataset.members(entry)["depth.npy"]
    shard = Path(dataset.path) / entry.shard
    data = bytearray(shard.read_bytes())
    data[member.data_offset + 5 * member.row_bytes + 7] ^= 4
    shard.write_bytes(data)
    assert verify.main([f"path={dataset.path}"]) == 1
    told = capsys.readouterr().err
    assert "got other bytes than were written, raw frame 5" in told
    assert f"key {entry.key}, field depth.npy" in told
    again = open_dataset(dataset.path)
    assert again.read(entry.key, (2, 3)).fields["depth"].shape == (8, 112, 160)  # frames 9 to 16
    with pytest.raises(ShardError, match=r"in raw frames \[5\] .*field depth.npy"):
        again.read(entry.key, (1, 2))


def test_a_cut_on_two_ranks(field, made, truth):
    """Cuts of 2 latents from latent 0 or 1, of which each rank holds one."""
    dataset, starts = made(), set()
    for step in range(3):
        whole, rows = batch_of(dataset, step, frames=(0, 2), clip_frames=2)
        ranks = [
            batch_of(dataset, step, frames=held, clip_frames=2, replicated=held[0] == 0)[0]
            for held in ((0, 1), (1, 2))
        ]
        for place, row in enumerate(rows):
            start = row.takes[0].start
            starts.add(start)
            expected = truth(whole.keys[place])[R * start : R * start + R + 1].astype(np.float32)
            np.testing.assert_array_equal(whole.fields["depth"][place], expected)
            if field.by_row:
                np.testing.assert_array_equal(ranks[0].fields["depth"][place], expected[:1])
                np.testing.assert_array_equal(ranks[1].fields["depth"][place], expected[1:])
            else:
                np.testing.assert_array_equal(ranks[0].fields["depth"][place], expected)
                assert torch.isnan(ranks[1].fields["depth"]).all()
        assert len(ranks[1].replicated()) == (3 if field.by_row else 4)
    assert starts == {0, 1}


@pytest.mark.parametrize("held", [(0, 7), (0, 2), (2, 5), (5, 7), (6, 7), (7, 7)])
def test_packed_rows(field, made, truth, held):
    """Rows of 7 latents hold two clips of 3 and one of padding: each rank has the depth of its own
    latent frames, clip by clip, and zeros behind."""
    dataset = made()
    batch, rows = batch_of(dataset, frames=held, clip_frames=7, pack=True, cost=float)
    part = held if field.by_row else (0, 7)
    places = [place for place, row in enumerate(rows) if len(row.starts) == 2]
    assert places
    for place in places:
        assert batch.document_starts[place] == (0, 3)
        clips = [truth(key) for key in batch.keys[place].split("+")]
        clips[1] = np.concatenate([clips[1], np.zeros((R, 112, 160), np.uint8)])
        expected = [
            clip[f]
            for clip, start, end in zip(clips, (0, 3), (3, 7), strict=True)
            for f in raw_frames(max(part[0], start) - start, min(part[1], end) - start)
        ]
        one = batch.each_tensor(lambda tensor, place=place: tensor[place : place + 1])
        one = type(one)(**{**vars(one), "document_starts": (batch.document_starts[place],)})
        found = one.own_entries(held, TimeLayout(R))["depth"][0]
        np.testing.assert_array_equal(found, np.array(expected, np.float32).reshape(-1, 112, 160))


def test_rows_of_one_bucket_and_no_rows(field, made, truth):
    dataset = made()
    batch, _ = batch_of(dataset, frames=(1, 3), clip_frames=5, shorter=[3])
    for place, key in enumerate(batch.keys):
        expected = truth(key)[1:] if field.by_row else truth(key)
        np.testing.assert_array_equal(batch.fields["depth"][place], expected)
    empty, _ = batch_of(dataset, frames=(1, 3), clip_frames=3, rows=range(6, 6))
    assert empty.fields["depth"].shape == (0, 16 if field.by_row else 17, 112, 160)


def test_without_its_package_the_set_is_refused_with_the_reason(install, made, recording, tmp_path):
    install(DEPTH)
    path = made().path
    install()
    dataset = open_dataset(path)
    with pytest.raises(DataError, match=r"'depth.npy'.*install the package that adds this field"):
        dataset.read(dataset.clips("train")[0])
    assert encode.main([f"source={recording}", f"out={tmp_path / 'new'}", "fields=depth"]) == 2
    assert not (tmp_path / "new.partial").exists()


def test_the_plan_of_a_set_without_own_fields_does_not_name_them(dataset_path):
    assert "fields" not in json.loads((dataset_path / "plan.json").read_text())


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"name": "a.b"}, "name"),
        ({"dtypes": ("object",)}, "dtypes"),
        ({"rate": "clip"}, "no rows"),
        ({"padding": "last"}, "padding 'last'"),
        ({"dims": (None,)}, "any length"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(changed, problem):
    with pytest.raises(DataError, match=problem):
        Field(**{**vars(DEPTH), **changed})


@pytest.mark.parametrize("found", ["no field", Field("c2w", (4, 4), ("float32",), "raw")])
def test_an_entry_point_that_is_no_field_of_its_name_is_refused(install, found):
    install(found)
    with pytest.raises(DataError, match="laboratory:DEPTH, expected a Field of that name"):
        fields.batch_fields()
