"""Time stamps as cameras and recorders write them: uneven, jittering, hidden by an edit list."""

import random
from fractions import Fraction

import numpy as np
import pytest
import webdataset

from data_shards import encode
from data_shards.schema import DataError
from data_shards.sources import Place, open_source
from data_shards.sources.reading import Reading
from data_shards.sources.video_times import Times
from data_shards.storage.read import open_dataset

# of 25 per second: 15 frames, a pause of 0.4 s, then every third
KEPT = [*range(15), *range(24, 30), *range(30, 60, 3)]


@pytest.fixture
def uneven(films, tmp_path):
    """A folder with a video of a variable rate."""
    films.write(tmp_path / "a.mp4", [films.pictures(60)[i] for i in KEPT], KEPT)
    return tmp_path


def test_a_variable_rate_is_refused_and_the_largest_gap_named(uneven, tmp_path, capsys):
    assert encode.main([f"source={uneven}", f"out={tmp_path / 'set'}"]) == 2
    said = capsys.readouterr().err
    assert "variable frame rate in a.mp4, a gap of 0.4 s after frame 14 where most" in said
    assert "Fix: fps=25 resamples by time" in said


def test_a_tar_with_a_variable_rate_is_refused_and_resampled_alike(uneven, tmp_path):
    with webdataset.TarWriter(str(tmp_path / "t.tar")) as writer:
        writer.write({"__key__": "x", "mp4": (uneven / "a.mp4").read_bytes()})
    tar = str(tmp_path / "t.tar")
    assert "a gap of 0.4 s after frame 14" in open_source(tar).problems["t/x"]
    reading = Reading(fps=Fraction(25))
    one, other = open_source(Place(tar, reading=reading)), None
    (uneven / "t.tar").rename(tmp_path.parent / f"{tmp_path.name}.tar")
    other = open_source(Place(str(uneven), reading=reading))
    (tmp_path.parent / f"{tmp_path.name}.tar").rename(uneven / "t.tar")
    np.testing.assert_array_equal(one.load(one.clips[0]).video, other.load(other.clips[0]).video)


@pytest.mark.parametrize("fps", ["25", "12.5", "50", "16"])
def test_resampling_shows_what_is_on_the_screen_at_that_time(films, uneven, tmp_path, fps):
    """Poses stay with the picture that they belong to, amounts add up, states do not."""
    count = len(KEPT)
    controls = np.stack([np.arange(count) + 1.0, np.arange(count) % 2], 1)
    np.savez(
        uneven / "a.npz",
        c2w=films.poses(count),
        intrinsics=[60.0, 60, 40, 24],
        controls=controls,
        control_names=["mouse", "key"],
        control_sums=[True, False],
    )
    rate = Fraction(fps)
    source = open_source(Place(str(uneven), reading=Reading(fps=rate)))
    content = source.load(source.clips[0])
    # by the times themselves, in seconds: the latest frame that is due, give or take half a frame
    times, half = [Fraction(t, 25) for t in KEPT], min(1 / rate, Fraction(1, 25)) / 2
    due = [Fraction(k) / rate + half for k in range(source.clips[0].frames)]
    expected = np.array([max(i for i, t in enumerate(times) if t <= now) for now in due])
    assert source.clips[0].frames == Reading().time.below(int((times[-1] + half) * rate) + 1)
    assert (source.fps, len(expected) % 8) == (float(rate), 1)
    numbers = np.rint(content.c2w[:, 2, 3] / 0.1).astype(int)
    np.testing.assert_array_equal(numbers, expected)
    decoded = films.brightness(content.video)
    truth = films.brightness([films.pictures(60)[KEPT[i]] for i in expected])
    np.testing.assert_allclose(decoded, truth, atol=1.9)  # a frame is 4 brighter than the last
    rows = content.frame_controls
    assert rows[:, 0].sum() == controls[: expected[-1] + 1, 0].sum()
    repeated = np.diff(expected) == 0
    assert (rows[1:][repeated, 0] == 0).all()
    np.testing.assert_array_equal(rows[1:][repeated, 1], controls[expected[1:][repeated], 1])


