"""Check all clips of a source before the first is encoded, and report every problem at once.

What is checked is what `load` would refuse, as far as a source can tell without decoding: cut
files, sidecars that do not fit, missing captions. Damage that only decoding shows is found later,
and reported after the other clips are encoded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data_shards.codecs import LatentCodec
from data_shards.encoding.arrays import camera_arrays
from data_shards.encoding.framing import Size, framing_of
from data_shards.encoding.job import PlannedClip, beside_arrays
from data_shards.encoding.settings import Settings
from data_shards.progress import clip_progress
from data_shards.schema import IMAGE_LATENTS, TIME_SHARDED, DataError
from data_shards.sources.clips import ClipSource, SourceClip
from data_shards.storage.write import encode_array

CODED = {TIME_SHARDED, IMAGE_LATENTS, "json"}  # members that say nothing of the source
TEXT = {"text.npy", "text_mask.npy"}
Fields = Mapping[str, frozenset[str]]  # key -> members that the clip has from its source


def check_clips(
    source: ClipSource, clips: Sequence[PlannedClip], codec: LatentCodec, settings: Settings
) -> tuple[dict[str, frozenset[str]], dict[str, str]]:
    """Return key -> members of the clips that can be encoded, and key -> problem of the others.

    Raises:
        DataError: a store that does not answer.
    """
    fields: dict[str, frozenset[str]] = {}
    problems: dict[str, str] = {}

    def look(planned: PlannedClip) -> frozenset[str] | DataError | None:
        try:
            return check_clip(planned.clip, source, codec, settings)
        except DataError as error:
            return error

    # One after the other: numpy reads headers by `ast`, and CPython 3.11 counts its depth for all
    # threads together, which ends in a SystemError.
    with clip_progress("check") as progress:
        found = progress.track(map(look, clips), total=len(clips))
        for planned, result in zip(clips, found, strict=True):
            if isinstance(result, DataError) and result.passing:
                raise result
            if isinstance(result, DataError):
                problems[planned.clip.key] = str(result)
            elif result is not None:
                fields[planned.clip.key] = result
    return fields, problems


def check_clip(
    clip: SourceClip, source: ClipSource, codec: LatentCodec, settings: Settings
) -> frozenset[str] | None:
    """Return the members that a clip will have from its source; None if the source cannot tell.

    Raises:
        DataError: one that `load` would refuse, or of numbers that cannot be stored.
    """
    content = source.check(clip)
    if content is None:
        return None
    arrays = beside_arrays(clip, content, source, codec, settings)
    framing = framing_of(clip, codec.spatial_stride, settings.resize)
    intrinsics = content.intrinsics
    if source.stored is None:  # pictures are framed, ready latents are not
        intrinsics = framing.intrinsics(intrinsics)
    arrays |= camera_arrays(clip, content.c2w, intrinsics, framing)
    for member, (dtype, array) in arrays.items():
        try:
            encode_array(array, dtype)
        except DataError as error:
            raise DataError(f"member: {error} (key {clip.key}, field {member})") from error
    return frozenset(arrays) | (TEXT if settings.text else set())


def fields_of_rows(rows: Iterable[Mapping[str, Any]]) -> dict[str, frozenset[str]]:
    """Return the same of clips that are encoded already, from the results of their shards."""
    return {row["clip"][0]: frozenset(m["field"] for m in row["members"]) - CODED for row in rows}


def unlike(fields: Fields) -> dict[str, str]:
    """Return key -> problem of the clips that lack what most have, or have what most lack."""
    counts = Counter(fields.values())
    if len(counts) < 2:
        return {}
    usual, count = counts.most_common(1)[0]
    problems = {}
    for key, own in fields.items():
        words = [f"has {', '.join(sorted(own - usual))}, which others lack"] if own - usual else []
        words += [f"lacks {', '.join(sorted(usual - own))}"] if usual - own else []
        if words:
            problems[key] = (
                f"source: it {' and '.join(words)}, expected the same as in {count} clips of"
                f" {len(fields)}. Fix: give each its sidecar, or encode them separately"
            )
    return problems


def unlike_sizes(
    clips: Sequence[SourceClip], stride: int, resize: Size | None = None
) -> dict[str, str]:
    """Return key -> problem of the clips that are too small for the codec's stride, or whose
    pictures have another size than most: a data set brings decoded ones back to one size."""
    sizes: dict[str, Size] = {}
    problems = {}
    for clip in clips:
        try:
            framing = framing_of(clip, stride, resize)
            sizes[clip.key] = framing.source if framing.resized else framing.size
        except DataError as error:
            problems[clip.key] = str(error)
    counts = Counter(sizes.values())
    for usual, count in counts.most_common(1):
        for key, size in sizes.items():
            if size != usual:
                problems[key] = (
                    f"video size: got {size[0]}x{size[1]}, expected {usual[0]}x{usual[1]} as in"
                    f" {count} clips of {len(sizes)}: one size in a data set. Fix: encode them"
                    " separately"
                )
    return problems


def repeated(clips: Sequence[SourceClip]) -> dict[str, str]:
    """Return key -> problem of the keys that come more than once."""
    counts = Counter(clip.key for clip in clips)
    return {
        key: f"clip key: got {key!r} twice, expected unique keys in a source. Fix: rename one"
        for key, count in counts.items()
        if count > 1
    }
