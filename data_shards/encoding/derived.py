"""Write a data set of another one's clips: their first frames as they are stored, with members
added to them.

Nothing is decoded, and codec, statistics and split are the source's. As with `encode`, a shard is
the unit of work: `rows/<number>.json` in the unfinished folder marks it as done, and a run that was
interrupted goes on with those that are missing, in any number of processes. Equal clips and equal
added members give equal bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from numpy.typing import NDArray

from data_shards.encoding.finish import Rows, common_fields
from data_shards.encoding.kept import find_made, members_of
from data_shards.encoding.target import Target
from data_shards.fields import entries_of, field_of
from data_shards.schema import (
    FACTS,
    INDEX,
    NEGATIVE_TEXT,
    NULL_TEXT,
    PLAN,
    SPLITS,
    SUMS,
    TIME_SHARDED,
    ClipEntry,
    DataError,
    info_to_json,
)
from data_shards.storage.files import as_float32, parse_json
from data_shards.storage.read import ClipDataset
from data_shards.storage.write import ShardWriter, encode_array, fingerprint, sums_text, write_index
from data_shards.time_layout import time_of

Arrays = Mapping[str, tuple[str, NDArray[Any]]]  # member -> (stored dtype, array)


@dataclass(frozen=True)
class Derived:
    """Describe the data set to make. latent_frames: of every clip, from its start; shards: the
    clips of each; facts: what the added members are made with, names and plain values."""

    source: ClipDataset
    out: str
    latent_frames: int
    shards: tuple[tuple[ClipEntry, ...], ...]
    facts: Mapping[str, Any]

    @cached_property
    def target(self) -> Target:
        return Target(self.out)

    @property
    def raw_frames(self) -> int:
        return time_of(self.source.info).raw(self.latent_frames)


def choose_clips(
    source: ClipDataset, latent_frames: int, most: Mapping[str, int], seed: int, size: int
) -> tuple[tuple[ClipEntry, ...], ...]:
    """Return the clips of each shard of `size`, in the order of the index.

    most: split -> how many of its clips, those with the smallest hash of seed and key; 0: all.

    Raises:
        DataError: a clip that is shorter than `latent_frames`.
    """
    chosen: list[ClipEntry] = []
    for split in SPLITS:
        table = source.clips(split)
        clips = [table[place] for place in range(len(table))]
        if 0 < most[split] < len(clips):
            ranked = sorted(clips, key=lambda clip: _rank(seed, clip.key))
            clips = sorted(ranked[: most[split]], key=lambda clip: clip.row)
        chosen += clips
    for clip in chosen:
        if clip.latent_frames < latent_frames:
            raise DataError(
                f"clip length: got {latent_frames} latent frames, expected at most"
                f" {clip.latent_frames} as clip {clip.key} has ({source.path}). Fix:"
                f" frames={clip.raw_frames} for this stage, or longer clips"
            )
    return tuple(tuple(chosen[at : at + size]) for at in range(0, len(chosen), size))


def _rank(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed}/{key}".encode()).digest()


def is_complete(out: str) -> bool:
    """Return whether a data set is there, whole."""
    return Target(out).finished()


def begin(derived: Derived) -> list[int] | None:
    """Return the numbers of the shards that are not made yet; None where the data set is complete.

    Raises:
        DataError: something else is there, or what another run with other facts has made.
    """
    target, mine = derived.target, _plan(derived)
    whole = target.finished()
    left = target.read(PLAN, done=whole)
    if left is not None:
        theirs = parse_json(left, PLAN, derived.out)
        if theirs != mine:
            place = target.out if whole else target.place
            raise DataError(
                f"data set: got {place}, made with {_differences(theirs, mine)}. Fix: remove"
                " it, and it is made again, or give another path"
            )
    if whole:
        return None
    target.prepare()
    if left is None:
        target.write(PLAN, _plan_text(derived))
    made, _ = find_made(target, "tar")
    done = {shard.result for shard in made}
    return [n for n in range(len(derived.shards)) if _result(n) not in done]


def _result(number: int) -> str:
    return f"rows/{number:06d}.json"


def _shard(number: int) -> str:
    return f"shards/{number:06d}.tar"


def _plan(derived: Derived) -> dict[str, Any]:
    """Return all that decides what is made, as it is stored beside it."""
    keys = [[clip.key for clip in shard] for shard in derived.shards]
    plan = {
        "facts": dict(derived.facts),
        "source": derived.source.fingerprint,
        "latent_frames": derived.latent_frames,
        "clips": hashlib.sha256(json.dumps(keys).encode()).hexdigest(),
    }
    return {name: json.loads(json.dumps(value)) for name, value in plan.items()}


def _plan_text(derived: Derived) -> bytes:
    return (json.dumps(_plan(derived), indent=1, sort_keys=True) + "\n").encode()


def _differences(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """Return in words what another plan has otherwise."""
    flat = [
        {**(plan.get("facts") or {}), **{k: v for k, v in plan.items() if k != "facts"}}
        for plan in (theirs, mine)
    ]
    names = [name for name in {**flat[0], **flat[1]} if flat[0].get(name) != flat[1].get(name)]
    return "; ".join(
        f"another {name} ({str(flat[0].get(name))[:40]}, expected {str(flat[1].get(name))[:40]})"
        for name in names
    )


def write_derived(derived: Derived, number: int, added: Sequence[Arrays]) -> None:
    """Write one shard and then the file that marks it as done. added: the new members of each of
    its clips, in their order."""
    target, rows = derived.target, []
    with target.room(_shard(number)) as path, ShardWriter(path) as writer:
        for clip, arrays in zip(derived.shards[number], added, strict=True):
            arrays = {**first_frames_of(derived, clip, set(arrays)), **arrays}
            facts = derived.source.description(clip)
            facts |= {"latent_frames": derived.latent_frames, "raw_frames": derived.raw_frames}
            members = writer.add(clip.key, arrays, facts)
            sizes = [derived.latent_frames, derived.raw_frames]
            row = {"clip": [clip.key, clip.episode, clip.split, *sizes], "identity": clip.key}
            rows.append({**row, "members": [vars(member) for member in members]})
    target.write(_result(number), json.dumps({"rows": rows}).encode())


def first_frames_of(derived: Derived, clip: ClipEntry, without: set[str]) -> Arrays:
    """Return the members of a clip but for those of `without`, as far as its first frames have
    them. Image latents, where cuts may start, are left out."""
    source, found = derived.source, dict[str, tuple[str, NDArray[Any]]]()
    frames = (0, derived.latent_frames)
    for name, member in source.members(clip).items():
        field = field_of(name)
        if name == "json" or name in without or field is None or field.rate == "image":
            continue
        first, stop = entries_of(field.rate, frames, time_of(source.info))
        if field.by_row:
            stored = source.rows(clip, member, first, stop)
        else:
            stored = source.whole(clip, [member])[name]
            stored = stored if field.rate == "clip" else stored[first:stop]
        # the writer takes numbers, and its rounding gives back the same bits
        bits = member.dtype == "bfloat16"
        found[name] = (member.dtype, as_float32(stored, member.dtype) if bits else stored)
    assert TIME_SHARDED in found, "every clip has latents"
    return found


def finish_derived(derived: Derived, **changed: Any) -> None:
    """Write index and, last, dataset.json, once every shard is there, and give the folder its name.

    changed: facts of dataset.json that are not the source's.
    """
    target, source = derived.target, derived.source
    rows: Rows = []
    names = [_result(number) for number in range(len(derived.shards))]
    for number, data in enumerate(target.read_all(names)):
        for row in json.loads(data)["rows"]:
            key, episode, split, latent_frames, raw_frames = row["clip"]
            place = (len(rows), _shard(number), episode, split, latent_frames, raw_frames)
            rows.append((ClipEntry(key, *place), tuple(members_of(row))))
    index = io.BytesIO()
    write_index(index, rows)
    files = {INDEX: index.getvalue(), PLAN: _plan_text(derived)}
    texts = {NULL_TEXT: source.null_text(), NEGATIVE_TEXT: source.negative_text()}
    for name, text in texts.items():
        if text is not None:
            files[name] = b"".join(encode_array(text, "float32"))
    info = dataclasses.replace(
        source.info,
        clips={split: sum(entry.split == split for entry, _ in rows) for split in SPLITS},
        shards=len(derived.shards),
        latent_frames=sum(entry.latent_frames for entry, _ in rows),
        raw_frames=sum(entry.raw_frames for entry, _ in rows),
        psnr_db=None,  # the source's is over all of its frames
        index_bytes=len(files[INDEX]),
        index_sha256=hashlib.sha256(files[INDEX]).hexdigest(),
        fields=common_fields(rows),
        image_latents_every=0,
        **changed,
    )
    info = dataclasses.replace(info, fingerprint=fingerprint(rows, info))
    files[FACTS] = info_to_json(info).encode()
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files[SUMS] = sums_text(digests).encode()
    for name in sorted(files, key=lambda name: name == FACTS):
        target.write(name, files[name])
    target.remove("rows")
    target.publish()
