"""Numbers that the stored type cannot hold, and facts of more or fewer frames than the video has:
refused by name, never wrapped, cut or made infinite in silence."""

import json

import numpy as np
import pytest

from data_shards import encode, fields
from data_shards.beside.video import read_events
from data_shards.fields import Field
from data_shards.schema import DataError
from data_shards.storage.read import open_dataset
from data_shards.storage.write import encode_array

BYTES = Field("mask", (2,), ("uint8",), "raw")


class Point:
    name, value = "mask", "laboratory:MASK"

    def __init__(self, field):
        self.field = field

    def load(self):
        return self.field


@pytest.fixture
def install(monkeypatch):
    """install(field): as if a package declared it under the name `mask`."""

    def declare(field):
        monkeypatch.setattr(
            "importlib.metadata.entry_points",
            lambda group: [Point(field)] if group == "data_shards.fields" else [],
        )
        fields.registered.cache_clear()

    yield declare
    monkeypatch.undo()
    fields.registered.cache_clear()


@pytest.mark.parametrize(
    ("values", "dtype", "told"),
    [
        ([0, 256], "uint8", "value 256, expected whole numbers from 0 to 255"),
        ([-1, 3], "uint8", "value -1, expected whole numbers from 0 to 255"),
        ([0.0, 1e9], "uint8", r"value 1e\+09, expected whole numbers"),
        ([0.5, 1.0], "uint8", "value 0.5, expected whole numbers"),
        ([70_000], "float16", "value 70000, expected values that float16 can hold"),
        ([-70_000], "float16", "value -70000, expected values that float16 can hold"),
        ([2**63, 10**19], "uint8", r"value 1e\+19, expected whole numbers"),
        ([1e300], "bfloat16", r"value 1e\+300, expected values that bfloat16 can hold"),
        ([3.4e38], "bfloat16", r"value 3.4e\+38, expected values that bfloat16 can hold"),
        ([1e300], "float32", r"value 1e\+300, expected values that float32 can hold"),
    ],
)
def test_what_a_type_cannot_hold_is_refused(values, dtype, told):
    with pytest.raises(DataError, match=told):
        encode_array(np.array(values), dtype)


@pytest.mark.parametrize("kind", ["int64", "uint64", "int8", "float64"])
def test_what_it_can_hold_is_stored(kind):
    values = np.array([0, 1, 100, 127], kind)
    for dtype in ("uint8", "float16", "float32", "float64"):
        stored = np.frombuffer(encode_array(values, dtype)[1], dtype)
        np.testing.assert_array_equal(stored, [0, 1, 100, 127])
    assert encode_array(values[:0], "uint8")[1] == b""


def film(folder, write_video, frames, mask):
    folder.mkdir()
    write_video(folder / "a.mp4", frames=frames)
    (folder / "a.json").write_text(json.dumps({"mask": mask}))
    return folder


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (256, "value 256, expected whole numbers from 0 to 255, which uint8 can hold"),
        (-1, "value -1, expected whole numbers"),
        (0.25, "value 0.25, expected whole numbers"),
    ],
)
def test_a_field_that_would_wrap_is_one_error(install, write_video, tmp_path, capsys, value, told):
    """It was stored modulo 256."""
    install(BYTES)
    source = film(tmp_path / "in", write_video, 9, [[0, value]] * 9)
    arguments = [f"source={source}", f"out={tmp_path / 'set'}", "fields=mask", "psnr=no"]
    assert encode.main([*arguments, "channels=8", "validation=0"]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert "clip a: member" in said
    assert "field mask.npy" in said


@pytest.mark.parametrize("rows", [13, 14, 11, 100])
@pytest.mark.parametrize("cut", [(), ("clip_frames=9",), ("fps=8",)])
def test_a_field_of_another_number_of_frames_is_refused(
    install, write_video, tmp_path, capsys, rows, cut
):
    """A video of 12 frames, of which a clip keeps 9: rows beyond the 12th are of another video."""
    install(BYTES)
    source = film(tmp_path / "in", write_video, 12, [[i, i] for i in range(rows)])
    arguments = [f"source={source}", f"out={tmp_path / 'set'}", "fields=mask", "psnr=no", *cut]
    assert encode.main([*arguments, "channels=8", "validation=0"]) == 2
    told = f"got mask for {rows} frames, expected one for each of the video's 12 (a.json)"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("cut", [(), ("clip_frames=9",)])
def test_a_field_of_all_frames_is_cut_with_the_video(install, write_video, tmp_path, cut):
    install(BYTES)
    source = film(tmp_path / "in", write_video, 12, [[i, 2 * i] for i in range(12)])
    arguments = [f"source={source}", f"out={tmp_path / 'set'}", "fields=mask", "psnr=no", *cut]
    assert encode.main([*arguments, "channels=8", "validation=0"]) == 0
    dataset = open_dataset(str(tmp_path / "set"))
    (entry,) = dataset.clips("train")
    stored = dataset.read(entry).fields["mask"]
    np.testing.assert_array_equal(stored, [[i, 2 * i] for i in range(9)])


@pytest.mark.parametrize("mask", [7, [1, 2], [[[1, 2]]] * 12])
def test_a_field_of_another_shape_is_one_error(install, write_video, tmp_path, capsys, mask):
    """A single number for a field with an entry for each frame was a TypeError."""
    install(BYTES)
    source = film(tmp_path / "in", write_video, 12, mask)
    arguments = [f"source={source}", f"out={tmp_path / 'set'}", "fields=mask", "psnr=no"]
    assert encode.main([*arguments, "channels=8", "validation=0"]) == 2
    said = capsys.readouterr().err
    assert "mask" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(("last_s", "fine"), [(3.9, True), (4.9, True), (6.0, False), (60, False)])
def test_events_may_end_soon_after_the_video_only(tmp_path, last_s, fine):
    """A log of another, longer recording was taken, and cut."""
    times = np.array([0, 10**9, last_s * 1e9], np.int64)
    columns = {"kind": np.uint8, "code": np.uint8, "dx": np.int16, "dy": np.int16}
    zeros = {name: np.zeros(3, kind) for name, kind in columns.items()}
    np.savez(tmp_path / "a.events.npz", time_ns=times, **zeros)
    if fine:
        assert len(read_events(tmp_path / "a.events.npz", 64, 16.0).time_ns) == 3
        return
    with pytest.raises(DataError, match=r"a last one 60?.* after frame 0.*a.events.npz"):
        read_events(tmp_path / "a.events.npz", 64, 16.0)
