"""Name the settings that determine the bytes of an encoded data set, besides its source."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from data_shards.codecs import LatentCodec, make_codec
from data_shards.encoding.text import READY, TextEncoder
from data_shards.schema import DataError
from data_shards.sources.clips import ClipSource
from data_shards.time_layout import LAYOUTS, Layout


@dataclass(frozen=True)
class Settings:
    """Hold all that determines the finished bytes, besides the source."""

    codec: str = "linear"
    codec_options: tuple[tuple[str, Any], ...] = ()  # (name, value): workers hash their settings
    latent_dtype: str = "float16"
    validation: float = 0.1
    shard_mb: float = 256.0
    container: str = "tar"
    psnr: str = "yes"
    image_latents_every: int = 0
    start_video: str = "no"
    image_encoder: str | None = None
    resize: tuple[int, int] | None = None  # (height, width) instead of a crop
    keep_taps: str = "no"
    controls_offset: int = 0
    device: str = "cpu"
    text: str | None = None
    text_length: int = 300
    text_prefix: str = ""
    text_dtype: str = "bfloat16"
    null_text: str | None = None
    negative_text: str | None = None
    fields: str | None = None  # names of fields that the source has besides, with commas

    def make_codec(self, source: ClipSource) -> LatentCodec:
        """Return the codec for this source.

        For ready-made latents it needs no weights here, but a name under which decoding finds them.
        """
        if source.stored is not None and self.codec != source.stored.name:
            raise DataError(
                f"codec: got {self.codec}, expected {source.stored.name}, which made these latents."
                f" Fix: codec={source.stored.name}"
            )
        options = dict(self.codec_options)
        if source.stored is not None:
            return replace(source.stored, options={**options, **source.stored.options})
        return make_codec(self.codec, options, self.device)

    def time_layout(self) -> Layout:
        """Return the time layout of the codec; no weights are read for it."""
        codec = make_codec(self.codec, dict(self.codec_options), self.device)
        layout: Layout = getattr(codec, "time_layout", LAYOUTS[0])
        return layout

    def check_first_images(self, source: ClipSource) -> None:
        """Raise DataError where what is made of clips' first images has none to be made of."""
        made = {"start_video": "start_video", "image_encoder": "clip_image"}  # option -> field
        for option, field in made.items():
            value, off = getattr(self, option), getattr(Settings, option)
            if value == off:
                continue
            got, rule, fix = "", "", f"leave {option} out"
            if source.stored is not None:
                got, rule = "ready latents", "pictures, of which the first is encoded"
            elif field in (self.fields or "").split(","):
                got, rule = f"fields={self.fields}", "one of them, as both give the same member"
            elif self.image_latents_every or self.time_layout() == "grouped":
                layout = self.time_layout()
                got = f"image_latents_every={self.image_latents_every} and {layout} latents"
                rule = "clips that are cut at their start alone, whose first image it is"
                fix += ", or image_latents_every=0 and a causal codec"
            if got:
                raise DataError(f"{option}: got {value} with {got}, expected {rule}. Fix: {fix}")

    def make_text_encoder(self) -> TextEncoder | None:
        if self.text == READY and not self.null_text:
            raise DataError(
                "null_text: got none with text=ready, expected the embedding of the empty prompt."
                " Fix: null_text=<npy of [L0, E]>"
            )
        if self.text in (None, READY):
            return None
        return TextEncoder(str(self.text), self.text_length, self.text_prefix, self.device)
