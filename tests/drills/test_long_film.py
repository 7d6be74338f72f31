"""A film of 30 minutes at 720p: encoded in bounded memory and cut into clips with its poses, killed
twice on the way, with the bytes of an undisturbed run."""

import resource
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data_shards.codecs import make_codec
from data_shards.storage.read import open_dataset

RATE, SECONDS, GROUP = 8, 1800, 48  # GROUP: pictures, after which the film begins again
EVERY, CLIP, OVERLAP = 16, 81, 17  # what is encoded: a picture every 2 seconds
LIMIT = 2 * 2**30  # bytes


def write_film(path: Path) -> None:
    """Encode one group of pictures, and write its packets over and over: quick to make, and as
    costly to read as any film."""
    y, x = np.mgrid[0:720, 0:1280]
    ramp = np.stack([x // 32, y // 18, 0 * x], -1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        stream.options = {"crf": "20", "bf": "0", "g": str(GROUP), "sc_threshold": "0"}
        packets = []
        for i in range(GROUP):
            frame = av.VideoFrame.from_ndarray((ramp + 4 * i).astype(np.uint8), "rgb24")
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            packets += stream.encode(frame)
        written = [(bytes(p), p.is_keyframe) for p in packets + stream.encode(None)]
        for i in range(RATE * SECONDS):
            data, whole = written[i % GROUP]
            packet = av.Packet(data)
            packet.stream, packet.is_keyframe = stream, whole
            packet.pts, packet.dts, packet.time_base = i, i, Fraction(1, RATE)
            container.mux(packet)


def bytes_of(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.drill
def test_half_an_hour_is_encoded_in_two_gigabytes_and_killed_twice(tmp_path):
    folder, frames = tmp_path / "films", RATE * SECONDS
    folder.mkdir()
    write_film(folder / "tape.mp4")
    c2w = np.tile(np.eye(4), (frames, 1, 1))
    c2w[:, 2, 3] = np.arange(frames)
    np.savez(folder / "tape.npz", c2w=c2w, intrinsics=[900.0, 900, 640, 360])
    command = [sys.executable, "-m", "data_shards.encode", f"source={folder}", "channels=16"]
    command += [
        f"fps={RATE / EVERY}",
        f"clip_frames={CLIP}",
        f"clip_overlap={OVERLAP}",
        "shard_mb=1.5",
    ]
    command += ["psnr=no", "validation=0"]
    started = time.monotonic()
    subprocess.run([*command, f"out={tmp_path / 'undisturbed'}"], check=True)
    took = time.monotonic() - started
    out, shards = tmp_path / "set", tmp_path / "set.partial" / "shards"
    for finished in (2, 4):
        child = subprocess.Popen([*command, f"out={out}"])
        while len(list(shards.glob("*.tar"))) < finished and child.poll() is None:
            time.sleep(0.05)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    subprocess.run([*command, f"out={out}"], check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert peak < LIMIT
    assert bytes_of(out) == bytes_of(tmp_path / "undisturbed")

    dataset = open_dataset(str(out))
    codec = make_codec(dataset.info.codec, dataset.info.codec_options)
    starts = range(0, frames // EVERY - CLIP + 1, CLIP - OVERLAP)
    assert [entry.key for entry in dataset.clips("train")] == [f"tape_{at:06d}" for at in starts]
    ramp = 13.0  # the mean of its first picture: of three colours, two rise to 39
    for at in starts:
        clip = dataset.read(f"tape_{at:06d}")
        numbers = np.arange(at, at + CLIP) * EVERY
        np.testing.assert_array_equal(clip.c2w[:, 2, 3], numbers)
        # the first latent is one picture; all are brighter by 4 than the one before in their group
        first = codec.decode(clip.latents[:1])[0, ::40, ::40].mean()
        assert abs(first - ramp - 4 * (at * EVERY % GROUP)) < 3
    print(
        f"{frames} frames of 1280x720, {SECONDS / 60:.0f} minutes: {len(starts)} clips of {CLIP}"
        f" in {took:.0f} s, at most {peak / 2**20:.0f} MiB, killed after 2 and 4 of"
        f" {dataset.info.shards} shards, the same bytes"
    )
