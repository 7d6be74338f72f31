"""Draw what people look at: a clip's path beside the one that was asked for, and its video with the
path and the error of each frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wm_train.evaluation.metrics.cameras import CameraErrors
from wm_train.evaluation.pictures import GAP

WIDTH, PANEL, MARGIN = 720, 300, 40
TRUTH, FOUND, FAINT, INK = (40, 110, 200), (220, 90, 30), (215, 215, 215), (30, 30, 30)
BAR_DB = 40.0  # of a whole bar
Picture = NDArray[np.uint8]


def path_plot(title: str, c2w: NDArray[np.float64], errors: CameraErrors, fps: float) -> Picture:
    """Draw the path from above and its height, truth and estimate, and the errors of each frame
    below; a gap in a line is a frame whose pose is unknown."""
    from PIL import Image, ImageDraw

    sheet = Image.new("RGB", (WIDTH, 2 * PANEL + MARGIN), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    rot, far = errors.rot_err_deg, errors.trans_err_m
    shown = "no number" if rot.value is None else f"{rot.value:.2f} degrees, {far.value:.3f} m"
    draw.text((8, 8), f"{title}: {shown}, {rot.coverage:.0%} of frames", fill=INK)
    draw.text((8, 22), "asked for", fill=TRUTH)
    draw.text((80, 22), "estimated", fill=FOUND)
    across, up, ahead = ground(c2w)
    axes = np.stack([across, ahead, up], axis=1)
    truth = (c2w[:, :3, 3] - c2w[0, :3, 3]) @ axes
    found = (errors.aligned[:, :3, 3] - c2w[0, :3, 3]) @ axes
    seconds = np.arange(len(c2w)) / fps
    half = WIDTH // 2
    top, below = MARGIN, MARGIN + PANEL
    paths = ((truth[:, :2], TRUTH), (found[:, :2], FOUND))
    panel(draw, (0, top, half, below), paths, ("from above, m", ""), equal=True)
    heights = tuple(
        (np.stack([seconds, one[:, 2]], axis=1), ink)
        for one, ink in ((truth, TRUTH), (found, FOUND))
    )
    panel(draw, (half, top, WIDTH, below), heights, ("height, m, over seconds", ""))
    for left, values, name in (
        (0, errors.rotation, "rotation error, degrees, over seconds"),
        (half, errors.translation, "centre error, m, over seconds"),
    ):
        line = ((np.stack([seconds, values], axis=1), FOUND),)
        panel(draw, (left, below, left + half, below + PANEL), line, (name, ""), zero=True)
    return np.asarray(sheet)


def ground(c2w: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return the first camera's axes right, up and ahead, in the world."""
    return c2w[0, :3, 0], -c2w[0, :3, 1], c2w[0, :3, 2]


Lines = Sequence[tuple[NDArray[np.float64], tuple[int, int, int]]]


def panel(
    draw: Any,
    box: tuple[int, int, int, int],
    lines: Lines,
    names: tuple[str, str],
    equal: bool = False,
    zero: bool = False,
) -> None:
    """Draw lines [n, 2] into a box, with the ends of both axes; equal: one scale for both."""
    left, top, right, bottom = box[0] + 44, box[1] + 20, box[2] - 14, box[3] - 24
    draw.rectangle((left, top, right, bottom), outline=FAINT)
    draw.text((left, box[1] + 4), names[0], fill=INK)
    points = np.concatenate([line for line, _ in lines])
    if not np.isfinite(points).any(axis=0).all():
        draw.text((left + 8, top + 8), "nothing known", fill=INK)
        return
    low, high = np.nanmin(points, axis=0), np.nanmax(points, axis=0)
    if zero:
        low[1] = 0.0
    span = np.maximum(high - low, 1e-3)
    size = np.array([right - left, bottom - top], np.float64)
    scale = np.full(2, (size / span).min()) if equal else size / span
    for line, ink in lines:
        place = np.stack(
            [left + (line[:, 0] - low[0]) * scale[0], bottom - (line[:, 1] - low[1]) * scale[1]], 1
        )
        polyline(draw, place, ink)
    draw.text((left, bottom + 4), f"{low[0]:.3g}", fill=INK)
    end = low + size / scale
    draw.text((right - 34, bottom + 4), f"{end[0]:.3g}", fill=INK)
    draw.text((box[0] + 4, bottom - 12), f"{low[1]:.3g}", fill=INK)
    draw.text((box[0] + 4, top), f"{end[1]:.3g}", fill=INK)


