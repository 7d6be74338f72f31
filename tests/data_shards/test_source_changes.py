"""`encode` when its source is not what it was: by the content of each clip's files, whatever their
sizes and times say."""

import json
import os
import shutil

import numpy as np
import pytest

from data_shards import encode
from data_shards.encoding import plan
from data_shards.sources import digests
from data_shards.sources.videos import VideosSource
from data_shards.storage.read import open_dataset

FRAMES = 9
EVENTS = ("time_ns", "kind", "code", "dx", "dy")


def poses(step, frames=FRAMES):
    c2w = np.tile(np.eye(4), (frames, 1, 1))
    c2w[:, 2, 3] = step * np.arange(frames)
    return c2w


def write_poses(path, step, frames=FRAMES):
    np.savez(path, c2w=poses(step, frames), intrinsics=[20.0, 20, 16, 16])


def write_colmap(folder, step):
    folder.mkdir(exist_ok=True)
    (folder / "cameras.txt").write_text("1 PINHOLE 32 32 20 20 16 16\n")
    lines = [f"{i + 1} 1 0 0 0 0 0 {-step * i} 1 f{i:04d}.png\n\n" for i in range(FRAMES)]
    (folder / "images.txt").write_text("".join(lines))


def write_events(path, x):
    np.savez(
        path,
        **{name: np.array([10**8 if name == "time_ns" else x]) for name in EVENTS[:1]},
        kind=np.array([2], np.int32),
        code=np.array([0], np.int32),
        dx=np.array([x], np.int32),
        dy=np.array([0], np.int32),
    )


@pytest.fixture(scope="session")
def clips(write_video, tmp_path_factory):
    """Four videos a, b, c, d with poses beside them."""
    folder = tmp_path_factory.mktemp("videos")
    for key in "abcd":
        write_video(folder / f"{key}.mp4", frames=FRAMES)
        write_poses(folder / f"{key}.npz", 1.0)
    return folder


@pytest.fixture
def videos(clips, tmp_path):
    return shutil.copytree(clips, tmp_path / "videos")


@pytest.fixture
def loaded(monkeypatch):
    """Keys of the clips that are decoded."""
    keys, load = [], VideosSource.load
    monkeypatch.setattr(
        VideosSource, "load", lambda s, clip: keys.append(clip.key) or load(s, clip)
    )
    return keys


def arguments(folder, out, *more, channels=64):
    """One clip a shard; with half of the channels, two."""
    options = [f"channels={channels}", "psnr=no", "shard_mb=0.001"]
    return [f"source={folder}", f"out={out}", *options, *more]


