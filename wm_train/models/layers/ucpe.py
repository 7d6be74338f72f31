"""Ray-local positional encoding of the camera branch (UCPE; SANA-WM §3.3, eq. 6) and its two stabilisers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wm_train.models.layers.rotary import Rotary, apply_rotary

EPS = 1e-6


class RayEncoding(NamedTuple):
    """What the camera branch needs of the geometry.

    world_to_ray, ray_to_world: rigid transforms D and D^-1 per token, fp32 [B, t, S, 4, 4]; rotary: table for the second half of
    a head's channels.
    """

    world_to_ray: Tensor
    ray_to_world: Tensor
    rotary: Rotary


def encode(x: Tensor, matrix: Tensor, rotary: Rotary, inverse: bool = False) -> Tensor:
    """(matrix ⊕ RoPE) x: groups of four of the first D/2 channels times a per-token 4x4 matrix, the rest rotated.

    x [B, t, S, H, D], matrix [B, t, S, 4, 4] -> [B, t, S, H, D]. `inverse` turns the rotation back.
    """
    half = x.shape[-1] // 2
    geometric, rotated = x.split(half, dim=-1)
    groups = geometric.unflatten(-1, (half // 4, 4)).flatten(-3, -2)  # [B, t, S, H * D/8, 4]
    geometric = (groups @ matrix.to(x.dtype).transpose(-1, -2)).reshape(geometric.shape)
    return torch.cat((geometric, apply_rotary(rotated, rotary, inverse)), dim=-1)


def limit_rms(reference: Tensor, transformed: Tensor) -> Tensor:
    """Scale `transformed` down, never up, to the channel RMS of `reference` per token and head; both [B, t, S, H, D].

    Translations enter the homogeneous coordinates and can grow without bound over a minute; the recurrence must not see that.
    """
    wanted = reference.square().mean(dim=-1, keepdim=True).add(EPS).sqrt()
    actual = transformed.square().mean(dim=-1, keepdim=True).add(EPS).sqrt()
    return transformed * (wanted / actual.clamp_min(EPS)).clamp(max=1.0)


def discounted_beta(beta: Tensor, key: Tensor, encoded_key: Tensor) -> Tensor:
    """beta [B, t, S, H] divided by the energy the encoding added to a frame's keys [B, t, S, H, D] (at least 1, mean over S)."""
    before = torch.linalg.vector_norm(key, dim=-1).clamp_min(EPS)
    after = torch.linalg.vector_norm(encoded_key, dim=-1).clamp_min(EPS)
    inflation = (after / before).square().mean(dim=2, keepdim=True)
    return beta / inflation.clamp_min(1.0)
