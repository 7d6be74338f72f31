"""Clips that cannot be encoded: all are named at once, before the first is encoded, and none costs
the work on the others."""

import json
import shutil

import numpy as np
import pytest

from data_shards import encode
from data_shards.schema import DataError
from data_shards.sources import videos as videos_source
from data_shards.sources.videos import VideosSource
from data_shards.storage.read import open_dataset


@pytest.fixture(scope="session")
def clips(write_video, tmp_path_factory):
    """Five videos a, b, c, d, e without anything beside them."""
    folder = tmp_path_factory.mktemp("videos")
    for key in "abcde":
        write_video(folder / f"{key}.mp4", frames=9)
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


def arguments(folder, out, *more):
    # two clips a shard
    return [f"source={folder}", f"out={out}", "channels=32", "psnr=no", "shard_mb=0.001", *more]


def shards(folder):
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in files
        if file.name not in ("plan.json", "SHA256SUMS", "dataset.json")
    }


def cut(path, share):
    """Keep the start of a video whose frames end the file: its header says it has them all."""
    data = path.read_bytes()
    start = data.find(b"mdat")
    assert start > 0
    path.write_bytes(data[: start + int(share * (len(data) - start))])


@pytest.fixture
def faststart():
    """faststart(path): move the header of an MP4 to its front, as for the web."""
    import av

    def move(path):
        made = path.with_suffix(".moved.mp4")
        with (
            av.open(str(path)) as old,
            av.open(str(made), "w", options={"movflags": "faststart"}) as new,
        ):
            stream = new.add_stream_from_template(old.streams.video[0])
            for packet in old.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    new.mux(packet)
        made.replace(path)

    return move


def test_all_problems_are_named_before_anything_is_encoded(
    videos, tmp_path, loaded, faststart, write_video, capsys
):
    faststart(videos / "a.mp4")
    cut(videos / "a.mp4", 0.5)
    (videos / "b.mp4").write_bytes(b"not a video")
    (videos / "c.json").write_text(json.dumps({"c2w": np.eye(4)[None].tolist()}))
    (videos / "d.txt").write_text("a room")  # a caption is no field of every clip
    (videos / "e.json").write_text("[]")
    write_video(videos / "f.mp4", frames=9, size=64)
    shutil.copy(videos / "d.mp4", videos / "d.mkv")
    (videos / "not a key.mp4").write_bytes(b"")
    assert encode.main(arguments(videos, tmp_path / "set")) == 2
    error = capsys.readouterr().err
    for name, words in (
        ("clip a", "the file is cut"),
        ("b.mp4", "cannot open b.mp4"),
        ("clip c", "poses without intrinsics"),
        ("e.mp4", "got a list of 0 in e.json"),
        ("clip f", "got 64x64, expected 32x32"),
        ("d.mp4", "got d.mkv and d.mp4, which are both the clip 'd'"),
        ("not a key.mp4", "clip key"),
    ):
        assert any(f"- {name}: " in line and words in line for line in error.splitlines()), name
    assert not loaded
    assert not list(tmp_path.glob("set*"))


def test_clips_before_the_cut_of_a_film_are_good(films, faststart, tmp_path, loaded, capsys):
    (tmp_path / "films").mkdir()
    film = films.write(tmp_path / "films" / "a.mp4", films.pictures(41), bf="0")
    faststart(film)
    cut(film, 0.6)
    command = arguments(film.parent, tmp_path / "set", "clip_frames=9")
    assert encode.main(command) == 2
    error = capsys.readouterr().err
    assert "clip a_000027: video: got" in error
    assert "clip a_000000" not in error
    assert not loaded
    assert encode.main([*command, "on_bad_clip=skip"]) == 0
    assert loaded[0] == "a_000000"
    assert "a_000027" not in loaded


@pytest.mark.parametrize("beside", ["cut", "sidecar"])
def test_a_bad_film_of_many_clips_is_read_once(
    films, faststart, tmp_path, monkeypatch, capsys, beside
):
    """It was read again for each of its clips, of which a film may have thousands."""
    (tmp_path / "films").mkdir()
    film = films.write(tmp_path / "films" / "a.mp4", films.pictures(41), bf="0")
    faststart(film)
    if beside == "cut":
        cut(film, 0.6)
    else:
        (tmp_path / "films" / "a.json").write_text('{"caption": 5}')
    read = []
    for name in ("count_packets", "read_beside"):
        real = getattr(videos_source, name)
        monkeypatch.setattr(
            videos_source, name, lambda *a, _r=real, _n=name: read.append(_n) or _r(*a)
        )
    assert encode.main(arguments(film.parent, tmp_path / "set", "clip_frames=9")) == 2
    assert capsys.readouterr().err.count("clip a_0000") > 1
    assert sorted(read) == ["count_packets", "read_beside"]


def test_a_clip_that_lacks_what_the_others_have_is_named_before(videos, tmp_path, loaded, capsys):
    for key in "abde":
        (videos / f"{key}.json").write_text(
            json.dumps({"c2w": np.tile(np.eye(4), (9, 1, 1)).tolist(), "intrinsics": [9, 9, 9, 9]})
        )
    assert encode.main(arguments(videos, tmp_path / "set")) == 2
    assert "clip c: source: it lacks c2w.npy, intrinsics.npy" in capsys.readouterr().err
    assert not loaded


def test_two_videos_of_one_name_are_refused(videos, tmp_path, capsys):
    for other in ("a.mkv", "b.MP4"):
        shutil.copy(videos / "c.mp4", videos / other)
    assert encode.main(arguments(videos, tmp_path / "set")) == 2
    error = capsys.readouterr().err
    assert "got a.mkv and a.mp4" in error
    assert "got b.MP4 and b.mp4" in error


