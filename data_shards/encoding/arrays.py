"""Convert one clip to the arrays of its shard: latents, cameras, controls, text.

Their contribution to the data set's statistics is computed here, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.cameras import camera_problem
from data_shards.codecs import LatentCodec
from data_shards.codecs.clip_features import image_encoder
from data_shards.controls import bucket_controls, bucket_events
from data_shards.encoding.framing import Framing, framing_of
from data_shards.encoding.settings import Settings
from data_shards.encoding.text import READY, TextEncoder
from data_shards.fields import START_LATENTS
from data_shards.schema import IMAGE_LATENTS, DataError
from data_shards.sources.clips import ClipContent, ClipSource, SourceClip
from data_shards.time_layout import TimeLayout, time_of

GREY = 127.5  # the value of a pixel that codecs map to zero
Arrays = dict[str, tuple[str, NDArray[Any]]]  # field -> (stored dtype, array)


@dataclass
class Tally:
    """Hold a clip's share of the data set's statistics: sums [first|later, sum|sum of squares, C]
    and counts."""

    sums: NDArray[np.float64]
    counts: NDArray[np.float64]
    squared_error: float = 0.0
    values: int = 0
    cut_captions: int = 0
    unfocused: int = 0  # times that the player left the window
    control_squares: list[float] = field(default_factory=list)  # sum over latent frames, [A]

    def add(self, latents: NDArray[np.float32], images: NDArray[np.float32]) -> None:
        for kind, part in ((0, latents[:1]), (0, images), (1, latents[1:])):
            wide = part.astype(np.float64)
            self.sums[kind] += (wide.sum(axis=(0, 2, 3)), np.square(wide).sum(axis=(0, 2, 3)))
            self.counts[kind] += wide.size / latents.shape[1]

    def compare(self, video: NDArray[np.uint8], decoded: NDArray[np.uint8]) -> None:
        for mine, theirs in zip(video, decoded, strict=True):  # one by one: no copy of the clip
            difference = theirs.astype(np.int32) - mine
            self.squared_error += float(np.square(difference).sum(dtype=np.float64))
            self.values += difference.size


def latent_arrays(
    clip: SourceClip, content: ClipContent, codec: LatentCodec, settings: Settings, tally: Tally
) -> Arrays:
    """Return latents, image latents, what is made of the first image for models that read it, and
    the camera of the encoded frames."""
    framing = framing_of(clip, codec.spatial_stride, settings.resize)
    size, intrinsics = framing.size, content.intrinsics
    images = np.empty(
        (0, codec.channels, *(side // codec.spatial_stride for side in size)), np.float32
    )
    if content.video is not None:
        video, intrinsics = framing.video(content.video), framing.intrinsics(intrinsics)
        latents = codec.encode(video)
        images = np.concatenate(
            [images, *image_latents(video, codec, settings.image_latents_every)]
        )
        if settings.psnr == "yes":
            tally.compare(video, codec.decode(latents))
    else:
        assert content.latents is not None, "a source gives one or the other"
        latents = content.latents
    tally.add(latents, images)
    arrays: Arrays = {"latent.npy": (settings.latent_dtype, latents)}
    if content.video is not None and settings.start_video == "yes":
        arrays["start_video.npy"] = (settings.latent_dtype, start_video(video[0], codec))
    if content.video is not None and settings.image_encoder:
        encoder = image_encoder(settings.image_encoder, settings.device)
        arrays["clip_image.npy"] = (settings.latent_dtype, encoder.features(video[0]))
    if len(images):
        arrays[IMAGE_LATENTS] = (settings.latent_dtype, images)
    return arrays | camera_arrays(clip, content.c2w, intrinsics, framing)


def camera_arrays(
    clip: SourceClip, c2w: NDArray[Any] | None, intrinsics: NDArray[Any] | None, framing: Framing
) -> Arrays:
    """Return the camera of a clip that has one; intrinsics are of the framed pictures.

    Raises:
        DataError: one that no such pictures can have.
    """
    if c2w is None or intrinsics is None:
        return {}
    if problem := camera_problem(c2w, intrinsics, *framing.size, cropped=framing.stride):
        raise DataError(f"{problem} (key {clip.key}). Fix: mend the source")
    return {"c2w.npy": ("float64", c2w), "intrinsics.npy": ("float64", intrinsics)}


def image_latents(
    video: NDArray[np.uint8], codec: LatentCodec, every: int
) -> Iterator[NDArray[np.float32]]:
    """Yield [1, C, h, w] for each raw frame that is a multiple of `every`, except frame 0.

    Each is encoded alone (see data_shards/README.md, "Where a cut may start").
    """
    for frame in range(every, len(video), every) if every else ():
        yield codec.encode(video[frame : frame + 1])


def start_video(image: NDArray[np.uint8], codec: LatentCodec) -> NDArray[np.float32]:
    """Encode a video of an image [H, W, 3] and zeros behind it, as Wan's image models read it
    [START_LATENTS, C, h, w]; from the last latent on, that of a longer one is constant."""
    frames = time_of(codec).raw(START_LATENTS)
    video = np.full((frames, *image.shape), GREY, np.float32)
    video[0] = image
    return codec.encode(video)


def control_arrays(
    source: ClipSource, content: ClipContent, frames: int, time: TimeLayout, settings: Settings
) -> Arrays:
    """Return the controls of a clip of so many raw frames per latent frame, from events or from
    rows per raw frame."""
    offset = settings.controls_offset
    if content.events is not None:
        fps = Fraction(source.fps).limit_denominator(100_000)
        keep_taps = settings.keep_taps == "yes"
        rows = bucket_events(content.events, time.latents(frames), fps, time, keep_taps, offset)
    elif content.frame_controls is not None:
        rows = bucket_controls(content.frame_controls, source.control_sums, time, offset)
    else:
        return {}
    return {"controls.npy": ("float32", rows)}


def ready_text(clip: SourceClip, content: ClipContent, settings: Settings) -> Arrays:
    """Return the ready text of a clip (`text=ready`), and see that one to be encoded is there.

    Raises:
        DataError: a clip without what is asked for, or with another shape.
    """
    if settings.text is None:
        return {}
    if settings.text != READY:
        if content.caption is None:
            raise DataError(
                f"text: got no caption, expected one for every clip (key {clip.key}). Fix:"
                " captions=<JSON file>, or a sidecar's `caption`"
            )
        return {}
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
    return {"text.npy": (settings.text_dtype, embedding), "text_mask.npy": ("uint8", mask)}


def encode_text(
    clip: SourceClip, content: ClipContent, settings: Settings, encoder: TextEncoder, tally: Tally
) -> Arrays:
    """Return the text embedding of a clip's caption."""
    assert content.caption is not None, "`ready_text` has looked"
    embedding, mask, cut = encoder.encode(content.caption)
    tally.cut_captions += cut
    return {"text.npy": (settings.text_dtype, embedding), "text_mask.npy": ("uint8", mask)}
