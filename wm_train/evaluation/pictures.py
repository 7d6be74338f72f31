"""Write samples as pictures: MP4 videos, and a PNG contact sheet with the truth above the
sample."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np

GAP = 4  # pixels between frames and between clips


def write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write [F, H, W, 3] uint8 frames as an H.264 MP4 that any browser plays."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "16"}
        )
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                )
            )
        container.mux(stream.encode())


def side_by_side(truth: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """Stack two videos [F, H, W, 3] -> [F, 2H + gap, W, 3], the truth above the sample."""
    gap = np.full((truth.shape[0], GAP, truth.shape[2], 3), 255, np.uint8)
    return _even(np.concatenate([truth, gap, sample], axis=1))


def _even(frames: np.ndarray) -> np.ndarray:
    """Crop a video to even sides, as H.264 with 4:2:0 colour requires."""
    return frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]


def contact_sheet(clips: list[tuple[np.ndarray, np.ndarray]], columns: int = 8) -> np.ndarray:
    """Combine pairs (truth, sample) of [F, H, W, 3] each into one [rows, columns, 3] picture.

    Two rows of `columns` frames per clip, evenly spaced in time from the first to the last: truth
    above, sample below.
    """
    bands = []
    for truth, sample in clips:
        picks = np.linspace(0, len(truth) - 1, min(columns, len(truth))).round().astype(int)
        bands += [_row(truth[picks]), _row(sample[picks]), None]
    width = max(band.shape[1] for band in bands if band is not None)
    rows = [
        np.full((GAP * (3 if band is None else 1), width, 3), 255, np.uint8)
        if band is None
        else band
        for band in bands
    ]
    return np.concatenate(rows[:-1], axis=0)


def _row(frames: np.ndarray) -> np.ndarray:
    padded = np.pad(frames, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    return np.concatenate(list(padded), axis=1)


def write_png(path: Path, picture: np.ndarray) -> None:
    """Write an [H, W, 3] uint8 picture."""
    from PIL import Image

    Image.fromarray(picture).save(path)
