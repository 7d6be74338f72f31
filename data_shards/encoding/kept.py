"""Keep what an interrupted run has encoded: whole shards, and single clips of other shards.

A shard of an earlier run is done if it holds exactly the clips that are planned for it. Another
one, after a clip was added, mended or taken out, is set aside in `kept/` of the unfinished folder,
and the new shards copy from it the clips that have not changed. An object store cannot rename, so
there a shard that does not fit is removed and made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from data_shards.encoding.target import Target
from data_shards.schema import DataError, MemberEntry
from data_shards.storage.files import array_from_bytes, as_float32, crc32c
from data_shards.storage.write import shard_size
from data_shards.storage.zarr_store import pieces, shard_files

KEPT = "kept"


@dataclass(frozen=True)
class MadeClip:
    """Locate a clip that an earlier run encoded. shard: in the unfinished folder; row: its line of
    that shard's result."""

    shard: str
    row: Mapping[str, Any]


@dataclass(frozen=True)
class MadeShard:
    """Hold a shard that is on the disk as its result says. content: (identity, split) of its
    clips."""

    result: str
    shard: str
    rows: Sequence[Mapping[str, Any]]

    @property
    def content(self) -> list[tuple[str, str]]:
        return [(row["identity"], row["clip"][2]) for row in self.rows]


def members_of(row: Mapping[str, Any]) -> list[MemberEntry]:
    """Return the members of a clip from its line of a shard's result."""
    return [
        MemberEntry(**{**m, "shape": tuple(m["shape"]), "row_crc32c": tuple(m["row_crc32c"])})
        for m in row["members"]
    ]


def find_made(target: Target, container: str) -> tuple[list[MadeShard], list[str]]:
    """Return the sound shards that earlier runs left, and all names that belong to their shards and
    results, sound or not."""
    sizes = target.sizes()
    results = sorted(
        name for name in sizes if name.startswith(("rows/", f"{KEPT}/")) and name.endswith(".json")
    )
    results = [name for name in results if name.count("/") == 1]
    made = []
    for name, data in zip(results, target.read_all(results), strict=True):
        folder = "shards" if name.startswith("rows/") else KEPT
        shard = f"{folder}/{Path(name).stem}.{container}"
        rows = json.loads(data)["rows"]
        if rows and "identity" in rows[0] and is_whole(shard, rows, sizes):
            made.append(MadeShard(name, shard, rows))
    shards = {"/".join(name.split("/")[:2]) for name in sizes if name.startswith("shards/")}
    return made, [*results, *sorted(shards)]


def is_whole(shard: str, rows: Iterable[Mapping[str, Any]], sizes: Mapping[str, int]) -> bool:
    """Return True if the shard exists with the sizes, or the files, that follow from its result."""
    members = [(row["clip"][0], member) for row in rows for member in members_of(row)]
    if shard.endswith(".zarr"):
        return all(
            sizes.get(f"{shard}/{name}") == n + len(rest)
            for name, (n, rest) in shard_files(members).items()
        )
    return sizes.get(shard) == shard_size(member for _, member in members)


def made_clips(made: Iterable[MadeShard]) -> dict[str, MadeClip]:
    """Return identity -> clip of all that these shards hold."""
    return {row["identity"]: MadeClip(shard.shard, row) for shard in made for row in shard.rows}


def set_aside(
    target: Target, made: Sequence[MadeShard], done: set[str], every: Iterable[str]
) -> list[MadeShard]:
    """Clear the names of shards that are to be made, and return those from which clips can be
    copied.

    done: names of the results that stay; every: all names that are there.
    """
    kept = []
    whole = {shard.result: shard for shard in made}
    stay = {name for result in done for name in (result, whole[result].shard)}
    for shard in made:
        if shard.result in done:
            continue
        if shard.result.startswith(f"{KEPT}/"):
            kept.append(shard)
        elif not target.in_store:
            content = [shard.result, *map(str, shard.content)]
            stem = hashlib.sha256(repr(content).encode()).hexdigest()[:32]
            moved = MadeShard(
                f"{KEPT}/{stem}.json", f"{KEPT}/{stem}{Path(shard.shard).suffix}", shard.rows
            )
            target.rename(shard.shard, moved.shard)  # killed here: the clips are encoded again
            target.rename(shard.result, moved.result)
            kept.append(moved)
    target.remove(*(name for name in every if name not in stay and not name.startswith(f"{KEPT}/")))
    return kept


def read_made(
    place: str, clip: MadeClip
) -> tuple[dict[str, tuple[str, NDArray[Any]]], dict[str, Any]]:
    """Read (field -> (stored dtype, array), description) of a clip that an earlier run encoded.

    Raises:
        DataError: bytes that are not those written.
    """
    key = clip.row["clip"][0]
    arrays: dict[str, tuple[str, NDArray[Any]]] = {}
    description: dict[str, Any] = {}
    for member in members_of(clip.row):
        data = read_member(place, clip.shard, key, member)
        if crc32c(data) != member.crc32c:
            raise DataError(
                f"kept clip: got other bytes than were written (shard {clip.shard}, key {key},"
                f" field {member.field})"
            )
        payload = data[member.data_offset - member.offset :]
        if member.field == "json":
            description = json.loads(payload)
            continue
        stored = array_from_bytes(payload, member.dtype, member.shape)
        if member.dtype == "bfloat16":  # the writers take numbers; their rounding gives it back
            stored = as_float32(stored, member.dtype)
        arrays[member.field] = (member.dtype, stored)
    return arrays, description


def read_member(place: str, shard: str, key: str, member: MemberEntry) -> bytes:
    """Read all bytes of a member: of a tar with its npy header, of a Zarr shard its numbers."""
    if shard.endswith(".zarr"):
        found = pieces(key, member, 0, member.shape[0]) if member.length else ()
        ranges = [(f"{shard}/{piece.name}", piece.offset, piece.length) for piece in found]
    else:
        ranges = [(shard, member.offset, member.length)]
    parts = []
    for name, start, length in ranges:
        try:
            with open(Path(place) / name, "rb") as file:
                file.seek(start)
                parts.append(file.read(length))
        except OSError as error:
            raise DataError(f"kept clip: cannot read {name} ({error.strerror})") from error
    return b"".join(parts)
