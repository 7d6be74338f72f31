"""Record gameplay with ViZDoom: a wandering player, its exact camera, depth and controls.

Headless, and deterministic for a seed. Camera model, checked by reprojecting frames onto each other
through depth and pose (tests/data_shards/test_vizdoom.py):

- The horizontal field of view is 90 degrees (CAMERA_FOV): fx = W / 2.
- Doom's world is drawn for pixels 1.2 times as tall as wide: fy = 1.2 fx on square pixels.
- The software renderer looks up and down by *shifting* the picture, not by turning the camera: yaw
  alone turns `c2w`, and pitch moves the principal point, cy = H / 2 - fy tan(pitch). The intrinsics
  are therefore one row per frame.
- Pixel (row i, column j) has its centre at (j + 0.5, i + 0.5).

World: x east, y north, z up as in Doom, in metres at METRES_PER_UNIT. `c2w` has OpenCV axes (+x
right, +y down, +z forward) and its origin is the player's eye, with the bobbing of his walk. Time:
the engine makes 35 tics a second; a frame lasts 2 or 3 tics so that the mean rate is exactly the
requested one (`tics_until`). Controls are recorded per frame and per tic.
"""

from __future__ import annotations

import contextlib
import math
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.schema import DataError
from data_shards.sources.rooms import room_name, write_rooms
from data_shards.sources.wander import Wanderer

METRES_PER_UNIT = 1.0 / 32.0  # the player's eye is 41 units up: 1.28 m
TICS_PER_SECOND = 35
PIXEL_ASPECT = 1.2
SHARED_BYTES = 2**25  # room for all pictures that the engine shares, at the largest size
# the engine's 8-bit depth: metres = ((value + 0.5) * this + DEPTH_UNITS_AT_ZERO) * METRES_PER_UNIT;
DEPTH_UNITS_PER_STEP = 7.13
# fitted to wall positions known from the map: within half a step on walls, one step too near on
# floors
DEPTH_UNITS_AT_ZERO = 5.2
MAX_UNITS_PER_TIC = 12.0  # walking reaches 8.4; a teleport or a respawn is far above
MIN_METRES_PER_FRAME = 0.04  # of a clip, on average: less is standing around
MAX_FACING_SHARE = 0.2  # of a clip spent in front of a wall
BUTTONS = ("forward", "backward", "left", "right")
# rendered at twice the size and averaged: no aliasing
SIZES = {(160, 120): "RES_320X240", (320, 240): "RES_640X480"}
ROOMS = "rooms"
ROOMS_IN_FILE = 256  # made at a time; the engine opens the next file after so many episodes
# name -> (scenario file shipped with the wheel, map or None). None of them needs monsters, which
# are switched off. `rooms` takes the settings of one, and maps of its own.
SCENARIOS = {
    ROOMS: ("my_way_home.cfg", None),
    "my_way_home": ("my_way_home.cfg", None),
    "deathmatch": ("deathmatch.cfg", None),
    "freedoom2": ("freedoom2.cfg", "map01"),
}


@dataclass(frozen=True)
class RecordedClip:
    """Store a recorded clip.

    video [F,H,W,3] uint8, depth [F,H,W] uint8, c2w [F,4,4] and intrinsics [F,4] float64 (fx, fy,
    cx, cy in pixels), buttons [F,4] uint8 (BUTTONS) and mouse [F,2] float32 (degrees right, degrees
    down). Row i of the controls is what was held between frames i-1 and i. tic_buttons [K,4] and
    tic_mouse [K,2] are the same at the engine's rate, K = tics_until(F - 1): row k is what acted in
    tic k + 1 after the first frame, and frame i follows tic tics_until(i).
    """

    episode: int
    first_tic: int
    video: NDArray[np.uint8]
    depth: NDArray[np.uint8]
    c2w: NDArray[np.float64]
    intrinsics: NDArray[np.float64]
    buttons: NDArray[np.uint8]
    mouse: NDArray[np.float32]
    tic_buttons: NDArray[np.uint8]
    tic_mouse: NDArray[np.float32]


@dataclass(frozen=True)
class VizdoomOptions:
    """Store the options of a recording."""

    frames: int
    fps: float
    seed: int
    width: int = 160
    height: int = 120
    scenario: str = "my_way_home"
    clips_per_episode: int = 2
    look_degrees: float = 4.0  # how far the player looks up and down


def tics_until(frame: int, fps: float) -> int:
    """Return the tics from the first frame to `frame`.

    They are rounded down, so n seconds of frames last n * 35 tics at any rate.
    """
    return math.floor(frame * TICS_PER_SECOND / fps + 1e-9)


