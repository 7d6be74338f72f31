"""Offer autoencoders of diffusers as codecs.

These are LTX-2 (stride 8x32x32, 128 channels), Wan (4x8x8, 16 channels), and the tiny ones (TAESD)
that encode frame by frame (1x8x8, 4 or 16 channels). Tiny autoencoders with a temporal stride are
in `codecs/taehv.py`.

`model` is a local folder or a hub name, as `from_pretrained` takes it. Encoding takes the mode of
the posterior, so it is deterministic. The latents are the autoencoder's own; the scaling that some
pipelines apply is left out, as dataset.json has measured mean and std.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.arguments import Option, path
from data_shards.codecs import CodecRow
from data_shards.schema import DataError
from data_shards.time_layout import time_of
from data_shards.weight_files import PublicFiles

MOST_SAID = 600  # characters of what the library says
CLASSES = {"ltx2": "AutoencoderKLLTX2Video", "wan": "AutoencoderKLWan", "tiny": "AutoencoderTiny"}


@dataclass(frozen=True)
class DiffusersCodec:
    """Encode and decode one clip at a time, on `device`, in float32 (or `dtype` bfloat16).

    The weights are loaded at the first use. normalised: latents of a ready-made set are normalised
    by LTX-2's own statistics, which decoding reverts.
    """

    name: str
    model: str
    dtype: str = "float32"
    device: str = "cpu"
    normalised: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise DataError(
                f"codec dtype: got {self.dtype!r}, expected float32 or bfloat16 (codec {self.name})"
            )

    @cached_property
    def network(self) -> Any:
        try:
            import diffusers
            import torch
        except ImportError as error:
            raise DataError(
                f"codec {self.name}: diffusers is not installed, expected it. Fix: pip install"
                " diffusers"
            ) from error
        try:
            if (folder := Path(self.model)).is_dir():  # the library takes 8-bit kinds for weights
                with PublicFiles(folder) as files:
                    files.check_floats(files.shapes())
            # safetensors only: a pickled checkpoint could run code
            network, report = getattr(diffusers, CLASSES[self.name]).from_pretrained(
                self.model,
                use_safetensors=True,
                torch_dtype=getattr(torch, self.dtype),
                output_loading_info=True,
            )
            if report["missing_keys"]:
                raise ValueError(
                    f"no weights for {sorted(report['missing_keys'])[0]} and"
                    f" {len(report['missing_keys']) - 1} more"
                )
        # for files that are not its own the library raises whatever its parts do
        except Exception as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"codec {self.name}: cannot load {self.model!r} ({said[:MOST_SAID]}), expected a"
                f" diffusers folder or hub name of {CLASSES[self.name]}"
            ) from error
        return network.to(self.device).eval().requires_grad_(False)

    @property
    def options(self) -> Mapping[str, Any]:
        return {
            "model": self.model,
            "dtype": self.dtype,
            **({"normalised": True} if self.normalised else {}),
        }

    @property
    def channels(self) -> int:
        config = self.network.config
        return int(config.latent_channels if "latent_channels" in config else config.z_dim)

    @property
    def temporal_stride(self) -> int:
        config = self.network.config
        if self.name == "tiny":
            return 1
        return int(
            config.scale_factor_temporal
            if "scale_factor_temporal" in config
            else self.network.temporal_compression_ratio
        )

    @property
    def spatial_stride(self) -> int:
        config = self.network.config
        if self.name == "tiny":
            return int(2 ** (len(config.encoder_block_out_channels) - 1))
        return int(
            config.scale_factor_spatial
            if "scale_factor_spatial" in config
            else self.network.spatial_compression_ratio
        )

    def encode(self, video: NDArray[np.uint8 | np.float32]) -> NDArray[np.float32]:
        """Encode [F, H, W, 3] uint8 -> [T, C, h, w] float32."""
        import torch

        count = time_of(self).latents(len(video))
        # [1, 3, F, H, W]
        pixels = torch.from_numpy(video.astype(np.float32) / 127.5 - 1.0).permute(3, 0, 1, 2)[None]
        with torch.no_grad():
            if self.name == "tiny":
                frames = [
                    self.network.encode(pixels[:, :, i].to(self.device, self.network.dtype)).latents
                    for i in range(len(video))
                ]
                latents = torch.stack(frames, dim=2)  # [1, C, T, h, w]
            else:
                latents = self.network.encode(
                    pixels.to(self.device, self.network.dtype)
                ).latent_dist.mode()  # [1, C, T, h, w]
        if tuple(latents.shape[1:3]) != (self.channels, count):
            raise DataError(
                f"codec {self.name}: got {latents.shape[1]} channels and {latents.shape[2]} latent"
                f" frames of {len(video)}, expected {self.channels} and {count} as its config.json"
                f" states ({self.model}). Fix: see its compression ratios"
            )
        return np.asarray(latents[0].permute(1, 0, 2, 3).float().cpu().numpy())

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Decode [T, C, h, w] -> [F, H, W, 3] uint8."""
        import torch

        tensor = torch.from_numpy(np.ascontiguousarray(latents, np.float32)).permute(1, 0, 2, 3)[
            None
        ]
        tensor = tensor.to(self.device, self.network.dtype)
        with torch.no_grad():
            if self.normalised:
                mean, std = (
                    each.to(tensor).view(1, -1, 1, 1, 1)
                    for each in (self.network.latents_mean, self.network.latents_std)
                )
                tensor = tensor * std / self.network.config.scaling_factor + mean
            if self.name == "tiny":
                video = torch.stack(
                    [self.network.decode(frame).sample for frame in tensor.unbind(2)], dim=2
                )
            else:
                video = self.network.decode(tensor).sample  # [1, 3, F, H, W]
        pixels = (video[0].permute(1, 2, 3, 0).float().cpu().numpy() + 1.0) * 127.5
        return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


OPTIONS = {"model": Option(path, "folder or hub name of the autoencoder", required=True)}
LTX2, WAN, TINY = (
    CodecRow(partial(DiffusersCodec, name), OPTIONS, True, ("diffusers", "torch"))
    for name in CLASSES
)
