"""Define `LatentCodec`, the interface of every codec, and find codecs by name.

Another package adds its own by an entry point in the group `data_shards.codecs` that names a
`CodecRow`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_shards.arguments import Option
from data_shards.registry import Registry, load
from data_shards.schema import DataError, DatasetInfo


class LatentCodec(Protocol):
    """Convert video to latents and back.

    Shapes: video [F, H, W, 3] uint8 (to be encoded also float32 between 0 and 255, whose 127.5 is
    zero to most networks), latents [T, C, h, w] float32 (not normalised). Which raw frames a latent
    encodes follows from temporal_stride and the attribute `time_layout`, one of
    `time_layout.LAYOUTS`; without it, T = (F - 1) / temporal_stride + 1.
    """

    @property
    def name(self) -> str: ...
    @property
    def options(self) -> Mapping[str, Any]: ...
    @property
    def channels(self) -> int: ...
    @property
    def temporal_stride(self) -> int: ...
    @property
    def spatial_stride(self) -> int: ...

    def encode(self, video: NDArray[np.uint8 | np.float32]) -> NDArray[np.float32]: ...

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]: ...


@dataclass(frozen=True)
class CodecRow:
    """Describe one registered codec. `make` takes the codec's options as dataset.json keeps them
    (`LatentCodec.options`), and `device` if `on_device`; `options` are those of the command
    `encode`; `libraries` are installed packages by whose version the latents can differ."""

    make: Callable[..., LatentCodec]
    options: Mapping[str, Option] = field(default_factory=dict)
    on_device: bool = False
    libraries: tuple[str, ...] = ()


CODECS = Registry(
    "codec",
    "data_shards.codecs",
    {
        "linear": "data_shards.codecs.linear:LINEAR",
        "lapped": "data_shards.codecs.lapped:LAPPED",
        "ltx2": "data_shards.codecs.diffusers:LTX2",
        "wan": "data_shards.codecs.diffusers:WAN",
        "tiny": "data_shards.codecs.diffusers:TINY",
        "taehv": "data_shards.codecs.taehv:TAEHV",
    },
)


def codec_row(name: str) -> CodecRow:
    """Return what is registered as the codec `name`.

    Raises:
        DataError: an unknown name, or something registered that is no CodecRow.
    """
    row = load(CODECS, name)
    if not isinstance(row, CodecRow):
        raise DataError(
            f"codec {name}: got {type(row).__name__} (entry point group {CODECS.group}), expected a"
            " data_shards.codecs.CodecRow"
        )
    return row


def resized_video(video: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize [F, H, W, 3] to (height, width) bilinearly, a pixel's centre at half a pixel; each
    axis has a factor of its own."""
    import torch

    out = np.empty((len(video), *size, 3), np.uint8)
    for i in range(len(video)):  # one by one: floats of a long clip would fill the memory
        pixels = torch.tensor(video[i]).permute(2, 0, 1)[None].float()
        scaled = torch.nn.functional.interpolate(
            pixels, size=size, mode="bilinear", align_corners=False
        )
        out[i] = scaled[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return out


def decode_shown(
    codec: LatentCodec, latents: NDArray[np.float32], info: DatasetInfo
) -> NDArray[np.uint8]:
    """Decode latents [T, C, h, w] (not normalised) of a data set -> [F, H, W, 3] of the size of its
    source's pictures, if encoding had resized them."""
    video, size = codec.decode(latents), (info.shown_height, info.shown_width)
    return resized_video(video, size) if all(size) else video


def make_codec(
    name: str, options: Mapping[str, Any] | None = None, device: str = "cpu"
) -> LatentCodec:
    """Make the codec called `name` with these options, as dataset.json keeps them; `device` is for
    this process only.

    Raises:
        DataError: an unknown name or an option it does not take.
    """
    row = codec_row(name)
    try:
        return row.make(**(options or {}), **({"device": device} if row.on_device else {}))
    except TypeError as error:
        raise DataError(
            f"codec options: got {dict(options or {})}, expected what codec {name!r} takes"
            f" ({error})"
        ) from error