def camera_matrix(x: float, y: float, z: float, yaw_degrees: float) -> NDArray[np.float64]:
    """Return the camera-to-world matrix [4, 4] in metres.

    The position is in Doom's units, the angle counted from east, anticlockwise.
    """
    c, s = math.cos(math.radians(yaw_degrees)), math.sin(math.radians(yaw_degrees))
    c2w = np.eye(4)
    c2w[:3, 0], c2w[:3, 1], c2w[:3, 2] = (s, -c, 0.0), (0.0, 0.0, -1.0), (c, s, 0.0)
    c2w[:3, 3] = np.array([x, y, z]) * METRES_PER_UNIT
    return c2w


def camera_intrinsics(
    width: int, height: int, fov_degrees: float, pitch_degrees: float
) -> NDArray[np.float64]:
    """Return [4] fx, fy, cx, cy in pixels; the engine's pitch is negative when looking up."""
    fx = width / 2.0 / math.tan(math.radians(fov_degrees) / 2.0)
    fy = PIXEL_ASPECT * fx
    return np.array(
        [fx, fy, width / 2.0, height / 2.0 - fy * math.tan(math.radians(pitch_degrees))]
    )


def depth_metres(depth: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Convert depth to metres along the camera's z axis."""
    return (
        ((depth.astype(np.float32) + 0.5) * DEPTH_UNITS_PER_STEP + DEPTH_UNITS_AT_ZERO)
        * METRES_PER_UNIT
    ).astype(np.float32)


def halve(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Halve [2H, 2W, 3] -> [H, W, 3]: mean of 2x2 pixels, rounded half up."""
    # whole rows: ten times as fast as a sum over axes of length 2
    rows = np.add(image[0::2], image[1::2], dtype=np.uint16)
    return ((rows[:, 0::2] + rows[:, 1::2] + 2) >> 2).astype(np.uint8)


def nearest(depth: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Halve [2H, 2W] -> [H, W]: the nearest of 2x2.

    A mean would invent surfaces between a wall and what is behind it.
    """
    rows = np.minimum(depth[0::2], depth[1::2])
    return np.minimum(rows[:, 0::2], rows[:, 1::2])


def check_file_size() -> None:
    """Raise DataError where a limit on the size of files (`ulimit -f`) cuts the memory that is
    shared with the engine, a file too: it would end this process by a signal."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and limit < SHARED_BYTES:
        raise DataError(
            f"recorder: got a limit of {limit:,} bytes on the size of a file, expected at least"
            f" {SHARED_BYTES:,}, which the game engine shares. Fix: ulimit -f unlimited"
        )


def open_game(options: VizdoomOptions, config_folder: str, first_episode: int = 0) -> Any:
    """Start and return a game without a window, for ROOMS_IN_FILE episodes from `first_episode` on
    with the scenario `rooms`, else for any.

    ViZDoom writes its settings file into `config_folder` (by default into the current folder).
    """
    try:
        import vizdoom as vzd
    except ImportError as error:
        raise DataError(
            "recorder: ViZDoom is not installed, expected it for source vizdoom. Fix: pip install"
            " 'wm-train[demo]'"
        ) from error
    if options.scenario not in SCENARIOS:
        raise DataError(
            f"scenario: got {options.scenario!r}, expected one of {sorted(SCENARIOS)}. Fix:"
            " scenario=my_way_home"
        )
    if (options.width, options.height) not in SIZES:
        raise DataError(
            f"size: got {options.width}x{options.height}, expected one of {sorted(SIZES)}. Fix:"
            " width=160 height=120"
        )
    file, level = SCENARIOS[options.scenario]
    game = vzd.DoomGame()
    game.load_config(f"{vzd.scenarios_path}/{file}")
    game.set_doom_config_path(f"{config_folder}/vizdoom.ini")
    if options.scenario == ROOMS:
        rooms = Path(config_folder) / "rooms.wad"
        write_rooms(rooms, options.seed, range(first_episode, first_episode + ROOMS_IN_FILE))
        game.set_doom_scenario_path(str(rooms))
        level = room_name(first_episode)
    if level:
        game.set_doom_map(level)
    game.set_window_visible(False)
    game.set_mode(vzd.Mode.PLAYER)
    game.set_screen_format(vzd.ScreenFormat.RGB24)
    game.set_screen_resolution(getattr(vzd.ScreenResolution, SIZES[options.width, options.height]))
    game.set_depth_buffer_enabled(True)
    game.set_automap_buffer_enabled(False)
    game.set_audio_buffer_enabled(False)
    for switch in (
        "hud",
        "weapon",
        "crosshair",
        "messages",
        "screen_flashes",
        "corpses",
        "decals",
        "particles",
        "effects_sprites",
    ):
        getattr(game, f"set_render_{switch}")(False)
    variable, button = vzd.GameVariable, vzd.Button
    camera = [
        variable.CAMERA_POSITION_X,
        variable.CAMERA_POSITION_Y,
        variable.CAMERA_POSITION_Z,
        variable.CAMERA_ANGLE,
    ]
    game.set_available_game_variables(
        [*camera, variable.CAMERA_PITCH, variable.CAMERA_FOV, variable.HEALTH, variable.DEAD]
    )
    keys = [button.MOVE_FORWARD, button.MOVE_BACKWARD, button.MOVE_LEFT, button.MOVE_RIGHT]
    game.set_available_buttons([*keys, button.TURN_LEFT_RIGHT_DELTA, button.LOOK_UP_DOWN_DELTA])
    # a walk of 3 m/s; the engine's own 8 m/s crosses a room in half a second
    game.add_game_args("-nomonsters +turbo 35")
    game.set_episode_timeout(0)
    game.set_seed(options.seed)
    with contextlib.chdir(config_folder):  # the engine makes a folder in the current one
        game.init()
    return game


def record_episodes(
    options: VizdoomOptions, config_folder: str, first: int = 0, step: int = 1
) -> Iterator[tuple[int, Iterator[RecordedClip]]]:
    """Yield every `step`-th episode from `first` on with its clips that are of use, without end.

    Every episode has its own seed, so a clip depends on (seed, episode) alone. Raises DataError for
    bad options.
    """
    game, opened, episode = open_game(options, config_folder, first), first, first
    try:
        while True:
            if options.scenario == ROOMS and episode >= opened + ROOMS_IN_FILE:
                game.close()
                game, opened = open_game(options, config_folder, episode), episode
            yield episode, record_episode(game, options, episode)
            episode += step
    finally:
        game.close()


def record_episode(game: Any, options: VizdoomOptions, episode: int) -> Iterator[RecordedClip]:
    """Yield at most `clips_per_episode` usable clips of one life.

    There are three times as many attempts; in a room just as many, so that the first clip of each
    begins at the door.
    """
    seed = np.random.SeedSequence([options.seed, episode])
    game.set_seed(int(seed.generate_state(1)[0] % 2**31))
    if options.scenario == ROOMS:
        game.set_doom_map(room_name(episode))
    game.new_episode()
    game.advance_action(15)
    player = Wanderer(np.random.default_rng(seed), options.look_degrees)
    found = 0
    for _ in range((1 if options.scenario == ROOMS else 3) * options.clips_per_episode):
        clip = record_clip(game, options, player, episode)
        if clip is None:
            return  # the episode ended or the player was hurt or moved by force: start anew
        if (
            player.walked_metres >= MIN_METRES_PER_FRAME * options.frames
            and player.blocked_share < MAX_FACING_SHARE
        ):
            found += 1
            yield clip
        if found == options.clips_per_episode:
            return


def record_clip(
    game: Any, options: VizdoomOptions, player: Wanderer, episode: int
) -> RecordedClip | None:
    """Record the next `frames` frames; None if something happened that no key press explains."""
    count, width, height = options.frames, options.width, options.height
    video = np.empty((count, height, width, 3), np.uint8)
    depth = np.empty((count, height, width), np.uint8)
    c2w, intrinsics = np.empty((count, 4, 4)), np.empty((count, 4))
    buttons, mouse = np.zeros((count, len(BUTTONS)), np.uint8), np.zeros((count, 2), np.float32)
    total = tics_until(count - 1, options.fps)
    tic_buttons, tic_mouse = np.zeros((total, len(BUTTONS)), np.uint8), np.zeros((total, 2), "f4")
    player.begin_clip()
    first_tic, previous, start_health = game.get_episode_time(), None, None
    for i in range(count):
        if i:
            before, now = tics_until(i - 1, options.fps), tics_until(i, options.fps)
            tics = now - before
            keys, moves = player.decide(depth_metres(depth[i - 1]), intrinsics[i - 1], tics)
            act(game, keys, moves)
            buttons[i], mouse[i] = keys, moves.sum(axis=0)
            tic_buttons[before:now], tic_mouse[before:now] = keys, moves
        if game.is_episode_finished():
            return None
        state = game.get_state()
        x, y, z, yaw, pitch, fov, health, dead = state.game_variables
        start_health = health if start_health is None else start_health
        if dead or health < start_health:
            return None
        if previous is not None:
            step = math.dist(previous, (x, y, z))
            if step > MAX_UNITS_PER_TIC * tics:
                return None
            player.moved(step * METRES_PER_UNIT)
        previous = (x, y, z)
        video[i] = halve(state.screen_buffer)
        depth[i] = nearest(state.depth_buffer)
        c2w[i] = camera_matrix(x, y, z, yaw)
        intrinsics[i] = camera_intrinsics(width, height, fov, pitch)
    return RecordedClip(
        episode, first_tic, video, depth, c2w, intrinsics, buttons, mouse, tic_buttons, tic_mouse
    )


def act(game: Any, keys: NDArray[np.uint8], moves: NDArray[np.float32]) -> None:
    """Hold the keys and move the mouse, moves [tics, 2] in degrees right and down; the picture is
    drawn after the last tic only."""
    for tic, (turn, look) in enumerate(moves.tolist(), start=1):
        game.set_action([*(float(k) for k in keys), turn, -look])  # positive: it looks up
        game.advance_action(1, tic == len(moves))
