"""Facts beside a video that are not those of this video: each ends in one error that names the
file, the value and the rule."""

import json
import os
import zipfile

import numpy as np
import pytest

from data_shards import encode
from data_shards.controls import Events
from data_shards.schema import DataError
from data_shards.sources import Place, open_source
from data_shards.sources.clips import load_clip
from data_shards.sources.reading import Reading
from data_shards.storage.npz import open_npz
from data_shards.storage.read import open_dataset

FRAMES, SIDE = 17, 32
K = [20.0, 21.0, 16.0, 17.0]


def poses(frames=FRAMES, step=0.1):
    c2w = np.tile(np.eye(4), (frames, 1, 1))
    c2w[:, 2, 3] = step * np.arange(frames)
    return c2w


@pytest.fixture(scope="module")
def video(tmp_path_factory, write_video):
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    write_video(path, FRAMES)
    return path


@pytest.fixture
def folder(video, tmp_path):
    (tmp_path / "a.mp4").symlink_to(video)
    return tmp_path


def load(folder, **place):
    source = open_source(Place(str(folder), **place))
    if source.problems:  # what keeps a file from being listed
        raise DataError("\n".join(source.problems.values()))
    return load_clip(source, source.clips[0])


def refused(folder, message):
    """Loading ends in one DataError of one line."""
    with pytest.raises(DataError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


GOOD = {"c2w": poses(), "intrinsics": K}
CONTROLS = {"controls": np.ones((FRAMES, 2)), "control_names": ["gas", "dx"]}


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"c2w": poses(), "intrinsics": [0.75, 1.8, 0.5, 0.5]}, "cx, cy = 0.5, 0.5.*divided by"),
        ({"c2w": poses(), "intrinsics": [0.3, 0.3, 16, 16]}, "fx, fy = 0.3, 0.3.*field of view"),
        ({"c2w": poses(), "intrinsics": [2000, 2000, 16, 16]}, "field of view of 2 to 175"),
        ({"c2w": poses(), "intrinsics": [200, 200, 160, 90]}, "cx, cy = 160, 90.*32x32 picture"),
        ({"c2w": poses(), "intrinsics": [[20, 3, 16], [0, 20, 16], [0, 0, 1]]}, "without skew"),
        ({"c2w": poses(2 * FRAMES), "intrinsics": K}, "poses for 34 frames, .*video's 17 .a.npz"),
        ({"c2w": poses(FRAMES - 1), "intrinsics": K}, "poses for 16 frames"),
        ({"c2w": poses().transpose(0, 2, 1), "intrinsics": K}, "last row that is not 0 0 0 1"),
        ({"c2w": np.zeros((FRAMES, 4, 4)), "intrinsics": K}, "rotations off by 1"),
        ({"c2w": poses(step=1e300), "intrinsics": K}, r"e\+301 metres from the origin"),
        ({"c2w": np.full((FRAMES, 4, 4), np.nan), "intrinsics": K}, "finite numbers .a.npz"),
        ({"extrinsics": poses(), "K": K}, "got the key 'K', expected.*Fix: is it intrinsics"),
        ({"extrinsics": poses()}, "got the key 'extrinsics'.*Fix: is it w2c"),
        ({**GOOD, "metres_per_units": 1}, "'metres_per_units'.*is it metres_per_unit"),
        ({**GOOD, "notes": 1}, "got the key 'notes'.*take it out"),
        ({"intrinsics": K}, "intrinsics without poses"),
        ({**GOOD, "metres_per_unit": 0}, "metres_per_unit = 0, expected a number from 1e-09"),
        ({**GOOD, "metres_per_unit": "mm"}, "metres_per_unit = 'mm', expected"),
        ({**CONTROLS, "controls": np.ones((FRAMES + 1, 2))}, "controls for 18 frames"),
        ({**CONTROLS, "control_sums": [True]}, "control_sums = an array.* expected 2 times"),
        ({**CONTROLS, "control_sums": ["no", "yes"]}, "control_sums = .*expected 2 times true or"),
        ({**CONTROLS, "control_names": "gas"}, "control_names = 'gas', expected a list"),
        ({**CONTROLS, "control_names": ["gas", "gas"]}, "a list of different names"),
        ({"controls": np.ones((FRAMES, 2))}, r"controls \(17, 2\), expected \[F, 0\]"),
        ({"control_names": ["gas"]}, "names or sums without controls"),
        ({"text": np.ones((4, 3)), "text_mask": [1, 1, 0, 256]}, r"text_mask = .*\[4\] of 0 and 1"),
        ({"text_mask": [1]}, "text without text_mask or the reverse"),
        ({"episode": ["a"]}, "episode = .*expected a name"),
        ({"caption": 7}, "caption = 7, expected a text"),
    ],
)
def test_facts_of_another_clip_are_refused(folder, facts, message):
    np.savez(folder / "a.npz", **facts)
    refused(folder, message)


