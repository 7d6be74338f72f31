"""Compare passes over tensors without values, and make the results of those alike by shape.

Two passes of one network, or of blocks of the same sizes, over inputs and pasts of the same shapes
are the same operators on the same bytes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parallel.masks import AttentionMask, needed
from parallel.packed import CleanPass, NoisyPass
from parallel.sequence import Cache, GroupSequence
from parallel.streaming import Past, StreamingSequence, turned_frames
from wm_train.compat import tree_map
from wm_train.plan.tracing import Repeat

Remembering = StreamingSequence | CleanPass | NoisyPass  # sequences with a memory of their calls
PLAIN = (int, float, bool, str, type(None), torch.dtype)


@dataclass(frozen=True)
class Sizes:
    """Hold what a tensor without values is made from: its view of a storage of so many elements."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    elements: int
    storage: int  # equal for tensors of one storage


class Piece(NamedTuple):
    """Hold a piece of a call's keys and values: its place among those of before, or sizes of a new
    one, the chunk's own or a ring."""

    place: int | None
    keys: Sizes
    values: Sizes


class Remembered(NamedTuple):
    """Hold what a verb call keeps for the next chunk."""

    tensors: list[Sizes]
    pieces: list[Piece]
    ring: AttentionMask | None


@dataclass(frozen=True)
class Pass:
    """Hold a pass that has run: its work, the sizes of its inputs and of what it returned, and by
    sequence and call what it has remembered, None where that cannot be made anew."""

    repeat: Repeat
    inputs: Sequence[Sizes]
    returned: Any  # as the pass returned it, sizes in place of tensors
    remembered: list[list[Remembered] | None]

    @property
    def known(self) -> bool:
        """Return whether all that the pass has remembered can be made anew."""
        return None not in self.remembered


class Stores:
    """Hold the storages of tensors that are made anew, so that tensors which shared one share one
    again: a part of a larger storage keeps all of it alive."""

    def __init__(self, before: Sequence[Sizes], inputs: Sequence[Tensor]) -> None:
        """Start with the inputs of a pass, in place of those of one before."""
        pairs = zip(before, inputs, strict=True)
        self._made = {(size.storage, size.dtype): x for size, x in pairs}

    def anew(self, size: Sizes) -> Tensor:
        """Return a tensor without values."""
        key = (size.storage, size.dtype)
        if key not in self._made:
            self._made[key] = torch.empty(size.elements, dtype=size.dtype)
        return self._made[key].as_strided(size.shape, size.stride, size.offset)

    def all_anew(self, returned: Any) -> Any:
        """Return what a pass returned, of tensors without values."""
        return tree_map(lambda one: self.anew(one) if isinstance(one, Sizes) else one, returned)


def sizes(x: Tensor) -> Sizes:
    """Return what `Stores.anew` makes a tensor from."""
    elements = x.untyped_storage().nbytes() // x.element_size()
    return Sizes(x.shape, x.stride(), int(x.storage_offset()), x.dtype, elements, storage(x))


def all_sizes(returned: Any) -> Any:
    """Return what `Stores.all_anew` makes a pass's result from."""
    return tree_map(lambda one: sizes(one) if isinstance(one, Tensor) else one, returned)


def storage(x: Tensor) -> int:
    """Return what tells storages apart."""
    return int(x.untyped_storage()._cdata)


