"""Encode rays for the camera branch of softmax blocks: ray-local positions (UCPE; SANA-WM §3.3, eq.
6).

GDN blocks have it inside `wm_train.kernels.camera_gram` and `camera_output`; the pieces are the
same.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from wm_train.kernels.gdn.reference import encode, limit_rms
from wm_train.models.layers.rotary import Rotary


class RayEncoding(NamedTuple):
    """Hold the geometry that the camera branch needs.

    world_to_ray, ray_to_world: rigid transforms D and D^-1 per token, fp32 [B, t, S, 4, 4]; rotary:
    table for the second half of a head's channels.
    """

    world_to_ray: Tensor
    ray_to_world: Tensor
    rotary: Rotary


def encode_rays(
    q: Tensor, k: Tensor, v: Tensor, rays: RayEncoding
) -> tuple[Tensor, Tensor, Tensor]:
    """Encode by eq. 6: q by D^T, k and v by D^-1, each limited to its RMS; [B, t, S, H, D] each."""
    q = limit_rms(q, encode(q, rays.world_to_ray.transpose(-1, -2), *rays.rotary))
    k, v = (limit_rms(x, encode(x, rays.ray_to_world, *rays.rotary)) for x in (k, v))
    return q, k, v


def decode_rays(out: Tensor, rays: RayEncoding) -> Tensor:
    """Decode by eq. 6, last line: attention output from ray frames back to the world, [B, t, S, H,
    D]."""
    return encode(out, rays.world_to_ray, rays.rotary.cos, -rays.rotary.sin)