def test_events_of_a_resampled_video_keep_their_times(uneven, tmp_path):
    times = np.arange(0, 2_400_000_000, 10_000_000)
    columns = {name: np.ones(len(times), np.int32) for name in ("code", "dx", "dy")}
    np.savez(uneven / "a.events.npz", time_ns=times, kind=np.full(len(times), 2), **columns)
    out = tmp_path / "set"
    assert encode.main([f"source={uneven}", f"out={out}", "fps=25"]) == 0
    moved = open_dataset(str(out)).read("a").fields["controls"][:, 256]
    assert moved.tolist() == [1.0] + [32.0] * (len(moved) - 1)  # 8 frames of 40 ms, 100 a second


def jitter(films, path, seed, nominal, frames=41):
    random.seed(seed)
    times = [round(90000 * (i / nominal + random.uniform(-0.002, 0.002))) for i in range(frames)]
    films.write(path, films.pictures(frames), [max(t, 0) for t in times], Fraction(1, 90000))


def test_jitter_and_names_of_one_rate_are_one_rate(films, tmp_path):
    for seed in range(3):
        jitter(films, tmp_path / f"{seed}.mp4", seed, 30)
    films.write(tmp_path / "ntsc.mp4", films.pictures(9), base=Fraction(1001, 30000), rate=30)
    source = open_source(str(tmp_path))
    assert (len(source.clips), source.fps) == (4, 30.0)
    for clip in source.clips:
        assert len(source.load(clip).video) == clip.frames
    films.write(tmp_path / "other.mp4", films.pictures(9), base=Fraction(1, 31), rate=31)
    with pytest.raises(DataError, match=r"frame rates 29\.97, 30, 31, expected one\. Fix: fps=30 "):
        open_source(str(tmp_path))


def test_a_matroska_of_whole_milliseconds_is_even(films, tmp_path):
    films.write(tmp_path / "a.mkv", films.pictures(41), base=Fraction(1001, 60000), rate=60)
    source = open_source(str(tmp_path))
    assert source.clips[0].frames == 41
    assert source.fps == pytest.approx(59.94, rel=2e-3)


def test_frames_that_an_edit_list_hides_are_no_frames(films, tmp_path):
    images = films.pictures(60)
    films.hide_start(films.write(tmp_path / "a.mp4", images), 20)
    source = open_source(str(tmp_path))
    content = source.load(source.clips[0])
    assert (source.clips[0].frames, content.video.shape[0]) == (33, 33)
    truth = films.brightness(images[20:53])
    np.testing.assert_allclose(films.brightness(content.video), truth, atol=1.9)


def test_an_empty_packet_shows_nothing(films, tmp_path):
    """An AVI says so that a picture is shown longer: so the rate is uneven."""
    import av

    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.height, stream.width = films.SIZE
        stream.pix_fmt = "yuvj420p"
        for i, image in enumerate(films.pictures(20)):
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")):
                if i != 9:
                    container.mux(packet)
        container.mux(stream.encode(None))
    problem = open_source(str(tmp_path)).problems["a.avi"]
    assert "variable frame rate in a.avi, a gap of 0.08 s" in problem
    source = open_source(Place(str(tmp_path), reading=Reading(fps=Fraction(25))))
    video = source.load(source.clips[0]).video
    np.testing.assert_array_equal(video[9], video[8])


@pytest.mark.parametrize(
    ("rate", "fps", "step"), [(30, 30, 1), (30, 10, 3), (60, 30, 2), (8, 1, 8)]
)
def test_a_whole_fraction_of_a_rate_takes_every_so_many_frames(rate, fps, step):
    """From the first: no picture comes later than its time, though jitter may move it."""
    even = Times(91, Fraction(rate), Fraction(1, 90000), 0)
    np.testing.assert_array_equal(even.shown(Fraction(fps)), np.arange(0, 91, step))
    shaken = tuple(i * 90000 // rate + (-1) ** i * 180 for i in range(91))  # 2 ms
    uneven = Times(91, Fraction(rate), Fraction(1, 90000), shaken[0], shaken)
    np.testing.assert_array_equal(uneven.shown(Fraction(fps)), np.arange(0, 91, step))
