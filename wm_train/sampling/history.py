"""Choose the earlier frames that a chunk of a long clip sees, and lay them out with it as a window
(MoWorld §4.2-4.3, eq. 6-9).

A window is [the clip's first frame, frames with a near camera, the frames right before the chunk |
the anchor | the chunk]: latents of one clip under their own time indices, so that a network without
a memory of its own sees a fixed number of frames. The choice is a function of poses, chunk and
configuration alone, computed in fp64 on the host: equal on every rank, mesh and restart. The anchor
stands where the last frame before the chunk does, is noised like the chunk, and is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_shards.fields import relative_poses
from data_shards.time_layout import TimeLayout
from parallel.layout import ClipLayout
from wm_train.conditioning import Conditions
from wm_train.config.kinds import HistoryConfig
from wm_train.noise import NoiseKey, normal, uniform

GRID = 32  # points of a picture, each way, over which its rays are averaged
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Window:
    """Hold the latent frames of a window of one clip: `ids`, of which the first `slots` are
    history, the next the anchor, and the rest the chunk."""

    ids: tuple[int, ...]
    slots: int

    @property
    def layout(self) -> ClipLayout:
        """Return the window as a clip whose frames have their own time indices."""
        return ClipLayout(len(self.ids), time_ids=self.ids)

    @property
    def made(self) -> range:
        """Return the latent frames of the clip from the anchor on, which are noised together."""
        return range(self.ids[self.slots], self.ids[-1] + 1)


def window_of(cameras: Numbers | None, chunk: range, config: HistoryConfig) -> Window:
    """Return the window of a chunk. cameras: of `camera_latents`, rows of all frames before the
    chunk and of the chunk; None: near slots repeat the first frame."""
    last, slots = chunk.start - 1, config.slots
    recent = list(range(max(1, last + 1 - config.recent), last + 1)) if config.recent else []
    near: list[int] = []
    if cameras is not None and config.near:
        free = np.arange(1, min([last, *recent]))
        wanted = cameras[chunk.start : chunk.stop].mean(axis=0)
        far = np.linalg.norm(cameras[free] - wanted, axis=1)
        near = sorted(free[np.argsort(far, kind="stable")[: config.near]].tolist())
    spare = [0] * (slots - len(near) - len(recent))
    return Window((*spare, *near, *recent, last, *chunk), slots)


def camera_latents(
    c2w: Numbers, intrinsics: Numbers, image_size: tuple[int, int], time: TimeLayout, scale: float
) -> Numbers:
    """Return the mean Plücker coordinates of the r raw frames behind each latent frame, [T, 6 r]
    fp64, relative to the first raw frame: c2w [F, 4, 4], intrinsics [F, 4] in pixels of image_size.

    The mean of moment o x d and direction d over a picture is that of its mean ray, so nothing of
    the picture's size is computed. scale: units of o in a metre.
    """
    poses = relative_poses(np.asarray(c2w, np.float64))
    rays = mean_rays(np.asarray(intrinsics, np.float64), image_size)
    direction = np.einsum("fij,fj->fi", poses[:, :3, :3], rays)
    moment = np.cross(scale * poses[:, :3, 3], direction)
    both = np.concatenate((moment, direction), axis=1)
    return both[raw_frames(latents_of(len(c2w), time), time)].reshape(-1, 6 * time.stride)


def mean_rays(intrinsics: Numbers, image_size: tuple[int, int]) -> Numbers:
    """Return the mean unit viewing direction of each frame in its camera, [F, 3] fp64."""
    lenses, which = np.unique(intrinsics, axis=0, return_inverse=True)
    height, width = image_size
    y, x = (np.arange(GRID) + 0.5) * height / GRID, (np.arange(GRID) + 0.5) * width / GRID
    rays = np.ones((len(lenses), GRID, GRID, 3))
    fx, fy, cx, cy = (lenses[:, i, None, None] for i in range(4))
    rays[..., 0], rays[..., 1] = (x[None, None, :] - cx) / fx, (y[None, :, None] - cy) / fy
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    found: Numbers = rays.mean(axis=(1, 2))[which.reshape(-1)]
    return found


def host_numbers(x: Tensor) -> Numbers:
    """Return a tensor's values in fp64 on the host, where frames are chosen by them. A rehearsal,
    whose tensors have none, puts others in their place (`wm_train/plan/rehearsal.py`)."""
    numbers: Numbers = x.cpu().double().numpy()
    return numbers


def latents_of(raw_frames: int, time: TimeLayout) -> range:
    """Return the latent frames that so many raw frames fill."""
    return range(time.latents(raw_frames))


def raw_frames(ids: tuple[int, ...] | range, time: TimeLayout) -> list[list[int]]:
    """Return the r raw frames behind each latent frame; one that encodes a single raw frame has it
    r times."""
    spans = (range(time.start(i), time.start(i + 1)) for i in ids)
    return [[*span] * (time.stride // len(span)) for span in spans]


def chunk_shares(key: NoiseKey, draws: Tensor) -> list[float]:
    """Return which chunk of each clip is trained on, as a share of its chunks from 0 to 1."""
    shares: list[float] = host_numbers(uniform(key, "ar/chunk", draws.cpu())).tolist()
    return shares


def clip_cameras(
    conditions: Conditions, config: HistoryConfig, rows: int
) -> list[Numbers] | list[None]:
    """Return the camera latents of each of so many clips, None where no slot asks for them. Raises
    ValueError for near slots without cameras."""
    c2w, lenses = conditions.c2w, conditions.intrinsics
    if not config.near:
        return [None] * rows
    if c2w is None or lenses is None:
        raise ValueError(
            f"history failed: got clips without cameras, expected poses for {config.near} frames"
            " with a near camera (key history.near). Fix: history.near=0, or data with poses"
        )
    given = (conditions.image_size, conditions.time, config.camera_scale)
    pairs = zip(host_numbers(c2w), host_numbers(lenses), strict=True)
    return [camera_latents(poses, pinholes, *given) for poses, pinholes in pairs]


def window_conditions(
    conditions: Conditions, row: int, window: Window, shown: Tensor
) -> Conditions:
    """Return the conditions of one clip's window: the raw frames' members of its frames, each frame
    with r of its own.

    shown: [1, W, C, h, w], the latents that a model with image channels is shown there, history and
    anchor; the rest counts for nothing. The first slot is the clip's first frame, to which poses
    stay relative.
    """
    own, time = conditions.rows(slice(row, row + 1)), conditions.time
    index = torch.tensor(raw_frames(window.ids, time)).flatten()
    raw = {n: own.fields[n] for n in ("c2w", "intrinsics") if n in own.fields}
    fields = {name: value[:, index.to(value.device)] for name, value in raw.items()}
    seen = torch.arange(len(window.ids), device=shown.device) <= window.slots
    moved = own.with_fields(**fields, shown=shown, shown_frames=seen[None])
    return replace(moved, grouped=True)


def window_noise(
    key: NoiseKey, purpose: str, draw: Tensor, window: Window, shape: tuple[int, ...], whole: bool
) -> Tensor:
    """Return noise by the frames' own time indices, [1, W, C, h, w] from draw [1]; whole: False
    leaves history zero."""
    made = normal(key, purpose, draw, window.made, shape)
    if not whole:
        return torch.cat((made.new_zeros(1, window.slots, *shape), made), dim=1)
    past = {i: normal(key, purpose, draw, (i, i + 1), shape) for i in {*window.ids[: window.slots]}}
    return torch.cat([*(past[i] for i in window.ids[: window.slots]), made], dim=1)
