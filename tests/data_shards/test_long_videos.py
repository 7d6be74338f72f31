"""Long recordings: cut into clips, and what lies beside them cut along, in bounded memory."""

from fractions import Fraction

import numpy as np
import pytest

from data_shards import encode
from data_shards.controls import BUTTONS, KEY_DOWN, MOUSE, bucket_events
from data_shards.schema import DataError
from data_shards.sources import Place, open_source, video_reader
from data_shards.sources.reading import Reading
from data_shards.storage.read import open_dataset
from data_shards.time_layout import TimeLayout

FRAMES, LENGTH, OVERLAP = 118, 25, 9


@pytest.fixture(scope="module")
def long(films, tmp_path_factory):
    """A folder with a video of 118 frames at 25 per second, its poses and controls."""
    folder = tmp_path_factory.mktemp("long")
    films.write(folder / "tape.mp4", films.pictures(FRAMES))
    np.savez(
        folder / "tape.npz",
        c2w=films.poses(FRAMES),
        intrinsics=np.stack([60.0 + np.arange(FRAMES), *np.full((3, FRAMES), 30.0)], 1),
        controls=np.stack([np.arange(FRAMES), np.arange(FRAMES) % 2], 1),
        control_names=["mouse", "key"],
        control_sums=[True, False],
        caption="a walk",
    )
    return folder


def test_a_long_video_becomes_clips_that_overlap(films, long, tmp_path, capsys):
    out = tmp_path / "set"
    cut = [f"clip_frames={LENGTH}", f"clip_overlap={OVERLAP}"]
    assert encode.main([f"source={long}", f"out={out}", *cut]) == 0
    assert "13 frames at the ends of videos fill no clip" in capsys.readouterr().out
    dataset = open_dataset(str(out))
    starts = range(0, 94, LENGTH - OVERLAP)
    assert [e.key for e in dataset.clips("train")] == [f"tape_{at:06d}" for at in starts]
    assert {entry.episode for entry in dataset.clips("train")} == {"tape"}
    for at in starts:
        clip = dataset.read(f"tape_{at:06d}")
        np.testing.assert_array_equal(clip.c2w, films.poses(FRAMES)[at : at + LENGTH])
        np.testing.assert_array_equal(clip.intrinsics[:, 0], 60 + np.arange(at, at + LENGTH))
        mouse = [at, *(np.arange(at + 1 + t, at + 9 + t).sum() for t in (0, 8, 16))]
        assert clip.fields["controls"][:, 0].tolist() == mouse
        assert clip.entry.raw_frames == LENGTH
        assert dataset.description(clip.entry)["caption"] == "a walk"


@pytest.mark.parametrize("fps", [None, Fraction(30), Fraction(10)])
def test_clips_are_the_same_in_any_order(films, long, monkeypatch, fps):
    """Read one after another, or each by a jump to the key frame before it."""
    monkeypatch.setattr(video_reader, "FAR", 5)
    place = Place(str(long), reading=Reading(fps, LENGTH, OVERLAP))
    source = open_source(place)
    forward = [source.load(clip) for clip in source.clips]
    whole = open_source(Place(str(long), reading=Reading(fps)))
    video = whole.load(whole.clips[0]).video
    for i, clip in reversed(list(enumerate(source.clips))):
        content = source.load(clip)
        np.testing.assert_array_equal(content.video, forward[i].video)
        np.testing.assert_array_equal(content.c2w, forward[i].c2w)
        start = int(clip.key[-6:])
        part = video[start : start + LENGTH]
        np.testing.assert_array_equal(content.video[: len(part)], part)


def test_a_jump_into_pictures_that_are_not_whole_is_no_jump(films, tmp_path, monkeypatch):
    """With intra refresh a picture is mended strip by strip, and no key frame is whole."""
    monkeypatch.setattr(video_reader, "FAR", 5)
    noise = np.random.default_rng(0).integers(0, 255, (*films.SIZE, 3), dtype=np.uint8)
    images = [np.roll(noise, 3 * i, axis=1) for i in range(90)]
    options = {"x264-params": "intra-refresh=1:keyint=24:bframes=0"}
    films.write(tmp_path / "a.mp4", images, **options)
    source = open_source(Place(str(tmp_path), reading=Reading(None, 17)))
    forward = [source.load(clip).video for clip in source.clips]
    for clip, expected in reversed(list(zip(source.clips, forward, strict=True))):
        np.testing.assert_array_equal(source.load(clip).video, expected)


def test_events_are_cut_along(films, tmp_path):
    """A key that is held since long before stays held; each mouse event is in one bucket."""
    films.write(tmp_path / "a.mp4", films.pictures(FRAMES))
    times = np.sort(np.random.default_rng(1).integers(0, FRAMES * 40_000_000, 500))
    kind = np.full(500, MOUSE)
    kind[3], times[:4] = KEY_DOWN, np.arange(-4, 0)
    np.savez(
        tmp_path / "a.events.npz",
        time_ns=times,
        kind=kind,
        code=np.full(500, 65),
        dx=np.arange(500),
        dy=np.ones(500, int),
    )
    whole = open_source(str(tmp_path))
    rows = bucket_events(whole.load(whole.clips[0]).events, 14, Fraction(25), TimeLayout(8))
    source = open_source(Place(str(tmp_path), reading=Reading(None, LENGTH, 1)))
    for clip in source.clips:
        start = int(clip.key[-6:]) // 8  # of 24 frames each: at whole latents
        events = source.load(clip).events
        cut = bucket_events(events, 4, Fraction(25), TimeLayout(8))
        np.testing.assert_array_equal(cut[1:], rows[start + 1 : start + 4])
        assert (cut[:, 65] == 1).all()
        assert (cut[0, BUTTONS + 1] <= rows[start, BUTTONS + 1]) or not start
        assert len(events.time_ns) < 150


def test_what_does_not_fit_is_refused_before_any_work(long, tmp_path, capsys):
    for options, report in (
        (["clip_frames=24"], "got 24, expected a multiple of 8 plus 1. Fix: clip_frames=17"),
        (["clip_frames=25", "clip_overlap=25"], "clip_overlap: got 25 with clip_frames=25"),
        (["clip_overlap=3"], "clip_overlap: got 3 with clip_frames=None"),
        (["fps=0"], "fps: got '0', expected frames per second from 0.1 to 1000"),
        (["clip_frames=241"], "no clips"),
    ):
        assert encode.main([f"source={long}", f"out={tmp_path / 'set'}", *options]) == 2
        assert report in capsys.readouterr().err
    with pytest.raises(DataError, match=r"clip_frames=9 with a source of the kind recording"):
        open_source(Place(str(long), kind="recording", reading=Reading(clip_frames=9)))


def test_a_set_without_memory_for_its_clips_is_refused(films, tmp_path, monkeypatch, capsys):
    from data_shards.encoding import memory

    films.write(tmp_path / "a.mp4", films.pictures(41))
    monkeypatch.setattr(memory, "free_bytes", lambda: 900_000)
    command = [f"source={tmp_path}", f"out={tmp_path / 'set'}", "psnr=no"]
    assert encode.main(command) == 0
    again = [f"source={tmp_path}", f"out={tmp_path / 'other'}", "psnr=no", "workers=2"]
    assert encode.main(again) == 2
    said = capsys.readouterr().err
    assert "memory: got 41 frames of 48x80 in clip a, 0.000945 GB for 2 workers" in said
    assert "clip_frames=" in said


def test_free_memory_is_what_the_machine_and_its_group_leave():
    from data_shards.encoding import memory

    free = memory.free_bytes()
    assert free is None or 2**20 < free < 2**50
