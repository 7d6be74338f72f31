"""Describe the members of a clip, one row each: all that storage, cuts, batches and mixtures need.

A package adds a member of its own (depth, a video of hands, pairs of an ODE) by an entry point of
the group `data_shards.fields`, `<name> = "module:FIELD"`, where FIELD is a `Field` of that name.
`encode fields=<name>` then takes it from the source, and it arrives in `Batch.fields` and
`Conditions.fields`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_shards.schema import ITEM_BYTES, ClipEntry, DataError, DatasetInfo, image_latent_count
from data_shards.time_layout import TimeLayout

GROUP = "data_shards.fields"
NAME_PATTERN = re.compile(r"[a-z][a-z0-9_]*")  # it becomes part of a file name
SAME_RATE = 0.005  # relative difference of frame rates that count as one: 29.97 is also called 30
Rate = Literal["latent", "raw", "image", "clip"]
ENTRY_NAMES: Mapping[Rate, str] = {
    "latent": "latent frame",
    "raw": "raw frame",
    "image": "latent frame",
    "clip": "",
}


@dataclass(frozen=True)
class Field:
    """Describe one member of a clip to the pipeline.

    - name: in `Batch.fields`; the file in a shard is `<key>.<name><suffix>`.
    - dims: shape of one entry. A word is a fact of dataset.json (a list counts its items), None any
      length. Entries that begin with image_height, image_width are cropped with the video.
    - dtypes: the allowed stored dtypes; `encode fields=` writes the first.
    - rate: an entry for each latent frame, raw frame or stored image latent, or one for the whole
      clip. A cut takes the entries of its frames.
    - by_row: every entry has a checksum, and each rank of a sequence group reads only the entries
      of its own frames. False: one rank reads the whole member and sends it to the others.
    - tensor: its type in a batch; None: used by storage only.
    - rebase: entries of a cut -> the same relative to the cut's start.
    - padding: fills a row of a batch after its last entry: that entry again, or zeros.
    - divisor: a fact of dataset.json by which the entries are divided when they are read.
    - alike: facts of dataset.json that data sets of one mixture must share.
    - latents: entries are the codec's latents, a clip's first one first, which are normalised like
      those of the clip when they are read.

    Raises DataError for a row that contradicts itself.
    """

    name: str
    dims: tuple[int | str | None, ...]
    dtypes: tuple[str, ...]
    rate: Rate
    by_row: bool = False
    tensor: str | None = "float32"
    rebase: Callable[[NDArray[Any]], NDArray[Any]] | None = None
    padding: Literal["last", "zero"] = "last"
    alike: tuple[str, ...] = ()
    suffix: str = ".npy"
    divisor: str = ""
    latents: bool = False

    def __post_init__(self) -> None:
        problem = ""
        if not NAME_PATTERN.fullmatch(self.name):
            problem = "a name that is not lower-case letters, digits and '_'"
        elif not self.dtypes or not set(self.dtypes) <= set(ITEM_BYTES):
            problem = f"dtypes {self.dtypes}, expected some of {sorted(ITEM_BYTES)}"
        elif self.by_row and self.rate == "clip":
            problem = "by_row with rate 'clip', which has no rows"
        elif self.by_row and (self.rebase or self.padding == "last"):
            problem = (
                "by_row with `rebase` or padding 'last', expected neither: a rank need not hold the"
                " frames that they refer to"
            )
        elif self.tensor and (self.rate == "image" or None in self.dims):
            problem = "a tensor of any length, expected dims that dataset.json fixes"
        if problem:
            raise DataError(f"field {self.name!r}: got {problem}. Fix: change its Field")

    @property
    def member(self) -> str:
        """Return the name of the member inside a clip."""
        return self.name + self.suffix

    @property
    def dimensions(self) -> int:
        """Return the number of dimensions of the whole member."""
        return len(self.dims) + (self.rate != "clip")

    @property
    def entry_name(self) -> str:
        """Return the word for one row in messages."""
        return ENTRY_NAMES[self.rate]

    def entry_shape(self, info: DatasetInfo) -> tuple[int | None, ...]:
        """Return the shape of one entry in this data set; None where any length is allowed."""
        return tuple(_length(info, dim) if isinstance(dim, str) else dim for dim in self.dims)

    def tensor_shape(self, info: DatasetInfo, entries: int) -> tuple[int, ...]:
        """Return the shape of so many entries in a batch's row."""
        shape = tuple(dim for dim in self.entry_shape(info) if dim is not None)
        return shape if self.rate == "clip" else (entries, *shape)


def relative_poses(c2w: NDArray[Any]) -> NDArray[Any]:
    """Convert poses [F,4,4] from any world to the frame of the first camera, which becomes the
    identity. Rigid inverse, in float64."""
    rotation, origin = c2w[0, :3, :3], c2w[0, :3, 3]
    world_to_first = np.eye(4)
    world_to_first[:3, :3], world_to_first[:3, 3] = rotation.T, -rotation.T @ origin
    return world_to_first @ c2w


