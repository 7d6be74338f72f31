"""Measure a clip, to decide if it is used for training (SANA-WM App. B.3).

Only its pictures and its camera are used.
"""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.schema import DataError

# VMAF's motion feature: mean absolute difference of luma frames blurred by this kernel
BLUR = np.array([3571, 16004, 26386, 16004, 3571], np.float32) / 65536
# BT.601 in video range, as in the files that FFmpeg measures
LUMA = np.array([0.299, 0.587, 0.114], np.float32) * 219 / 255
EPSILON = 1e-6
FLOW_EVERY_S, FLOW_WITHIN_S = 0.5, 60.0  # App. B.3: frame pairs every 0.5 s across the first 60 s
CAMERA_METRICS = (
    "fov_x_degrees",
    "fov_y_degrees",
    "focal_divergence",
    "pose_jump_m",
    "turn_jump_degrees",
)
VIDEO_METRICS = ("saturation", "vmaf_motion", "flow_pixels", "scene_cuts")
_MOVES = (
    r"pan(?:s|ned|ning)?|tilt(?:s|ed|ing)?|doll(?:y|ies|ied|ying)|zoom(?:s|ed|ing)?"
    r"|truck(?:s|ed|ing)|orbit(?:s|ed|ing)?|crane(?:s|d)?"
)
_GOES = (
    r"(?:mov|rotat|glid|advanc)(?:e|es|ed|ing)"
    r"|(?:turn|walk|strafe|push|pull|pedestal|track|travel|back)(?:s|ed|ing)?"
    r"|steps?|stepp(?:ed|ing)|fl(?:y|ies|ying)"
)
_WAYS = r"left|right|forwards?|backwards?|up|down|ahead|closer|away|in|out|clockwise"
CAMERA_MOTION = re.compile(
    r"\b(?:(?:camera|view|viewpoint|shot|perspective)\s+(?:\w+\s+){0,2}?"
    rf"(?:{_MOVES}|(?:{_GOES}))\b"
    rf"|(?:{_MOVES})\s+(?:\w+\s+){{0,2}}?(?:{_WAYS})|(?:{_GOES})\s+(?:to\s+the\s+)?(?:{_WAYS})\b)",
    re.IGNORECASE,
)


def camera_metrics(
    c2w: NDArray[np.float64], intrinsics: NDArray[np.float64], width: int, height: int
) -> dict[str, float]:
    """Return the camera's metrics, each of its worst frame.

    They are the fields of view (the one farther from 60 degrees), |fx - fy| / mean, and the largest
    change of velocity and of turning speed between successive frames (m and degrees), which reveals
    a jump in the pose track.
    """
    fx, fy = intrinsics[:, 0], intrinsics[:, 1]
    views = [np.degrees(2 * np.arctan(size / (2 * f))) for size, f in ((width, fx), (height, fy))]
    steps = np.diff(c2w[:, :3, 3], axis=0)
    relative = np.einsum("fji,fjk->fik", c2w[:-1, :3, :3], c2w[1:, :3, :3])
    turns = np.degrees(np.arccos(np.clip((np.trace(relative, axis1=1, axis2=2) - 1) / 2, -1, 1)))
    return {
        **{
            name: float(view[np.argmax(np.abs(view - 60))])
            for name, view in zip(("fov_x_degrees", "fov_y_degrees"), views)
        },
        "focal_divergence": float(np.max(np.abs(fx - fy) / ((fx + fy) / 2))),
        "pose_jump_m": float(np.linalg.norm(np.diff(steps, axis=0), axis=1).max(initial=0)),
        "turn_jump_degrees": float(np.abs(np.diff(turns)).max(initial=0)),
    }


def scale_cv(scales: Sequence[float]) -> float:
    """Return the coefficient of variation of per-frame metric scales: std / (mean + epsilon)."""
    values = np.asarray(scales, np.float64)
    return float(values.std() / (values.mean() + EPSILON))


def video_metrics(
    video: NDArray[np.uint8], fps: float, wanted: Iterable[str] = VIDEO_METRICS
) -> dict[str, float]:
    """Return the wanted VIDEO_METRICS of a video [F,H,W,3].

    Raises:
        DataError: a tool that a metric needs is not installed.
    """
    measures: dict[str, Callable[[], float]] = {
        "saturation": lambda: float(np.mean([saturation(frame).mean() for frame in video])),
        "vmaf_motion": lambda: float(np.mean(vmaf_motion(video)[1:] or [0.0])),
        "flow_pixels": lambda: flow_pixels(video, fps),
        "scene_cuts": lambda: float(len(scene_cuts(video, fps))),
    }
    return {name: measures[name]() for name in VIDEO_METRICS if name in wanted}


