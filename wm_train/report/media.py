"""Turn pictures and videos into data addresses, so that the page needs no other file."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from markupsafe import Markup

from wm_train.report.words import size_of

MOST_BYTES = 3_000_000  # of one video or picture in the page; a larger video is encoded again
WIDEST = 640  # pixels of one that is encoded again
KINDS = {".mp4": "video/mp4", ".png": "image/png"}


@dataclass(frozen=True)
class Clip:
    """Hold a picture or video of the page. source: "" when it is left out, `note` says why."""

    name: str
    source: Markup
    note: str = ""


def embed(path: Path) -> Clip:
    """Return a picture or video of the run as part of the page."""
    kind = KINDS[path.suffix]
    try:
        data = path.read_bytes()
        if len(data) > MOST_BYTES and kind.startswith("video/"):
            data = smaller_video(data)
    except ImportError:
        return Clip(path.stem, Markup(), f"{too_large(data)}, and PyAV is not installed")
    except (OSError, ValueError) as error:  # av.FFmpegError is both
        return Clip(path.stem, Markup(), f"cannot be read ({type(error).__name__})")
    if len(data) > MOST_BYTES:
        return Clip(path.stem, Markup(), too_large(data))
    return Clip(path.stem, data_address(kind, data))


def too_large(data: bytes) -> str:
    return f"not in this page, as it has {size_of(len(data))}"


def data_address(kind: str, data: bytes) -> Markup:
    """Return bytes as the address of themselves."""
    return Markup(f"data:{kind};base64,{base64.b64encode(data).decode()}")


def smaller_video(data: bytes) -> bytes:
    """Return an H.264 MP4 of the same frames, at most WIDEST pixels wide and of a lower quality."""
    import av

    out = io.BytesIO()
    with av.open(io.BytesIO(data), "r") as source, av.open(out, "w", format="mp4") as target:
        stream = source.streams.video[0]
        share = min(1.0, WIDEST / stream.width)
        width, height = (int(size * share) // 2 * 2 for size in (stream.width, stream.height))
        rate = stream.average_rate or Fraction(16)
        size: dict[str, Any] = {"width": width, "height": height, "pix_fmt": "yuv420p"}
        made = target.add_stream("libx264", rate=rate, options={"crf": "30"}, **size)
        for frame in source.decode(stream):
            small = frame.reformat(width, height, "yuv420p").to_ndarray()
            # a new frame has no time of its own: the encoder counts
            target.mux(made.encode(av.VideoFrame.from_ndarray(small, "yuv420p")))
        target.mux(made.encode())
    return out.getvalue()