FLOATS = ("float16", "bfloat16", "float32")
LATENT = ("channels", "latent_height", "latent_width")
TEXT_FACTS = ("text_encoder", "text_length", "text_width")
FIELDS: Mapping[str, Field] = {
    field.name: field
    for field in (
        # a member of the batch of its own, of which each rank takes its frames
        Field("latent", LATENT, FLOATS, "latent", by_row=True, tensor=None, padding="zero"),
        # one stands for the first latent of a cut from the middle
        Field("image_latents", LATENT, FLOATS, "image", by_row=True, tensor=None, padding="zero"),
        # metres, OpenCV axes; of a batch relative to the cut's first raw frame
        Field("c2w", (4, 4), ("float32", "float64"), "raw", rebase=relative_poses),
        # fx, fy, cx, cy in pixels
        Field("intrinsics", (4,), ("float32", "float64"), "raw"),
        # of a latent those up to its last raw frame, divided by `control_std`
        Field(
            "controls",
            ("control_names",),
            ("float32",),
            "latent",
            alike=("control_names",),
            divisor="control_std",
        ),
        Field("text", ("text_length", "text_width"), FLOATS, "clip", alike=TEXT_FACTS),
        Field("text_mask", ("text_length",), ("uint8",), "clip", tensor="bool"),
        # normalised latents on a teacher's trajectory, at its levels but the first, and at its end
        Field(
            "ode",
            ("ode_levels", *LATENT),
            FLOATS,
            "latent",
            by_row=True,
            padding="zero",
            alike=("ode_levels",),
        ),
        # the number that keys the trajectory's start, its lowest byte first
        Field("ode_start", (8,), ("uint8",), "clip", tensor="int64"),
        # the clip's description, for people and tools
        Field("json", (None,), ("uint8",), "clip", tensor=None, suffix=""),
    )
}

START_LATENTS, CLIP_SHAPE = 30, (257, 1280)  # of the released models
# Members of ours that `encode fields=` can take from a source, as those of other packages
TAKEN: Mapping[str, Field] = {
    field.name: field
    for field in (
        # latents of a clip's first image followed by zeros, constant from the last on; `encode
        # start_video=yes` makes them
        Field("start_video", (START_LATENTS, *LATENT), FLOATS, "clip", latents=True),
        # CLIP ViT-H/14 features of that image; `encode image_encoder=` makes them
        Field("clip_image", CLIP_SHAPE, FLOATS, "clip"),
    )
}


@cache
def registered() -> Mapping[str, Field]:
    """Return the fields that installed packages add, and `TAKEN`, by name.

    Raises:
        DataError: an entry point that names no Field of its own name, or a name that is taken.
    """
    from importlib.metadata import entry_points

    rows = dict(TAKEN)
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        field = point.load()
        if (
            not isinstance(field, Field)
            or field.name != point.name
            or point.name in {**FIELDS, **TAKEN}
        ):
            raise DataError(
                f"field: got {field!r} at the entry point {point.name} = {point.value}, expected a"
                f" Field of that name and none of {sorted({**FIELDS, **TAKEN})} (group {GROUP})."
                " Fix: mend the package that declares it"
            )
        rows[field.name] = field
    return rows


def field_named(name: str) -> Field:
    """Return the field of a name in `Batch.fields`."""
    return FIELDS.get(name) or registered()[name]


def field_of(member: str) -> Field | None:
    """Return the field of a member of a clip (`c2w.npy`), or None for one that is not
    registered."""
    name = member.removesuffix(".npy")
    field = FIELDS.get(name) or registered().get(name)
    return field if field is not None and field.member == member else None


def is_by_row(member: str) -> bool:
    """Return True if the rows of a member have checksums and are read one by one."""
    field = field_of(member)
    return field is not None and field.by_row


def known_members() -> list[str]:
    """Return the members that a clip may have."""
    return sorted(field.member for field in (*FIELDS.values(), *registered().values()))


def batch_fields() -> list[Field]:
    """Return the fields that come into `Batch.fields`, in one order on all ranks."""
    return [field for field in (*FIELDS.values(), *registered().values()) if field.tensor]


def alike_in_mixture() -> tuple[str, ...]:
    """Return what data sets must have in common to be mixed in one training stream."""
    own = ["codec", "codec_options", "channels", "temporal_stride", "spatial_stride"]
    own += ["time_layout", "controls_offset"]
    return (*own, *(fact for field in batch_fields() for fact in field.alike), "fields")


def same_rate(one: float, other: float) -> bool:
    """Return True if two frame rates differ by no more than `SAME_RATE`."""
    return math.isclose(one, other, rel_tol=SAME_RATE)


def unlike(mine: DatasetInfo, theirs: DatasetInfo, mixed_rates: bool) -> list[str]:
    """Return the facts that keep two data sets from being mixed; `mixed_rates`: frame rates are
    meant to differ."""
    names = [name for name in alike_in_mixture() if getattr(mine, name) != getattr(theirs, name)]
    return names + ([] if mixed_rates or same_rate(mine.fps, theirs.fps) else ["fps"])


def expected_shape(field: Field, info: DatasetInfo, entry: ClipEntry) -> tuple[int | None, ...]:
    """Return the shape that this field of a clip must have; None where any length is allowed."""
    length = {
        "latent": (entry.latent_frames,),
        "raw": (entry.raw_frames,),
        "image": (image_latent_count(entry.raw_frames, info.image_latents_every),),
        "clip": (),
    }[field.rate]
    return (*length, *field.entry_shape(info))


def entries_of(rate: Rate, frames: tuple[int, int], time: TimeLayout) -> tuple[int, int]:
    """Return the entries [start, stop) of a cut that belong to its latent frames [start, stop)."""
    if rate == "latent":
        return frames
    return time.start(frames[0]), time.start(frames[1])


def row_entries(
    rate: Rate, starts: tuple[int, ...], held: tuple[int, int], frames: int, time: TimeLayout
) -> int:
    """Return how many entries the latent frames [held) of a row of `frames` have. Its clips begin
    at `starts`; the last one goes on over padding."""
    total = 0
    for start, end in zip(starts, (*starts[1:], frames), strict=True):
        own = (max(held[0], start) - start, min(held[1], end) - start)
        if own[0] < own[1]:
            first, stop = entries_of(rate, own, time)
            total += stop - first
    return total


def _length(info: DatasetInfo, fact: str) -> int:
    value = getattr(info, fact)
    return value if isinstance(value, int) else len(value)
