"""Compute the frame-wise GDN scan in plain PyTorch: default kernels, and oracle of the others.

Recurrence of one head over frames (SANA-WM §3; `^T` is never needed for M because A, a Gram matrix,
is symmetric):

    forward   F_t = F_{t-1} M_t + U_t        M_t = γ_t (I − A_t)
    reverse   I_t = I_{t+1} M_t + U_t        and its exclusive form R_t = I_{t+1}
    output    F_t, F_t + I_t or F_t + R_t

A step is computed as γ_t (F − F A_t) + U_t, so that only the small A is ever rounded. A closed edge
passes nothing: there F_t = U_t, I_t = U_t, and R_t = 0 (zeroing only M would leak U_{t+1} into
R_t). Composites of a rank's frames a…b: C = M_a … M_b *without* any cut (forward and reverse may be
cut at different places and C serves both, the reverse through C^T), H_fwd = F_b from a zero start
and H_rev = I_a from a zero start, both *with* the cuts.

All functions work in float32, or float64 for float64 inputs. Nothing here depends on ranks. The
table of all local kernels, `Kernels`, is here as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallel.local_attention import accumulation_dtype, block_attention, block_attention_backward


class Stream(NamedTuple):
    """Store one GDN recurrence over the local frames t.

    decay [B, t, H] (γ); gram [B, t, H, D, D] (A, symmetric); update [B, t, H, E, D] (U; E = D, or 1
    for the normaliser).
    """

    decay: Tensor
    gram: Tensor
    update: Tensor


class Cuts(NamedTuple):
    """Store the open edges of the local frames.

    forward[i]: frame i may see frame i-1. reverse[i]: frame i may see frame i+1.
    """

    forward: tuple[bool, ...]
    reverse: tuple[bool, ...]


def _time_first(x: Tensor, tail: tuple[int, ...]) -> Tensor:
    """Reshape [B, t, H, …] -> [t, B·H, …], so that one frame is one batched matrix."""
    return x.transpose(0, 1).reshape(x.shape[1], x.shape[0] * x.shape[2], *tail)


def _batch_first(x: Tensor, batch: int, heads: int) -> Tensor:
    """Reshape [t, B·H, …] -> [B, t, H, …]."""
    return x.reshape(x.shape[0], batch, heads, *x.shape[2:]).transpose(0, 1)


class _Flat(NamedTuple):
    """Store a stream time first: decay [t, B·H, 1, 1], gram [t, B·H, D, D], update [t, B·H, E, D].

    B·H is one batch dimension.
    """

    decay: Tensor
    gram: Tensor
    update: Tensor


def _flat(stream: Stream) -> _Flat:
    e, d = stream.update.shape[-2:]
    dtype = accumulation_dtype(stream.update.dtype)
    decay, gram, update = (x.detach().to(dtype) for x in stream)
    return _Flat(_time_first(decay, (1, 1)), _time_first(gram, (d, d)), _time_first(update, (e, d)))


def _step(state: Tensor, decay: Tensor, gram: Tensor) -> Tensor:
    """Return state · M without ever forming M."""
    return torch.baddbmm(state, state, gram, alpha=-1).mul_(decay)


def _run_forward(flat: _Flat, cuts: Cuts, start: Tensor | None) -> Tensor:
    """Return F [t, B·H, E, D]."""
    decay, gram, update = flat
    out = torch.empty_like(update)
    state = start
    for i in range(update.shape[0]):
        if state is None or not cuts.forward[i]:
            out[i].copy_(update[i])
        else:
            torch.addcmul(
                update[i], torch.baddbmm(state, state, gram[i], alpha=-1), decay[i], out=out[i]
            )
        state = out[i]
    return out


def _run_reverse(flat: _Flat, cuts: Cuts, start: Tensor | None) -> Tensor:
    """Return I [t, B·H, E, D]."""
    decay, gram, update = flat
    out = torch.empty_like(update)
    state = start
    for i in reversed(range(update.shape[0])):
        if state is None or not cuts.reverse[i]:
            out[i].copy_(update[i])
        else:
            torch.addcmul(
                update[i], torch.baddbmm(state, state, gram[i], alpha=-1), decay[i], out=out[i]
            )
        state = out[i]
    return out


def _seen_by_forward(states: Tensor, cuts: Cuts, start: Tensor | None) -> Tensor:
    """Return F_{i-1} [t, B·H, E, D], entering frame i from the left; 0 at a closed edge."""
    seen = torch.zeros_like(states)
    seen[1:] = states[:-1]
    if len(states) and start is not None:
        seen[0] = start
    for i, is_open in enumerate(cuts.forward):
        if not is_open:
            seen[i] = 0
    return seen


def _seen_by_reverse(states: Tensor, cuts: Cuts, start: Tensor | None) -> Tensor:
    """Return I_{i+1} = R_i [t, B·H, E, D], entering frame i from the right; 0 at a closed edge."""
    seen = torch.zeros_like(states)
    seen[:-1] = states[1:]
    if len(states) and start is not None:
        seen[-1] = start
    for i, is_open in enumerate(cuts.reverse):
        if not is_open:
            seen[i] = 0
    return seen


def _heads(x: Tensor | None, batch: int, heads: int) -> Tensor | None:
    return None if x is None else x.reshape(batch * heads, *x.shape[2:])


def local_composites(
    stream: Stream, cuts: Cuts, reverse: str | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return C [B, H, D, D], H_fwd [B, H, E, D] and, with a reverse pass, H_rev [B, H, E, D].

    Without local frames they are the identity and zeros.
    """
    batch, t, heads, e, d = stream.update.shape
    flat = _flat(stream)
    composite = torch.eye(d, dtype=flat.update.dtype, device=flat.update.device).expand(
        batch * heads, d, d
    )
    for i in range(t):
        composite = _step(composite, flat.decay[i], flat.gram[i])
    zero = flat.update.new_zeros(batch * heads, e, d)
    ahead = _run_forward(flat, cuts, None)[-1] if t else zero
    behind = None if reverse is None else (_run_reverse(flat, cuts, None)[0] if t else zero)
    shape = (batch, heads, e, d)
    return (
        composite.reshape(batch, heads, d, d),
        ahead.reshape(shape),
        None if behind is None else behind.reshape(shape),
    )


