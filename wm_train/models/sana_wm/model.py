"""Define SANA-WM's backbone: frame-wise GDN blocks with softmax at every n-th, camera conditioned
(SANA-WM §3.2, §3.3, §5.1).

Module and parameter names are those of the public checkpoint (diffusers' SanaWMTransformer3DModel),
so weights pass both ways by name. Everything that crosses frames goes through the verbs of
`SequenceShard`; the rest is per frame or per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.checkpointing import checkpoint
from parallel.masks import FULL, AttentionMask
from parallel.sequence import SequenceShard
from wm_train.conditioning import Conditions
from wm_train.conditioning.camera import (
    check_raw_frames,
    invert_pose,
    packed_plucker,
    raw_frame_index,
    ray_frames,
    relative_poses,
    scaled_intrinsics,
    up_latitude_map,
)
from wm_train.models.init import Rule
from wm_train.models.layers.cross_attention import CrossAttention
from wm_train.models.layers.embed import (
    CaptionEmbed,
    PatchEmbed,
    TimestepEmbed,
    token_grid,
    unpatchify,
)
from wm_train.models.layers.rotary import rotary_tables
from wm_train.models.sana_wm.attention import (
    UNUSED_IN_SOFTMAX,
    BlockContext,
    CameraAttention,
    GatedDeltaNet,
    SoftmaxAttention,
)
from wm_train.models.sana_wm.config import PLUCKER_FRAMES, SanaWMConfig
from wm_train.models.sana_wm.ffn import GatedConvFeedForward
from wm_train.models.sana_wm.public import stage_parts
from wm_train.models.sana_wm.ucpe import RayEncoding
from wm_train.models.spec import WorldModel

TIMESTEPS = 1000.0  # sigma 1 is timestep 1000


class Block(nn.Module):
    """Run one transformer block: attention, Plücker injection, cross-attention, convolutional FFN,
    all under per-frame AdaLN."""

    PARTS = ("attention", "feed_forward")  # recomputed, and compiled, one by one

    def __init__(self, config: SanaWMConfig, softmax: bool) -> None:
        super().__init__()
        width = config.width
        self.recompute = config.activation_checkpointing
        self.scale_shift_table = nn.Parameter(torch.zeros(6, width))
        if config.camera and config.plucker:
            self.plucker_proj = nn.Linear(width, width)
        self.attn = (
            SoftmaxAttention(width, config.heads, config.camera)
            if softmax
            else GatedDeltaNet(width, config.heads, config.camera, config.conv_kernel)
        )
        if config.text_width:
            self.cross_attn = CrossAttention(width, config.heads)
        self.mlp = GatedConvFeedForward(width, int(width * config.ffn_ratio))

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        plucker: Tensor | None,
        text: Tensor | None,
        context: BlockContext,
    ) -> Tensor:
        """Transform x [B, t, S, C] with modulation [B, t, 6, C], plucker [B, t, S, C], text [B, L,
        C] -> [B, t, S, C]."""
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.feed_forward(
                self.attention(x, modulation, plucker, text, context), modulation, context
            )
        # Two halves: while one is recomputed in backward, nothing of the other is in memory.
        again = partial(
            checkpoint, sequence=context.sequence, keep_products=self.recompute == "selective"
        )
        return again(
            self.feed_forward,
            again(self.attention, x, modulation, plucker, text, context),
            modulation,
            context,
        )

    def attention(
        self,
        x: Tensor,
        modulation: Tensor,
        plucker: Tensor | None,
        text: Tensor | None,
        context: BlockContext,
    ) -> Tensor:
        """Run the first half: self-attention, Plücker injection, cross-attention."""
        shift, scale, gate = self.modulation_rows(modulation, slice(0, 3))
        x = x + gate * self.attn(modulate(x, shift, scale), context)
        if plucker is not None:
            injected = self.plucker_proj(plucker)
            x = x + (
                injected
                if context.camera_keep is None
                else injected * context.camera_keep.to(x.dtype)
            )
        return x if text is None else x + self.cross_attn(x, text, context.text_mask)

    def feed_forward(self, x: Tensor, modulation: Tensor, context: BlockContext) -> Tensor:
        """Run the second half: the convolutional FFN."""
        shift, scale, gate = self.modulation_rows(modulation, slice(3, 6))
        return x + gate * self.mlp(
            modulate(x, shift, scale), context.grid, context.sequence, context.edges
        )

    def modulation_rows(self, modulation: Tensor, rows: slice) -> tuple[Tensor, ...]:
        """Return shift, scale and gate of one half, [B, t, 1, C] each."""
        return (self.scale_shift_table[rows] + modulation[:, :, rows]).unsqueeze(3).unbind(2)


class FinalLayer(nn.Module):
    """Apply the modulated norm and the zero-initialised output head."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, features)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, width))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Map x [B, t, S, C] and time [B, t, C] -> [B, t, S, features], in the type of its weights.

        They are fp32 in a bf16 model, too: two networks are subtracted in distillation, and one
        that is guided from its own outputs, and rounding of outputs is all that is left of a small
        difference.
        """
        x, time = x.to(self.linear.weight.dtype), time.to(self.linear.weight.dtype)
        shift, scale = (self.scale_shift_table + time.unsqueeze(2)).unsqueeze(3).unbind(2)
        return self.linear(modulate(x, shift, scale))


class SanaWM(WorldModel):
    """Predict the velocity of a noisy latent video at per-frame noise levels (SANA-WM §3)."""

    def __init__(self, config: SanaWMConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.width, config.patch_size
        self.x_embedder = PatchEmbed(config.latent_channels, width, patch)
        self.t_embedder = TimestepEmbed(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        if config.text_width:
            self.y_embedder = CaptionEmbed(config.text_width, width)
            self.attention_y_norm = nn.RMSNorm(width, eps=1e-5)
        if config.camera and config.plucker:
            self.plucker_embedder = PatchEmbed(6 * PLUCKER_FRAMES, width, patch)
        if config.camera:
            self.raymap_embedder = PatchEmbed(3, width, patch)
        self.blocks = nn.ModuleList(Block(config, self.is_softmax(i)) for i in range(config.depth))
        self.final_layer = FinalLayer(width, patch * patch * config.latent_channels)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in self.unused_parameters())

    def is_softmax(self, block: int) -> bool:
        every = self.config.softmax_every
        return every > 0 and (block + 1) % every == 0

    def exact_units(self) -> Sequence[nn.Module]:
        """Return the output head."""
        return (self.final_layer,)

    def units(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def switched_parameters(self, names: Iterable[str]) -> list[str]:
        return stage_parts(names)

    def use_kernels(self, engine: str) -> None:
        for module in self.modules():
            if isinstance(module, CameraAttention):
                module.engine = engine

    def unused_parameters(self) -> frozenset[str]:
        """Return parameters that exist for the checkpoint layout only: kept on export, never read
        or trained."""
        softmax = [i for i in range(self.config.depth) if self.is_softmax(i)]
        unused = {f"blocks.{i}.attn.{name}" for i in softmax for name in UNUSED_IN_SOFTMAX}
        if self.config.camera and self.config.plucker:
            unused |= {"raymap_embedder.proj.weight", "raymap_embedder.proj.bias"}
        return frozenset(unused)

    def initial_rule(self, name: str, shape: Sequence[int]) -> Rule | None:
        """Return the initial rule: zero output head and gates as DiTs do; zero camera injections so
        that a pretrained model starts unchanged (§3.3)."""
        if name.endswith("A_log"):
            return Rule("log_uniform", 16.0)
        if name.endswith("dt_bias"):
            return Rule("inverse_softplus", 0.1, low=0.001)
        if name.endswith((".conv_k.weight", ".conv_k_cam.weight")):
            return Rule("last_tap")
        if name.endswith("scale_shift_table"):
            return Rule("normal", self.config.width**-0.5, zero_rows=(2, 5))
        if name.startswith(("t_embedder", "t_block")) and len(shape) == 2:
            return Rule("normal", 0.02)
        zero = (
            "final_layer.linear",
            "plucker_embedder.proj",
            "out_proj_cam",
            "t_conv",
            "cross_attn.proj",
        )
        return (
            Rule("constant", 0.0)
            if name.endswith(tuple(f"{layer}.weight" for layer in zero))
            else None
        )

    def forward(
        self, latents: Tensor, sigma: Tensor, conditions: Conditions, sequence: SequenceShard
    ) -> Tensor:
        """Map local frames of a batch of clips -> velocity eps - x0 of the same shape.

        latents [B, t, C, h, w]; sigma fp32 [B, t] in [0, 1], 0 for frames given clean; conditions
        of the whole clip. Raises ValueError if h or w does not divide by the patch, or the poses do
        not fit the clip.
        """
        grid = token_grid(latents, self.config.patch_size)
        x = self.x_embedder(latents)
        time = self.t_embedder(sigma * TIMESTEPS)
        modulation = self.t_block(time).unflatten(-1, (6, self.config.width))
        context = self.context(grid, conditions, sequence, latents.device)
        plucker = self.plucker(latents, conditions, sequence)
        if self.config.camera and not self.config.plucker and conditions.c2w is not None:
            absolute = self.raymap_embedder(self.absolute_map(latents, conditions, sequence))
            x = x + (
                absolute
                if context.camera_keep is None
                else absolute * context.camera_keep.to(x.dtype)
            )
        text = (
            self.attention_y_norm(self.y_embedder(conditions.text))
            if self.config.text_width and conditions.text is not None
            else None
        )
        for block in self.blocks:
            x = block(x, modulation, plucker, text, context)
        return unpatchify(self.final_layer(x, time), grid, self.config.patch_size).contiguous()

    def context(
        self,
        grid: tuple[int, int],
        conditions: Conditions,
        sequence: SequenceShard,
        device: torch.device,
    ) -> BlockContext:
        """Compute the inputs that all blocks share: rotary tables, ray frames, masks."""
        positions = sequence.positions.to(device)
        head_dim = self.config.width // self.config.heads
        rays = None
        if self.config.camera and conditions.c2w is not None:
            rotary = rotary_tables(positions, grid, head_dim, head_dim // 2)
            world_to_ray = ray_frames(
                *self.latent_camera(grid, conditions, sequence), grid
            ).flatten(2, 3)
            rays = RayEncoding(world_to_ray, invert_pose(world_to_ray), rotary)
        keep = conditions.camera_keep
        return BlockContext(
            sequence=sequence,
            grid=grid,
            rotary=rotary_tables(positions, grid, head_dim),
            rays=rays,
            camera_keep=None if keep is None else keep.to(device)[:, None, None, None],
            edges="chunk" if self.config.causal else "document",
            attention=attention_mask(self.config),
            text_mask=conditions.text_mask,
        )

    def latent_camera(
        self, grid: tuple[int, int], conditions: Conditions, sequence: SequenceShard
    ) -> tuple[Tensor, Tensor]:
        """Return poses [B, t, 4, 4] and intrinsics [B, t, 4] in grid units of the local latent
        frames; the world is a document's first camera."""
        assert conditions.c2w is not None
        assert conditions.intrinsics is not None
        layout, local = sequence.layout, sequence.frames
        anchor, _, origin, total = raw_frame_index(
            layout.document_starts, layout.frames, local.start, local.stop, conditions.time
        )
        check_raw_frames(conditions.c2w, total, layout.frames)
        pose = relative_poses(conditions.c2w, anchor, origin)
        return pose, scaled_intrinsics(
            conditions.intrinsics[:, anchor], conditions.image_size, grid
        )

    def absolute_map(
        self, latents: Tensor, conditions: Conditions, sequence: SequenceShard
    ) -> Tensor:
        """Compute up direction and latitude of every latent pixel, fp32 [B, t, 3, h, w]."""
        grid = (latents.shape[-2], latents.shape[-1])
        return up_latitude_map(*self.latent_camera(grid, conditions, sequence), grid).permute(
            0, 1, 4, 2, 3
        )

    def plucker(
        self, latents: Tensor, conditions: Conditions, sequence: SequenceShard
    ) -> Tensor | None:
        """Embed the raw-frame raymaps of the local frames, [B, t, S, C]; None without a camera."""
        if not (self.config.camera and self.config.plucker) or conditions.c2w is None:
            return None
        assert conditions.intrinsics is not None
        layout, local = sequence.layout, sequence.frames
        rays = packed_plucker(
            conditions.c2w,
            conditions.intrinsics,
            conditions.image_size,
            (latents.shape[-2], latents.shape[-1]),
            conditions.time,
            layout.document_starts,
            layout.frames,
            (local.start, local.stop),
        )
        return self.plucker_embedder(rays)


def attention_mask(config: SanaWMConfig) -> AttentionMask:
    """Return full attention, or chunk-causal with the first frame as sink and a window over the
    last chunks (SANA-WM §5.4, deployment)."""
    if not config.causal:
        return FULL
    if config.window_chunks == 0:
        return AttentionMask("chunk")
    return AttentionMask("chunk", window=config.window_chunks, sink=config.sink_frames)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Apply LayerNorm without parameters, then scale and shift per frame: x [B, t, S, C], shift and
    scale [B, t, 1, C]."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
