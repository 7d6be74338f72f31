"""Compute camera geometry in fp32: relative poses, per-token rays, UCPE frames, Plücker raymaps.

Raymaps are packed at latent rate. Source: SANA-WM §3.3 (eq. 6 and "Raw-Frame Plücker Mixing");
where the paper is silent (pixel grid, which raw frames the first latent frame packs) this follows
the public model. Poses are camera to world in OpenCV axes.

A clip may hold several documents (videos packed one after the other), each with the raw frames of
its latents; poses are relative to its own first raw frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data_shards.time_layout import TimeLayout


@dataclass(frozen=True)
class Packing:
    """Describe how raymaps of the r raw frames behind a latent frame become channels.

    moment_first: (o x d, d) instead of (d, o x d); pixel: where in its cell a ray passes, 0 or 0.5;
    by_coordinate: channel r i + k for coordinate i of the k-th raw frame, instead of 6 k + i;
    repeat_first: a document's latent 0 packs raw frame 0 r times, instead of 0 .. r - 1.
    scale: units of the maps in a metre. The default is SANA-WM's; Wan's camera adapters
    (VideoX-Fun, MoWorld §3.2) are `WAN_PACKING`.
    """

    moment_first: bool = False
    pixel: float = 0.0
    by_coordinate: bool = False
    repeat_first: bool = False
    scale: float = 1.0


SANA_PACKING = Packing()
WAN_PACKING = Packing(moment_first=True, pixel=0.5, by_coordinate=True, repeat_first=True)


def raw_frame_index(
    document_starts: Sequence[int], frames: int, start: int, stop: int, time: TimeLayout
) -> tuple[list[int], list[list[int]], list[int], int]:
    """Return the raw frames of latent frames start..stop of a clip of `frames` latent frames.

    Returns (anchor, packed, origin, total): per latent frame the raw frame of its pose, the
    r raw frames that it packs, and the first raw frame of its document; and the number of raw
    frames of the whole clip. The pose is that of the last raw frame that a latent encodes, and it
    packs what it encodes; frame 0 of a causal codec encodes raw frame 0 alone but packs 0 .. r-1,
    as the public model does.
    """
    r = time.stride
    ends = [*document_starts[1:], frames]
    anchor, packed, origin = [], [], []
    total = 0
    for first, end in zip(document_starts, ends):
        last = total + time.raw(end - first) - 1
        for frame in range(max(first, start), min(end, stop)):
            position = frame - first
            lead = total + time.start(position)
            anchor.append(total + time.start(position + 1) - 1)
            packed.append([min(lead + k, last) for k in range(r)])
            origin.append(total)
        total = last + 1
    return anchor, packed, origin, total


def invert_pose(pose: Tensor) -> Tensor:
    """Invert rigid transforms [..., 4, 4], in closed form."""
    rotation = pose[..., :3, :3].transpose(-1, -2)
    translation = -rotation @ pose[..., :3, 3:]
    top = torch.cat((rotation, translation), dim=-1)
    bottom = torch.zeros_like(pose[..., 3:, :])
    bottom[..., 3] = 1.0
    return torch.cat((top, bottom), dim=-2)


def relative_poses(c2w: Tensor, frame: Sequence[int], origin: Sequence[int]) -> Tensor:
    """Return poses of raw frames `frame` in the coordinates of raw frames `origin`.

    [B, F, 4, 4] -> [B, len(frame), 4, 4]; exactly I where both are the same frame.
    """
    c2w = c2w.float()
    relative = invert_pose(c2w[:, list(origin)]) @ c2w[:, list(frame)]
    same = torch.tensor(
        [i == j for i, j in zip(frame, origin)], dtype=torch.bool, device=c2w.device
    )
    return torch.where(same[None, :, None, None], torch.eye(4, device=c2w.device), relative)


def scaled_intrinsics(
    intrinsics: Tensor, image_size: tuple[int, int], grid: tuple[int, int]
) -> Tensor:
    """Convert intrinsics [..., 4] of an image (height, width) to units of a grid (h, w)."""
    vertical, horizontal = grid[0] / image_size[0], grid[1] / image_size[1]
    return intrinsics.float() * torch.tensor(
        [horizontal, vertical, horizontal, vertical], device=intrinsics.device
    )


def cropped_intrinsics(
    intrinsics: Tensor,
    source_size: tuple[int, int],
    resized_size: tuple[int, int],
    crop: tuple[int, int],
) -> Tensor:
    """Return intrinsics [..., 4] after a resize and a crop.

    Sizes are (height, width), crop is (top, left) in the resized image.
    """
    scaled = scaled_intrinsics(intrinsics, source_size, resized_size)
    return scaled - torch.tensor(
        [0.0, 0.0, float(crop[1]), float(crop[0])], device=intrinsics.device
    )


def camera_rays(intrinsics: Tensor, grid: tuple[int, int], pixel: float = 0.0) -> Tensor:
    """Return unit viewing directions in the camera frame, [..., 4] -> [..., h, w, 3].

    Cell (i, j) is the point (i + pixel, j + pixel): its corner, or with 0.5 its centre.
    """
    h, w = grid
    fx, fy, cx, cy = (intrinsics[..., i, None, None] for i in range(4))
    rows, columns = (
        torch.arange(n, device=intrinsics.device, dtype=intrinsics.dtype) + pixel for n in (h, w)
    )
    y, x = (rows[:, None] - cy) / fy, (columns[None, :] - cx) / fx
    x, y = torch.broadcast_tensors(x, y)
    return F.normalize(torch.stack((x, y, torch.ones_like(x)), dim=-1), dim=-1)


def plucker_rays(
    pose: Tensor, intrinsics: Tensor, grid: tuple[int, int], packing: Packing = SANA_PACKING
) -> Tensor:
    """Return Plücker coordinates of every grid point: direction d and moment o x d, in the order of
    `packing`.

    Pose [..., 4, 4] and intrinsics [..., 4] (in grid units) -> [..., h, w, 6].
    """
    rays = camera_rays(intrinsics, grid, packing.pixel)
    direction = torch.einsum("...ij,...hwj->...hwi", pose[..., :3, :3], rays)
    origin = packing.scale * pose[..., None, None, :3, 3].expand_as(direction)
    moment = torch.linalg.cross(origin, direction)
    both = (moment, direction) if packing.moment_first else (direction, moment)
    return torch.cat(both, dim=-1)


def packed_plucker(
    c2w: Tensor,
    intrinsics: Tensor,
    image_size: tuple[int, int],
    grid: tuple[int, int],
    time: TimeLayout,
    document_starts: Sequence[int],
    frames: int,
    local: tuple[int, int],
    packing: Packing = SANA_PACKING,
) -> Tensor:
    """Return raymaps of the raw frames behind each latent frame (SANA-WM §3.3, fine branch; MoWorld
    §3.2, eq. 2-4).

    Covers latent frames local[0]..local[1]. c2w [B, F, 4, 4], intrinsics [B, F, 4] in pixels of
    image_size -> fp32 [B, t, 6 r, h, w], r raw frames of a latent, channels as `packing` orders
    them. Raises ValueError if F does not fit `frames`.
    """
    anchor, packed, origin, total = raw_frame_index(document_starts, frames, *local, time)
    check_raw_frames(c2w, total, frames)
    if packing.repeat_first:
        packed = [
            [a] * time.stride if a == first else own
            for own, a, first in zip(packed, anchor, origin)
        ]
    flat = [index for group in packed for index in group]
    pose = relative_poses(c2w, flat, [index for index in origin for _ in range(time.stride)])
    scaled = scaled_intrinsics(intrinsics[:, flat], image_size, grid)
    b, t = c2w.shape[0], len(packed)
    rays = plucker_rays(pose, scaled, grid, packing).reshape(b, t, time.stride, *grid, 6)
    order = (0, 1, 5, 2, 3, 4) if packing.by_coordinate else (0, 1, 2, 5, 3, 4)
    return rays.permute(order).reshape(b, t, time.stride * 6, *grid)


def check_raw_frames(c2w: Tensor, expected: int, frames: int) -> None:
    """Raise ValueError unless c2w [B, F, 4, 4] fits a clip of `frames` latent frames."""
    if c2w.shape[1] != expected:
        raise ValueError(
            f"camera conditioning failed: got {c2w.shape[1]} raw-frame poses, expected {expected}"
            f" for {frames} latent frames. Fix: pass the poses of the whole clip, one per raw frame"
        )


def ray_frames(pose: Tensor, intrinsics: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the world-to-ray transforms D of UCPE (SANA-WM §3.3).

    Pose [..., 4, 4] and intrinsics [..., 4] (in grid units) -> [..., h, w, 4, 4]. The ray frame has
    z along the viewing direction, x = norm(u x z) with u the camera's vertical axis, y = z x x, and
    its origin at the camera centre.
    """
    rotation, centre = pose[..., :3, :3], pose[..., :3, 3]
    z = F.normalize(
        torch.einsum("...ij,...hwj->...hwi", rotation, camera_rays(intrinsics, grid)),
        dim=-1,
        eps=1e-6,
    )
    vertical = rotation[..., None, None, :, 1].expand_as(z)
    x = F.normalize(torch.linalg.cross(vertical, z), dim=-1, eps=1e-6)
    y = F.normalize(torch.linalg.cross(z, x), dim=-1, eps=1e-6)
    world_to_ray = torch.stack((x, y, z), dim=-2)  # rows are the axes of the ray frame
    shift = -torch.einsum("...ij,...j->...i", world_to_ray, centre[..., None, None, :].expand_as(z))
    top = torch.cat((world_to_ray, shift[..., None]), dim=-1)
    bottom = torch.zeros_like(top[..., :1, :])
    bottom[..., 3] = 1.0
    return torch.cat((top, bottom), dim=-2)