def described(value: Any, tensors: list[Tensor], streams: list[Remembering]) -> Hashable:
    """Return what the work of a pass over these arguments depends on, but for the pasts of
    sequences; add the tensors and the sequences with a past to the lists. Raises TypeError for an
    argument of a kind that cannot be compared."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return (value.shape, value.stride(), value.dtype)
    if isinstance(value, Remembering):
        streams.append(value)
        return clip_kind(value)
    if isinstance(value, GroupSequence):
        return clip_kind(value)
    if hasattr(value, "clip_frames"):
        raise TypeError(f"got {type(value).__name__}, a sequence that has a memory of its own")
    if is_dataclass(value) and not isinstance(value, type):
        own = (described(getattr(value, f.name), tensors, streams) for f in fields(value))
        return (type(value), *own)
    if isinstance(value, (list, tuple)):
        return (type(value), *(described(one, tensors, streams) for one in value))
    if isinstance(value, Mapping):
        items = sorted(value.items())
        return (type(value), *(described(item, tensors, streams) for item in items))
    hash(value)
    return (type(value), value)


def clip_kind(sequence: Any) -> Hashable:
    """Return what the work of a pass over a sequence depends on, but for the past of a stream and
    the shapes of latents."""
    frames = sequence.frames
    if isinstance(sequence, (CleanPass, NoisyPass)):
        return (type(sequence), clip_kind(sequence._clip))
    if not isinstance(sequence, StreamingSequence):
        own = sequence.layout
        clip = (own.frames, own.document_starts, own.chunk_starts, own.valid_frames, own.copies)
        return (type(sequence), *clip, frames.start, frames.stop)
    chunk, inner = sequence.chunk, sequence._inner
    place = (len(chunk), frames.start - chunk.start, frames.stop - chunk.start, chunk.start == 0)
    last = chunk.stop == sequence.layout.chunk_of(sequence.layout.chunk_starts[-1]).stop
    return (type(sequence), type(inner), sequence._remember, *place, last)


def past_kind(past: Past) -> Hashable:
    """Return the shapes of what a call has kept, and how its frames lie."""
    keys = ((tuple(one.keys.shape), *_runs(one.frames)) for one in past.keys)
    return (*(tuple(x.shape) for x in past.tensors), *keys)


def _runs(frames: Sequence[int]) -> tuple[int, int]:
    """Return how many slots hold frames, and in how many runs."""
    held = [frame >= 0 for frame in frames]
    return sum(held), sum(now and not last for last, now in zip([False, *held], held))


def past_kinds(sequence: Remembering, calls: range) -> Hashable:
    """Return the shapes of the past of some calls, and how many frames of the chunk a ring of each
    takes."""
    return tuple(
        (
            past_kind(one),
            one.ring and len(useful_frames(sequence, one.ring).intersection(own_frames(sequence))),
        )
        for one in befores(sequence, calls)
    )


def useful_frames(sequence: Any, mask: AttentionMask) -> frozenset[int]:
    """Return the frames that a chunk after this one sees."""
    return needed(sequence.layout, mask, sequence.chunk.stop)


def unit_kind(unit: nn.Module) -> Hashable:
    """Return what the work of a block depends on, besides its inputs."""
    return tuple(
        (
            name,
            type(module),
            *((key, value) for key, value in sorted(vars(module).items()) if _is_plain(key, value)),
            *((key, p.shape, p.dtype) for key, p in module.named_parameters(recurse=False)),
        )
        for name, module in unit.named_modules()
    )


def _is_plain(key: str, value: Any) -> bool:
    """Return whether an attribute is a setting of a module."""
    settings = isinstance(value, PLAIN) or is_dataclass(value)
    return settings and not key.startswith("_")


def own_frames(sequence: Any) -> tuple[int, ...]:
    return tuple(range(sequence.chunk.start, sequence.chunk.stop))


def remembers(sequence: Remembering) -> bool:
    """Return whether each call of a pass is kept for a later one."""
    if isinstance(sequence, StreamingSequence):
        return sequence._remember
    return isinstance(sequence, CleanPass)


def calls_made(sequence: Remembering) -> int:
    """Return how many verb calls with a memory a pass has made."""
    return len(sequence.kept) if isinstance(sequence, CleanPass) else sequence._calls.made


def befores(sequence: Remembering, calls: range) -> Sequence[Past]:
    """Return the past of some calls, empty ones at the start of a clip."""
    if isinstance(sequence, NoisyPass):
        return [Past(keys) for keys in sequence._clean[calls.start : calls.stop]]
    known = () if isinstance(sequence, CleanPass) else sequence._state.calls
    return known[calls.start : calls.stop] if known else (Past(),) * len(calls)


def kept_by(sequence: Remembering, calls: range) -> Sequence[Past]:
    """Return what some calls of a pass have kept for a later one."""
    if isinstance(sequence, CleanPass):
        return [Past(keys) for keys in sequence.kept[calls.start : calls.stop]]
    return () if isinstance(sequence, NoisyPass) else sequence._kept[calls.start : calls.stop]


def pasts_of(sequence: Remembering, calls: range) -> list[Remembered] | None:
    """Return what some calls of a pass have remembered; None where a piece of keys is neither one
    of before nor the chunk's own nor a ring, as when a window cuts it."""
    found = []
    pairs = zip(kept_by(sequence, calls), befores(sequence, calls), strict=remembers(sequence))
    for past, old in pairs:
        places = {storage(piece.keys): place for place, piece in enumerate(old.keys)}
        pieces = []
        for piece in past.keys:
            place = places.get(storage(piece.keys))
            if place is None and not past.ring and piece.frames != own_frames(sequence):
                return None
            pieces.append(Piece(place, sizes(piece.keys), sizes(piece.values)))
        found.append(Remembered([*map(sizes, past.tensors)], pieces, past.ring))
    return found


def remember_anew(
    sequence: Remembering, calls: range, remembered: Sequence[Remembered], stores: Stores
) -> None:
    """Let a sequence count some calls of a pass as made, and remember what they would, of tensors
    without values."""
    pasts = [*pasts_anew(sequence, calls, remembered, stores)]
    if isinstance(sequence, CleanPass):
        sequence.kept += [(keys, values) for keys, values in (past.tensors for past in pasts)]
        return
    sequence._calls.made += len(calls)
    if isinstance(sequence, StreamingSequence):
        sequence._kept += pasts


def pasts_anew(
    sequence: Remembering, calls: range, remembered: Sequence[Remembered], stores: Stores
) -> Iterator[Past]:
    """Yield what some calls of a pass would remember, of tensors without values."""
    pairs = zip(remembered, befores(sequence, calls), strict=remembers(sequence))
    for call, old in pairs:
        keys = tuple(
            old.keys[one.place]
            if one.place is not None
            else Cache(stores.anew(one.keys), stores.anew(one.values), own_frames(sequence))
            for one in call.pieces
        )
        if call.ring:
            (ring,), before = keys, old.keys[0].frames if old.keys else None
            useful, slots = useful_frames(sequence, call.ring), ring.keys.shape[1]
            frames, _ = turned_frames(before, own_frames(sequence), useful, slots)
            keys = (ring._replace(frames=frames),)
        yield Past(tuple(map(stores.anew, call.tensors)), keys, call.ring)
