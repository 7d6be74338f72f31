from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def camera_path():
    """camera_path(batch, frames, generator) -> a smooth random path, c2w [B, F, 4, 4] away from the origin, and intrinsics [B, F, 4] of
    a 96 x 160 image."""

    def make(batch: int, frames: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        turn = torch.randn(batch, frames, 3, generator=generator).cumsum(1) * 0.03 + torch.randn(batch, 1, 3, generator=generator)
        skew = torch.zeros(batch, frames, 3, 3)
        for i, j, k, sign in ((0, 1, 2, -1.0), (0, 2, 1, 1.0), (1, 2, 0, -1.0)):
            skew[..., i, j], skew[..., j, i] = sign * turn[..., k], -sign * turn[..., k]
        c2w = torch.eye(4).repeat(batch, frames, 1, 1)
        c2w[..., :3, :3] = torch.matrix_exp(skew.double()).float()
        walk = torch.randn(batch, frames, 3, generator=generator).cumsum(1) * 0.05
        c2w[..., :3, 3] = walk + torch.randn(batch, 1, 3, generator=generator)
        intrinsics = torch.tensor([90.0, 95.0, 80.0, 48.0]) + torch.randn(batch, frames, 4, generator=generator)
        return c2w, intrinsics

    return make
