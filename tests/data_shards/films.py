"""Small videos as cameras, phones and recorders make them, written with PyAV."""

import struct
from fractions import Fraction

import av
import numpy as np

SIZE = (48, 80)  # height, width
IDENTITY = b"".join(struct.pack(">i", n) for n in (65536, 0, 0, 0, 65536, 0, 0, 0, 2**30))


def pictures(frames, size=SIZE):
    """Pictures [H, W, 3] that differ at each corner, each brighter by 4 than the one before; after
    50 of them from the start again."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    ramp = np.stack([x * 50 // size[1], y * 50 // size[0], 0 * x], -1)
    return [(ramp + 4 * (i % 50)).astype(np.uint8) for i in range(frames)]


def write(path, images, times=None, base=Fraction(1, 25), rate=25, codec="libx264", **options):
    """Write images with these time stamps, in units of `base` seconds; None: one after another."""
    height, width = images[0].shape[:2]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = stream.time_base = base
        stream.options = {"g": "12", "crf": "10", **options}
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts, frame.time_base = (i if times is None else times[i]), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_tagged(path, image, matrix):
    """Write a frame with colours stored, and tagged, by this matrix: 1 BT.709, 5 BT.601."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width = image.shape[:2]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "5", "preset": "ultrafast"}
        stream.codec_context.colorspace = matrix
        plain = av.VideoFrame.from_ndarray(image, "rgb24")
        container.mux(stream.encode(plain.reformat(format="yuv420p", dst_colorspace=matrix)))
        container.mux(stream.encode(None))


def set_matrix(path, a, b, c, d):
    """Say in an MP4 that pictures are shown with the display matrix (a, b, c, d)."""
    data = path.read_bytes()
    at = data.index(IDENTITY, data.index(b"tkhd"))
    numbers = (a * 65536, b * 65536, 0, c * 65536, d * 65536, 0, 0, 0, 2**30)
    path.write_bytes(data[:at] + struct.pack(">9i", *map(int, numbers)) + data[at + 36 :])
    return path


def hide_start(path, frames, rate=25):
    """Hide the first frames of an MP4 by its edit list, as cuts without re-encoding do."""
    data = path.read_bytes()
    at = data.index(b"elst")
    _, duration, start = struct.unpack(">III", data[at + 8 : at + 20])
    header = data.index(b"mdhd")
    scale = struct.unpack(">I", data[header + 16 : header + 20])[0]
    rest = struct.pack(">II", duration - frames * 1000 // rate, start + frames * scale // rate)
    path.write_bytes(data[: at + 12] + rest + data[at + 20 :])
    return path


def brightness(video):
    """The mean of each frame [F]."""
    return np.asarray(video, np.float64).mean(axis=(1, 2, 3))


def poses(frames):
    c2w = np.tile(np.eye(4), (frames, 1, 1))
    c2w[:, 2, 3] = 0.1 * np.arange(frames)
    return c2w
