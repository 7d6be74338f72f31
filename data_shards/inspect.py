"""Draw a clip: `python -m data_shards.inspect path=… key=… out=clip.png`.

The picture shows decoded frames, the camera's path from above, and the controls.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.arguments import Option, path, run, text, whole
from data_shards.codecs import decode_shown, make_codec
from data_shards.schema import SPLITS, DataError
from data_shards.storage.read import Clip, open_dataset

ABOUT = (
    "Draw a clip as a PNG: a contact sheet of decoded frames, the camera path from above, a"
    " timeline of the controls."
)
OPTIONS = {
    "path": Option(path, "data set folder or URL", required=True),
    "key": Option(text, "clip; the first training clip if not given", None),
    "out": Option(path, "PNG to write", "clip.png"),
    "columns": Option(whole(1, 64), "frames in a row", 6),
    "rows": Option(whole(1, 64), "rows of frames", 2),
}
INK, PAPER, GREY = (20, 20, 20), (250, 250, 250), (190, 190, 190)
COLOURS = (
    (200, 40, 40),
    (40, 90, 200),
    (30, 150, 60),
    (190, 120, 0),
    (130, 50, 170),
    (0, 140, 150),
)


def contact_sheet(video: NDArray[np.uint8], columns: int, rows: int) -> NDArray[np.uint8]:
    """Arrange [F,H,W,3] as one picture of columns x rows frames.

    The frames are evenly spread over the clip, first and last included.
    """
    chosen = np.linspace(0, len(video) - 1, columns * rows).round().astype(int)
    height, width = video.shape[1:3]
    return (
        video[chosen]
        .reshape(rows, columns, height, width, 3)
        .transpose(0, 2, 1, 3, 4)
        .reshape(rows * height, columns * width, 3)
    )


def draw_path(canvas: Any, box: tuple[int, int, int, int], c2w: NDArray[np.float64]) -> None:
    """Draw the camera's path, seen along its own vertical.

    The start is a dot, view directions are short lines, both axes have the same scale.
    """
    left, top, right, bottom = box
    down = c2w[:, :3, 1].mean(axis=0)
    across = c2w[0, :3, 0] - down * (c2w[0, :3, 0] @ down) / (down @ down)
    across /= np.linalg.norm(across)
    ahead = np.cross(across, down / np.linalg.norm(down))
    origin = c2w[:, :3, 3] - c2w[0, :3, 3]
    # up on paper is where the first frame looks
    points = np.stack([origin @ across, -(origin @ ahead)], axis=1)
    low, high = points.min(axis=0), points.max(axis=0)
    scale = min(
        (right - left - 40) / max(high[0] - low[0], 0.5),
        (bottom - top - 50) / max(high[1] - low[1], 0.5),
    )
    centre = np.array([(left + right) / 2, (top + bottom + 14) / 2])
    pixels = (points - (low + high) / 2) * scale + centre
    canvas.rectangle(box, outline=GREY)
    canvas.line([tuple(p) for p in pixels], fill=INK, width=2)
    for i in range(0, len(pixels), max(1, len(pixels) // 12)):
        view = np.array([c2w[i, :3, 2] @ across, -(c2w[i, :3, 2] @ ahead)]) * 14
        canvas.line([tuple(pixels[i]), tuple(pixels[i] + view)], fill=COLOURS[0])
    x, y = pixels[0]
    canvas.ellipse([x - 4, y - 4, x + 4, y + 4], fill=COLOURS[1])
    length = np.linalg.norm(np.diff(c2w[:, :3, 3], axis=0), axis=1).sum()
    canvas.text(
        (left + 6, top + 4),
        f"camera path from above, {length:.1f} m; dot: start, red: view",
        fill=INK,
    )


def draw_controls(
    canvas: Any,
    box: tuple[int, int, int, int],
    controls: NDArray[np.float32],
    names: tuple[str, ...],
) -> None:
    """Draw one line per control over the latent frames [T, A], each on its own scale."""
    left, top, right, bottom = box
    canvas.rectangle(box, outline=GREY)
    band = (bottom - top) / max(len(names), 1)
    for i, name in enumerate(names):
        values = controls[:, i]
        limit = max(float(np.abs(values).max()), 1e-6)
        middle = top + band * (i + 0.6)
        x = np.linspace(left + 150, right - 8, len(values))
        canvas.line([(left + 150, middle), (right - 8, middle)], fill=GREY)
        canvas.line(
            [(float(a), float(middle - b / limit * band * 0.35)) for a, b in zip(x, values)],
            fill=COLOURS[i % len(COLOURS)],
            width=2,
        )
        canvas.text((left + 6, middle - 6), f"{name} (±{limit:.3g})", fill=INK)


def draw_clip(
    clip: Clip, video: NDArray[np.uint8], names: tuple[str, ...], columns: int, rows: int
) -> Any:
    """Return the whole picture, a PIL image."""
    from PIL import Image, ImageDraw

    sheet = contact_sheet(video, columns, rows)
    width = max(sheet.shape[1], 640)
    picture = Image.new("RGB", (width, 24 + sheet.shape[0] + 10 + 260), PAPER)
    canvas = ImageDraw.Draw(picture)
    entry = clip.entry
    canvas.text(
        (6, 6),
        f"{entry.key}  episode {entry.episode}  {entry.split}  {entry.raw_frames} frames,"
        f" {entry.latent_frames} latents",
        fill=INK,
    )
    picture.paste(Image.fromarray(sheet), (0, 24))
    top = 24 + sheet.shape[0] + 10
    if clip.c2w is not None:
        draw_path(canvas, (4, top, width // 2 - 4, top + 250), clip.c2w)
    if "controls" in clip.fields and names:
        box = (width // 2 + 4, top, width - 4, top + 250)
        draw_controls(canvas, box, clip.fields["controls"], names)
    return picture


def inspect(path: str, key: str | None, out: str, columns: int, rows: int) -> None:
    """Write the picture and print facts about the clip."""
    try:
        import PIL  # noqa: F401  (only to say so before the work is done)
    except ImportError as error:
        raise DataError(
            "inspect: pillow is not installed, expected it to draw. Fix: pip install"
            " 'wm-train[demo]'"
        ) from error
    dataset = open_dataset(path)
    first = next((dataset.clips(split)[0] for split in SPLITS if len(dataset.clips(split))), None)
    if first is None:
        raise DataError(f"inspect: got a data set without clips, expected at least one ({path})")
    clip = dataset.read(key or first)
    codec = make_codec(dataset.info.codec, dataset.info.codec_options)
    video = decode_shown(codec, clip.latents, dataset.info)
    draw_clip(clip, video, dataset.info.control_names, columns, rows).save(out)
    for field, member in dataset.members(clip.entry).items():
        print(
            f"{field:<16} {member.dtype:<9} {list(member.shape)!s:<20} {member.length} bytes at"
            f" {member.offset} of {clip.entry.shard}"
        )
    print(f"drawn to {Path(out)}")


def main(arguments: list[str]) -> int:
    return run("python -m data_shards.inspect", ABOUT, OPTIONS, inspect, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
