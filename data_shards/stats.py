"""Print statistics of a data set: `python -m data_shards.stats path=…`.

Durations, motion, controls, and a check of the normalisation: the statistics of dataset.json were
taken while encoding, before rounding; here they are taken again from the stored latents, which
reveals a set whose parts do not belong together.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.arguments import Option, choice, path, run, whole
from data_shards.progress import terminal, track
from data_shards.schema import IMAGE_LATENTS, SPLITS, ClipEntry
from data_shards.storage.files import as_float32
from data_shards.storage.read import ClipDataset, open_dataset

ABOUT = "Durations, motion and controls of a data set, and its latent statistics measured again."
OPTIONS = {
    "path": Option(path, "data set folder or URL", required=True),
    "split": Option(choice(*SPLITS), "which clips", "train"),
    "limit": Option(whole(1), "clips to read, evenly spread", 1000),
    "out": Option(path, "JSON file to write as well", None),
}
PERCENTILES = (0, 5, 50, 95, 100)
BINS = 12
BARS = " ▁▂▃▄▅▆▇█"


def motion(c2w: NDArray[np.float64], fps: float) -> dict[str, float]:
    """Return speed (m/s), turning (degrees/s) and path length (m) of a camera [F,4,4]."""
    steps = np.linalg.norm(np.diff(c2w[:, :3, 3], axis=0), axis=1)
    relative = np.einsum("fji,fjk->fik", c2w[:-1, :3, :3], c2w[1:, :3, :3])
    turns = np.degrees(np.arccos(np.clip((np.trace(relative, axis1=1, axis2=2) - 1) / 2, -1, 1)))
    seconds = max(len(steps), 1) / fps
    return {
        "speed_m_s": steps.sum() / seconds,
        "turn_deg_s": turns.sum() / seconds,
        "path_m": steps.sum(),
    }


def image_latents(dataset: ClipDataset, entry: ClipEntry) -> NDArray[np.float32]:
    """Return the image latents [K, C, h, w], which count as first latents, too."""
    member = dataset.members(entry).get(IMAGE_LATENTS)
    if member is None:
        return np.empty(
            (0, dataset.info.channels, dataset.info.latent_height, dataset.info.latent_width),
            np.float32,
        )
    return as_float32(dataset.rows(entry, member, 0, member.shape[0]), member.dtype)


def measure(dataset: ClipDataset, split: str, limit: int, progress: Any = iter) -> dict[str, Any]:
    """Measure at most `limit` clips of a split, evenly spread."""
    clips, info = dataset.clips(split), dataset.info
    chosen = np.unique(
        np.linspace(0, max(len(clips) - 1, 0), min(limit, len(clips))).astype(int)
    ).tolist()
    sums, counts = np.zeros((2, 2, info.channels)), np.zeros(2)
    columns: dict[str, list[float]] = {"seconds": []}
    controls = []
    for index in progress(chosen):
        clip = dataset.read(clips[index])
        columns["seconds"].append(clip.entry.raw_frames / info.fps)
        for kind, part in (
            (0, clip.latents[:1]),
            (0, image_latents(dataset, clip.entry)),
            (1, clip.latents[1:]),
        ):
            wide = part.astype(np.float64)
            sums[kind] += (wide.sum(axis=(0, 2, 3)), np.square(wide).sum(axis=(0, 2, 3)))
            counts[kind] += wide.size / info.channels
        if clip.c2w is not None:
            for name, value in motion(clip.c2w, info.fps).items():
                columns.setdefault(name, []).append(float(value))
        if "controls" in clip.fields:
            controls.append(np.abs(clip.fields["controls"]).mean(axis=0))
    if info.time_layout == "grouped":  # all latents share one mean and spread
        sums, counts = sums.sum(axis=0)[None].repeat(2, 0), counts.sum()[None].repeat(2)
    safe = np.maximum(counts, 1)[:, None]
    mean = sums[:, 0] / safe
    std = np.sqrt(np.maximum(sums[:, 1] / safe - mean**2, 0))
    # how far off, in units of the stated spread: 0 is right
    shift = float(np.max(np.abs(mean - info.mean) / info.std)) if counts.all() else 0.0
    return {
        "clips": len(chosen),
        "columns": {
            name: np.percentile(values, PERCENTILES).tolist()
            for name, values in columns.items()
            if values
        },
        "histograms": {name: histogram(values) for name, values in columns.items() if values},
        "mean": mean.tolist(),
        "std": std.tolist(),
        "mean_shift_in_std": shift,
        "std_ratio": (
            [float(np.min(std / info.std)), float(np.max(std / info.std))]
            if counts.all()
            else [1.0, 1.0]
        ),
        "controls": (
            dict(zip(info.control_names, np.mean(controls, axis=0).tolist())) if controls else {}
        ),
    }


def histogram(values: Sequence[float]) -> dict[str, list[float]]:
    """Return {edges [n + 1], counts [n]} of equal bins from the smallest value to the largest."""
    counts, edges = np.histogram(values, BINS)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def bars(counts: Sequence[float]) -> str:
    """Draw one character per bin, as high as its count; a bin that is not empty is visible."""
    most = max(counts)
    return "".join(
        BARS[max(int(count > 0), round(count / most * (len(BARS) - 1)))] for count in counts
    )


def report(dataset: ClipDataset, figures: Mapping[str, Any]) -> None:
    """Print the figures of a data set."""
    from rich.table import Table

    info, console = dataset.info, terminal()
    hours = info.raw_frames / info.fps / 3600
    print(
        f"{info.source}\n{sum(info.clips.values())} clips in {info.shards} shards, {hours:.3f} h at"
        f" {info.fps:g} fps\ncodec {info.codec} {info.psnr_db} dB, latents [{info.channels},"
        f" {info.latent_height}, {info.latent_width}] {info.latent_dtype}"
    )
    table = Table("per clip", *(f"{p} %" for p in PERCENTILES), "least to largest")
    for name, values in figures["columns"].items():
        table.add_row(
            name, *(f"{value:.2f}" for value in values), bars(figures["histograms"][name]["counts"])
        )
    console.print(table)
    if figures["controls"]:
        print(
            "mean absolute control: "
            + ", ".join(f"{name} {value:.2f}" for name, value in figures["controls"].items())
        )
    low, high = figures["std_ratio"]
    print(
        f"normalisation, measured over {figures['clips']} clips against dataset.json: mean off by"
        f" at most {figures['mean_shift_in_std']:.4f} std, std ratio {low:.4f} to {high:.4f}"
    )


def stats(path: str, split: str, limit: int, out: str | None) -> None:
    dataset = open_dataset(path)
    figures = measure(dataset, split, limit, lambda items: track(items, "read"))
    report(dataset, figures)
    if out:
        Path(out).write_text(json.dumps(figures, indent=1) + "\n")


def main(arguments: list[str]) -> int:
    return run("python -m data_shards.stats", ABOUT, OPTIONS, stats, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