def with_ragged_rows():
    return [*poses().tolist()[:-1], [[1, 2]]]


JSONS = [
    ({"c2w": with_ragged_rows(), "intrinsics": K}, "c2w = a list of 17.*rows of one length"),
    ({"c2w": poses().tolist(), "intrinsics": "20 20 16 16"}, "intrinsics = '20 20 16 16'"),
    ({"c2w": poses().tolist(), "intrinsics": K, "metres_per_unit": "mm"}, "metres_per_unit = 'mm'"),
    ({"c2w": poses().tolist(), "intrinsics": [10**400, 1, 1, 1]}, "intrinsics = a list of 4"),
    ({"episode": True}, "episode = True, expected a name"),
    ([1], "got a list of 1 in a.json, expected a JSON object"),
    (b'{"c2w": 1, "c2w": 2}', "the key 'c2w' comes twice"),
    (b"[" * 100_000, "nested too deep"),
    (b'{"episode": ' + b"7" * 5000 + b"}", "cannot read a.json"),
    (b"\xff\xfe{", "cannot read a.json"),
]


@pytest.mark.parametrize(("facts", "message"), JSONS)
def test_json_that_is_wrong_is_refused(folder, facts, message):
    data = facts if isinstance(facts, bytes) else json.dumps(facts).encode()
    (folder / "a.json").write_bytes(data)
    refused(folder, message)


def test_files_that_are_no_npz_are_named(folder):
    np.savez(folder / "good.npz", **GOOD)
    np.save(folder / "array.npy", poses())
    good, path = (folder / "good.npz").read_bytes(), folder / "a.npz"
    for data, message in (
        (good[:2000], "sidecar: cannot read a.npz .File is not a zip file"),
        (b"", "cannot read a.npz .it is empty"),
        ((folder / "array.npy").read_bytes(), "one array without a name"),
        (good.replace(b"<f8", b"|O8"), "a.npz .array"),
        (good[:2000] + b"\xff" * 40 + good[2040:], "a.npz .array 'c2w'"),
    ):
        path.write_bytes(data)
        refused(folder, message)


def test_an_array_larger_than_its_use_is_not_made(folder):
    np.savez_compressed(folder / "a.npz", c2w=np.zeros((1000, 4, 4)))
    with open_npz(folder / "a.npz", "a.npz", "sidecar") as file:
        with pytest.raises(DataError, match=r"which is 128000 bytes, expected at most 127999"):
            file.read("c2w", 127999)
        assert file.read("c2w", 128000).shape == (1000, 4, 4)


@pytest.mark.full
def test_an_npz_that_unpacks_to_gigabytes_is_refused_before_it_does(folder):
    with (
        zipfile.ZipFile(folder / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("c2w.npy", "w") as file,
    ):
        shape = (2**21 + 1, 4, 4)  # a little over 256 MiB
        header = {"descr": "<f8", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(shape[0] // 2**17):
            file.write(bytes(2**24))
        file.write(bytes(128))
    refused(folder, r"\(2097153, 4, 4\), which is 268435584 bytes, expected at most")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"code": [1, 300, 2]}, "got code 300 at event 1, expected 0 to 255 .a.events.npz"),
        ({"code": [-1, 3, 2]}, "got code -1"),
        ({"kind": [0, -1, 0]}, "got kind -1 at event 1"),
        ({"code": [0.5, 1.0, 2.0]}, "got code of float64"),
        ({"dx": [0, 2**40, 0]}, "got dx 1099511627776"),
        ({"dx": [[0, 0, 0]]}, r"got dx of int64 \(1, 3\)"),
        ({"time_ns": np.array([5, 3, 9], np.uint64)}, "time going back at event 1"),
        ({"time_ns": np.array([1, 2, 3]) + 17 * 10**17}, "first one 1.7e.09 s after frame 0"),
        ({"kind": [0, 0]}, r"columns of \[2, 3\] events"),
    ],
)
def test_events_that_are_wrong_are_refused(folder, columns, message):
    good = {
        "time_ns": [0, 10**8, 2 * 10**8],
        **dict.fromkeys(("kind", "code", "dx", "dy"), [0] * 3),
    }
    np.savez(folder / "a.events.npz", **{**good, **columns})
    refused(folder, message)


