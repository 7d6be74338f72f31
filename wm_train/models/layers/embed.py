"""Embed patches, timesteps and captions. Parameter names are those of the public checkpoint
layout."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIME_CHANNELS = 256


class PatchEmbed(nn.Module):
    """Embed latent maps [B, t, C, h, w] -> tokens [B, t, S, width], one per patch x patch cell."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv3d(
            channels, width, kernel_size=(1, patch, patch), stride=(1, patch, patch)
        )

    def forward(self, maps: Tensor) -> Tensor:
        b, t, c, h, w = maps.shape
        p = self.patch
        cells = maps.reshape(b, t, c, h // p, p, w // p, p).permute(0, 1, 3, 5, 2, 4, 6)
        cells = cells.reshape(b, t, (h // p) * (w // p), c * p * p)
        return F.linear(
            cells.to(self.proj.weight.dtype), self.proj.weight.flatten(1), self.proj.bias
        )


def token_grid(latents: Tensor, patch: int) -> tuple[int, int]:
    """Return token rows and columns of a frame of latents [..., h, w]. Raises ValueError where the
    patch does not divide them."""
    h, w = latents.shape[-2:]
    if h % patch or w % patch:
        raise ValueError(
            f"patch embedding failed: got latents of {h}x{w}, expected multiples of patch_size"
            f" {patch} (key model.patch_size). Fix: choose a patch_size that divides both, or"
            " resize the data"
        )
    return h // patch, w // patch


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Convert tokens [B, t, S, patch * patch * C] (C fastest) -> maps [B, t, C, h, w]."""
    b, t, _, features = tokens.shape
    (rows, columns), channels = grid, features // (patch * patch)
    cells = tokens.reshape(b, t, rows, columns, patch, patch, channels).permute(0, 1, 6, 2, 4, 3, 5)
    return cells.reshape(b, t, channels, rows * patch, columns * patch)


class TimestepEmbed(nn.Module):
    """Embed per-frame timesteps [B, t] (sigma * 1000, any float) -> [B, t, width]: cosines then
    sines, and a two-layer MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(TIME_CHANNELS, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, timestep: Tensor) -> Tensor:
        half = TIME_CHANNELS // 2
        exponent = (
            -math.log(10000.0)
            * torch.arange(half, device=timestep.device, dtype=torch.float32)
            / half
        )
        angle = timestep.float()[..., None] * exponent.exp()
        features = torch.cat((angle.cos(), angle.sin()), dim=-1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(features)))


class CaptionProjection(nn.Module):
    """Project captions by the embedder's two-layer MLP."""

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(text_width, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, text: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(text), approximate="tanh"))


class CaptionEmbed(nn.Module):
    """Embed text features [B, L, E] -> [B, L, width]."""

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.y_proj = CaptionProjection(text_width, width)

    def forward(self, text: Tensor) -> Tensor:
        return self.y_proj(text.to(self.y_proj.fc1.weight.dtype))