def saturation(frame: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the HSV saturation [H,W], 0 to 255, of an RGB image [H,W,3]."""
    value, low = frame.max(axis=-1).astype(np.float32), frame.min(axis=-1).astype(np.float32)
    return np.asarray((value - low) / np.maximum(value, 1) * 255, np.float32)


def luma(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the BT.601 luma [H, W] of [H, W, 3], with its offset."""
    return np.asarray(np.rint(frame.astype(np.float32) @ LUMA + 16), np.uint8)


def vmaf_motion(video: NDArray[np.uint8]) -> list[float]:
    """Return VMAF's motion feature of each frame (0 for the first).

    FFmpeg's own filter computes it where PyAV has it, else the same formula here.
    """
    planes = [luma(frame) for frame in video]
    try:
        import av
    except ImportError:
        return motion_by_formula(planes)
    return (
        motion_by_ffmpeg(planes)
        if "vmafmotion" in av.filter.filters_available
        else motion_by_formula(planes)
    )


def motion_by_ffmpeg(planes: Sequence[NDArray[np.uint8]]) -> list[float]:
    """Return VMAF's motion feature of each frame by FFmpeg's own filter."""
    import av

    height, width = planes[0].shape
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=width,
        height=height,
        format=av.VideoFormat("gray", width, height),
        time_base=Fraction(1, 25),
    )
    measure, sink = graph.add("vmafmotion"), graph.add("buffersink")
    source.link_to(measure)
    measure.link_to(sink)
    graph.configure()
    scores = []
    for number, plane in enumerate(planes):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(plane), format="gray")
        frame.pts = number
        graph.push(frame)
        scores.append(float(graph.pull().metadata["lavfi.vmafmotion.score"]))
    return scores


def motion_by_formula(planes: Sequence[NDArray[np.uint8]]) -> list[float]:
    """Return the mean absolute difference of blurred luma.

    FFmpeg treats the two outermost pixels differently.
    """
    blurred = [blur(plane.astype(np.float32)) for plane in planes]
    return [0.0, *(float(np.abs(b - a).mean()) for a, b in itertools.pairwise(blurred))]


def blur(luma: NDArray[np.float32]) -> NDArray[np.float32]:
    """Blur [H,W] -> [H,W], with mirrored edges."""
    padded = np.pad(luma, 2, mode="reflect")
    rows = sum(weight * padded[i : padded.shape[0] - 4 + i] for i, weight in enumerate(BLUR))
    return np.asarray(
        sum(weight * rows[:, i : rows.shape[1] - 4 + i] for i, weight in enumerate(BLUR))
    )


def flow_pixels(video: NDArray[np.uint8], fps: float) -> float:
    """Return the mean length of the optical flow (OpenCV's DIS) in pixels.

    It is taken between frames FLOW_EVERY_S apart; 0 for a clip of one sample.
    """
    cv2 = filter_tool("cv2")
    step = max(1, round(FLOW_EVERY_S * fps))
    grey = [
        np.ascontiguousarray(luma(frame))
        for frame in video[: round(FLOW_WITHIN_S * fps) + 1 : step]
    ]
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    lengths = [
        float(np.linalg.norm(flow.calc(a, b, None), axis=-1).mean())
        for a, b in itertools.pairwise(grey)
    ]
    return float(np.mean(lengths)) if lengths else 0.0


def scene_cuts(video: NDArray[np.uint8], fps: float) -> list[int]:
    """Return the first frame of every later scene.

    It uses PySceneDetect's ContentDetector with its own defaults.
    """
    scenedetect = filter_tool("scenedetect")
    detector, found = scenedetect.ContentDetector(), []
    moment = scenedetect.FrameTimecode(0, float(fps))
    for number, frame in enumerate(video):
        moment = scenedetect.FrameTimecode(number, float(fps))
        # it takes BGR
        found += detector.process_frame(moment, np.ascontiguousarray(frame[..., ::-1]))
    return [cut.frame_num for cut in (*found, *detector.post_process(moment))]


def filter_tool(name: str) -> Any:
    """Import a package that filtering needs, or raise DataError with what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"filter: {name} is not installed, expected it for flow_pixels and scene_cuts. Fix: pip"
            " install 'wm-train[filter]', or a table without them"
        ) from error


def camera_words(caption: str) -> list[str]:
    """Return the phrases of a caption that name camera motion.

    A caption must describe the scene only: the motion is given by the poses.
    """
    return [match.group(0) for match in CAMERA_MOTION.finditer(caption)]
