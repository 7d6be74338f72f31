"""Tars of videos that others made, here by webdataset's own writer, as a source of clips."""

import filecmp
import re
import tarfile

import numpy as np
import pytest
import webdataset

from data_shards import encode
from data_shards.schema import DataError
from data_shards.sources import open_source
from data_shards.sources.webdataset import WebDatasetSource
from data_shards.storage.read import open_dataset


@pytest.fixture(scope="session")
def clip(tmp_path_factory, write_video):
    """A video's bytes; `frames` and `container` as asked."""
    folder = tmp_path_factory.mktemp("clips")

    def make(frames=20, container="mp4"):
        path = folder / f"{frames}.{container}"
        if not path.exists():
            write_video(path, frames)
        return path.read_bytes()

    return make


def write_tar(path, *samples):
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)


@pytest.fixture
def tars(clip, tmp_path):
    """Three tars of two clips; those of a tar are one episode."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(3):
        samples = [
            {
                "__key__": f"clip{i}",
                "mp4": clip(20 + i),
                "txt": f"scene {number} {i}",
                "json": {"episode": f"https://video/{number}", "width": 32},
            }
            for i in range(2)
        ]
        write_tar(folder / f"{number:06d}.tar", *samples)
    return folder


def same_files(a, b, pattern="*"):
    names = sorted(str(path.relative_to(a)) for path in a.rglob(pattern) if path.is_file())
    assert names == sorted(str(path.relative_to(b)) for path in b.rglob(pattern) if path.is_file())
    assert filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


def test_a_range_of_tars_becomes_a_data_set(tars, tmp_path, capsys):
    out = tmp_path / "set"
    arguments = [f"source={tars}/{{000000..000002}}.tar", f"out={out}", "validation=0.3"]
    assert encode.main(arguments) == 0
    assert "21 frames at the ends of clips are left out" in capsys.readouterr().out
    dataset = open_dataset(str(out))
    clips = [*dataset.clips("train"), *dataset.clips("validation")]
    assert len({entry.key for entry in clips}) == 6
    assert len({entry.episode for entry in dataset.clips("train")}) == 2
    assert len({entry.episode for entry in dataset.clips("validation")}) == 1, "split by video"
    source = open_source(str(tars))
    assert [clip.name for clip in source.clips][:3] == [
        "000000/clip0",
        "000000/clip1",
        "000001/clip0",
    ]
    assert {clip.key for clip in source.clips} == {entry.key for entry in clips}


def test_every_clip_is_what_webdatasets_own_reader_gives(tars):
    source = open_source(str(tars))
    urls = [str(path) for path in sorted(tars.glob("*.tar"))]
    read = webdataset.WebDataset(urls, shardshuffle=False)
    for listed, sample in zip(source.clips, read, strict=True):
        parts = {suffix: (start, size) for suffix, start, size in listed.members}
        assert listed.name == f"{sample['__url__'][-10:-4]}/{sample['__key__']}"
        for suffix in ("mp4", "txt", "json"):
            assert source._read(listed, *parts[suffix]) == sample[suffix]
        content = source.load(listed)
        assert content.caption == sample["txt"].decode()
        levels = content.video.mean((1, 2, 3))
        np.testing.assert_allclose(levels, 10 * np.arange(17), atol=3)


def test_an_interrupted_run_goes_on_and_workers_list_no_tar(tars, tmp_path, monkeypatch, capsys):
    arguments = [f"source={tars}", "shard_mb=0.001", "psnr=no"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert encode.main([*arguments, f"out={whole}", "workers=2"]) == 0
    load, loaded = WebDatasetSource.load, []

    def interrupt(self, clip):
        if len(loaded) == 3:
            raise KeyboardInterrupt
        loaded.append(clip.name)
        return load(self, clip)

    with monkeypatch.context() as broken:
        broken.setattr(WebDatasetSource, "load", interrupt)
        assert encode.main([*arguments, f"out={cut}"]) == 130
    monkeypatch.setattr(
        WebDatasetSource, "load", lambda self, clip: loaded.append(clip.name) or load(self, clip)
    )
    assert encode.main([*arguments, f"out={cut}"]) == 0
    assert len(loaded) == len(set(loaded)) == 6, "no finished shard is made twice"
    same_files(whole, cut)
    clips = open_source(str(tars)).clips
    monkeypatch.setattr(WebDatasetSource, "_list", lambda *_: pytest.fail("listed again"))
    assert open_source(str(tars)).load(clips[0]).caption == "scene 0 0"


def test_tars_in_a_store_give_the_same_bytes(tars, bucket, tmp_path):
    from s3fs import S3FileSystem

    S3FileSystem().put(str(tars), "shards-test/tars", recursive=True)
    local, remote = tmp_path / "local", tmp_path / "remote"
    rest = ["psnr=no", "shard_mb=0.01"]
    assert encode.main([f"source={tars}/{{000000..000002}}.tar", f"out={local}", *rest]) == 0
    address = "s3://shards-test/tars/{000000..000002}.tar"
    assert encode.main([f"source={address}", f"out={remote}", *rest]) == 0
    # but for the plan, which names the tars by the times and hashes of their store
    same_files(local, remote, "*.tar")
    same_files(local, remote, "*.parquet")


def test_a_listing_skips_what_lies_between_headers(clip, bucket, tmp_path, monkeypatch):
    from s3fs import S3FileSystem
    from s3fs.core import S3File

    samples = [{"__key__": f"c{i}", "mp4": clip(), "wav": bytes(4 * 2**20)} for i in range(5)]
    write_tar(tmp_path / "big.tar", *samples)
    S3FileSystem().put(str(tmp_path / "big.tar"), "shards-test/big.tar")
    fetch, fetched = S3File._fetch_range, []
    monkeypatch.setattr(
        S3File, "_fetch_range", lambda f, a, b: fetched.append(b - a) or fetch(f, a, b)
    )
    assert len(open_source("s3://shards-test/big.tar").clips) == 5
    assert sum(fetched) < 5 * 2**20


def test_cameras_and_captions_in_json_and_webm_without_a_frame_count(clip, tmp_path):
    c2w = np.tile(np.eye(4), (20, 1, 1))
    c2w[:, 2, 3] = np.arange(20)
    facts = {"c2w": c2w.tolist(), "intrinsics": [20, 21, 16, 17], "metres_per_unit": 2.0}
    write_tar(
        tmp_path / "a.tar",
        {"__key__": "x", "mkv": clip(container="mkv"), "json": {**facts, "caption": "a walk"}},
    )
    source = open_source(str(tmp_path / "a.tar"))
    content = source.load(source.clips[0])
    assert (source.clips[0].frames, source.fps, content.caption) == (17, 16.0, "a walk")
    np.testing.assert_allclose(content.c2w[:, 2, 3], 2.0 * np.arange(17))
    np.testing.assert_array_equal(content.intrinsics[3], [20, 21, 16, 17])


def members(path):
    with tarfile.open(path) as tar:
        return [(info.name, info.offset, info.offset_data, info.size) for info in tar]


@pytest.mark.parametrize("where", ["in a video", "between members", "header", "concatenated"])
def test_a_damaged_tar_is_named(tars, where):
    path = tars / "000001.tar"
    data, listed = bytearray(path.read_bytes()), members(path)
    if where == "in a video":
        data = data[: listed[-2][2] + 100]
    elif where == "between members":
        data = data[: listed[3][1]]
    elif where == "header":
        data[listed[3][1] + 5] ^= 1
    else:
        data += (tars / "000002.tar").read_bytes()
    path.write_bytes(data)
    if where != "in a video":  # why we list tars ourselves
        quiet = list(webdataset.WebDataset(str(path), shardshuffle=False))
        assert len(quiet) == (2 if where == "concatenated" else 1)
    with pytest.raises(DataError, match=r"000001.tar.*(unexpected end|cut or damaged)"):
        _ = open_source(str(tars)).clips


def test_what_is_wrong_in_a_tar_is_named(clip, tmp_path):
    video, path = clip(), tmp_path / "a.tar"
    cases = [
        ([{"__key__": "x", "mp4": video}] * 2, r"got 'x.mp4' twice, .*a.tar"),
        ([{"__key__": "x", "mp4": video, "mkv": video}], "mkv and mp4 of the clip a/x"),
        ([{"__key__": "x", "mp4": b"no video"}], "cannot open a/x.mp4"),
        ([{"__key__": "x", "mp4": video, "json": b"{"}], "cannot read a/x.json"),
        ([{"__key__": "x", "mp4": video, "json": {"controls": []}}], "controls in a/x.json"),
        ([{"__key__": "../x", "mp4": video}], "got the name '../x.mp4'"),
    ]
    for samples, message in cases:
        write_tar(path, *samples)
        try:
            source = open_source(str(path))
            assert not source.clips
            told = source.problems["a/x"]
        except DataError as error:  # of the tar
            told = str(error)
        assert re.search(message, told)
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("x.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(DataError, match=r"got 'x.mp4', a link"):
        _ = open_source(str(path)).clips


def test_what_is_left_out_is_named(clip, tmp_path):
    write_tar(
        tmp_path / "a.tar",
        {"__key__": "x", "mp4": clip(17), "wav": b"sound"},
        {"__key__": "y", "txt": "a caption alone"},
    )
    source = open_source(str(tmp_path))
    assert [clip.name for clip in source.clips] == ["a/x"]
    assert source.notes == ("2 members or clips are left out: a/x.wav, a/y (no video)",)


def test_a_command_is_never_run(tmp_path, capsys):
    canary = tmp_path / "canary"
    for source in (f"pipe:touch {canary}", f"{{a.tar,pipe:touch {canary} #.tar}}"):
        assert encode.main([f"source={source}", f"out={tmp_path / 'set'}"]) == 2
        assert "got pipe:, which would run a command" in capsys.readouterr().err
    assert not canary.exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{}/000000.tar.gz", "expected names that end in .tar"),
        ("{}/{{000000..000003}}.tar", r"cannot read 000003.tar \(FileNotFoundError\)"),
        ("{}/{{000000,000000}}.tar", "got 000000.tar twice"),
        ("nosuch://me:secret@host/{{a,b}}.tar", "a URL of 'nosuch'"),
        ("https://me:secret@host/a.tgz?Signature=secret", "got host/a.tgz, expected names"),
    ],
)
def test_wrong_use_is_one_report_without_logins(tars, tmp_path, capsys, source, message):
    arguments = [f"source={source.format(tars)}", f"out={tmp_path / 'set'}"]
    assert encode.main(arguments) == 2
    report = capsys.readouterr().err
    assert "secret" not in report
    with pytest.raises(DataError, match=message):
        _ = open_source(source.format(tars)).clips


def test_a_changed_tar_is_another_source(tars, clip):
    before = open_source(str(tars)).description
    assert open_source(str(tars)).description == before
    write_tar(tars / "000001.tar", {"__key__": "x", "mp4": clip()})
    assert open_source(str(tars)).description != before
