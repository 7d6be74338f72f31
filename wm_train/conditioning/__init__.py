"""Define the inputs of a model besides the latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from data_shards.time_layout import TimeLayout


@dataclass(frozen=True)
class Conditions:
    """Store the conditions of a batch of clips.

    image_size: (height, width) of the pixels that intrinsics refer to. temporal_stride: raw frames
    per latent frame, but for the first, which has one of its own unless `grouped`. fields: name ->
    [B, entries, …], as `data_shards.fields` describes them: whole clips on every process that has
    part of a clip, but only the local frames of a field that is read by row. camera_keep,
    controls_keep: bool [B], False where the camera or the controls are dropped (None: kept
    everywhere). null_text: [L0, E], the embedding of "no text"; negative_text: [L1, E], that of a
    prompt to push away from.
    """

    image_size: tuple[int, int]
    temporal_stride: int
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    camera_keep: Tensor | None = None
    controls_keep: Tensor | None = None
    null_text: Tensor | None = None
    negative_text: Tensor | None = None
    grouped: bool = False

    @property
    def time(self) -> TimeLayout:
        """Return which raw frames each latent frame encodes."""
        return TimeLayout(self.temporal_stride, "grouped" if self.grouped else "causal")

    @classmethod
    def of(
        cls,
        image_size: tuple[int, int],
        temporal_stride: int,
        c2w: Tensor | None = None,
        intrinsics: Tensor | None = None,
        *,
        camera_keep: Tensor | None = None,
        null_text: Tensor | None = None,
        grouped: bool = False,
        **fields: Tensor | None,
    ) -> Conditions:
        """Return conditions with these fields; one that is None is left out."""
        bare = cls(
            image_size,
            temporal_stride,
            camera_keep=camera_keep,
            null_text=null_text,
            grouped=grouped,
        )
        return bare.with_fields(c2w=c2w, intrinsics=intrinsics, **fields)

    def with_fields(self, **changes: Tensor | None) -> Conditions:
        """Return a copy with some fields changed or added; None takes one out."""
        merged = {**self.fields, **changes}
        return replace(self, fields={n: value for n, value in merged.items() if value is not None})

    def rows(self, own: slice) -> Conditions:
        """Return the conditions of some clips of the batch."""
        fields = {name: value[own] for name, value in self.fields.items()}
        camera, controls = (
            keep if keep is None else keep[own] for keep in (self.camera_keep, self.controls_keep)
        )
        return replace(self, fields=fields, camera_keep=camera, controls_keep=controls)

    @property
    def c2w(self) -> Tensor | None:
        """Return camera to world, fp32 [B, F, 4, 4], OpenCV axes (+x right, +y down, +z forward),
        in metres."""
        return self.fields.get("c2w")

    @property
    def intrinsics(self) -> Tensor | None:
        """Return fx, fy, cx, cy in pixels of `image_size`, fp32 [B, F, 4]."""
        return self.fields.get("intrinsics")

    @property
    def text(self) -> Tensor | None:
        """Return text features [B, L, E]."""
        return self.fields.get("text")

    @property
    def text_mask(self) -> Tensor | None:
        """Return bool [B, L], True at real tokens."""
        return self.fields.get("text_mask")

    @property
    def controls(self) -> Tensor | None:
        """Return controls [B, T, A] at latent rate."""
        return self.fields.get("controls")


def drop_text(conditions: Conditions, drop: Tensor) -> Conditions:
    """Replace the text by the null text where drop [B] is True. Raises ValueError without a null
    text."""
    if conditions.null_text is None:
        raise ValueError(
            "dropping the text failed: got no null text in the conditions, expected the null member"
            " of dataset.json. Fix: encode the data with a null text, or set text_dropout=0 and no"
            " guidance by text"
        )
    return replace_text(conditions, drop, conditions.null_text)


def replace_text(conditions: Conditions, where: Tensor, embedding: Tensor) -> Conditions:
    """Replace the text where [B] is True by an embedding [L0, E], padded or cut to the length L of
    the batch."""
    text = conditions.text
    assert text is not None, "the caller has looked for text"
    length = min(embedding.shape[0], text.shape[1])
    padded = torch.zeros_like(text[0])
    padded[:length] = embedding[:length].to(text.dtype)
    real = torch.arange(text.shape[1], device=text.device) < length
    mask = torch.ones_like(text[..., 0]) if conditions.text_mask is None else conditions.text_mask
    return conditions.with_fields(
        text=torch.where(where[:, None, None], padded, text),
        text_mask=torch.where(where[:, None], real, mask.bool()),
    )
