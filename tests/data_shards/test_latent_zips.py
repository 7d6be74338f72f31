"""SANA-WM's public training layout, made here as its loader expects it: latents, captions and
cameras arrive unchanged, code does not."""

import io
import json
import pickle
import re
import zipfile

import numpy as np
import pytest

from data_shards import encode, verify
from data_shards.schema import DataError
from data_shards.sources import Place, open_source
from data_shards.sources.latent_zips import safe_key
from data_shards.storage.read import open_dataset

CHANNELS, COUNT, FRAMES = 6, 3, 17  # 3 latents are 17 raw frames


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def latents_of(number):
    return (
        np.random.default_rng(number).normal(size=(CHANNELS, COUNT, 2, 4)).astype(np.float16)
    )  # [C, T, h, w]


def poses_of(number):
    c2w = np.tile(np.eye(4, dtype=np.float32), (FRAMES + 2, 1, 1))
    c2w[:, 0, 3] = number + 0.1 * np.arange(FRAMES + 2)
    return c2w


def write_zip(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members:
            archive.writestr(name, data)


@pytest.fixture
def layout(tmp_path):
    """Two zips of two clips, the second without metric scales; intrinsics of 256x128 videos,
    latents of 128x64."""
    raw, cache = tmp_path / "raw", tmp_path / "cache"
    for z in range(2):
        numbers = (2 * z, 2 * z + 1)
        facts = [json.dumps({"prompt": f"room {n}", "height": 128, "width": 256}) for n in numbers]
        write_zip(raw / f"s{z}.zip", [(f"clip_{n}.json", text) for n, text in zip(numbers, facts)])
        write_zip(cache / f"s{z}.zip", [(f"clip_{n}.npz", npz(z=latents_of(n))) for n in numbers])
        pose = np.concatenate([poses_of(n) for n in numbers])
        ranges = np.array([[0, FRAMES + 2], [FRAMES + 2, FRAMES + 2]])
        intrinsics = np.tile(np.float32([200, 210, 128, 64]), (len(pose), 1))
        np.savez(
            raw / f"s{z}_camera.npz",
            ids=[f"clip_{n}" for n in numbers],
            ranges=ranges,
            pose=pose,
            intrinsics=intrinsics,
        )
    (raw / "s0_metric_scale_stats.json").write_text(
        json.dumps({"clip_0": {"median": 2.0}, "clip_1": 3.0})
    )
    return raw, cache


def source_of(layout):
    return open_source(Place(str(layout[0]), str(layout[1])))


def test_latents_captions_and_cameras_arrive(layout, tmp_path):
    out = tmp_path / "set"
    arguments = [
        f"source={layout[0]}",
        f"latents={layout[1]}",
        f"out={out}",
        "codec=ltx2",
        "model=some/vae",
        "validation=0.5",
        "workers=2",
    ]
    assert encode.main([*arguments, "shard_mb=0.001"]) == 0
    assert verify.main([f"path={out}"]) == 0
    dataset = open_dataset(str(out))
    info = dataset.info
    assert (info.codec, info.channels, info.temporal_stride, info.spatial_stride, info.fps) == (
        "ltx2",
        CHANNELS,
        8,
        32,
        16.0,
    )
    assert info.codec_options == {"model": "some/vae", "normalised": True}
    assert (info.image_height, info.image_width, info.clips) == (
        64,
        128,
        {"train": 2, "validation": 2},
    )  # a whole zip on either side
    for number, scale in ((0, 2.0), (1, 3.0), (2, 1.0), (3, 1.0)):
        clip = dataset.read(f"clip_{number}")
        np.testing.assert_array_equal(
            clip.latents, latents_of(number).transpose(1, 0, 2, 3).astype(np.float32)
        )
        np.testing.assert_allclose(
            clip.c2w[:, 0, 3], scale * poses_of(number)[:FRAMES, 0, 3], rtol=1e-6
        )
        np.testing.assert_allclose(clip.intrinsics, np.tile([100, 105, 64, 32], (FRAMES, 1)))
        assert dataset.description(clip.entry)["caption"] == f"room {number}"


def test_what_cannot_be_used_is_left_out_and_counted(layout):
    raw, cache = layout
    (raw / "s0_metric_scale_stats.json").write_text(json.dumps({"clip_1": 3.0}))
    write_zip(cache / "s1.zip", [("clip_3.npz", npz(z=latents_of(3)))])
    source = source_of(layout)
    assert [clip.key for clip in source.clips] == ["clip_1", "clip_3"]
    assert [note.split(":")[0] for note in source.notes] == [
        "1 clips are left out",
        "1 clips are left out",
    ]


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def test_no_code_runs_and_lies_about_size_are_refused(layout, tmp_path):
    raw, cache = layout
    lie = io.BytesIO()  # a header that claims 10 GB
    np.lib.format.write_array_header_1_0(
        lie, {"descr": "<f4", "fortran_order": False, "shape": (5, 2**29, 1, 1)}
    )
    outer = io.BytesIO()
    with zipfile.ZipFile(outer, "w") as archive:
        archive.writestr("z.npy", lie.getvalue() + b"\0" * 64)
    ran = tmp_path / "ran"
    cut = npz(z=latents_of(2))[:-40]
    for data, report in (
        (npz(z=np.array([Bomb(ran)], dtype=object)), "got z object"),
        (pickle.dumps(Bomb(ran)), "cannot read 'clip_2.npz'"),
        (npz(y=latents_of(2)), "cannot read 'clip_2.npz'"),
        (npz(z=latents_of(2)[0]), r"expected \[C, T, h, w\]"),
        (npz(z=latents_of(2).astype(np.int32)), "got z int32"),
        (outer.getvalue(), "which is 10737418240 bytes, in a member of"),
        (cut, "cannot read 'clip_2.npz'"),
    ):
        write_zip(cache / "s1.zip", [("clip_2.npz", data), ("clip_3.npz", npz(z=latents_of(3)))])
        source = source_of(layout)
        assert "clip_2" not in [clip.key for clip in source.clips]
        assert re.search(report, source.problems["s1.zip/clip_2"])
    np.savez(raw / "s1_camera.npz", ids=np.array([Bomb(ran)], dtype=object))
    with pytest.raises(DataError, match="without pickles"):
        source_of(layout)
    assert not ran.exists()


def test_a_flipped_bit_in_a_latent_is_seen(layout):
    path = layout[1] / "s1.zip"
    source, data = source_of(layout), bytearray(path.read_bytes())
    place = data.index(latents_of(3).tobytes()[:64])
    data[place + 9] ^= 4
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"cannot read 'clip_3\.npz' .*CRC"):
        source.load(source.clips[3])
    source.load(source.clips[2])


