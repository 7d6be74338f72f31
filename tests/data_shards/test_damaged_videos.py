"""Videos with pictures that the decoder had to make up, that are missing, or of another size."""

import random
import sys
import types

import av
import numpy as np
import pytest

from data_shards import encode
from data_shards.schema import DataError
from data_shards.sources import Place, open_source
from data_shards.sources.reading import Reading

FRAMES = 41


@pytest.fixture(scope="module")
def damaged(films, tmp_path_factory):
    """(file, numbers of its damaged frames): flipped bits that the decoder conceals."""
    path = tmp_path_factory.mktemp("damaged") / "a.mp4"
    noise = np.random.default_rng(0).integers(0, 99, (FRAMES, *films.SIZE, 3), dtype=np.uint8)
    whole = films.write(path, list(noise), crf="30").read_bytes()
    start = whole.index(b"mdat") + 4 + (whole.index(b"moov") - whole.index(b"mdat")) // 2
    for seed in range(200):
        random.seed(seed)
        data = bytearray(whole)
        data[random.randrange(start, whole.index(b"moov"))] ^= 1 << random.randrange(8)
        path.write_bytes(data)
        try:
            with av.open(str(path)) as container:
                flags = [frame.is_corrupt for frame in container.decode(video=0)]
        except av.error.FFmpegError:
            continue
        if any(flags) and len(flags) == FRAMES:
            return path, [number for number, flag in enumerate(flags) if flag]
    raise AssertionError("no bit gave a damaged picture")


def test_a_damaged_picture_is_refused_with_its_number(damaged, tmp_path, capsys):
    path, numbers = damaged
    command = [f"source={path.parent}", f"out={tmp_path / 'set'}"]
    assert encode.main(command) == 2
    said = capsys.readouterr().err
    assert f"got a damaged picture at frame {numbers[0]}, {numbers[0] / 25:.2f} s" in said
    assert "damaged=allow" in said
    assert encode.main([*command[:1], f"out={tmp_path / 'allowed'}", "damaged=allow"]) == 0


def test_clips_without_the_damage_are_read(damaged):
    path, numbers = damaged
    reading = Reading(clip_frames=9)
    source, bad = open_source(Place(str(path.parent), reading=reading)), []
    for clip in source.clips:
        try:
            assert len(source.load(clip).video) == 9
        except DataError:
            bad.append(clip.key)
    assert bad == sorted({f"a_{n // 9 * 9:06d}" for n in numbers if n < len(source.clips) * 9})


def test_frames_whose_references_are_missing_are_refused(films, tmp_path):
    """As at the start of a cut that does not begin with a key frame."""
    whole = films.write(tmp_path / "whole.mp4", films.pictures(60))
    with av.open(str(whole)) as there, av.open(str(tmp_path / "a.mp4"), "w") as here:
        stream = here.add_stream_from_template(there.streams.video[0])
        for packet in there.demux(video=0):
            if packet.dts is not None and packet.pts > 0:
                packet.stream = stream
                here.mux(packet)
    whole.unlink()
    source = open_source(str(tmp_path))
    with pytest.raises(DataError, match=r"got no frame 0 at 0\.00 s, expected one \(a\.mp4\)"):
        source.load(source.clips[0])


def test_a_change_of_size_is_refused_with_its_frame_and_both_sizes(films, tmp_path):
    from fractions import Fraction

    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 80, 48, "yuvj420p"
        for i in range(17):
            size = (48, 80) if i < 6 else (32, 64)
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.height, encoder.width = size
            encoder.pix_fmt, encoder.time_base = "yuvj420p", Fraction(1, 25)
            frame = av.VideoFrame.from_ndarray(films.pictures(1, size)[0], "rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            for packet in encoder.encode(frame.reformat(format="yuvj420p")):
                packet.stream, packet.pts, packet.dts = stream, i, i
                packet.time_base = Fraction(1, 25)
                container.mux(packet)
    source = open_source(str(tmp_path))
    with pytest.raises(DataError, match=r"32x64 at frame 6 after 48x80.*\(a\.avi"):
        source.load(source.clips[0])


def test_all_bad_videos_are_named_at_once(films, tmp_path):
    films.write(tmp_path / "good.mp4", films.pictures(9))
    (tmp_path / "text.mp4").write_text("no video")
    half = films.write(tmp_path / "half.mkv", films.pictures(41))
    half.write_bytes(half.read_bytes()[:100])
    problems = open_source(str(tmp_path)).problems
    assert {name: words.split(" (")[0] for name, words in problems.items()} == {
        "half.mkv": "video: cannot open half.mkv",
        "text.mp4": "video: cannot open text.mp4",
    }


def test_an_old_reader_is_refused(films, tmp_path, monkeypatch):
    films.write(tmp_path / "a.mp4", films.pictures(9))
    old = types.ModuleType("av")
    old.__version__ = "16.1.0"
    monkeypatch.setitem(sys.modules, "av", old)
    with pytest.raises(DataError, match=r"got PyAV 16\.1\.0, expected 17 or newer"):
        open_source(str(tmp_path))
