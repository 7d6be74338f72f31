"""Take paths from files that another program has written: one per clip, in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_shards.schema import DataError
from wm_train.evaluation.poses import KnownScene, PoseEstimator, PoseTrack, no_track
from wm_train.evaluation.poses.files import read_path


@dataclass(frozen=True)
class GivenPoses:
    """Read `<folder>/<key>.npz` or `<folder>/<key>.txt` (TUM)."""

    folder: Path

    def estimate(self, video: NDArray[np.uint8], fps: float, known: KnownScene) -> PoseTrack:
        """Return the path in the clip's file; without a file no frame has a pose."""
        files = [self.folder / f"{known.key}{end}" for end in (".npz", ".txt")]
        file = next((file for file in files if file.exists()), None)
        if file is None:
            return no_track(len(video), "given", f"no file {files[0].name} in {self.folder}")
        path, metric = read_path(file, len(video), fps)
        sure = np.isfinite(path).all(axis=(1, 2)).astype(np.float64)
        return PoseTrack(path, metric, sure, "given", 0.0)


def given(argument: str | None) -> PoseEstimator:
    """Build the estimator. Raises DataError without a folder."""
    if not argument or not Path(argument).is_dir():
        raise DataError(
            f"poses given: got {argument}, expected a folder of paths, <clip>.npz or <clip>.txt."
            " Fix: poses=given:<folder>"
        )
    return GivenPoses(Path(argument))