def test_events_keep_their_types():
    events = Events(*(np.zeros(2, np.int64) for _ in range(5)))
    found = [column.dtype for column in (events.time_ns, events.kind, events.dx)]
    assert found == [np.int64, np.uint8, np.int32]


def test_two_sources_of_one_fact_are_refused(folder):
    np.savez(folder / "a.npz", **GOOD, **CONTROLS)
    np.savez(folder / "a.events.npz", time_ns=[0], kind=[0], code=[0], dx=[0], dy=[0])
    refused(folder, "controls in a.npz and a.events.npz, expected one")
    (folder / "a.events.npz").unlink()
    (folder / "a.colmap").mkdir()
    refused(folder, "a.colmap and c2w in a.npz, expected one of them")


def test_a_file_beside_no_video_is_told(folder):
    np.savez(folder / "A.npz", **GOOD)
    (folder / "b.colmap").mkdir()
    (folder / "c.events.npz").write_bytes(b"")
    notes = open_source(str(folder)).notes
    assert notes == ("3 files are left out that belong to no video: A.npz, b.colmap, c.events.npz",)


def test_a_pipe_in_place_of_a_file_is_refused_at_once(folder):
    for name in ("a.npz", "a.events.npz", "a.json", "a.txt"):
        os.mkfifo(folder / name)
        refused(folder, f"{name}.*it is a pipe")
        (folder / name).unlink()


def test_encode_does_not_wait_for_a_pipe(folder, tmp_path_factory, capsys):
    os.mkfifo(folder / "a.txt")
    out = tmp_path_factory.mktemp("out") / "set"
    assert encode.main([f"source={folder}", f"out={out}", "validation=0"]) == 2
    assert "a.txt (it is a pipe" in capsys.readouterr().err


def test_clips_of_one_video_are_checked_against_all_its_frames(folder):
    place = Place(str(folder), reading=Reading(clip_frames=9, clip_overlap=1))
    np.savez(folder / "a.npz", **GOOD)
    source = open_source(place)
    assert [clip.key for clip in source.clips] == ["a_000000", "a_000008"]
    np.testing.assert_array_equal(source.check(source.clips[1]).c2w, poses()[8:])
    np.savez(folder / "a.npz", c2w=poses(2 * FRAMES), intrinsics=K)
    source = open_source(place)
    for clip in source.clips:
        with pytest.raises(DataError, match=f"clip {clip.key}: .*34 frames, .*video's 17"):
            load_clip(source, clip)


def test_captions(folder):
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfa walk\n")
    assert load(folder).caption == "a walk"
    (folder / "a.txt").write_bytes("café au lait".encode("cp1252"))
    refused(folder, "a.txt, which is no UTF-8 .byte 3")
    (folder / "a.txt").unlink()
    (folder / "a.json").write_text('\ufeff{"caption": null, "episode": 7}', encoding="utf-8")
    assert load(folder).caption is None
    captions = folder.parent / "captions.json"
    for content, message in (
        ('{"a": null}', "captions: got None, expected a text"),
        ('{"a": {"caption": "x"}}', "captions: got a table of 1, expected a text or an object"),
        ('{"a": 5}', "captions: got 5"),
    ):
        captions.write_text(content)
        with pytest.raises(DataError, match=message):
            load(folder, captions=str(captions))


def test_sums_are_those_of_every_clip(folder, video):
    (folder / "b.mp4").symlink_to(video)
    np.savez(folder / "a.npz", **CONTROLS, control_sums=[True, False])
    np.savez(folder / "b.npz", **CONTROLS, control_sums=[False, True])
    with pytest.raises(DataError, match="different control sums"):
        open_source(str(folder))


def test_encode_names_clip_and_file(folder, tmp_path_factory, capsys):
    np.savez(folder / "a.npz", c2w=poses(5), intrinsics=K)
    out = tmp_path_factory.mktemp("out") / "set"
    assert encode.main([f"source={folder}", f"out={out}", "validation=0"]) == 2
    assert "clip a: sidecar: got poses for 5 frames" in capsys.readouterr().err
    np.savez(folder / "a.npz", **GOOD)
    assert encode.main([f"source={folder}", f"out={out}-2", "validation=0"]) == 0
    np.testing.assert_array_equal(open_dataset(f"{out}-2").read("a").c2w, poses())
