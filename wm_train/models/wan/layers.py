"""Define the parts of a Wan block and of what surrounds the blocks.

Time embedding, modulation tables and norms are computed in fp32 whatever the model's type, as in
the public classes; what is modulated is rounded to the model's type, and so is the residual.
Parameter names are diffusers', but for those of `BlockScales` and `OutputScales`, which hold what
stays in fp32 as modules of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.local_attention import accumulation_dtype
from parallel.sequence import SequenceShard
from wm_train.kernels.gdn.reference import rotate
from wm_train.models.layers.embed import CaptionProjection, TimestepEmbed
from wm_train.models.layers.rotary import Rotary

EPSILON = 1e-6
ROWS = 6  # shift, scale and gate of attention, then of the FFN


@dataclass(frozen=True)
class BlockContext:
    """Hold what all blocks read besides their inputs.

    text [B, L, C], image [B, L_image, C] and camera [B, t, S, C] are embedded; None: text in a
    model without, image without CLIP features, camera where it does not enter blocks.
    """

    sequence: SequenceShard
    rotary: Rotary
    text: Tensor | None
    image: Tensor | None
    camera: Tensor | None = None


@dataclass(frozen=True)
class Scales:
    """Hold a block's modulation [B, t, 6, C] and the norm before cross-attention, weight and bias
    [C], all at least fp32; None without text."""

    rows: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None


class BlockScales(nn.Module):
    """Hold a block's modulation table and the norm before cross-attention, an fp32 unit."""

    def __init__(self, width: int, text: bool) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(ROWS, width))
        self.norm2 = nn.LayerNorm(width, eps=EPSILON) if text else None

    def forward(self, modulation: Tensor) -> tuple[Tensor, ...]:
        """Return what `Scales` holds, for the modulation of this noise level, [B, t, 6, C].

        Copies of the norm's parameters: a sharded module frees its own after this call.
        """
        table = self.scale_shift_table.to(accumulation_dtype(self.scale_shift_table.dtype))
        if self.norm2 is None:
            return (table + modulation,)
        weight, bias = self.norm2.weight, self.norm2.bias
        exact = accumulation_dtype(weight.dtype)
        return table + modulation, weight.to(exact, copy=True), bias.to(exact, copy=True)


class OutputScales(nn.Module):
    """Hold the modulation table of the output, an fp32 unit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(2, width))

    def forward(self, time: Tensor) -> tuple[Tensor, ...]:
        """Return shift and scale [B, t, 1, C] for the time embedding [B, t, C]."""
        return (self.scale_shift_table + time[:, :, None]).unsqueeze(3).unbind(2)


class Attention(nn.Module):
    """Project to queries, keys and values, with RMSNorm of q and k over the whole width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q, self.norm_k = (nn.RMSNorm(width, eps=EPSILON) for _ in range(2))

    def split(self, x: Tensor) -> Tensor:
        """Split [..., C] -> [..., H, D]."""
        return x.unflatten(-1, (self.heads, x.shape[-1] // self.heads))


class SelfAttention(Attention):
    """Attend over all tokens of the clip."""

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        """Map x [B, t, S, C] -> [B, t, S, C]."""
        q, k = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(x))
        q, k = (rotate(self.split(y), *context.rotary) for y in (q, k))
        out = context.sequence.attend(q, k, self.split(self.to_v(x)))
        return self.to_out[0](out.flatten(-2).to(x.dtype))


class CrossAttention(Attention):
    """Attend from every token to the text, and to CLIP features where the model has them, each by
    a softmax of its own. No mask: the zeros behind a text are seen, as in training."""

    def __init__(self, width: int, heads: int, image: bool) -> None:
        super().__init__(width, heads)
        if image:
            self.add_k_proj, self.add_v_proj = (nn.Linear(width, width) for _ in range(2))
            self.norm_added_k = nn.RMSNorm(width, eps=EPSILON)

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        """Map x [B, t, S, C] -> [B, t, S, C]; frames do not meet here."""
        b, t, s, c = x.shape
        q = self.norm_q(self.to_q(x)).reshape(b, t * s, c)
        text = context.text
        assert text is not None, "a block without text has no cross-attention"
        out = self._over(q, self.norm_k(self.to_k(text)), self.to_v(text))
        if context.image is not None:
            keys, values = self.add_k_proj(context.image), self.add_v_proj(context.image)
            out = out + self._over(q, self.norm_added_k(keys), values)
        return self.to_out[0](out.reshape(b, t, s, c))

    def _over(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (self.split(x).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


class GeluLinear(nn.Module):
    """Apply a linear layer, then GELU, exact or by tanh."""

    def __init__(self, inputs: int, outputs: int, approximate: str) -> None:
        super().__init__()
        self.proj, self.approximate = nn.Linear(inputs, outputs), approximate

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate=self.approximate)


class FeedForward(nn.Module):
    """Apply two linear layers with GELU between them."""

    def __init__(self, inputs: int, hidden: int, outputs: int, approximate: str) -> None:
        super().__init__()
        first, last = GeluLinear(inputs, hidden, approximate), nn.Linear(hidden, outputs)
        self.net = nn.ModuleList([first, nn.Identity(), last])  # the public class has dropout at 1

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class ImageEmbed(nn.Module):
    """Embed CLIP features of the first image: [B, 257, E] -> [B, 257, C]."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(features), nn.LayerNorm(width)
        self.ff = FeedForward(features, features, width, "none")

    def forward(self, features: Tensor) -> Tensor:
        return self.norm2(self.ff(self.norm1(features.to(self.norm1.weight.dtype))))


class ConditionEmbed(nn.Module):
    """Hold the embeddings of noise level, text and image."""

    def __init__(self, width: int, text_width: int, clip_width: int) -> None:
        super().__init__()
        self.time_embedder = TimestepEmbed(width)
        self.time_proj = nn.Linear(width, ROWS * width)
        if text_width:
            self.text_embedder = CaptionProjection(text_width, width)
        if clip_width:
            self.image_embedder = ImageEmbed(clip_width, width)


def normed(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Apply LayerNorm over the last axis, at least in fp32, and return it so."""
    return F.layer_norm(x.to(accumulation_dtype(x.dtype)), x.shape[-1:], weight, bias, EPSILON)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Apply LayerNorm, then scale and shift per frame: x [B, t, S, C], shift and scale [B, t, 1,
    C], at least fp32 -> x's type."""
    return (normed(x) * (1 + scale) + shift).to(x.dtype)


def gated(x: Tensor, change: Tensor, gate: Tensor) -> Tensor:
    """Add a gated change to the residual x [B, t, S, C], computed in the gate's type."""
    return (x.to(gate.dtype) + change * gate).to(x.dtype)
