"""Convert one clip to the arrays of its shard: latents, cameras, controls, text.

Their contribution to the data set's statistics is computed here, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.cameras import camera_problem
from data_shards.codecs import LatentCodec
from data_shards.controls import bucket_controls, bucket_events
from data_shards.encoding.fields import crop_pictures
from data_shards.encoding.settings import Settings
from data_shards.encoding.text import READY, TextEncoder
from data_shards.schema import IMAGE_LATENTS, DataError
from data_shards.sources.clips import ClipContent, ClipSource, SourceClip

Arrays = dict[str, tuple[str, NDArray[Any]]]  # field -> (stored dtype, array)


def crop_size(clip: SourceClip, stride: int) -> tuple[int, int]:
    """Return (height, width) of the centred crop: the largest multiples of the codec's stride."""
    height, width = clip.height // stride * stride, clip.width // stride * stride
    if not height or not width:
        raise DataError(
            f"video size: got {clip.height}x{clip.width}, expected at least {stride}x{stride} (key"
            f" {clip.key})"
        )
    return height, width


def crop(
    video: NDArray[np.uint8], intrinsics: NDArray[np.float64] | None, size: tuple[int, int]
) -> tuple[NDArray[np.uint8], Any]:
    """Crop [F,H,W,3] in the centre, and move the principal point accordingly."""
    top, left = (video.shape[1] - size[0]) // 2, (video.shape[2] - size[1]) // 2
    moved = None if intrinsics is None else intrinsics - np.array([0.0, 0.0, left, top])
    return crop_pictures(video, size), moved


@dataclass
class Tally:
    """Hold a shard's share of the data set's statistics: sums [first|later, sum|sum of squares, C]
    and counts, over training clips."""

    sums: NDArray[np.float64]
    counts: NDArray[np.float64]
    squared_error: float = 0.0
    values: int = 0
    cut_captions: int = 0

    def add(self, latents: NDArray[np.float32], images: NDArray[np.float32]) -> None:
        for kind, part in ((0, latents[:1]), (0, images), (1, latents[1:])):
            wide = part.astype(np.float64)
            self.sums[kind] += (wide.sum(axis=(0, 2, 3)), np.square(wide).sum(axis=(0, 2, 3)))
            self.counts[kind] += wide.size / latents.shape[1]

    def compare(self, video: NDArray[np.uint8], decoded: NDArray[np.uint8]) -> None:
        difference = decoded.astype(np.int32) - video
        self.squared_error += float(np.square(difference).sum(dtype=np.float64))
        self.values += difference.size


def latent_arrays(
    clip: SourceClip,
    content: ClipContent,
    codec: LatentCodec,
    settings: Settings,
    tally: Tally,
    count: bool,
) -> Arrays:
    """Return latents, image latents, and the camera of the encoded frames."""
    size, intrinsics = crop_size(clip, codec.spatial_stride), content.intrinsics
    images = np.empty(
        (0, codec.channels, *(side // codec.spatial_stride for side in size)), np.float32
    )
    if content.video is not None:
        video, intrinsics = crop(content.video, content.intrinsics, size)
        latents = codec.encode(video)
        images = np.concatenate(
            [images, *image_latents(video, codec, settings.image_latents_every)]
        )
        if settings.psnr == "yes":
            tally.compare(video, codec.decode(latents))
    else:
        assert content.latents is not None, "a source gives one or the other"
        latents = content.latents
    if count:
        tally.add(latents, images)
    arrays: Arrays = {"latent.npy": (settings.latent_dtype, latents)}
    if len(images):
        arrays[IMAGE_LATENTS] = (settings.latent_dtype, images)
    if content.c2w is not None and intrinsics is not None:
        if problem := camera_problem(content.c2w, intrinsics, *size, cropped=codec.spatial_stride):
            raise DataError(f"{problem} (key {clip.key}). Fix: mend the source")
        arrays |= {"c2w.npy": ("float64", content.c2w), "intrinsics.npy": ("float64", intrinsics)}
    return arrays


def image_latents(
    video: NDArray[np.uint8], codec: LatentCodec, every: int
) -> Iterator[NDArray[np.float32]]:
    """Yield [1, C, h, w] for each raw frame that is a multiple of `every`, except frame 0.

    Each is encoded alone (see data_shards/README.md, "Where a cut may start").
    """
    for frame in range(every, len(video), every) if every else ():
        yield codec.encode(video[frame : frame + 1])


def control_arrays(
    source: ClipSource, content: ClipContent, latent_frames: int, stride: int, keep_taps: bool
) -> Arrays:
    """Return the controls of a clip per latent frame, from events or from rows per raw frame."""
    if content.events is not None:
        fps = Fraction(source.fps).limit_denominator(100_000)
        rows = bucket_events(content.events, latent_frames, fps, stride, keep_taps)
    elif content.frame_controls is not None:
        rows = bucket_controls(content.frame_controls, source.control_sums, stride)
    else:
        return {}
    return {"controls.npy": ("float32", rows)}


def text_arrays(
    clip: SourceClip,
    content: ClipContent,
    settings: Settings,
    encoder: TextEncoder | None,
    tally: Tally,
) -> Arrays:
    """Return the text embedding of a clip: encoded here, or ready-made by the source."""
    if encoder is not None:
        if content.caption is None:
            raise DataError(
                f"text: got no caption, expected one for every clip (key {clip.key}). Fix:"
                " captions=<JSON file>, or a sidecar's `caption`"
            )
        embedding, mask, cut = encoder.encode(content.caption)
        tally.cut_captions += cut
    elif settings.text == READY:
        if content.text is None:
            raise DataError(
                "text: got no ready embedding, expected `text` and `text_mask` for every clip (key"
                f" {clip.key}). Fix: text=<encoder>"
            )
        embedding, mask = content.text
        length = settings.text_length
        if (
            embedding.ndim != 2
            or len(embedding) != length
            or mask.shape != (length,)
            or not set(np.unique(mask)) <= {0, 1}
        ):
            raise DataError(
                f"text: got {embedding.shape} with a mask {mask.shape}, expected [{length}, E] and"
                f" [{length}] of 0 and 1 (key {clip.key}). Fix: text_length={len(embedding)}, or"
                " pad them alike"
            )
    else:
        return {}
    return {"text.npy": (settings.text_dtype, embedding), "text_mask.npy": ("uint8", mask)}
