"""Let another program estimate the path: learned models keep their own environment and weights.

`command:<program and arguments>`: `{video}` in it is replaced by the clip as MP4, `{out}` by the
file to write, poses.npz (c2w [n, 4, 4], perhaps frames [n] and metric) or, if it writes that
instead, poses.txt beside it (TUM).
"""

from __future__ import annotations

import shlex
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_shards.schema import DataError
from wm_train.evaluation.pictures import write_video
from wm_train.evaluation.poses import KnownScene, PoseEstimator, PoseTrack
from wm_train.evaluation.poses.files import read_path

LIMIT_S = 3600.0


@dataclass(frozen=True)
class CommandEstimator:
    """Run `words` once for each clip."""

    words: tuple[str, ...]

    def estimate(self, video: NDArray[np.uint8], fps: float, known: KnownScene) -> PoseTrack:
        """Return the path that the program writes. Raises DataError when it fails or writes none:
        a broken program is no unknown pose."""
        name, began = Path(self.words[0]).name, time.monotonic()
        with tempfile.TemporaryDirectory(prefix="poses-") as folder:
            clip, out = Path(folder) / "clip.mp4", Path(folder) / "poses.npz"
            write_video(clip, video, fps)
            words = [word.format(video=clip, out=out) for word in self.words]
            try:
                done = subprocess.run(
                    words, capture_output=True, text=True, timeout=LIMIT_S, check=False
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise DataError(f"poses command: got {error} ({known.key})") from error
            files = [file for file in (out, out.with_suffix(".txt")) if file.exists()]
            if done.returncode or not files:
                said = (done.stderr or done.stdout).strip().splitlines()[-1:]
                raise DataError(
                    f"poses command: got exit code {done.returncode} and {len(files)} files of"
                    f" poses from {name} ({known.key}; it said {said}), expected 0 and one"
                )
            path, metric = read_path(files[0], len(video), fps)
        sure = np.isfinite(path).all(axis=(1, 2)).astype(np.float64)
        return PoseTrack(path, metric, sure, f"command {name}", time.monotonic() - began)


def command(argument: str | None) -> PoseEstimator:
    """Build the estimator. Raises DataError for a command that does not say where its video and its
    output are."""
    words = tuple(shlex.split(argument or ""))
    if not {"{video}", "{out}"} <= set(words):
        raise DataError(
            f"poses command: got {argument!r}, expected a program with {{video}} and {{out}} among"
            " its arguments. Fix: poses='command:<program> {video} {out}'"
        )
    return CommandEstimator(words)
