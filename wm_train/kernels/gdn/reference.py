"""Compute the GDN layer's token work in plain PyTorch: the oracle, and the path without kernels.

Source: SANA-WM §3.2 (eq. 3-5), §3.3 (eq. 6), App. C.1. Products and sums are fp32 (fp64 for fp64
tokens); norms are in the tokens' dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6  # of the camera branch's RMS and energies


def wide(x: Tensor) -> Tensor:
    """Convert to fp32, but keep fp64."""
    return x if x.dtype == torch.float64 else x.float()


def normalised(x: Tensor, weight: Tensor, eps: float, heads: int) -> Tensor:
    """Apply RMSNorm over all heads' channels and ReLU: [B, t, S, H·D] -> [B, t, S, H, D]."""
    return F.relu(F.rms_norm(x, weight.shape, weight, eps)).unflatten(
        -1, (heads, x.shape[-1] // heads)
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs (2i, 2i+1) of x [B, t, S, H, 2·pairs] in fp32, returned in x's dtype.

    cos, sin [B or 1, t, S, 1, pairs].
    """
    even, odd = wide(x).unflatten(-1, (x.shape[-1] // 2, 2)).unbind(-1)
    return (
        torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
        .flatten(-2)
        .to(x.dtype)
    )


def short_convolution(taps: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Convolve over time, both ways: y_t = Σ over |d| < K of w[K-1-|d|] x_{t+d}.

    taps: 2K-1 of [B, t, S, C]; weight [C, 1, K].
    """
    by_distance = weight[:, 0].unbind(-1)
    centre = len(by_distance) - 1
    y = taps[centre] * by_distance[centre]
    for distance in range(1, len(by_distance)):
        y = torch.addcmul(
            y, taps[centre - distance] + taps[centre + distance], by_distance[centre - distance]
        )
    return y


def encode(x: Tensor, matrix: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply (matrix ⊕ RoPE) to x.

    Groups of four of the first D/2 channels are multiplied by a per-token 4x4 matrix [B, t, S, 4,
    4], the rest is rotated.
    """
    half = x.shape[-1] // 2
    geometric, rotated = x.split(half, dim=-1)
    groups = geometric.unflatten(-1, (half // 4, 4)).flatten(-3, -2)  # [B, t, S, H·D/8, 4]
    geometric = (groups @ matrix.to(x.dtype).transpose(-1, -2)).reshape(geometric.shape)
    return torch.cat((geometric, rotate(rotated, cos, sin)), dim=-1)


def limit_rms(reference: Tensor, transformed: Tensor) -> Tensor:
    """Scale `transformed` down, never up, to the channel RMS of `reference` per token and head.

    Both are [B, t, S, H, D].
    """
    wanted = reference.square().mean(dim=-1, keepdim=True).add(EPS).sqrt()
    actual = transformed.square().mean(dim=-1, keepdim=True).add(EPS).sqrt()
    return transformed * (wanted / actual.clamp_min(EPS)).clamp(max=1.0)


def discounted_beta(beta: Tensor, key: Tensor, encoded_key: Tensor) -> Tensor:
    """Divide beta [B, t, S, H] by the energy that the encoding added to a frame's keys.

    Keys [B, t, S, H, D]; the energy ratio is a mean over S, at least 1.
    """
    before = torch.linalg.vector_norm(key, dim=-1).clamp_min(EPS)
    after = torch.linalg.vector_norm(encoded_key, dim=-1).clamp_min(EPS)
    return beta / (after / before).square().mean(dim=2, keepdim=True).clamp_min(1.0)


def frame_gram(beta: Tensor, key: Tensor, value: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return A = K β Kᵀ [B, t, H, D, D] and U = V β Kᵀ [B, t, H, E, D] of every frame.

    Without values U = Σ β k, E = 1.
    """
    with torch.autocast(device_type=key.device.type, enabled=False):
        key = wide(key).transpose(2, 3)  # [B, t, H, S, D]
        weighted = key * beta.transpose(2, 3).unsqueeze(-1)
        gram = weighted.transpose(-1, -2) @ key
        if value is None:
            return gram, weighted.sum(dim=-2, keepdim=True)
        return gram, wide(value).permute(0, 1, 3, 4, 2) @ weighted


def read_state(state: Tensor, query: Tensor) -> Tensor:
    """Return S q per frame: state [B, t, H, E, D], query [B, t, S, H, D] -> [B, t, S, H, E]."""
    with torch.autocast(device_type=query.device.type, enabled=False):
        return (wide(query).transpose(2, 3) @ state.transpose(-1, -2)).transpose(2, 3)


def gdn_gram(
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `wm_train.kernels.dispatch.gdn_gram`."""
    heads = beta.shape[-1]
    k = normalised(key, weight, norm_eps, heads) * scale
    numerator = frame_gram(
        beta, rotate(k, cos, sin), value.unflatten(-1, (heads, value.shape[-1] // heads))
    )
    return *numerator, *frame_gram(beta, k, None)


def gdn_output(
    query: Tensor,
    state: Tensor,
    normaliser: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm_eps: float,
    eps: float,
) -> Tensor:
    """Compute `wm_train.kernels.dispatch.gdn_output`."""
    q = normalised(query, weight, norm_eps, state.shape[2])
    return (read_state(state, rotate(q, cos, sin)) / (read_state(normaliser, q) + eps)).to(
        query.dtype
    )


def camera_gram(
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    weight: Tensor,
    ray_to_world: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor]:
    """Compute `wm_train.kernels.dispatch.camera_gram`."""
    heads = beta.shape[-1]
    k = normalised(key, weight, norm_eps, heads) * scale
    v = value.unflatten(-1, (heads, value.shape[-1] // heads))
    encoded_key = limit_rms(k, encode(k, ray_to_world, cos, sin))
    encoded_value = limit_rms(v, encode(v, ray_to_world, cos, sin))
    return frame_gram(discounted_beta(beta, k, encoded_key), encoded_key, encoded_value)


def camera_output(
    query: Tensor,
    state: Tensor,
    weight: Tensor,
    world_to_ray: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm_eps: float,
) -> Tensor:
    """Compute `wm_train.kernels.dispatch.camera_output`."""
    q = normalised(query, weight, norm_eps, state.shape[2])
    encoded = limit_rms(q, encode(q, world_to_ray.transpose(-1, -2), cos, sin))
    return encode(read_state(state, encoded).to(query.dtype), world_to_ray, cos, -sin)
