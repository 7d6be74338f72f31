"""Return results of operators on tensors without values from calls of the same shapes before.

A rehearsal runs tens of thousands of operators, few of which differ. torch's shape-only mode takes
about a third of a millisecond for each, also for one that it knows. What is kept here takes a tenth
of that. Operators that read values, exchange data with other ranks, or write into their arguments,
but for the few of WRITERS, always go to torch, as do tensors of any other kind.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wm_train.compat import (
    FakeTensor,
    FakeTensorMode,
    fake_tensor,
    in_kernel_invocation_manager,
    no_dispatch,
)

PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout}
PLAIN |= {torch.memory_format}
# operators that write into their arguments and change nothing else of them: shapes, places, types
WRITERS = {"add_", "sub_", "mul_", "div_", "copy_", "fill_", "zero_", "exp_", "_foreach_copy_"}
WRITERS |= {"all_gather_copy_in", "split_with_sizes_copy", "chunk_cat"}  # of FSDP2


class Made(NamedTuple):
    """Hold what one result is made from; attributes: torch's own, of the first such result; `of`:
    the place of the argument (`_flat`) whose storage it shares, None for a storage of its own."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    attributes: dict[str, Any]
    of: int | None


class Answer(NamedTuple):
    """Hold the results of an operator, None in place of those that it leaves out, a place in place
    of an argument that it returns, and its numbers: bytes returned, FLOPs, bytes read."""

    made: Sequence[Made | int | None]
    kind: type | None  # list or tuple of results; None: a single one
    mode: FakeTensorMode | None
    numbers: tuple[int, int, int]


class UnknownKind(Exception):
    """Report an argument of a kind whose calls are not kept."""


def call_key(func: Any, args: Any, kwargs: Any) -> Hashable | None:
    """Return what the shapes of an operator's results depend on, None if that is not known."""
    if func.namespace not in ("aten", "fsdp"):
        return None
    if func._schema.is_mutable and func._opname not in WRITERS:
        return None
    try:
        given = tuple(map(_described, args))
        named = tuple((name, _described(value)) for name, value in kwargs.items())
    except UnknownKind:
        return None
    return (func, given, named)


def _described(value: Any) -> Hashable:
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None or value.dtype.is_complex:
            raise UnknownKind
        store = (value.storage_offset(), value.untyped_storage().nbytes())
        return (value.shape, value.stride(), store, value.dtype, value.fake_device)
    if kind in PLAIN:
        return (kind, value)  # as 1 == 1.0 == True
    if kind in (list, tuple, torch.Size):
        return tuple(map(_described, value))
    raise UnknownKind


def kept_answer(args: Sequence[Any], out: Any, numbers: tuple[int, int, int]) -> Answer | None:
    """Return what makes the results of a call again, None where they are of another kind."""
    several, args = type(out) in (list, tuple), _flat(args)
    results = out if several else (out,)
    stores = {_storage(x): place for place, x in enumerate(args) if type(x) is FakeTensor}
    places = {id(x): place for place, x in enumerate(args) if type(x) is FakeTensor}
    made: list[Made | int | None] = []
    mode = None
    for x in results:
        if x is None:
            made.append(None)
            continue
        if type(x) is not FakeTensor or x.constant is not None or x.dtype.is_complex:
            return None
        mode = x.fake_mode
        if id(x) in places:
            made.append(places[id(x)])
            continue
        place = stores.get(_storage(x))
        if place is None and x.untyped_storage().nbytes() != _span(x):
            return None  # a part of a storage that none of the arguments has
        layout = (
            x.shape,
            x.stride(),
            int(x.storage_offset()),
            x.dtype,
            x.fake_device,
            dict(vars(x)),
        )
        made.append(Made(*layout, place))
    own = [_storage(x) for x in results if x is not None and _storage(x) not in stores]
    if len(set(own)) < len(own):
        return None
    return Answer(made, type(out) if several else None, mode, numbers)


def make_answer(answer: Answer, args: Sequence[Any]) -> Any:
    """Return the results of a call like one before."""
    given = _flat(args)
    made = [_result(one, given, answer.mode) for one in answer.made]
    return answer.kind(made) if answer.kind else made[0]


def _flat(args: Sequence[Any]) -> list[Any]:
    """Return arguments with those of lists among them."""
    return [x for arg in args for x in (arg if type(arg) in (list, tuple) else (arg,))]


def _result(made: Made | int | None, args: Sequence[Any], mode: Any) -> Tensor | None:
    if made is None or isinstance(made, Made):
        return made and _tensor(made, args, mode)
    result: Tensor = args[made]
    return result


def _tensor(made: Made, args: Sequence[Any], mode: FakeTensorMode) -> Tensor:
    with no_dispatch():
        if made.of is None:
            plain = torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device="meta")
        else:
            plain = torch.empty(0, dtype=made.dtype, device="meta")
            with in_kernel_invocation_manager(mode):
                store = args[made.of].untyped_storage()
                where = (made.offset, made.shape, made.stride)
                plain.set_(store, *where)  # type: ignore[call-overload]
        return fake_tensor(plain, made.device, made.attributes)


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _span(x: Tensor) -> int:
    """Return the bytes from the first to the last element of a tensor that starts its storage."""
    if x.numel() == 0:
        return 0
    last = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    return int(x.storage_offset() + last + 1) * x.element_size()
