"""Take from a source the fields of `encode fields=`: those that other packages add to
`data_shards.fields`."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from data_shards.encoding.framing import Framing
from data_shards.fields import GROUP, Field, registered
from data_shards.schema import DataError
from data_shards.sources import ClipSource, SourceClip
from data_shards.sources.reading import STRIDE


def other_arrays(
    source: ClipSource, clip: SourceClip, names: str | None, framing: Framing, latent_frames: int
) -> dict[str, tuple[str, NDArray[Any]]]:
    """Return member -> (stored dtype, array) of the fields in `Settings.fields`, as the source has
    them; pictures are framed like the video.

    Raises:
        DataError: a field of too few or too many frames.
    """
    arrays = {}
    for field in own_fields(names):
        array = source.array(clip.key, field.name)
        if array.ndim != field.dimensions:
            raise DataError(
                f"field {field.name}: got an array {array.dtype} {array.shape}, expected"
                f" {field.dimensions} dimensions (key {clip.key}). Fix: mend the source"
            )
        expected = {"raw": clip.frames, "latent": latent_frames}.get(field.rate)
        # a source may have those of the frames that fill no group at a clip's end, and no others:
        # they would belong to another clip
        if field.rate == "raw" and clip.frames <= len(array) < clip.frames + STRIDE:
            array = array[: clip.frames]
        if expected is not None and len(array) != expected:
            raise DataError(
                f"field {field.name}: got {len(array)} entries, expected {expected}, one for each"
                f" {field.entry_name} (key {clip.key}). Fix: mend the source"
            )
        if field.dims[:2] == ("image_height", "image_width"):
            array = framing.pictures(array)
        arrays[field.member] = (field.dtypes[0], array)
    return arrays


def own_fields(names: str | None) -> list[Field]:
    """Return the fields of a list of names with commas.

    Raises:
        DataError: a name that no installed package adds.
    """
    wanted, known = names.split(",") if names else [], registered()
    for name in wanted:
        if name not in known:
            raise DataError(
                f"fields: got {name!r}, expected one of {sorted(known)}. Fix: install the package"
                f" that adds it (entry point {GROUP})"
            )
    return [known[name] for name in wanted]
