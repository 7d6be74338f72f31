"""What can be measured on a clip to decide whether to train on it (SANA-WM App. B.3), from its pictures and its camera alone."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

# VMAF's motion feature: mean absolute difference of luma frames blurred by this kernel
BLUR = np.array([3571, 16004, 26386, 16004, 3571], np.float32) / 65536
CUT_THRESHOLD = 27.0  # PySceneDetect's ContentDetector, its default
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_MOVES = r"pan(?:s|ned|ning)?|tilt(?:s|ed|ing)?|doll(?:y|ies|ied|ying)|zoom(?:s|ed|ing)?|truck(?:s|ed|ing)|orbit(?:s|ed|ing)?|crane(?:s|d)?"
_GOES = (
    r"(?:mov|rotat|glid|advanc)(?:e|es|ed|ing)|(?:turn|walk|strafe|push|pull|pedestal|track|travel|back)(?:s|ed|ing)?"
    r"|steps?|stepp(?:ed|ing)|fl(?:y|ies|ying)"
)
_WAYS = r"left|right|forwards?|backwards?|up|down|ahead|closer|away|in|out|clockwise"
CAMERA_MOTION = re.compile(
    rf"\b(?:(?:camera|view|viewpoint|shot|perspective)\s+(?:\w+\s+){{0,2}}?(?:{_MOVES}|(?:{_GOES}))\b"
    rf"|(?:{_MOVES})\s+(?:\w+\s+){{0,2}}?(?:{_WAYS})|(?:{_GOES})\s+(?:to\s+the\s+)?(?:{_WAYS})\b)",
    re.IGNORECASE,
)


def camera_metrics(c2w: NDArray[np.float64], intrinsics: NDArray[np.float64], width: int, height: int) -> dict[str, float]:
    """Of the worst frame: fields of view (the one farther from 60 degrees), |fx - fy| / mean, and the largest change of velocity and of
    turning speed between successive frames (m and degrees), which a jump in the pose track shows as."""
    fx, fy = intrinsics[:, 0], intrinsics[:, 1]
    views = [np.degrees(2 * np.arctan(size / (2 * f))) for size, f in ((width, fx), (height, fy))]
    steps = np.diff(c2w[:, :3, 3], axis=0)
    relative = np.einsum("fji,fjk->fik", c2w[:-1, :3, :3], c2w[1:, :3, :3])
    turns = np.degrees(np.arccos(np.clip((np.trace(relative, axis1=1, axis2=2) - 1) / 2, -1, 1)))
    return {
        **{name: float(view[np.argmax(np.abs(view - 60))]) for name, view in zip(("fov_x_degrees", "fov_y_degrees"), views)},
        "focal_divergence": float(np.max(np.abs(fx - fy) / ((fx + fy) / 2))),
        "pose_jump_m": float(np.linalg.norm(np.diff(steps, axis=0), axis=1).max(initial=0)),
        "turn_jump_degrees": float(np.abs(np.diff(turns)).max(initial=0)),
    }


def hsv(frame: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[H,W,3] RGB -> hue 0-180, saturation and value 0-255, OpenCV's scales."""
    rgb = frame.astype(np.float32)
    value, low = rgb.max(axis=-1), rgb.min(axis=-1)
    spread = value - low
    safe = np.where(spread > 0, spread, 1)
    r, g, b = (rgb[..., i] for i in range(3))
    sixth = np.where(value == r, (g - b) / safe % 6, np.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4))
    saturation = np.where(value > 0, spread / np.where(value > 0, value, 1), 0) * 255
    return np.stack([np.where(spread > 0, sixth * 30, 0), saturation, value], axis=-1)


def blurred_luma(frame: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[H,W,3] -> [H,W], edges mirrored."""
    luma = np.pad(frame.astype(np.float32) @ LUMA, 2, mode="reflect")
    rows = sum(weight * luma[i : luma.shape[0] - 4 + i] for i, weight in enumerate(BLUR))
    return np.asarray(sum(weight * rows[:, i : rows.shape[1] - 4 + i] for i, weight in enumerate(BLUR)))


def video_metrics(video: NDArray[np.uint8]) -> dict[str, float]:
    """[F,H,W,3] -> mean saturation (0-255), VMAF motion (mean over frames), number of scene cuts."""
    motion, saturation, cuts = [], [], 0
    previous_luma, previous_hsv = None, None
    for frame in video:
        luma, colour = blurred_luma(frame), hsv(frame)
        saturation.append(float(colour[..., 1].mean()))
        if previous_luma is not None and previous_hsv is not None:
            motion.append(float(np.abs(luma - previous_luma).mean()))
            cuts += float(np.abs(colour - previous_hsv).mean(axis=(0, 1)).mean()) > CUT_THRESHOLD
        previous_luma, previous_hsv = luma, colour
    return {"saturation": float(np.mean(saturation)), "vmaf_motion": float(np.mean(motion)) if motion else 0.0, "scene_cuts": float(cuts)}


def camera_words(caption: str) -> list[str]:
    """The phrases of a caption that name camera motion. A caption must describe the scene only: the motion comes through the poses."""
    return [match.group(0) for match in CAMERA_MOTION.finditer(caption)]
