"""Build rooms for ViZDoom: each is a place of its own, made from (seed, number) alone.

A room is a rectangle of random size with two pillars at random places; the player starts anywhere
in it, turned anyhow. All rooms are of one style: the wall to the north is of red brick, the one to
the east of blue panels, and so on. A model that has seen many can know which wall is behind the
camera in a new one, but how far away it is, and where the pillars are, only the picture says.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Flats, which are plainer than the textures of walls: a coarse codec keeps what is seen of them.
# Clockwise from the west, as the corners are listed: gray, red, blue, green.
WALLS = ("FLAT18", "FLOOR1_6", "FLAT14", "AQF022")
PILLAR_WALLS = ("FLOOR0_2", "AQF067")  # tan, nearly white
FLOOR, CEILING = "SLIME05", "CEIL3_5"
HEIGHT = 128  # units from floor to ceiling
SIDES = (448, 640)  # units: the least and the largest width and depth
PILLAR = 20  # units: half the side of a pillar
APART = 128  # units from the middle of a pillar, or from the start, to a wall and to each other
Points = list[tuple[int, int]]


def room_name(number: int) -> str:
    """Return the name of the room's map, at most eight characters."""
    return f"R{number:07d}"


def block(kind: str, **values: object) -> str:
    """Return one block of a UDMF text map."""
    return f"{kind} {{ {' '.join(f'{key} = {udmf(value)};' for key, value in values.items())} }}\n"


def udmf(value: object) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    return str(value).lower()  # booleans, numbers


def places(
    random: np.random.Generator, size: tuple[int, int], count: int, start: tuple[int, int]
) -> Points:
    """Return points of a room that are APART from its walls, from the start and from each other."""
    found = [start]
    while len(found) <= count:
        x, y = (int(random.integers(APART, side - APART + 1)) for side in size)
        if all(math.hypot(x - a, y - b) >= APART for a, b in found):
            found.append((x, y))
    return found[1:]


@dataclass(frozen=True)
class Room:
    """Hold one room, in Doom's units. outlines: the corners of the room, clockwise, and of its
    pillars, anticlockwise, so that walls face what is between; walls: the texture of each side."""

    start: tuple[int, int]
    angle: int  # degrees, anticlockwise from east
    outlines: tuple[Points, ...]
    walls: tuple[tuple[str, ...], ...]


def make_room(seed: int, number: int) -> Room:
    """Return room `number` of a seed."""
    random = np.random.default_rng([seed, number])
    width, depth = (int(side) for side in random.integers(*SIDES, 2, endpoint=True))
    start = (int(random.integers(APART, width - APART + 1)), APART)
    middles = places(random, (width, depth), len(PILLAR_WALLS), start)
    outlines = [[(0, 0), (0, depth), (width, depth), (width, 0)]]
    for x, y in middles:
        r = PILLAR
        outlines.append([(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)])
    walls = (WALLS, *((wall,) * 4 for wall in PILLAR_WALLS))
    return Room(start, int(random.integers(60, 121)), tuple(outlines), walls)


def room_text(seed: int, number: int) -> str:
    """Return one room as a text map in the format UDMF, version 1.1, in Doom's units."""
    room = make_room(seed, number)
    skills = {f"skill{level}": True for level in range(1, 6)}
    text = 'namespace = "zdoom";\n' + block(
        "thing", x=room.start[0], y=room.start[1], angle=room.angle, type=1, single=True, **skills
    )
    lines = 0
    for corners, walls in zip(room.outlines, room.walls, strict=True):
        for i, ((x, y), wall) in enumerate(zip(corners, walls, strict=True)):
            text += block("vertex", x=x, y=y)
            text += block("sidedef", sector=0, texturemiddle=wall)
            after = lines + (i + 1) % len(corners)
            text += block("linedef", v1=lines + i, v2=after, sidefront=lines + i, blocking=True)
        lines += len(corners)
    return text + block(
        "sector", texturefloor=FLOOR, textureceiling=CEILING, heightceiling=HEIGHT, lightlevel=224
    )


def room_depth(
    room: Room,
    c2w: NDArray[np.float64],
    lens: NDArray[np.float64],
    size: tuple[int, int],
    metres_per_unit: float,
) -> NDArray[np.float64]:
    """Return the exact depth of a picture taken in a room, metres along the camera's z axis.

    c2w [4, 4] in metres of the room's own world; lens [4] fx, fy, cx, cy in pixels; size: height
    and width -> [height, width]. (The engine stores depth in steps of 0.22 m.)
    """
    height, width = size
    fx, fy, cx, cy = lens
    right, down = (np.arange(width) + 0.5 - cx) / fx, (np.arange(height) + 0.5 - cy) / fy
    turn, eye = c2w[:3, :3], c2w[:3, 3]
    ray = turn[:, 0] * right[None, :, None] + turn[:, 1] * down[:, None, None] + turn[:, 2]
    top = HEIGHT * metres_per_unit
    with np.errstate(divide="ignore"):
        depth = np.where(ray[..., 2] < 0, -eye[2], top - eye[2]) / ray[..., 2]  # floor or ceiling
    depth[ray[..., 2] == 0] = np.inf
    for outline in room.outlines:
        corners = np.array(outline) * metres_per_unit
        for a, b in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            np.minimum(depth, meeting(ray, a - eye[:2], b - a), out=depth)
    return depth


def meeting(
    ray: NDArray[np.float64], start: NDArray[np.float64], side: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return how many times `ray` [..., 3], seen from above, reaches from the origin to the wall
    that begins at `start` [2] and goes along `side` [2]; infinity where it does not."""
    x, y = ray[..., 0], ray[..., 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        across = x * side[1] - y * side[0]
        ahead = (start[0] * side[1] - start[1] * side[0]) / across
        along = (start[0] * y - start[1] * x) / across
    return np.where((ahead > 1e-6) & (along >= 0) & (along <= 1), ahead, np.inf)


def write_rooms(path: Path, seed: int, numbers: Iterable[int]) -> None:
    """Write a file of maps (PWAD: magic, count and place of the directory, the lumps, and 16 bytes
    of directory for each)."""
    lumps, directory = b"", b""
    for number in numbers:
        text = room_text(seed, number).encode()
        for name, data in ((room_name(number), b""), ("TEXTMAP", text), ("ENDMAP", b"")):
            directory += struct.pack("<ii8s", 12 + len(lumps), len(data), name.encode())
            lumps += data
    path.write_bytes(
        struct.pack("<4sii", b"PWAD", len(directory) // 16, 12 + len(lumps)) + lumps + directory
    )
