"""Describe a data set of latent clips: its facts as frozen dataclasses, and the allow-lists for all
that is read from disk.

Layout of a data set directory:
  shards/000000.tar …  WebDataset tars; per clip the members `<key>.<field>` (data_shards/fields.py)
  index.parquet        one row per clip: offset, dtype, shape and crc32c of each member, and the
                       crc32c of each latent frame
  null_text.npy        only in sets with text: float32 [L0, E], the embedding of the empty prompt,
                       real tokens only
  negative_text.npy    only where it was asked for: the same of a prompt that guidance pushes away
                       from
  plan.json            what it is made of: arguments, library versions, digests of each clip's files
  SHA256SUMS           of the files beside the shards, as `sha256sum -c` reads it
  dataset.json         written last: without it the directory is no data set

Start of a cut. Where `time_layout` is grouped, every latent encodes r = temporal_stride raw frames,
and a cut may start at any. Latent 0 of a causal codec encodes one raw frame, the others r each, so
a shorter clip can start at latent 0 only, or at a raw frame whose own *image latent* (that frame
alone, encoded as the first of a clip) was stored. With `image_latents_every` = e > 0 in
dataset.json, a multiple of r, every clip of F > e raw frames has the member `image_latents.npy` [K,
C, h, w], K = (F - 1) // e, of the dtype of `latent.npy`: row k is the image latent of raw frame (k
+ 1) e, that is of every multiple of e up to the clip's last frame, except frame 0, whose image
latent is latent 0 itself. Its columns in the index are those of `latent.npy`: one crc32c per row,
so one row is read and verified by itself. The cut that starts at raw frame s = (k + 1) e is row k
followed by latents s / r + 1, s / r + 2, … of `latent.npy`; its first latent is normalised as a
first one. e = 0: no such member.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SCHEMA_VERSION = 2
SPLITS = ("train", "validation")

MAX_FREE_BYTES = 64 * 2**20  # of a member whose shape dataset.json does not fix (text, json)
TIME_SHARDED = "latent.npy"
IMAGE_LATENTS = "image_latents.npy"
INDEX, NULL_TEXT, NEGATIVE_TEXT, FACTS, PLAN, SUMS = (
    "index.parquet",
    "null_text.npy",
    "negative_text.npy",
    "dataset.json",
    "plan.json",
    "SHA256SUMS",
)
ITEM_BYTES: Mapping[str, int] = {
    "uint8": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
}
KEY_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,71}")
SHARD_PATTERN = re.compile(r"shards/[0-9]{6}\.(tar|zarr)")
MAX_MEMBER_BYTES = 8 * 2**30 - 1  # what a ustar header can state; longer clips belong in Zarr
LOGIN = re.compile(r"://[^/@\s]*@")  # user name and password in an address: never shown
SHOWN = 60  # characters of a value that messages repeat


def plain(text: str) -> str:
    """Replace what a terminal or a launcher would obey: control characters other than the end of a
    line, and a line that begins with `@`, as a worker's progress does."""
    safe = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
    return safe.replace("\n@", "\\n@")


