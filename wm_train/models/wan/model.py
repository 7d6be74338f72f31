"""Define Wan's backbone: full attention over space and time, text by cross-attention (Wan 2.1 §4.2,
Wan 2.2).

- One set of six modulations, from the noise level, serves all blocks, which add a table each.
- RMSNorm of queries and keys spans the whole width; positions turn each head by time, row, column.
- The text is `text_tokens` vectors, zeros behind its end, and all of them are attended to.
- A camera path enters by an adapter, once or in every block, that is the identity at first.
- An image is the clean first latent (TI2V-5B), or channels beside the latents (A14B I2V, 2.1 I2V):
  a mask, and the encoding of the image followed by zeros, which few latents hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.checkpointing import checkpoint
from parallel.local_attention import accumulation_dtype
from parallel.sequence import SequenceShard
from wm_train.conditioning import Conditions
from wm_train.conditioning.camera import WAN_PACKING
from wm_train.models.init import Rule
from wm_train.models.layers.camera_adapter import CameraAdapter
from wm_train.models.layers.embed import PatchEmbed, token_grid, unpatchify
from wm_train.models.spec import WorldModel
from wm_train.models.wan.config import MASK_CHANNELS, WanConfig
from wm_train.models.wan.layers import (
    ROWS,
    BlockContext,
    BlockScales,
    ConditionEmbed,
    CrossAttention,
    FeedForward,
    OutputScales,
    Scales,
    SelfAttention,
    gated,
    modulate,
    normed,
)
from wm_train.models.wan.rope import check_positions, wan_rope

TIMESTEPS = 1000.0  # sigma 1 is timestep 1000


class Block(nn.Module):
    """Run one transformer block: self-attention, cross-attention, FFN."""

    PARTS = ("attention", "feed_forward")  # recomputed, and compiled, one by one

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.recompute = config.activation_checkpointing
        text = config.text_width > 0
        self.scales = BlockScales(width, text)
        self.attn1 = SelfAttention(width, heads)
        self.attn2 = CrossAttention(width, heads, config.clip_width > 0) if text else None
        if config.camera and config.camera_injection == "blocks":
            self.camera = nn.Linear(width, 2 * width, bias=False)  # no camera: no change
        self.ffn = FeedForward(width, config.ffn_width, width, "tanh")

    def forward(self, x: Tensor, modulation: Tensor, context: BlockContext) -> Tensor:
        """Transform x [B, t, S, C] with modulation [B, t, 6, C]."""
        scales = Scales(*self.scales(modulation))
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.feed_forward(self.attention(x, scales, context), scales)
        # Two halves: while one is recomputed in backward, nothing of the other is in memory.
        again = partial(
            checkpoint, sequence=context.sequence, keep_products=self.recompute == "selective"
        )
        return again(self.feed_forward, again(self.attention, x, scales, context), scales)

    def attention(self, x: Tensor, scales: Scales, context: BlockContext) -> Tensor:
        """Run the first half: self-attention and cross-attention."""
        shift, scale, gate = scales.rows[:, :, :3].unsqueeze(3).unbind(2)
        x = gated(x, self.attn1(modulate(x, shift, scale), context), gate)
        if context.camera is not None:
            scale, shift = self.camera(context.camera).chunk(2, dim=-1)
            x = x + scale * x + shift
        if self.attn2 is None:
            return x
        return x + self.attn2(normed(x, scales.weight, scales.bias).to(x.dtype), context)

    def feed_forward(self, x: Tensor, scales: Scales) -> Tensor:
        """Run the second half: the FFN."""
        shift, scale, gate = scales.rows[:, :, 3:].unsqueeze(3).unbind(2)
        return gated(x, self.ffn(modulate(x, shift, scale)), gate)


class Wan(WorldModel):
    """Predict the velocity of a noisy latent video at per-frame noise levels."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.width, config.patch_size
        self.patch_embedding = PatchEmbed(config.input_channels, width, patch)
        self.condition_embedder = ConditionEmbed(width, config.text_width, config.clip_width)
        if config.camera:
            self.control_adapter = CameraAdapter(config.camera_stride, width, patch)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.output_scales = OutputScales(width)
        self.proj_out = nn.Linear(width, patch * patch * config.latent_channels)

    def units(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def exact_units(self) -> Sequence[nn.Module]:
        embed = self.condition_embedder
        blocks = [block.get_submodule("scales") for block in self.blocks]
        return [embed.time_embedder, embed.time_proj, self.output_scales, *blocks]

    def initial_rule(self, name: str, shape: Sequence[int]) -> Rule | None:
        """Return the initial rule, the released class's: tables of variance 1 / width, a zero
        head."""
        if name.endswith("scale_shift_table"):
            return Rule("normal", self.config.width**-0.5)
        if name == "proj_out.weight":
            return Rule("constant", 0.0)
        # a camera changes nothing at first: the first or the last layer of its way is zero
        inside = self.config.camera_injection == "blocks"
        if name.endswith(".camera.weight" if inside else "control_adapter.conv.weight"):
            return Rule("constant", 0.0)
        small = name.startswith("condition_embedder.t") and len(shape) == 2
        return Rule("normal", 0.02) if small else None

    def switched_parameters(self, names: Iterable[str]) -> list[str]:
        """Return the parameters that `camera` adds."""
        return sorted(n for n in names if n.startswith("control_adapter.") or ".camera." in n)

    def forward(
        self, latents: Tensor, sigma: Tensor, conditions: Conditions, sequence: SequenceShard
    ) -> Tensor:
        """Map local frames of a batch of clips -> velocity eps - x0 of the same shape.

        latents [B, t, C, h, w]; sigma fp32 [B, t] in [0, 1]; conditions of the whole clip. Raises
        ValueError if h or w does not divide by the patch, a position is beyond the table, or text
        or image do not fit.
        """
        config, grid = self.config, token_grid(latents, self.config.patch_size)
        embed, exact = self.condition_embedder, accumulation_dtype(self.proj_out.weight.dtype)
        time = embed.time_embedder(sigma * TIMESTEPS)
        modulation = embed.time_proj(F.silu(time)).unflatten(-1, (ROWS, config.width)).to(exact)
        camera = self.camera(latents, conditions, sequence) if config.camera else None
        if config.image_condition_mode == "channels":
            latents = torch.cat((latents, self.image_channels(latents, conditions, sequence)), 2)
        x = self.patch_embedding(latents)
        if camera is not None and config.camera_injection == "input":
            x, camera = x + camera, None
        head_dim = config.width // config.heads
        check_positions(sequence, grid)
        rotary = wan_rope(sequence.positions, grid, head_dim, exact, x.device)
        text = None
        if config.text_width:
            text = embed.text_embedder(self.text(conditions).to(x.dtype))
        context = BlockContext(sequence, rotary, text, self.image(conditions), camera)
        for block in self.blocks:
            x = block(x, modulation, context)
        shift, scale = self.output_scales(time.to(exact))
        tokens = self.proj_out(modulate(x, shift, scale))
        return unpatchify(tokens, grid, config.patch_size).contiguous()

    def text(self, conditions: Conditions) -> Tensor:
        """Return the text [B, L, E] with zeros behind its end."""
        text, mask, wanted = conditions.text, conditions.text_mask, self.config.text_tokens
        if text is None or text.shape[1] != wanted:
            got = "none" if text is None else f"{text.shape[1]} vectors"
            raise ValueError(
                f"text failed: got {got}, expected {wanted} vectors, zeros behind the text's end,"
                " as all of them are attended to (key model.text_tokens). Fix: data encoded with"
                f" text_length={wanted}"
            )
        return text if mask is None else torch.where(mask.bool()[:, :, None], text, 0.0)

    def camera(self, latents: Tensor, conditions: Conditions, sequence: SequenceShard) -> Tensor:
        """Return the embedded cameras of the local frames, [B, t, S, C]."""
        packing = replace(WAN_PACKING, scale=self.config.translation_scale)
        size = (latents.shape[-2], latents.shape[-1])
        return self.control_adapter.embed(conditions, size, packing, sequence)

    def image(self, conditions: Conditions) -> Tensor | None:
        """Return the embedded CLIP features of the first image [B, 257, C], None in a model
        without."""
        if not self.config.clip_width:
            return None
        return self.condition_embedder.image_embedder(_field(conditions, "clip_image"))

    def image_channels(
        self, latents: Tensor, conditions: Conditions, sequence: SequenceShard
    ) -> Tensor:
        """Return the channels beside the local latents: a mask, 1 in a document's first frame, and
        the encoding of the first image followed by zeros, [B, t, 4 + C, h, w]; in a window of a
        longer clip (`sampling/history.py`) mask and latents of all frames that are given.

        Of that encoding a few latents are stored: it is constant from some latent on, whose value
        the last one stored is.
        """
        stored, (b, t, c, h, w) = _field(conditions, "start_video"), latents.shape
        if stored.shape[2:] != (c, h, w):
            raise ValueError(
                f"image channels failed: got start_video of {tuple(stored.shape[2:])}, expected"
                f" {(c, h, w)}, the latents' (key data.path). Fix: encode the data set again"
            )
        place = sequence.positions[0]
        seen = stored.to(latents)[:, place.clamp(max=stored.shape[1] - 1).to(stored.device)]
        known = (place == 0).to(latents.device)[None, :, None, None, None]
        if "shown" in conditions.fields:  # frames of a window that are given, the first among them
            local = slice(sequence.frames.start, sequence.frames.stop)
            known = conditions.fields["shown_frames"][:, local, None, None, None]
            seen = torch.where(known, conditions.fields["shown"][:, local].to(seen), seen)
        return torch.cat((known.to(latents.dtype).expand(b, t, MASK_CHANNELS, h, w), seen), 2)


def _field(conditions: Conditions, name: str) -> Tensor:
    """Return a field of the clips. Raises ValueError without it."""
    found = conditions.fields.get(name)
    if found is None:
        raise ValueError(
            f"image condition failed: got clips without {name}, expected it of every clip (key"
            f" data.path). Fix: encode the data set with fields=[{name}]"
        )
    return found