def test_names_that_lead_elsewhere(layout):
    cache = layout[1]
    for name in ("../x", "/etc/x", "a/../../x", "a\\x", "C:x"):
        write_zip(cache / "s1.zip", [(f"{name}.npz", npz(z=latents_of(2)))])
        with pytest.raises(DataError, match="zip member: got the name"):
            source_of(layout)
    link = zipfile.ZipInfo("clip_2.npz")
    link.external_attr = 0o120777 << 16
    write_zip(cache / "s1.zip", [(link, b"/etc/passwd")])
    with pytest.raises(DataError, match="a link, expected a file"):
        source_of(layout)
    assert safe_key("video_1") == "video_1"
    assert safe_key("a b/c.d") != safe_key("a_b/c.d")
    assert safe_key("a b/c.d").startswith("a_b_c_d-")


def test_wrong_use_is_one_report(layout, tmp_path, capsys):
    raw, cache = layout
    arguments = [f"source={raw}", f"out={tmp_path / 'set'}"]
    for extra, report in (
        ([], "latents: got none for the zips"),
        ([f"latents={cache}"], "codec: got linear, expected ltx2"),
        ([f"latents={cache}", "codec=ltx2"], "model: missing (folder or hub name"),
        ([f"latents={tmp_path}", "codec=ltx2", "model=x"], "got no s0.zip"),
    ):
        assert encode.main([*arguments, *extra]) == 2
        assert report in capsys.readouterr().err
    (raw / "s0_metric_scale_stats.json").write_text(json.dumps({"clip_0": {"median": "much"}}))
    with pytest.raises(DataError, match="metric scale: got"):
        source_of(layout)
