"""SANA-WM's forward FLOPs by hand, as an oracle of the counter.

Per token (one of N = T·S) of a block:
  dense layers    2 · (elements of every projection, convolution and MLP weight of the block): each
                  element meets each token once. Key and value projections of text meet the text
                  tokens instead.
  GDN (per head)  Grams and outputs 2 D² each: A, U and O of the numerator, A of the normaliser;
                  with the camera A, U and O of its branch.
                  Scan, per frame: 2 D³ a direction for the numerator and for the camera, 2 D² for
                  the normaliser.
  softmax         4 · (tokens it sees) · D per head and branch: scores and values; the camera is a
                  second branch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch

from parallel.layout import ClipLayout
from parallel.masks import visible
from parallel.streaming import chunk_starts
from wm_train.models.sana_wm.config import SanaWMConfig
from wm_train.models.sana_wm.model import attention_mask
from wm_train.models.spec import build_model


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of one clip."""

    dense: int
    gdn: int
    softmax: int

    @property
    def total(self) -> int:
        return self.dense + self.gdn + self.softmax


@cache
def frame_pairs(model: SanaWMConfig, frames: int, chunk_frames: int = 0) -> int:
    """Pairs (frame, frame it sees) in a clip of T = `frames` latent frames under the model's
    attention mask; T² without one."""
    starts = chunk_starts(frames, chunk_frames)
    layout, mask = ClipLayout(frames, chunk_starts=starts), attention_mask(model)
    return sum(
        (stop - start) * len(visible(layout, mask, start))
        for start, stop in pairwise((*starts, frames))
    )


def forward_flops(
    model: SanaWMConfig,
    frames: int,
    tokens_per_frame: int,
    text_tokens: int = 0,
    chunk_frames: int = 0,
) -> Flops:
    """FLOPs of one clip of T = `frames` latent frames of S tokens, in chunks of `chunk_frames` (0:
    one chunk)."""
    with torch.device("meta"):
        built = build_model(model)
    tokens, d = frames * tokens_per_frame, model.width // model.heads
    text = sum(
        p.numel()
        for name, p in built.named_parameters()
        if "cross_attn.kv" in name and p.dim() >= 2
    )
    weights = (
        sum(p.numel() for name, p in built.named_parameters() if _meets_tokens(name, p)) - text
    )
    softmax_blocks = model.depth // model.softmax_every if model.softmax_every else 0
    branches = 2 if model.camera else 1
    grams = tokens * 2 * d * d * (4 + 3 * (branches - 1))
    scan = frames * 2 * (2 * d**3 * branches + 2 * d**2)
    cross = 4 * tokens * text_tokens * model.width * model.depth if model.text_width else 0
    return Flops(
        dense=2 * (tokens * weights + text_tokens * text) + cross,
        gdn=model.heads * (grams + scan) * (model.depth - softmax_blocks),
        softmax=4
        * frame_pairs(model, frames, chunk_frames)
        * tokens_per_frame**2
        * model.width
        * branches
        * softmax_blocks,
    )


def _meets_tokens(name: str, parameter: torch.Tensor) -> bool:
    """Weights that are multiplied with every token: those of blocks, patch embedding and output;
    not tables and embeddings of time."""
    if parameter.dim() < 2 or name.endswith("scale_shift_table"):
        return False
    return name.startswith(("blocks.", "x_embedder.", "plucker_embedder.", "final_layer."))