def local_states(
    stream: Stream,
    cuts: Cuts,
    reverse: str | None,
    start_forward: Tensor | None,
    start_reverse: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the states of the local frames [B, t, H, E, D] and F after the last one [B, H, E, D].

    start_forward: F left of the first frame, start_reverse: I right of the last frame [B, H, E, D];
    None: zero.
    """
    batch, t, heads, e, d = stream.update.shape
    flat = _flat(stream)
    start, start_back = _heads(start_forward, batch, heads), _heads(start_reverse, batch, heads)
    ahead = _run_forward(flat, cuts, start)
    if t:
        final = ahead[-1].clone()
    else:
        final = (
            torch.zeros(batch * heads, e, d, dtype=flat.update.dtype, device=flat.update.device)
            if start is None
            else start.clone()
        )
    if reverse is not None:
        behind = _run_reverse(flat, cuts, start_back)
        if reverse == "inclusive":
            ahead += behind
        else:
            if t > 1:
                for i in range(t - 1):
                    if cuts.reverse[i]:
                        ahead[i] += behind[i + 1]
            if t and start_back is not None and cuts.reverse[-1]:
                ahead[-1] += start_back
    return _batch_first(ahead, batch, heads), final.reshape(batch, heads, e, d)


def _adjoint_forward(
    flat: _Flat, cuts: Cuts, grads: Tensor, right: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return λ_t = dL/dF_t [t, B·H, E, D], and the gradient of F left of the first frame.

    The latter is [B·H, E, D]. right: the gradient that reaches F_b from later frames.
    """
    decay, gram, _ = flat
    out = torch.empty_like(grads)
    carried = right
    for i in reversed(range(grads.shape[0])):
        if carried is None:
            out[i].copy_(grads[i])
        else:
            torch.add(grads[i], carried, out=out[i])
        carried = _step(out[i], decay[i], gram[i]) if cuts.forward[i] else None
    return out, carried


def _adjoint_reverse(
    flat: _Flat, cuts: Cuts, grads: Tensor, left: Tensor | None, exclusive: bool
) -> tuple[Tensor, Tensor | None]:
    """Return μ_t = dL/dI_t [t, B·H, E, D] and the gradient of I right of the last frame.

    left: the gradient that reaches I_a from earlier frames.
    """
    decay, gram, _ = flat
    out = torch.empty_like(grads)
    carried = left
    for i in range(grads.shape[0]):
        if exclusive:
            out[i].zero_()
        else:
            out[i].copy_(grads[i])
        if carried is not None:
            out[i] += carried
        carried = _step(out[i], decay[i], gram[i]) if cuts.reverse[i] else None
        if exclusive and carried is not None:
            carried += grads[i]  # R_i = I_{i+1}
    return out, carried


def local_adjoint_composites(
    stream: Stream, cuts: Cuts, reverse: str | None, grads: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients that leave the local frames when none enters, [B, H, E, D] each.

    They go to F on the left and, with a reverse pass, to I on the right.
    """
    batch, _, heads, e, d = stream.update.shape
    flat = _flat(stream)
    upstream = _time_first(grads.to(flat.update.dtype), (e, d))
    zero = flat.update.new_zeros(batch, heads, e, d)
    _, to_left = _adjoint_forward(flat, cuts, upstream, None)
    to_left = zero if to_left is None else to_left.reshape(zero.shape)
    if reverse is None:
        return to_left, None
    _, to_right = _adjoint_reverse(flat, cuts, upstream, None, reverse == "exclusive")
    return to_left, zero if to_right is None else to_right.reshape(zero.shape)


def local_adjoint(
    stream: Stream,
    cuts: Cuts,
    reverse: str | None,
    start_forward: Tensor | None,
    start_reverse: Tensor | None,
    grads: Tensor,
    from_right: Tensor | None,
    from_left: Tensor | None,
) -> tuple[Stream, Tensor | None]:
    """Return the gradients of decay, gram and update, and of start_forward [B, H, E, D].

    The last is None if no gradient reaches it. The states are recomputed from the starts; nothing
    of the forward pass is kept. grads [B, t, H, E, D]; from_right, from_left [B, H, E, D]: the
    gradients that reach F_b and I_a from the frames of other ranks.

    With G_t = F_{t-1}^T λ_t + I_{t+1}^T μ_t (D × D): dU_t = λ_t + μ_t, dA_t = −γ_t G_t and dγ_t =
    tr(G_t) − ⟨G_t, A_t⟩.
    """
    batch, _, heads, e, d = stream.update.shape
    flat = _flat(stream)
    upstream = _time_first(grads.to(flat.update.dtype), (e, d))
    start, start_back = _heads(start_forward, batch, heads), _heads(start_reverse, batch, heads)
    seen = _seen_by_forward(_run_forward(flat, cuts, start), cuts, start)
    toward, to_start = _adjoint_forward(flat, cuts, upstream, _heads(from_right, batch, heads))
    outer = torch.matmul(seen.transpose(-1, -2), toward)  # [t, B·H, D, D]
    if reverse is not None:
        seen = _seen_by_reverse(_run_reverse(flat, cuts, start_back), cuts, start_back)
        back, _ = _adjoint_reverse(
            flat, cuts, upstream, _heads(from_left, batch, heads), reverse == "exclusive"
        )
        outer += torch.matmul(seen.transpose(-1, -2), back)
        toward += back
    d_decay = outer.diagonal(dim1=-2, dim2=-1).sum(-1) - (outer * flat.gram).sum((-2, -1))
    d_gram = outer.mul_(-flat.decay)
    local = Stream(*(_batch_first(x, batch, heads) for x in (d_decay, d_gram, toward)))
    return local, None if to_start is None else to_start.reshape(batch, heads, e, d)


class Kernels(NamedTuple):
    """List the local computations behind the verbs; a back end replaces them by its own.

    The signatures are those of the functions above. products: operators of a back end's own whose
    results selective checkpointing keeps, as it does those of torch's products and attention.
    """

    local_composites: Callable[..., tuple[Tensor, Tensor, Tensor | None]] = local_composites
    local_states: Callable[..., tuple[Tensor, Tensor]] = local_states
    local_adjoint_composites: Callable[..., tuple[Tensor, Tensor | None]] = local_adjoint_composites
    local_adjoint: Callable[..., tuple[Stream, Tensor | None]] = local_adjoint
    block_attention: Callable[..., tuple[Tensor, Tensor]] = block_attention
    block_attention_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = (
        block_attention_backward
    )
    products: tuple[Any, ...] = ()


REFERENCE = Kernels()