def test_hidden_files_are_left_out_with_a_note(videos, tmp_path, capsys):
    (videos / "._a.mp4").write_bytes(b"\0\5\x16\7")
    (videos / "._a.json").write_bytes(b"\0\5\x16\7")
    (videos / ".hidden.mp4").write_bytes(b"")
    (videos / "z.json").write_text("{}")
    assert encode.main(arguments(videos, tmp_path / "set")) == 0
    told = capsys.readouterr().out
    assert "2 hidden videos are left out" in told
    assert "1 files are left out that belong to no video: z.json" in told


@pytest.fixture
def damaged(monkeypatch):
    """damaged(*keys): decoding these fails, as only decoding can tell."""

    def damage(*keys):
        load = VideosSource.load

        def loading(source, clip):
            if clip.key in keys and source._files[clip.key].stat().st_size:
                raise DataError(f"video: cannot decode {clip.key}.mp4, frame 3")
            return load(source, clip)

        context = pytest.MonkeyPatch()
        context.setattr(VideosSource, "load", loading)
        return context

    return damage


def test_what_decoding_finds_costs_nothing_of_the_others(videos, tmp_path, loaded, damaged, capsys):
    """All such clips are named, and when they are taken out nothing is decoded again."""
    out, patch = tmp_path / "set", damaged("b", "e")
    assert encode.main(arguments(videos, out)) == 2
    patch.undo()
    error = capsys.readouterr().err
    assert "clip b: video: cannot decode b.mp4, frame 3" in error
    assert "clip e: video: cannot decode e.mp4" in error
    assert not out.exists()
    (videos / "b.mp4").unlink()
    (videos / "e.mp4").unlink()
    loaded.clear()
    assert encode.main(arguments(videos, out)) == 0
    assert loaded == []
    assert encode.main(arguments(videos, tmp_path / "anew")) == 0
    assert shards(out) == shards(tmp_path / "anew")


def test_bad_clips_are_left_out_on_request_and_listed(
    videos, tmp_path, loaded, damaged, capsys, clips
):
    out = tmp_path / "set"
    (videos / "c.mp4").write_bytes(b"not a video")
    command = arguments(videos, out, "on_bad_clip=skip")
    patch = damaged("b")
    assert encode.main(command) == 0
    told = capsys.readouterr().out
    assert "2 are left out" in told
    assert "b: video: cannot decode b.mp4, frame 3" in told
    assert "c.mp4: video: cannot open c.mp4" in told
    left_out = json.loads((out / "plan.json").read_text())["left_out"]
    assert left_out.keys() == {"b", "c.mp4"}
    assert "frame 3" in left_out["b"]["why"]
    assert loaded.count("a") == 1
    assert encode.main(command) == 0, "the same command again"
    told = capsys.readouterr().out
    assert "clip b is left out" in told
    assert "nothing to do" in told
    patch.undo()
    for key in "bc":
        (videos / f"{key}.mp4").unlink()
    assert encode.main(arguments(videos, tmp_path / "anew")) == 0
    assert shards(out) == shards(tmp_path / "anew")
    shutil.copy(clips / "c.mp4", videos / "c.mp4")
    assert encode.main(command) == 2, "a clip was mended since"
    error = capsys.readouterr().err
    assert "clip c: is new" in error
    assert "clip b: is no longer there" in error


def test_a_run_that_leaves_clips_out_goes_on_after_an_interruption(
    videos, tmp_path, damaged, monkeypatch, loaded
):
    out = tmp_path / "set"
    command = arguments(videos, out, "on_bad_clip=skip")
    patch = damaged("b")
    with monkeypatch.context() as stopped:
        stopped.setattr(encode, "finish", interrupted)
        assert encode.main(command) == 130
    loaded.clear()
    assert encode.main(command) == 0
    patch.undo()
    assert loaded == []
    (videos / "b.mp4").unlink()
    assert encode.main(arguments(videos, tmp_path / "anew")) == 0
    assert shards(out) == shards(tmp_path / "anew")


def test_nothing_but_bad_clips_is_an_error(videos, tmp_path, capsys):
    for key in "abcde":
        (videos / f"{key}.mp4").write_bytes(b"")
    assert encode.main(arguments(videos, tmp_path / "set", "on_bad_clip=skip")) == 2
    assert "beside 0 clips that can" in capsys.readouterr().err


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_tar_names_all_of_its_bad_clips(videos, tmp_path, loaded, faststart, capsys):
    import tarfile

    faststart(videos / "b.mp4")
    cut(videos / "b.mp4", 0.5)
    (videos / "c.mp4").write_bytes(b"not a video")
    (videos / "d.json").write_text("[]")
    with tarfile.open(tmp_path / "clips.tar", "w") as tar:
        for file in sorted(videos.iterdir()):
            tar.add(file, file.name)
    assert encode.main(arguments(tmp_path / "clips.tar", tmp_path / "set")) == 2
    error = capsys.readouterr().err
    for name, words in (("clips/b", "cut"), ("clips/c", "cannot open"), ("clips/d", "a list of 0")):
        assert any(name in line and words in line for line in error.splitlines()), name
    dataset = tmp_path / "skipped"
    assert encode.main(arguments(tmp_path / "clips.tar", dataset, "on_bad_clip=skip")) == 0
    assert sum(open_dataset(str(dataset)).info.clips.values()) == 2
