"""Find a video's path by structure from motion, from its pictures alone (pycolmap).

Pictures are matched with the few before and after them only: pairs that close a loop glue together
walls that look alike. Each frame has its own known intrinsics. The scale is arbitrary. Small
pictures are enlarged twice, below which corners are placed too coarsely.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.schema import DataError
from wm_train.evaluation.pictures import write_png
from wm_train.evaluation.poses import KnownScene, PoseEstimator, PoseTrack, no_track

OVERLAP = 5  # frames before and after that each frame is matched with
SMALL = 240  # rows below which pictures are enlarged


@dataclass(frozen=True)
class ColmapEstimator:
    """Estimate a path by incremental structure from motion."""

    def estimate(self, video: NDArray[np.uint8], fps: float, known: KnownScene) -> PoseTrack:
        """Return the poses of the largest model; other frames are unknown."""
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="colmap-") as folder:
            model = reconstruct(Path(folder), video, known.intrinsics)
        seconds = time.monotonic() - began
        if model is None:
            return no_track(len(video), "colmap", "structure from motion found no model", seconds)
        path = np.full((len(video), 4, 4), np.nan)
        for image in model.images.values():
            if image.has_pose:
                w2c = np.eye(4)
                w2c[:3] = image.cam_from_world().matrix()
                path[int(Path(image.name).stem)] = np.linalg.inv(w2c)
        sure = np.asarray(np.isfinite(path).all(axis=(1, 2)), np.float64)
        return PoseTrack(path, False, sure, "colmap", seconds)


def colmap(argument: str | None) -> PoseEstimator:
    """Build the estimator. Raises DataError without pycolmap."""
    try:
        import pycolmap
    except ImportError as error:
        raise DataError(
            f"poses colmap: got {error}, expected pycolmap. Fix: pip install 'wm-train[evaluate]'"
        ) from error
    pycolmap.logging.minloglevel = 2
    return ColmapEstimator()


def reconstruct(
    folder: Path, video: NDArray[np.uint8], intrinsics: NDArray[np.float64]
) -> Any | None:
    """Return the largest model of a video, None without one."""
    import pycolmap

    pictures, database = folder / "pictures", folder / "database.db"
    pictures.mkdir()
    grow = 2 if video.shape[1] < SMALL else 1
    for number, picture in enumerate(video):
        write_png(pictures / f"{number:06d}.png", picture.repeat(grow, 0).repeat(grow, 1))
    pycolmap.set_random_seed(0)
    extraction = pycolmap.FeatureExtractionOptions()
    extraction.use_gpu, extraction.num_threads = False, 1
    pycolmap.extract_features(
        database,
        pictures,
        camera_mode=pycolmap.CameraMode.PER_IMAGE,
        reader_options=pycolmap.ImageReaderOptions(camera_model="PINHOLE"),
        extraction_options=extraction,
        device=pycolmap.Device.cpu,
    )
    with pycolmap.Database.open(database) as held:
        for image in held.read_all_images():
            camera = held.read_camera(image.camera_id)
            camera.params = grow * intrinsics[int(Path(image.name).stem)]
            camera.has_prior_focal_length = True
            held.update_camera(camera)
    pairing = pycolmap.SequentialPairingOptions(overlap=OVERLAP, loop_detection=False)
    matching = pycolmap.FeatureMatchingOptions()
    matching.use_gpu, matching.num_threads = False, 1
    pycolmap.match_sequential(
        database, matching_options=matching, pairing_options=pairing, device=pycolmap.Device.cpu
    )
    # several models: a first pair from which no third frame is found would be all of a single one
    options = pycolmap.IncrementalPipelineOptions(num_threads=1, multiple_models=True)
    options.ba_refine_focal_length = options.ba_refine_principal_point = False
    options.ba_refine_extra_params = False
    models = pycolmap.incremental_mapping(database, pictures, folder / "models", options)
    return max(models.values(), key=lambda model: model.num_reg_images(), default=None)
