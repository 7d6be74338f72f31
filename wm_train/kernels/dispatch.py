"""Run the kernels that models call: check shapes, then run Triton or the PyTorch of `reference.py`.

Shapes: B clips, t local latent frames, S tokens per frame, H heads of D channels. Tokens arrive as
projections give them, [B, t, S, H·D], un-normalised. Rotary tables are [B or 1, t, S, 1, pairs].
Sums, states and Grams are fp32 (fp64 for fp64 tokens). `engine`: auto | triton | reference (see
`engine.py`; every choice is logged once). Errors: ValueError for a wrong shape, naming it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from parallel.halo import Taps
from parallel.reference import REFERENCE, Kernels, Stream
from wm_train.kernels.attention.choose import with_attention
from wm_train.kernels.engine import HEAD_DIMS, rehearsed_device, resolve
from wm_train.kernels.gdn import reference
from wm_train.kernels.names import ENGINES
from wm_train.kernels.trial import trusted

if TYPE_CHECKING:
    from wm_train.kernels.gdn.scan import ScanSettings


def short_convolution(
    taps: Taps, weight: Tensor, heads: int, norm_eps: float = 1e-5, engine: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """Convolve keys over time, both ways: y_t = Σ over |d| < K of w[K-1-|d|] x_{t+d}.

    taps: 2K-1 of [B, t, S, H·D], from `SequenceShard.halo`; weight [H·D, 1, K] -> y [B, t, S, H·D],
    and 1 / RMS of its tokens [B·t·S] for the Gram that follows, if the kernel computed it.
    """
    x, kernel = taps.extended, weight.shape[-1]
    if x.dim() != 4 or x.shape[-1] % heads:
        raise ValueError(
            f"short_convolution failed: got frames {tuple(x.shape)}, expected [B, t, S, H·D] with H"
            f" = {heads} (kernels)"
        )
    _same("short_convolution", "weight", weight, (x.shape[-1], 1, kernel))
    if len(taps) != 2 * kernel - 1 or taps.before != kernel - 1:
        raise ValueError(
            f"short_convolution failed: got {len(taps)} taps, {taps.before} before, expected"
            f" {2 * kernel - 1} and {kernel - 1} (kernels)"
        )
    if not taps.frames or _engine(engine, x, x.shape[-1] // heads) == "reference":
        return reference.short_convolution(taps, weight), None
    from wm_train.kernels.gdn.convolution import short_convolution as fused

    return fused(taps, weight, norm_eps)


def gdn_gram(
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    norm_eps: float = 1e-5,
    engine: str = "auto",
    rstd: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute A and U of the main branch (SANA-WM eq. 3, 5), with k̂ = scale · ReLU(RMSNorm(key)).

    k̂ is rotated for the numerator only. key (after its short convolution), value [B, t, S, H·D];
    beta [B, t, S, H], 0 at padding; weight [H·D] of the key norm; rstd: what `short_convolution`
    returned with the key. -> numerator's A, U [B, t, H, D, D], normaliser's A [B, t, H, D, D] and U
    [B, t, H, 1, D].
    """
    d = _check_tokens("gdn_gram", key, beta.shape[-1], weight, cos, sin, 2)
    _same("gdn_gram", "value", value, key.shape)
    _same("gdn_gram", "beta", beta, (*key.shape[:3], beta.shape[-1]))
    if _engine(engine, key, d) == "reference":
        return reference.gdn_gram(key, value, beta, weight, cos, sin, scale, norm_eps)
    from wm_train.kernels.gdn.gram import gdn_gram as fused

    return fused(key, value, beta, weight, cos, sin, scale, norm_eps, rstd)


def gdn_output(
    query: Tensor,
    state: Tensor,
    normaliser: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm_eps: float = 1e-5,
    eps: float = 1e-8,
    engine: str = "auto",
) -> Tensor:
    """Compute O = S q̂_rotated / (z · q̂ + eps) per token.

    query [B, t, S, H·D]; state [B, t, H, D, D]; normaliser [B, t, H, 1, D]; weight [H·D] of the
    query norm -> [B, t, S, H, D].
    """
    d = _check_tokens("gdn_output", query, state.shape[2], weight, cos, sin, 2)
    _same("gdn_output", "state", state, (*query.shape[:2], state.shape[2], d, d))
    _same("gdn_output", "normaliser", normaliser, (*query.shape[:2], state.shape[2], 1, d))
    if _engine(engine, query, d) == "reference":
        return reference.gdn_output(query, state, normaliser, weight, cos, sin, norm_eps, eps)
    from wm_train.kernels.gdn.output import gdn_output as fused

    return fused(query, state, normaliser, weight, cos, sin, norm_eps, eps)


