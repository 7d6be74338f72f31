"""Define Waypoint-1.5's backbone: a frame-causal transformer played by keyboard and mouse.

Source: Waypoint-1.5 §2, and the public engines of its weights where the paper leaves room.
- Most blocks see a window of frames; every fourth sees its own frame and every eighth of the past.
- One set of six conditioning projections serves all blocks, which add a bias each. It is held here,
  at the root, and blocks get its results: parameters shared by name do not survive sharding.
- Values of the first block are mixed into those of all others.
- Controls enter every third block; an unknown row is a learned null embedding.
- Norms have no gain, linear layers no bias. The output is a transposed convolution.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.checkpointing import checkpoint
from parallel.local_attention import accumulation_dtype
from parallel.masks import AttentionMask
from parallel.sequence import SequenceShard
from wm_train.conditioning import Conditions
from wm_train.models.init import Rule
from wm_train.models.layers.embed import token_grid
from wm_train.models.spec import WorldModel
from wm_train.models.waypoint.config import WaypointConfig
from wm_train.models.waypoint.layers import (
    Attention,
    BlockContext,
    ControlEmbed,
    ControllerFusion,
    Mlp,
    NoiseEmbed,
    NullControls,
    OutputNorm,
    Patchify,
    Unpatchify,
    rms,
)
from wm_train.models.waypoint.rope import ortho_rope

MODULATIONS = 6  # scale, shift and gate of attention, then of the MLP


class Block(nn.Module):
    """Run one transformer block: attention, controls in some, MLP, under per-frame modulation."""

    PARTS = ("attention", "feed_forward")  # recomputed, and compiled, one by one

    def __init__(self, config: WaypointConfig, index: int) -> None:
        super().__init__()
        self.recompute = config.activation_checkpointing
        self.attn = Attention(config, attention_mask(config, index))
        if config.is_fused(index):
            self.ctrl_mlpfusion = ControllerFusion(config.width)
        self.fused = config.is_fused(index)
        self.mlp = Mlp(config.width, config.mlp_ratio * config.width, config.width)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        control: Tensor | None,
        first: Tensor | None,
        context: BlockContext,
    ) -> tuple[Tensor, Tensor]:
        """Transform x [B, t, S, C] with modulation [B, t, 6, C] and control [B, t, C]; return it
        with the first block's values, which are `first` in all but the first."""
        if self.recompute == "none" or not torch.is_grad_enabled():
            x, first = self.attention(x, modulation, first, context)
            return self.feed_forward(x, modulation, control), first
        # Two halves: while one is recomputed in backward, nothing of the other is in memory.
        again = partial(
            checkpoint, sequence=context.sequence, keep_products=self.recompute == "selective"
        )
        x, first = again(self.attention, x, modulation, first, context)
        return again(self.feed_forward, x, modulation, control), first

    def attention(
        self, x: Tensor, modulation: Tensor, first: Tensor | None, context: BlockContext
    ) -> tuple[Tensor, Tensor]:
        """Run the first half: self-attention."""
        scale, shift, gate = modulation[:, :, :3].unsqueeze(3).unbind(2)
        out, first = self.attn(rms(x) * (1 + scale) + shift, first, context)
        return x + gate * out, first

    def feed_forward(self, x: Tensor, modulation: Tensor, control: Tensor | None) -> Tensor:
        """Run the second half: controls and MLP."""
        scale, shift, gate = modulation[:, :, 3:].unsqueeze(3).unbind(2)
        if self.fused:
            assert control is not None
            x = x + self.ctrl_mlpfusion(x, control)
        return x + gate * self.mlp(rms(x) * (1 + scale) + shift)


