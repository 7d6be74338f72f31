"""Define what all sources share: clips as listed and as loaded, and the protocol of a source."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_shards.controls import Events
from data_shards.schema import KEY_PATTERN, DataError


@dataclass(frozen=True)
class SourceClip:
    """Describe a clip before it is read. `episode`: clips of one episode go to the same side of the
    validation split."""

    key: str
    episode: str
    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class ClipContent:
    """Store the content of a clip. All fields but the first may be absent.

    - video [F,H,W,3] uint8, or, from a source of ready-made latents, latents [T,C,h,w].
    - c2w [F,4,4] in metres, OpenCV axes; intrinsics [F,4] fx, fy, cx, cy in pixels.
    - frame_controls [F,A] float32: row i is what happened between frames i-1 and i (row 0:
      nothing); or, with a finer resolution than frames, `events`.
    - the caption; or ready-made text: (embeddings [L,E], mask [L] uint8).
    """

    video: NDArray[np.uint8] | None
    c2w: NDArray[np.float64] | None = None
    intrinsics: NDArray[np.float64] | None = None
    frame_controls: NDArray[np.float32] | None = None
    events: Events | None = None
    latents: NDArray[np.float32] | None = None
    caption: str | None = None
    text: tuple[NDArray[Any], NDArray[np.uint8]] | None = None


@dataclass(frozen=True)
class StoredLatents:
    """Describe the codec of ready-made latents: it knows the layout and needs no weights."""

    name: str
    channels: int
    temporal_stride: int
    spatial_stride: int
    options: Mapping[str, Any]

    def encode(self, video: NDArray[np.uint8 | np.float32]) -> NDArray[np.float32]:
        raise DataError(
            "source: got latents without their videos, expected videos to encode from. Fix:"
            " image_latents_every=0"
        )

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        raise AssertionError("nothing is decoded while ready latents are taken over")


class ClipSource(Protocol):
    notes: tuple[str, ...]  # what `encode` should tell the user, say about frames left out
    description: str  # goes into dataset.json; must not name folders of one machine
    fps: float
    metres_per_unit: float
    control_names: tuple[str, ...]
    control_sums: tuple[
        bool, ...
    ]  # per control: True = amounts that add up (mouse motion), False = states, which are averaged
    clips: tuple[SourceClip, ...]
    stored: StoredLatents | None  # set where clips come as latents
    # what cannot be listed as a clip -> why, as one message: `encode` reports all, or leaves it out
    problems: Mapping[str, str]
    libraries: tuple[str, ...]  # installed packages by whose version the pixels can differ

    def load(self, clip: SourceClip) -> ClipContent: ...

    # All but video and latents, refusing what `load` would refuse, as far as can be told without
    # decoding; None: nothing can be told. Called in threads, as is `digests`.
    def check(self, clip: SourceClip) -> ClipContent | None: ...

    # file -> digest of its content, of all that the clip is made of: the video and what lies beside
    # it. A clip whose digests change is encoded again.
    def digests(self, clip: SourceClip) -> Mapping[str, str]: ...

    def array(self, key: str, name: str) -> NDArray[Any]: ...  # more of a clip: encode fields=


def load_clip(source: ClipSource, clip: SourceClip) -> ClipContent:
    """Load a clip; an error names the clip besides its file.

    Raises:
        DataError: files that cannot be read, or facts that are not those of this clip.
    """
    try:
        return source.load(clip)
    except DataError as error:
        raise DataError(f"clip {clip.key}: {error}", error.passing) from error
    except MemoryError as error:
        raise DataError(
            f"clip {clip.key}: got {clip.frames} frames of {clip.width}x{clip.height}, which do not"
            " fit in memory. Fix: cut the clip, or use fewer workers"
        ) from error


def safe_key(name: str, what: str = "zip member") -> str:
    """Return a clip key for a member's name.

    That is the name itself if it is a valid key, else its letters followed by a hash.

    Raises:
        DataError: a name that leads out of a folder.
    """
    if not name or name.startswith("/") or "\\" in name or ":" in name or ".." in name.split("/"):
        raise DataError(
            f"{what}: got the name {name!r}, expected a relative one without '..'. Fix: pack it"
            " again"
        )
    if KEY_PATTERN.fullmatch(name):
        return name
    letters = re.sub(r"[^A-Za-z0-9_-]", "_", name).lstrip("_-")[:60] or "clip"
    return f"{letters}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
