"""Attend from video tokens to text, with a padding mask and RMSNorm on q and k (SANA-Video's text
branch)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class CrossAttention(nn.Module):
    """Attend from x [B, t, S, C] to text [B, L, C] -> [B, t, S, C]; the text is the same for all
    frames, so frames do not interact here."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm = nn.RMSNorm(width, eps=1e-6)
        self.k_norm = nn.RMSNorm(width, eps=1e-6)

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor | None) -> Tensor:
        """Return [B, t, S, C]. text_mask: bool [B, L], True at real tokens."""
        b, t, s, c = x.shape
        length = text.shape[1]
        k, v = self.kv_linear(text).chunk(2, dim=-1)
        q = (
            self.q_norm(self.q_linear(x))
            .reshape(b, t * s, self.heads, self.head_dim)
            .transpose(1, 2)
        )
        k = self.k_norm(k).reshape(b, length, self.heads, self.head_dim).transpose(1, 2)
        v = v.reshape(b, length, self.heads, self.head_dim).transpose(1, 2)
        mask = None if text_mask is None else text_mask.bool()[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).reshape(b, t, s, c))