def interrupted(command, monkeypatch):
    """Run a command that is interrupted when all shards are made."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(encode, "finish", stop)
        assert encode.main(command) == 130


def bytes_of(folder):
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def in_place(path, change):
    """Change a file and put its time back."""
    facts = path.stat()
    change(path)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def flip_video(path):
    data = bytearray(path.read_bytes())
    at = data.find(b"Lavc")  # of the encoder's name, which no pixel depends on
    data[at : at + 4] = b"lavc"
    path.write_bytes(bytes(data))


def edit_json(path):
    path.write_text(path.read_text().replace("1.5", "2.5"))


def prepare(kind, videos):
    """Give each clip a file of this kind; return that of clip a, and how to change it."""
    for npz in [] if kind in ("video", "npz") else videos.glob("?.npz"):
        npz.unlink()
    for key in "abcd":
        if kind == "json":
            facts = {"c2w": poses(1.5).tolist(), "intrinsics": [20, 20, 16, 16]}
            (videos / f"{key}.json").write_text(json.dumps(facts))
        elif kind == "text":
            (videos / f"{key}.txt").write_text("a room")
        elif kind == "events":
            write_events(videos / f"{key}.events.npz", 3)
        elif kind == "colmap":
            write_colmap(videos / f"{key}.colmap", 1.0)
    return {
        "video": (videos / "a.mp4", flip_video),
        "npz": (videos / "a.npz", lambda path: write_poses(path, 2.0)),
        "json": (videos / "a.json", edit_json),
        "text": (videos / "a.txt", lambda path: path.write_text("a hall")),
        "events": (videos / "a.events.npz", lambda path: write_events(path, 4)),
        "colmap": (videos / "a.colmap" / "images.txt", lambda path: write_colmap(path.parent, 2.0)),
    }[kind]


ALSO = [pytest.param(kind, marks=pytest.mark.full) for kind in ("json", "events")]
KINDS = ("video", "npz", "text", "colmap", *ALSO)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_changed_redoes_its_clip_alone(
    videos, tmp_path, loaded, monkeypatch, capsys, kind
):
    """Sizes and times are as before. Afterwards the finished set names what has changed."""
    out, (file, change) = tmp_path / "set", prepare(kind, videos)
    interrupted(arguments(videos, out), monkeypatch)
    in_place(file, change)
    loaded.clear()
    assert encode.main(arguments(videos, out)) == 0
    assert loaded == ["a"]
    name = file.relative_to(videos)
    assert f"clip a: {name} has changed" in capsys.readouterr().out
    assert encode.main(arguments(videos, tmp_path / "anew")) == 0
    assert bytes_of(out) == bytes_of(tmp_path / "anew")
    in_place(file, lambda path: path.write_bytes(path.read_bytes() + b"\n"))
    before = bytes_of(out)
    assert encode.main(arguments(videos, out)) == 2
    error = capsys.readouterr().err
    assert f"clip a: {name} has changed" in error
    assert "clip b" not in error
    assert bytes_of(out) == before


def test_captions_are_part_of_their_clips(videos, tmp_path, loaded, monkeypatch, capsys):
    captions, out = tmp_path / "captions.json", tmp_path / "set"
    captions.write_text(json.dumps({"a": "a room", "b": "a hall"}))
    command = arguments(videos, out, f"captions={captions}")
    interrupted(command, monkeypatch)
    captions.write_text(json.dumps({"b": "a cellar", "a": "a room"}))
    loaded.clear()
    assert encode.main(command) == 0
    assert loaded == ["b"]
    dataset = open_dataset(str(out))
    assert dataset.description(dataset.find("b"))["caption"] == "a cellar"
    captions.write_text(json.dumps({"b": "a cellar", "z": "a room"}))
    assert encode.main(arguments(videos, tmp_path / "other", f"captions={captions}")) == 2
    assert "got 1 keys that no clip has: 'z'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("container", "dtype"),
    [
        ("tar", "bfloat16"),
        pytest.param("tar", "float16", marks=pytest.mark.full),
        pytest.param("zarr", "bfloat16", marks=pytest.mark.full),
    ],
)
def test_clips_that_come_and_go_leave_the_others_encoded(
    videos, tmp_path, loaded, monkeypatch, capsys, container, dtype
):
    """Two clips a shard, so what is taken out moves all after it into other shards."""
    out, more = (
        tmp_path / "set",
        (f"container={container}", "validation=0.4", f"latent_dtype={dtype}"),
    )
    command = arguments(videos, out, *more, channels=32)
    interrupted(command, monkeypatch)
    assert len(list((tmp_path / "set.partial" / "shards").iterdir())) == 2
    for file in videos.glob("b.*"):
        file.rename(tmp_path / file.name)
    shutil.copy(videos / "a.mp4", videos / "e.mp4")
    shutil.copy(videos / "a.npz", videos / "e.npz")
    loaded.clear()
    interrupted(command, monkeypatch)
    assert loaded == ["e"]
    told = capsys.readouterr().out
    assert "clip b: is no longer there" in told
    assert "clip e: is new" in told
    (tmp_path / "b.mp4").rename(videos / "b.mp4")
    (tmp_path / "b.npz").rename(videos / "b.npz")
    loaded.clear()
    assert encode.main(command) == 0
    assert loaded == [], "b was encoded by the first run"
    assert encode.main(arguments(videos, tmp_path / "anew", *more, channels=32)) == 0
    assert bytes_of(out) == bytes_of(tmp_path / "anew")
    (videos / "e.mp4").unlink()
    (videos / "e.npz").unlink()
    assert encode.main(command) == 2
    assert "clip e: is no longer there" in capsys.readouterr().err


def test_other_libraries_encode_what_is_left_anew_and_are_told_of_a_finished_set(
    videos, tmp_path, loaded, monkeypatch, capsys
):
    out, version = tmp_path / "set", plan.version
    with monkeypatch.context() as patch:
        patch.setattr(plan, "version", lambda name: "16.0" if name == "av" else version(name))
        interrupted(arguments(videos, out), monkeypatch)
    loaded.clear()
    assert encode.main(arguments(videos, out)) == 0
    assert sorted(loaded) == ["a", "b", "c", "d"]
    assert f"av was 16.0 and is now {version('av')}" in capsys.readouterr().out
    libraries = open_dataset(str(out)).info.libraries
    assert libraries.keys() == {"av", "libavcodec", "libswscale", "numpy"}
    assert libraries["av"] == version("av")
    monkeypatch.setattr(plan, "version", lambda name: "99" if name == "av" else version(name))
    assert encode.main(arguments(videos, out)) == 0
    told = capsys.readouterr().out
    assert f"av was {version('av')} and is now 99" in told
    assert "nothing to do" in told


def test_a_set_that_states_no_libraries_is_read(dataset_path, tmp_path):
    shutil.copytree(dataset_path, tmp_path / "set")
    facts = json.loads((tmp_path / "set" / "dataset.json").read_text())
    del facts["libraries"]
    (tmp_path / "set" / "dataset.json").write_text(json.dumps(facts))
    assert open_dataset(str(tmp_path / "set")).info.libraries == {}


def test_a_file_that_changes_while_it_is_encoded_is_named(videos, tmp_path, monkeypatch, capsys):
    load = VideosSource.load

    def edited(source, clip):
        content = load(source, clip)
        if clip.key == "b":
            in_place(videos / "b.npz", lambda path: write_poses(path, 2.0))
        return content

    monkeypatch.setattr(VideosSource, "load", edited)
    assert encode.main(arguments(videos, tmp_path / "set")) == 2
    assert "got other files of the clip b than when this command began" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_nothing_is_written_beside_the_source(videos, tmp_path):
    before = bytes_of(videos), sorted(p.name for p in tmp_path.iterdir())
    assert encode.main(arguments(videos, tmp_path / "set")) == 0
    assert (bytes_of(videos), sorted({p.name for p in tmp_path.iterdir()} - {"set"})) == before


def test_clips_cut_from_one_film_go_with_its_files(
    write_video, tmp_path, loaded, monkeypatch, capsys
):
    """Each clip is kept by itself; a change beside the film is one of all its clips."""
    folder, out = tmp_path / "films", tmp_path / "set"
    folder.mkdir()
    for key in "ab":
        write_video(folder / f"{key}.mp4", frames=25)
        write_poses(folder / f"{key}.npz", 1.0, 25)
    command = arguments(folder, out, "clip_frames=9", "clip_overlap=1", channels=32)
    interrupted(command, monkeypatch)
    assert len(loaded) == 6
    in_place(folder / "b.npz", lambda path: write_poses(path, 2.0, 25))
    loaded.clear()
    assert encode.main(command) == 0
    assert loaded == ["b_000000", "b_000008", "b_000016"]
    assert "clip b_000008: b.npz has changed" in capsys.readouterr().out
    anew = tmp_path / "anew"
    assert encode.main([*command[:1], f"out={anew}", *command[2:]]) == 0
    assert bytes_of(out) == bytes_of(anew)


def test_a_film_of_many_clips_is_hashed_once(write_video, tmp_path, monkeypatch):
    read, digest_file = [], digests.digest_file
    monkeypatch.setattr(
        digests, "digest_file", lambda path: read.append(path.name) or digest_file(path)
    )
    (tmp_path / "films").mkdir()
    write_video(tmp_path / "films" / "a.mp4", frames=25)
    write_poses(tmp_path / "films" / "a.npz", 1.0, 25)
    command = [f"source={tmp_path / 'films'}", f"out={tmp_path / 'set'}", "psnr=no", "validation=0"]
    assert encode.main([*command, "channels=8", "clip_frames=9", "clip_overlap=1"]) == 0
    assert sorted(read) == ["a.mp4", "a.npz"]
