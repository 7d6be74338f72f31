"""An attention-only world model: every token sees the whole clip."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from lab.config import AttentionConfig
from torch import Tensor, nn

from parallel.checkpointing import checkpoint
from parallel.sequence import SequenceShard
from wm_train.conditioning import Conditions
from wm_train.models.layers.embed import PatchEmbed, TimestepEmbed, unpatchify
from wm_train.models.layers.rotary import Rotary, rotary_tables
from wm_train.models.spec import WorldModel


class Block(nn.Module):
    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        width, self.heads = config.channels, config.queries
        self.recompute = config.activation_checkpointing
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, level: Tensor, rotary: Rotary, sequence: SequenceShard) -> Tensor:
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.run(x, level, rotary, sequence)
        keep = self.recompute == "selective"
        return checkpoint(
            self.run, x, level, rotary, sequence, sequence=sequence, keep_products=keep
        )

    def run(self, x: Tensor, level: Tensor, rotary: Rotary, sequence: SequenceShard) -> Tensor:
        """x [B, t, S, C], level [B, t, 1, C] -> [B, t, S, C]."""
        seen = F.layer_norm(x, x.shape[-1:]) + level
        q, k, v = self.qkv(seen).unflatten(-1, (3, self.heads, -1)).unbind(3)
        attended = sequence.attend(turned(q, rotary), turned(k, rotary), v)
        x = x + self.out(attended.flatten(3).to(x.dtype))
        return x + self.down(F.gelu(self.up(F.layer_norm(x, x.shape[-1:]) + level)))


class AttentionWorld(WorldModel):
    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.config, width = config, config.channels
        self.into = PatchEmbed(config.latent_channels, width, config.cell)
        self.level = TimestepEmbed(width)
        if config.buttons:
            self.pressed = nn.Linear(config.buttons, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.back = nn.Linear(width, config.cell**2 * config.latent_channels)

    def units(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def forward(
        self, latents: Tensor, sigma: Tensor, conditions: Conditions, sequence: SequenceShard
    ) -> Tensor:
        cell, config = self.config.cell, self.config
        grid = (latents.shape[-2] // cell, latents.shape[-1] // cell)
        level = self.level(sigma * 1000)
        if config.buttons and conditions.controls is not None:
            local = conditions.controls[:, sequence.frames.start : sequence.frames.stop]
            level = level + self.pressed(local.to(level.dtype))
        head_width = config.channels // config.queries
        rotary = rotary_tables(sequence.positions.to(latents.device), grid, head_width)
        x = self.into(latents)
        for block in self.blocks:
            x = block(x, level[:, :, None], rotary, sequence)
        return unpatchify(self.back(x), grid, cell)


def turned(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the pairs of [B, t, S, H, D]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    pairs = (even * rotary.cos - odd * rotary.sin, even * rotary.sin + odd * rotary.cos)
    return torch.stack(pairs, -1).flatten(-2).to(x.dtype)
