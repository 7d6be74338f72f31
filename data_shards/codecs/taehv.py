"""Offer tiny video autoencoders as codecs: TAEHV 1.5 (Waypoint-1.5), TAEW, TAELTX.

TAEHV 1.5 has stride 4x16x16 and 32 channels. `model` is a local `.safetensors` file or a folder
with one; widths, strides, patch and channels follow from the weights. The network is that of
madebyollin/taehv, reimplemented: 2-D convolutions over single frames; a memory block also sees the
previous frame; a pool joins a pair of frames, a grow splits one. diffusers 0.42 has no class for it
(its `AutoencoderTiny` handles single images: codec `tiny`).

Latent t pools the raw frames r t … r t + r - 1. With `layout=grouped`, as Waypoint-1.5 uses TAEHV
1.5, F = r k frames give k latents and decode to F frames. The layout `causal` stands in for an
autoencoder of F = r k + 1 frames (TAEW, TAELTX): the last frame is repeated at the end, and latent
t decodes to the frames r (t - 1) + 1 … r t, though it has seen up to r - 1 later ones. Frames are
processed CHUNK latents at a time; the result is that of one pass.

The decoder's memory blocks begin with zeros, which it has seen at the start of clips only. With
`warm_up=n` it is shown the first latent n times more before the clip, as engines of Waypoint-1.5
do (n = 3) whose seed is one image, four times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.arguments import Option, choice, path, whole
from data_shards.codecs import CodecRow
from data_shards.schema import DataError
from data_shards.time_layout import LAYOUTS, Layout, time_of
from data_shards.weight_files import check_kinds, open_tensors

CHUNK = 4
STAGES = 3
# Places in the two sequences of layers, which are also the names of the weights.
ENCODER_IN, ENCODER_OUT, DECODER_IN, DECODER_OUT = (
    "encoder.0",
    "encoder.17",
    "decoder.1",
    "decoder.22",
)


def pool_at(stage: int) -> int:
    """Return the encoder layer that pools frames in `stage`."""
    return 2 + 5 * stage  # then a convolution of stride 2 and three memory blocks


def grow_at(stage: int) -> int:
    """Return the decoder layer that splits frames in `stage`."""
    return 7 + 6 * stage  # after three memory blocks and an upsampling; then a convolution


@dataclass(frozen=True)
class TaehvCodec:
    """Encode and decode one clip at a time, on `device`, in float32 (or `dtype` bfloat16).

    The weights are loaded at the first use.
    """

    model: str
    dtype: str = "float32"
    device: str = "cpu"
    name: str = "taehv"
    layout: Layout = "causal"
    warm_up: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise DataError(
                f"codec dtype: got {self.dtype!r}, expected float32 or bfloat16 (codec taehv)"
            )

    @cached_property
    def weights(self) -> dict[str, Any]:
        """Return name -> tensor, checked to be a network of this kind."""
        import torch

        path = Path(self.model)
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if len(files) != 1 or files[0].suffix != ".safetensors" or not files[0].is_file():
            raise DataError(
                f"model: got {self.model}, expected a .safetensors file, or a folder with one"
                " (codec taehv). Fix: convert a pickled .pth, which is not read here"
            )
        try:
            with open_tensors(files[0]) as stored:
                names = list(stored.keys())
                check_kinds({n: str(stored.get_slice(n).get_dtype()) for n in names}, files[0])
                weights = {
                    name: stored.get_tensor(name).to(self.device, getattr(torch, self.dtype))
                    for name in names
                }
        except ValueError as error:
            raise DataError(f"model: {error} (codec taehv)") from error
        try:
            for name in (ENCODER_IN, ENCODER_OUT, DECODER_IN, DECODER_OUT):
                assert weights[f"{name}.weight"].ndim == 4
            self._match_strides(weights)
            self._try_out(weights)
        except (LookupError, AssertionError, ArithmeticError, ValueError, RuntimeError) as error:
            said = " ".join(str(error).split()) or "the shape of a convolution"
            raise DataError(
                f"model: got {files[0]}, which lacks or misstates {said}, expected the weights of a"
                " TAEHV (codec taehv)"
            ) from error
        return weights

    def _match_strides(self, weights: dict[str, Any]) -> None:
        """Cut weights that were trained to grow more frames than their encoder pools: the last of
        the frames is the one that is kept. Raises ValueError if that does not help."""
        grows = [weights[f"decoder.{grow_at(stage)}.conv.weight"] for stage in range(STAGES)]
        pools = [weights[f"encoder.{pool_at(stage)}.conv.weight"] for stage in range(STAGES)]
        stride = int(np.prod([pool.shape[1] // pool.shape[0] for pool in pools]))
        for stage, grow in enumerate(grows):
            if int(np.prod([g.shape[0] // g.shape[1] for g in grows])) > stride:
                grows[stage] = weights[f"decoder.{grow_at(stage)}.conv.weight"] = grow[
                    -grow.shape[1] :
                ]
        if int(np.prod([grow.shape[0] // grow.shape[1] for grow in grows])) != stride:
            raise ValueError(f"a decoder of another time stride than its encoder's {stride}")

    def _try_out(self, weights: dict[str, Any]) -> None:
        """Encode and decode the smallest picture, for which every layer must be there and fit."""
        trial = replace(self)
        trial.__dict__["weights"] = weights  # as `cached_property` keeps them
        side = trial.spatial_stride
        video = np.zeros((time_of(trial).first, side, side, 3), np.uint8)
        latents = trial.encode(video)
        assert latents.shape[:2] == (1, trial.channels)
        assert trial.decode(latents).shape == video.shape

    @property
    def options(self) -> Mapping[str, Any]:
        grouped = {} if self.layout == "causal" else {"layout": self.layout}
        warm = {"warm_up": self.warm_up} if self.warm_up else {}
        return {"model": self.model, "dtype": self.dtype, **grouped, **warm}

    @property
    def time_layout(self) -> Layout:
        return self.layout

    @property
    def channels(self) -> int:
        return int(self.weights[f"{ENCODER_OUT}.weight"].shape[0])

    @property
    def patch(self) -> int:
        return round((self.weights[f"{ENCODER_IN}.weight"].shape[1] / 3) ** 0.5)

    @property
    def temporal_stride(self) -> int:
        pools = [self.weights[f"encoder.{pool_at(stage)}.conv.weight"] for stage in range(STAGES)]
        return int(np.prod([pool.shape[1] // pool.shape[0] for pool in pools]))

    @property
    def spatial_stride(self) -> int:
        return 2**STAGES * self.patch

    def encode(self, video: NDArray[np.uint8 | np.float32]) -> NDArray[np.float32]:
        """Encode [F, H, W, 3] uint8 -> [T, C, h, w] float32."""
        import torch

        time = time_of(self)
        stride, count = time.stride, time.latents(len(video))
        padded = np.concatenate([video, *[video[-1:]] * (stride - time.first)])
        memory: dict[int, Any] = {}
        out = []
        with torch.no_grad():
            for start in range(0, count, CHUNK):
                frames = torch.from_numpy(
                    padded[start * stride : (start + CHUNK) * stride]
                ).permute(0, 3, 1, 2)
                x = frames.to(self.device, self.weights[f"{ENCODER_IN}.weight"].dtype) / 255
                out.append(
                    self._encode(torch.nn.functional.pixel_unshuffle(x, self.patch), memory)
                    .float()
                    .cpu()
                    .numpy()
                )
        return np.concatenate(out)

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Decode [T, C, h, w] -> [F, H, W, 3] uint8."""
        import torch

        memory: dict[int, Any] = {}
        out = []
        latents = np.concatenate([latents[:1]] * self.warm_up + [latents])
        with torch.no_grad():
            for start in range(0, len(latents), CHUNK):
                x = torch.from_numpy(
                    np.ascontiguousarray(latents[start : start + CHUNK], np.float32)
                )
                frames = self._decode(
                    x.to(self.device, self.weights[f"{DECODER_IN}.weight"].dtype), memory
                )
                pixels = (
                    torch.nn.functional.pixel_shuffle(frames, self.patch).float().clamp(0, 1) * 255
                )
                out.append(pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
        time = time_of(self)
        before = self.warm_up * time.stride + time.stride - time.first
        return np.concatenate(out)[before:]  # without the frames before the clip's first

    def _encode(self, x: Any, memory: dict[int, Any]) -> Any:
        """Encode [n, 3 p p, H, W] -> [n / r, C, h, w].

        memory: each memory block's last frame, passed to the next call.
        """
        x = self._conv(ENCODER_IN, x).relu()
        for stage in range(STAGES):
            at = pool_at(stage)
            weight = self.weights[f"encoder.{at}.conv.weight"]
            x = self._conv(
                f"encoder.{at}.conv", x.reshape(-1, weight.shape[1], *x.shape[2:]), padding=0
            )
            x = self._conv(f"encoder.{at + 1}", x, stride=2)
            for block in range(at + 2, at + 5):
                x = self._remember("encoder", block, x, memory)
        return self._conv(ENCODER_OUT, x)

    def _decode(self, x: Any, memory: dict[int, Any]) -> Any:
        """Decode [n, C, h, w] -> [n r, 3 p p, H, W]."""
        x = self._conv(DECODER_IN, (x / 3).tanh() * 3).relu()
        for stage in range(STAGES):
            at = grow_at(stage)
            for block in range(at - 4, at - 1):
                x = self._remember("decoder", block, x, memory)
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            channels = x.shape[1]
            x = self._conv(f"decoder.{at}.conv", x, padding=0)
            x = self._conv(f"decoder.{at + 1}", x.reshape(-1, channels, *x.shape[2:]))
        return self._conv(DECODER_OUT, x.relu())

    def _remember(self, part: str, block: int, x: Any, memory: dict[int, Any]) -> Any:
        """Apply a memory block: [n, A, H, W] -> [n, B, H, W], frame i seeing frames i and i - 1."""
        import torch

        past = torch.cat([memory.get(block, torch.zeros_like(x[:1])), x[:-1]])
        memory[block] = x[-1:]
        name = f"{part}.{block}"
        y = self._conv(f"{name}.conv.0", torch.cat([x, past], dim=1)).relu()
        y = self._conv(f"{name}.conv.4", self._conv(f"{name}.conv.2", y).relu())
        return (
            y
            + (
                self._conv(f"{name}.skip", x, padding=0)
                if f"{name}.skip.weight" in self.weights
                else x
            )
        ).relu()

    def _conv(self, name: str, x: Any, stride: int = 1, padding: int = 1) -> Any:
        import torch

        return torch.nn.functional.conv2d(
            x,
            self.weights[f"{name}.weight"],
            self.weights.get(f"{name}.bias"),
            stride=stride,
            padding=padding,
        )


TAEHV = CodecRow(
    TaehvCodec,
    {
        "model": Option(
            path, "safetensors file of the weights, or a folder with one", required=True
        ),
        "layout": Option(
            choice(*LAYOUTS), "grouped: F = r k, as TAEHV 1.5; causal, the usual: F = r k + 1", None
        ),
        "warm_up": Option(
            whole(0, 64),
            "times that the decoder sees the first latent before a clip; usual: 0",
            None,
        ),
    },
    on_device=True,
    libraries=("torch",),
)