def camera_gram(
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    weight: Tensor,
    ray_to_world: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    norm_eps: float = 1e-5,
    engine: str = "auto",
    rstd: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute A and U of the camera branch (SANA-WM eq. 6).

    Keys and values are encoded by D^-1 and limited to their RMS, beta is discounted. Arguments as
    in `gdn_gram`, with ray_to_world [B, t, S, 4, 4] and tables for half the channels -> A, U [B, t,
    H, D, D].
    """
    d = _check_tokens("camera_gram", key, beta.shape[-1], weight, cos, sin, 4)
    _same("camera_gram", "value", value, key.shape)
    _same("camera_gram", "beta", beta, (*key.shape[:3], beta.shape[-1]))
    _same("camera_gram", "ray_to_world", ray_to_world, (*key.shape[:3], 4, 4))
    if _engine(engine, key, d) == "reference":
        return reference.camera_gram(
            key, value, beta, weight, ray_to_world, cos, sin, scale, norm_eps
        )
    from wm_train.kernels.gdn.camera import camera_gram as fused

    return fused(key, value, beta, weight, ray_to_world, cos, sin, scale, norm_eps, rstd)


def camera_output(
    query: Tensor,
    state: Tensor,
    weight: Tensor,
    world_to_ray: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm_eps: float = 1e-5,
    engine: str = "auto",
) -> Tensor:
    """Compute S q̂ with queries encoded by Dᵀ, and transform it back to the world.

    query [B, t, S, H·D], state [B, t, H, D, D], world_to_ray [B, t, S, 4, 4] -> [B, t, S, H, D],
    ready for the branch's output projection.
    """
    d = _check_tokens("camera_output", query, state.shape[2], weight, cos, sin, 4)
    _same("camera_output", "state", state, (*query.shape[:2], state.shape[2], d, d))
    _same("camera_output", "world_to_ray", world_to_ray, (*query.shape[:3], 4, 4))
    if _engine(engine, query, d) == "reference":
        return reference.camera_output(query, state, weight, world_to_ray, cos, sin, norm_eps)
    from wm_train.kernels.gdn.camera import camera_output as fused

    return fused(query, state, weight, world_to_ray, cos, sin, norm_eps)


@lru_cache(maxsize=16)
def sequence_kernels(
    device: torch.device, engine: str = "auto", attention: str = "auto"
) -> Kernels:
    """Return the local kernels of `parallel`'s verbs on this device, the same table on every call.

    It is for `LocalSequence` and `GroupSequence`. engine: of the GDN states; attention: of the
    softmax blocks (`attention/choose.py`). Keys backend.kernels and backend.attention.
    """
    if engine not in ENGINES:
        raise ValueError(
            f"kernels: got engine {engine!r}, expected one of {', '.join(ENGINES)}"
            " (sequence_kernels). Fix: engine='auto'"
        )
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    table = with_attention(device, attention)
    if (
        resolve(engine, "states", device.type, capability, torch.float32, HEAD_DIMS[1])
        == "reference"
    ):
        return table
    return table._replace(**recurrences(engine))


def recurrences(engine: str, settings: ScanSettings | None = None) -> dict[str, Any]:
    """Return the four functions of the GDN states by name: the kernels, each with the reference for
    streams that they cannot take."""
    from wm_train.kernels.gdn import scan

    names = ("local_composites", "local_states", "local_adjoint_composites", "local_adjoint")
    given = scan.ScanSettings() if settings is None else settings
    return {
        name: partial(
            _scan, engine, partial(getattr(scan, name), settings=given), getattr(REFERENCE, name)
        )
        for name in names
    }


def forget_tables() -> None:
    """Forget the small tables that kernels keep from call to call, as in a rehearsal they were made
    without storage."""
    from wm_train.kernels.gdn import convolution, scan

    for table in (convolution.seen_table, scan.edge_table, scan.pass_table):
        table.cache_clear()


def _scan(
    engine: str, fused: Callable[..., Any], plain: Callable[..., Any], stream: Stream, *rest: Any
) -> Any:
    """Return the recurrence to run. Without frames there is nothing to launch, and the reference
    returns the empty results."""
    update = stream.update
    if update.shape[1] == 0 or engine_for(engine, "states", update, update.shape[-1]) != "triton":
        return plain(stream, *rest)
    return fused(stream, *rest)


def engine_for(engine: str, kind: str, tensor: Tensor, head_dim: int) -> str:
    """Call `resolve` for the device and dtype of a tensor; unless asked for by name, kernels must
    first pass their trial there."""
    device = tensor.device
    if stands_for := rehearsed_device():
        return resolve(engine, kind, *stands_for, tensor.dtype, head_dim)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    answer = resolve(engine, kind, device.type, capability, tensor.dtype, head_dim)
    if engine == "auto" and answer == "triton":
        return "triton" if trusted(kind, device, tensor.dtype, head_dim) else "reference"
    return answer


def _engine(engine: str, tokens: Tensor, head_dim: int) -> str:
    """Return the engine for tokens; the reference if there are none, as it keeps the graph."""
    return "reference" if tokens.numel() == 0 else engine_for(engine, "tokens", tokens, head_dim)


def _check_tokens(
    where: str, x: Tensor, heads: int, weight: Tensor, cos: Tensor, sin: Tensor, per_pair: int
) -> int:
    """Check the shapes of tokens and tables, and return the head dim.

    per_pair: channels of a head per rotary pair, 4 where only half are rotated.
    """
    if x.dim() != 4 or x.shape[-1] % heads:
        raise ValueError(
            f"{where} failed: got tokens {tuple(x.shape)}, expected [B, t, S, H·D] with H = {heads}"
            " (wm_train.kernels)"
        )
    b, t, s, channels = x.shape
    d = channels // heads
    _same(where, "norm weight", weight, (channels,))
    for name, table in (("cos", cos), ("sin", sin)):
        if tuple(table.shape) not in ((b, t, s, 1, d // per_pair), (1, t, s, 1, d // per_pair)):
            raise ValueError(
                f"{where} failed: got rotary {name} {tuple(table.shape)}, expected"
                f" {(b, t, s, 1, d // per_pair)}, or 1 for {b} (kernels)"
            )
    return d


def _same(where: str, name: str, x: Tensor, expected: tuple[int, ...] | torch.Size) -> None:
    if tuple(x.shape) != tuple(expected):
        raise ValueError(
            f"{where} failed: got {name} {tuple(x.shape)}, expected {tuple(expected)}"
            " (wm_train.kernels)"
        )