def polyline(draw: Any, places: NDArray[np.float64], ink: tuple[int, int, int]) -> None:
    """Draw the known parts of a line [n, 2]; a known point alone is a dot."""
    known = np.asarray(np.isfinite(places).all(axis=1))
    for i, (x, y) in enumerate(places):
        if not known[i]:
            continue
        if i and known[i - 1]:
            draw.line((*places[i - 1], x, y), fill=ink, width=2)
        elif i + 1 == len(places) or not known[i + 1]:
            draw.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), fill=ink)


def judged_video(
    truth: Picture, made: Picture, decibels: NDArray[np.float64] | None, inset: Inset | None
) -> Picture:
    """Return the truth and the sample side by side [F, h, w, 3], enlarged to be seen; in the
    sample's corner the path so far, below a bar of its PSNR, full at 40 dB."""
    from PIL import Image, ImageDraw

    frames, height, width, _ = made.shape
    grow = max(1, round(320 / width))
    frames_out = []
    foot = 14 if decibels is not None else 0
    for number in range(frames):
        pair = np.concatenate(
            [
                truth[number].repeat(grow, 0).repeat(grow, 1),
                np.full((grow * height, GAP, 3), 255, np.uint8),
                made[number].repeat(grow, 0).repeat(grow, 1),
            ],
            axis=1,
        )
        sheet = Image.new("RGB", (pair.shape[1] // 2 * 2, (pair.shape[0] + foot) // 2 * 2))
        sheet.paste(Image.fromarray(pair), (0, 0))
        draw = ImageDraw.Draw(sheet)
        if inset is not None:
            inset(draw, (pair.shape[1], 0), number)
        if decibels is not None:
            start = grow * width + GAP
            full = grow * width - 60
            share = min(1.0, max(0.0, decibels[number] / BAR_DB))
            line = pair.shape[0] + 2
            draw.rectangle((start, line, start + full * share, line + 9), fill=FOUND)
            draw.text((start + full + 4, line - 1), f"{decibels[number]:.1f} dB", fill=(255,) * 3)
        frames_out.append(np.asarray(sheet))
    return np.stack(frames_out)


Inset = Callable[[Any, tuple[int, int], int], None]


def path_inset(c2w: NDArray[np.float64], aligned: NDArray[np.float64] | None) -> Inset:
    """Return a function that draws the path from above up to a frame, 80 pixels wide, left of a
    corner: what was asked for, and what was found."""
    across, _, ahead = ground(c2w)
    axes = np.stack([across, ahead], axis=1)
    truth = (c2w[:, :3, 3] - c2w[0, :3, 3]) @ axes
    found = None if aligned is None else (aligned[:, :3, 3] - c2w[0, :3, 3]) @ axes
    span = max(float(np.ptp(truth, axis=0).max()), 1e-3)
    low = (truth.min(axis=0) + truth.max(axis=0) - span) / 2

    def draw_path(draw: Any, corner: tuple[int, int], number: int) -> None:
        left, top = corner[0] - 86, corner[1] + 6
        draw.rectangle((left, top, left + 80, top + 80), fill=(255, 255, 255))
        for line, ink in ((truth, TRUTH), (found, FOUND)):
            if line is None:
                continue
            share = np.clip((line[: number + 1] - low) / span, 0, 1)
            place = np.stack([left + 4 + 72 * share[:, 0], top + 76 - 72 * share[:, 1]], 1)
            place[~np.isfinite(line[: number + 1]).all(axis=1)] = np.nan
            polyline(draw, place, ink)

    return draw_path