def shown(value: Any) -> str:
    """Return a value from a file as a message shows it: in quotes, on one line, and short."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        if value.shape or value.dtype.kind not in "biufUS":
            return f"an array {value.dtype} {value.shape}"
        value = value.item()
    if isinstance(value, list | tuple | dict):
        return f"a {'table' if isinstance(value, dict) else 'list'} of {len(value)}"
    text = repr(value[:SHOWN]) if isinstance(value, str | bytes) else str(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


class DataError(ValueError):
    """Report a data set, shard, recording or argument that is wrong: what, where and what to do.

    passing: storage did not answer within the time limit. The data may be fine, and trying later
    may help.
    """

    def __init__(self, message: str, passing: bool = False) -> None:
        super().__init__(plain(LOGIN.sub("://", message)))
        self.passing = passing


class ShardError(DataError):
    """Report a shard that is missing, cut, changed or unreadable.

    shard: its name, for the quarantine list.
    """

    def __init__(self, message: str, shard: str, passing: bool = False) -> None:
        super().__init__(message, passing)
        self.shard = shard


@dataclass(frozen=True)
class MemberEntry:
    """Describe one file inside a shard. Offsets are absolute byte positions in the tar."""

    field: str
    offset: int  # of the npy header (or of the JSON text)
    length: int
    data_offset: int  # of the first array element
    dtype: str
    shape: tuple[int, ...]
    crc32c: int  # of the whole member
    row_crc32c: tuple[int, ...] = ()  # of each row, where the field is `by_row`; else empty

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class ClipEntry:
    """Describe one clip. row: its position in the index; episode: the source video.

    The validation split is made by episode.
    """

    key: str
    row: int
    shard: str
    episode: str
    split: str
    latent_frames: int
    raw_frames: int


@dataclass(frozen=True)
class DatasetInfo:
    """Store the content of dataset.json.

    mean, std: [2][C], for the first latent of a clip and for all later ones; equal in the layout
    grouped, where the first is like the others.
    """

    schema_version: int
    codec: str
    codec_options: Mapping[str, Any]
    channels: int
    latent_height: int
    latent_width: int
    latent_dtype: str
    temporal_stride: int
    spatial_stride: int
    image_height: int  # pixels that were encoded; intrinsics refer to this size
    image_width: int
    fps: float  # of the raw frames
    metres_per_unit: (
        float  # metres in one unit of the source's own length scale; c2w is in metres already
    )
    control_names: tuple[str, ...]
    mean: tuple[tuple[float, ...], ...]
    std: tuple[tuple[float, ...], ...]
    clips: Mapping[str, int]  # split -> number of clips
    shards: int
    latent_frames: int
    raw_frames: int
    psnr_db: float | None  # of decode(encode(video)) over the whole set
    null_text: str | None  # file with the embedding of the empty prompt; None: this set has no text
    index_bytes: int
    index_sha256: str
    source: str
    fingerprint: str  # sha256 over every clip's key, split and member checksums, and over the codec
    fields: tuple[
        str, ...
        # what every clip has, besides image_latents.npy, which only clips longer than
        # image_latents_every have
    ] = ()
    image_latents_every: int = (
        0  # raw frames between stored image latents (see the module's docstring); 0: none
    )
    text_encoder: str | None = None  # what made text.npy; None: this set has no text
    text_length: int = 0  # L of text.npy [L, E] and text_mask.npy [L]
    text_width: int = 0  # E
    null_text_crc32c: int = 0  # of the file null_text
    negative_text: str | None = None  # file with the embedding of a prompt to push away from
    negative_text_crc32c: int = 0  # of that file
    # noise levels of ode.npy, from 1 down; (): this set has no trajectories. The state at 1 is not
    # stored, as it is keyed noise; the last one stored is at 0
    ode_levels: tuple[float, ...] = ()
    time_layout: str = "causal"  # which raw frames a latent encodes, see time_layout.py
    # size of the source's pictures where encoding resized them, to which decoded ones are brought
    # back; 0: they were not resized
    shown_height: int = 0
    shown_width: int = 0
    # by what a control is divided when it is read: the spread of amounts such as mouse motion, 1
    # for states; (): all by 1, in sets of earlier versions
    control_std: tuple[float, ...] = ()
    controls_offset: int = (
        0  # raw frames by which control rows end after their latent (negative: before)
    )
    # what made the trajectories: the digest of the teacher's weights, its solver and guidance
    trajectories: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # versions of the packages by which the numbers can differ; not in the fingerprint, which is of
    # the numbers themselves
    libraries: Mapping[str, str] = dataclasses.field(default_factory=dict)


def expected_fields(info: DatasetInfo, raw_frames: int) -> frozenset[str]:
    """Return the members that a clip of this length must have."""
    extra = {IMAGE_LATENTS} if image_latent_count(raw_frames, info.image_latents_every) else set()
    return frozenset({*info.fields, *extra})


def image_latent_count(raw_frames: int, every: int) -> int:
    """Return K, the number of image latents of a clip besides latent 0.

    They are of the raw frames every, 2 every, … (see the module's docstring).
    """
    return (raw_frames - 1) // every if every else 0


def check_key(key: str) -> str:
    """Check and return a key, which becomes part of a file name inside the tar.

    Letters, digits, `_` and `-` only: WebDataset would split it at a dot.
    """
    if not KEY_PATTERN.fullmatch(key):
        raise DataError(
            f"clip key: got {key!r}, expected letters, digits, '_' and '-', at most 72. Fix: rename"
            " the source clip"
        )
    return key


def index_schema() -> Any:
    """Return the columns of index.parquet (a pyarrow.Schema)."""
    import pyarrow as pa

    member = pa.struct(
        [
            ("field", pa.string()),
            ("offset", pa.int64()),
            ("length", pa.int64()),
            ("data_offset", pa.int64()),
            ("dtype", pa.string()),
            ("shape", pa.list_(pa.int32())),
            ("crc32c", pa.uint32()),
            ("row_crc32c", pa.list_(pa.uint32())),
        ]
    )
    clip = [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("episode", pa.string()),
        ("split", pa.string()),
    ]
    return pa.schema(
        [
            *clip,
            ("latent_frames", pa.int32()),
            ("raw_frames", pa.int32()),
            ("members", pa.list_(member)),
        ]
    )


def info_to_json(info: DatasetInfo) -> str:
    return json.dumps(dataclasses.asdict(info), indent=1, sort_keys=True, allow_nan=False) + "\n"
