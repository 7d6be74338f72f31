"""Camera geometry: raymaps, ray frames, relative poses, crops, frame bookkeeping, against the
public pipeline."""

from __future__ import annotations

import diffusers.models.transformers.transformer_sana_wm as public
import numpy as np
import pytest
import torch
from diffusers.pipelines.sana_wm.cam_utils import prepare_camera, transform_intrinsics_for_crop

from data_shards.time_layout import TimeLayout
from wm_train.conditioning.camera import (
    cropped_intrinsics,
    invert_pose,
    packed_plucker,
    plucker_rays,
    raw_frame_index,
    ray_frames,
    relative_poses,
    scaled_intrinsics,
    up_latitude_map,
)

SIZE, GRID = (96, 160), (6, 10)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_plucker_rays_are_unit_directions_and_orthogonal_moments(camera_path):
    c2w, intrinsics = camera_path(3, 9, generator())
    rays = plucker_rays(c2w, scaled_intrinsics(intrinsics, SIZE, GRID), GRID)
    direction, moment = rays[..., :3], rays[..., 3:]
    assert rays.shape == (3, 9, *GRID, 6)
    assert (direction.norm(dim=-1) - 1).abs().max() < 1e-6
    assert (direction * moment).sum(-1).abs().max() < 1e-6
    # the moment does not depend on which point of the ray is taken
    point = c2w[:, :, None, None, :3, 3] + 2.5 * direction
    assert (torch.linalg.cross(point, direction) - moment).abs().max() < 1e-5


@pytest.mark.parametrize("frames", [1, 2, 11])
def test_packing_equals_the_public_pipeline(camera_path, frames):
    c2w, intrinsics = camera_path(1, (frames - 1) * 8 + 1, generator())
    expected = prepare_camera(
        np.asarray(c2w[0]), np.asarray(intrinsics[0]), target_size=SIZE, vae_stride=(8, 16, 16)
    )
    ours = packed_plucker(c2w, intrinsics, SIZE, GRID, TimeLayout(8), (0,), frames, (0, frames))[0]
    assert (ours.transpose(0, 1) - expected["chunk_plucker"]).abs().max() < 1e-6
    anchor, _, origin, _ = raw_frame_index((0,), frames, 0, frames, TimeLayout(8))
    pose, scaled = (
        relative_poses(c2w, anchor, origin)[0],
        scaled_intrinsics(intrinsics[:, anchor], SIZE, GRID)[0],
    )
    assert (torch.cat((pose.flatten(1), scaled), dim=1) - expected["raymap"]).abs().max() < 1e-6
    half = (frames // 2, frames)
    part = packed_plucker(c2w, intrinsics, SIZE, GRID, TimeLayout(8), (0,), frames, half)[0]
    assert torch.equal(part, ours[frames // 2 :])


def test_ray_frames_and_the_absolute_map_equal_the_public_model(camera_path):
    c2w, intrinsics = camera_path(2, 5, generator())
    scaled = scaled_intrinsics(intrinsics, SIZE, GRID)
    pose = relative_poses(c2w, range(5), [0] * 5)
    rays, absolute = public._process_camera_conditions_ucpe(
        torch.cat((pose.flatten(2), scaled), -1), 2, (5, *GRID), (1, 1, 1)
    )
    ours = ray_frames(pose, scaled, GRID)
    assert (ours - rays).abs().max() < 1e-6
    assert (up_latitude_map(pose, scaled, GRID) - absolute).abs().max() < 1e-5
    assert (invert_pose(ours) @ ours - torch.eye(4)).abs().max() < 1e-5


def test_poses_are_relative_and_do_not_feel_where_the_world_lies(camera_path):
    c2w, intrinsics = camera_path(2, 17, generator())
    elsewhere = camera_path(2, 1, torch.Generator().manual_seed(8))[0] @ c2w
    here, there = (relative_poses(poses, range(17), [0] * 17) for poses in (c2w, elsewhere))
    assert torch.equal(here[:, 0], torch.eye(4).expand(2, 4, 4))
    assert (here - there).abs().max() < 1e-5
    rays, moved = (
        packed_plucker(poses, intrinsics, SIZE, GRID, TimeLayout(8), (0,), 3, (0, 3))
        for poses in (c2w, elsewhere)
    )
    assert (rays - moved).abs().max() < 1e-5


def test_intrinsics_follow_resize_and_crop(camera_path):
    intrinsics = camera_path(1, 4, generator())[1][0]
    expected = transform_intrinsics_for_crop(np.asarray(intrinsics), (160, 96), (240, 140), (20, 6))
    assert (
        np.abs(
            np.asarray(cropped_intrinsics(intrinsics, (96, 160), (140, 240), (6, 20))) - expected
        ).max()
        < 1e-4
    )


def test_raw_frames_of_packed_documents():
    """Documents of 3 and 2 latent frames bring 17 and 9 raw frames; the second starts its own count
    at raw frame 17."""
    anchor, packed, origin, total = raw_frame_index((0, 3), 5, 0, 5, TimeLayout(8))
    assert anchor == [0, 8, 16, 17, 25]
    assert origin == [0, 0, 0, 17, 17]
    assert total == 26
    assert packed[0] == list(range(8))
    assert packed[1] == list(range(1, 9))
    assert packed[4] == list(range(18, 26))
    assert raw_frame_index((0, 3), 5, 4, 5, TimeLayout(8))[0] == [25]
    assert raw_frame_index((0,), 1, 0, 1, TimeLayout(8))[1] == [[0] * 8]
    assert raw_frame_index((0,), 5, 2, 2, TimeLayout(8))[0] == []