UP_STEP = 0.1  # radians by which a ray is turned towards "up" to see where up lies in the image


def up_latitude_map(pose: Tensor, intrinsics: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return UCPE's absolute map: image direction of world up (2) and latitude of the ray (1).

    Pose [..., 4, 4] and intrinsics [..., 4] -> [..., h, w, 3]. "Up" is -y of the world, that is of
    the first camera. The rotation follows the public model exactly: the last term of its Rodrigues
    formula is not k (k . v), which would vanish, but k * k times the sum of v; released weights
    were trained with that map.
    """
    rotation = pose[..., :3, :3]
    v = F.normalize(
        torch.einsum("...ij,...hwj->...hwi", rotation, camera_rays(intrinsics, grid)),
        dim=-1,
        eps=1e-8,
    )
    latitude = torch.atan2(-v[..., 1], torch.sqrt(v[..., 0] ** 2 + v[..., 2] ** 2))
    up = v.new_tensor([0.0, -1.0, 0.0]).expand_as(v)
    axis = torch.linalg.cross(v, up)
    axis = axis / axis.norm(dim=-1, keepdim=True).clamp_min(1e-8)
    step = v.new_tensor(UP_STEP)
    turned = (
        v * step.cos()
        + torch.linalg.cross(axis, v) * step.sin()
        + axis * axis * v.sum(-1, keepdim=True) * (1 - step.cos())
    )
    seen = torch.einsum("...ji,...hwj->...hwi", rotation, turned)
    fx, fy, cx, cy = (intrinsics[..., i, None, None] for i in range(4))
    dx = (
        fx * seen[..., 0] / seen[..., 2]
        + cx
        - torch.arange(grid[1], device=v.device, dtype=v.dtype)
    )
    dy = (
        fy * seen[..., 1] / seen[..., 2]
        + cy
        - torch.arange(grid[0], device=v.device, dtype=v.dtype)[:, None]
    )
    direction = torch.stack((dx, dy), dim=-1)
    direction = direction / direction.norm(dim=-1, keepdim=True).clamp_min(1e-8)
    return torch.cat((direction, latitude[..., None]), dim=-1)
