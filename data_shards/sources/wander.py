"""Drive the player of the ViZDoom recorder: it walks where there is room and looks around.

It turns smoothly.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from data_shards.schema import DataError

BODY_METRES = 0.65  # half the width of the lane that must be free
FREE_METRES = 12.0  # farther than this is all the same
CLOSE_METRES = 2.1
FACING_METRES = 1.4  # a view whose middle is nearer than this shows little but one wall
TURN_DEGREES_PER_TIC = 1.6
LANES = np.radians(np.linspace(-40, 40, 33))


def lane_clearance(
    depth: NDArray[np.float32], intrinsics: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the free metres [33] along each of LANES, from one depth picture [H, W].

    LANES are angles to the right of the view; the clearance is for a body of BODY_METRES.
    """
    height, width = depth.shape
    fx, _, cx, cy = intrinsics
    horizon = int(np.clip(cy, 8, height - 9))
    # [W] the nearest thing around eye height and a little below
    z = depth[horizon - 3 : horizon + 8].min(axis=0).astype(np.float64)
    x = (np.arange(width) + 0.5 - cx) / fx * z
    ahead = np.sin(LANES)[:, None] * x + np.cos(LANES)[:, None] * z
    aside = np.cos(LANES)[:, None] * x - np.sin(LANES)[:, None] * z
    blocking = np.where((np.abs(aside) < BODY_METRES) & (ahead > 0), ahead, FREE_METRES)
    return np.minimum(blocking.min(axis=1), FREE_METRES)


class Wanderer:
    """Choose keys and mouse motion from the camera's depth picture.

    All randomness comes from `random`, so equal seeds give equal paths.
    """

    def __init__(self, random: np.random.Generator, look_degrees: float) -> None:
        if not (math.isfinite(look_degrees) and 0 <= look_degrees <= 20):
            raise DataError(
                f"look_degrees: got {look_degrees}, expected 0 to 20. Fix: look_degrees=4"
            )
        self.random = random
        self.look_degrees = look_degrees
        self.turn_rate = 0.0  # degrees per tic, right is positive
        self.wish = 0.0  # degrees: where the player would like to drift
        self.pitch, self.pitch_wish = 0.0, 0.0  # degrees, down is positive
        self.escape = 0  # -1 or 1 while turning away from an obstacle
        self.mode, self.mode_frames = "walk", 0
        self.walked_metres, self.blocked_share = 0.0, 0.0
        self._frames = 0

    def begin_clip(self) -> None:
        self.walked_metres, self.blocked_share, self._frames = 0.0, 0.0, 0

    def moved(self, metres: float) -> None:
        self.walked_metres += metres

    def decide(
        self, depth: NDArray[np.float32], intrinsics: NDArray[np.float64], tics: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Return (keys [4], mouse motion [tics, 2]) for the next `tics` tics.

        Keys are forward/backward/left/right, motion is in degrees right and down.
        """
        free = lane_clearance(depth, intrinsics)
        self._choose_mode()
        self.wish = float(np.clip(0.96 * self.wish + self.random.normal(0.0, 4.0), -35, 35))
        score = free - 0.06 * np.abs(np.degrees(LANES) - self.wish)
        best = int(np.argmax(score))
        centre = float(free[len(LANES) // 2])
        if free[best] < CLOSE_METRES or (self.escape and centre < 1.5 * CLOSE_METRES):
            # boxed in: turn on the spot, always the same way, until the way ahead is open again
            self.escape = self.escape or (
                1 if free[len(LANES) // 2 :].sum() >= free[: len(LANES) // 2 + 1].sum() else -1
            )
            target_rate = self.escape * TURN_DEGREES_PER_TIC
        else:
            self.escape = 0
            target_rate = float(
                np.clip(0.06 * np.degrees(LANES[best]), -TURN_DEGREES_PER_TIC, TURN_DEGREES_PER_TIC)
            )
            if self.mode == "look" and centre > CLOSE_METRES:
                target_rate = math.copysign(0.5 * TURN_DEGREES_PER_TIC, self.wish)
        keys = np.zeros(4, np.uint8)
        keys[0] = centre > CLOSE_METRES * 0.8 and self.mode != "look"
        keys[2] = self.mode == "left" and keys[0]
        keys[3] = self.mode == "right" and keys[0]
        self._frames += 1
        facing = (
            float(np.median(depth[depth.shape[0] // 2 - 8 : depth.shape[0] // 2 + 1]))
            < FACING_METRES
        )
        self.blocked_share += (float(facing) - self.blocked_share) / self._frames
        moves = np.empty((tics, 2), np.float32)
        for move in moves:
            self.turn_rate += 0.2 * (target_rate - self.turn_rate)
            move[:] = self.turn_rate, 0.05 * (self.pitch_wish - self.pitch)
            self.pitch += float(move[1])
        return keys, moves

    def _choose_mode(self) -> None:
        self.mode_frames -= 1
        if self.mode_frames > 0:
            return
        self.mode = str(
            self.random.choice(["walk", "left", "right", "look"], p=[0.74, 0.08, 0.08, 0.1])
        )
        self.mode_frames = (
            int(self.random.integers(24, 60))
            if self.mode == "walk"
            else int(self.random.integers(10, 22))
        )
        self.pitch_wish = float(self.random.uniform(-1, 1)) * self.look_degrees