class Waypoint(WorldModel):
    """Predict the velocity of a noisy latent video at per-frame noise levels (Waypoint-1.5 §2)."""

    def __init__(self, config: WaypointConfig) -> None:
        super().__init__()
        self.config = config
        width, channels, patch = config.width, config.latent_channels, config.patch_size
        self.patchify = Patchify(channels, width, patch)
        self.denoise_step_emb = NoiseEmbed(config.noise_features, width)
        if config.controls:
            self.ctrl_emb = ControlEmbed(config.controls, config.mlp_ratio * width, width)
            self.ctrl_cfg = NullControls(width)
        self.cond_proj = nn.ModuleList(
            nn.Linear(width, width, bias=False) for _ in range(MODULATIONS)
        )
        self.cond_bias = nn.ParameterList(torch.zeros(width) for _ in range(config.depth))
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.depth))
        self.out_norm = OutputNorm(width)
        self.unpatchify = Unpatchify(channels, width, patch)
        for name in self.unused_parameters():
            self.get_parameter(name).requires_grad_(False)

    def units(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def unused_parameters(self) -> frozenset[str]:
        """Return the first block's share of the first block's values, which is never read."""
        return frozenset({"blocks.0.attn.v_lamb"})

    def switched_parameters(self, names: Iterable[str]) -> list[str]:
        """Return the parameters that `controls` adds."""
        own = ("ctrl_emb.", "ctrl_cfg.", "ctrl_mlpfusion.")
        return sorted(name for name in names if any(word in name for word in own))

    def initial_rule(self, name: str, shape: Sequence[int]) -> Rule | None:
        """Return the initial rule (§2.4): zero modulation and fusion, so that every block starts as
        the identity; half of the first block's values; null embedding 0."""
        if name.endswith("v_lamb"):
            return Rule("constant", 0.5)
        if name.startswith("cond_proj.") or name.endswith("ctrl_mlpfusion.fc2.weight"):
            return Rule("constant", 0.0)
        # its first dimension is the input: the default rule would take the output for it
        return Rule("normal", shape[0] ** -0.5) if name == "unpatchify.weight" else None

    def forward(
        self, latents: Tensor, sigma: Tensor, conditions: Conditions, sequence: SequenceShard
    ) -> Tensor:
        """Map local frames of a batch of clips -> velocity eps - x0 of the same shape.

        latents [B, t, C, h, w]; sigma fp32 [B, t] in [0, 1]; conditions of the whole clip. Raises
        ValueError if h or w does not divide by the patch, or the controls do not fit the clip.
        """
        config, grid = self.config, token_grid(latents, self.config.patch_size)
        noise = self.denoise_step_emb(sigma)
        modulations = self.modulations(noise)
        control = self.controls(conditions, sequence, latents.device) if config.controls else None
        positions = sequence.positions.to(latents.device)
        head_dim, exact = config.width // config.heads, accumulation_dtype(noise.dtype)
        context = BlockContext(sequence, ortho_rope(positions, grid, head_dim, exact))
        x, first = self.patchify(latents), None
        for block, modulation in zip(self.blocks, modulations.unbind(2), strict=True):
            x, first = block(x, modulation, control, first, context)
        return self.unpatchify(self.out_norm(x, noise), grid).contiguous()

    def modulations(self, noise: Tensor) -> Tensor:
        """Compute the modulation of all blocks from the noise embedding: [B, t, C] -> [B, t, L, 6,
        C], L blocks."""
        hidden = F.silu(noise[:, :, None] + torch.stack(list(self.cond_bias)))
        return torch.stack([project(hidden) for project in self.cond_proj], dim=3)

    def controls(
        self, conditions: Conditions, sequence: SequenceShard, device: torch.device
    ) -> Tensor:
        """Return the normed embedding of the local frames' controls, [B, t, C]; the null embedding
        in clips whose controls are dropped."""
        rows, local = conditions.controls, sequence.frames
        wanted = (sequence.clip_frames, self.config.controls)
        if rows is None or tuple(rows.shape[1:]) != wanted:
            got = "none" if rows is None else f"{rows.shape[1]} rows of {rows.shape[2]}"
            raise ValueError(
                f"controls failed: got {got}, expected {wanted[0]} rows of {wanted[1]}, one per"
                " latent frame (key model.controls). Fix: data with controls at latent rate, or"
                " model.controls=0"
            )
        embedded = self.ctrl_emb(rows[:, local.start : local.stop].to(device))
        keep = conditions.controls_keep
        if keep is None:
            keep = torch.ones(len(rows), dtype=torch.bool)
        # always both: a parameter must have a gradient on all processes or on none
        kept = keep.to(device)[:, None, None]
        return rms(torch.where(kept, embedded, self.ctrl_cfg.null_emb))


def attention_mask(config: WaypointConfig, block: int) -> AttentionMask:
    """Return the frames that a block sees: the last few, or its own and a few of the far past."""
    if config.is_global(block):
        return AttentionMask(
            "frame", window=config.global_window, dilation=config.dilation, reach=config.reach
        )
    return AttentionMask("frame", window=config.window)
