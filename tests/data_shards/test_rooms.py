"""The rooms that the recorder builds, against the geometry that they are said to have."""

import filecmp
import math
import re
import struct
from contextlib import closing

import numpy as np
import pytest

from data_shards import record
from data_shards.sources.recording import RecordingSource
from data_shards.sources.rooms import (
    APART,
    PILLAR,
    SIDES,
    WALLS,
    make_room,
    room_depth,
    room_name,
    room_text,
    write_rooms,
)
from data_shards.sources.vizdoom import (
    METRES_PER_UNIT,
    VizdoomOptions,
    depth_metres,
    open_game,
    record_episodes,
)

BLOCK = re.compile(r"(\w+) \{ (.*?) \}")


def parsed(text: str) -> list[tuple[str, dict[str, str]]]:
    return [
        (kind, dict(re.findall(r'(\w+) = "?([^";]*)"?;', body)))
        for kind, body in BLOCK.findall(text)
    ]


def of_kind(text: str, wanted: str) -> list[dict[str, str]]:
    return [values for kind, values in parsed(text) if kind == wanted]


@pytest.mark.parametrize("number", range(20))
def test_walls_face_inwards_pillars_outwards_and_both_are_closed(number):
    """The front of a line is on its right: the area to the right of a clockwise outline is inside
    it, so the room's signed area is negative and a pillar's positive."""
    text = room_text(7, number)
    points = [(int(v["x"]), int(v["y"])) for v in of_kind(text, "vertex")]
    lines = [(int(v["v1"]), int(v["v2"])) for v in of_kind(text, "linedef")]
    areas = []
    for first in range(0, len(lines), 4):
        outline = lines[first : first + 4]
        assert [b for _, b in outline] == [a for a, _ in outline[1:]] + [outline[0][0]]
        cross = [points[a][0] * points[b][1] - points[b][0] * points[a][1] for a, b in outline]
        areas.append(sum(cross) / 2)
    width, depth = points[2]
    assert SIDES[0] <= min(width, depth) <= max(width, depth) <= SIDES[1]
    assert areas == [-width * depth, (2 * PILLAR) ** 2, (2 * PILLAR) ** 2]
    assert [v["texturemiddle"] for v in of_kind(text, "sidedef")][:4] == list(WALLS)
    (start,) = of_kind(text, "thing")
    middles = [np.mean(points[at : at + 4], axis=0) for at in (4, 8)]
    middles.append((int(start["x"]), int(start["y"])))
    for i, (x, y) in enumerate(middles):
        assert min(x, y, width - x, depth - y) >= APART
        assert all(math.dist((x, y), other) >= APART for other in middles[:i])


def test_a_room_is_a_function_of_seed_and_number():
    assert room_text(1, 5) == room_text(1, 5)
    assert len({room_text(seed, number) for seed in (1, 2) for number in range(50)}) == 100


def test_the_file_has_each_room_where_its_directory_says(tmp_path):
    write_rooms(tmp_path / "rooms.wad", 3, range(4, 6))
    data = (tmp_path / "rooms.wad").read_bytes()
    magic, count, at = struct.unpack("<4sii", data[:12])
    assert (magic, count, len(data)) == (b"PWAD", 6, at + 6 * 16)
    entries = [struct.unpack("<ii8s", data[at + 16 * i : at + 16 * i + 16]) for i in range(count)]
    names = [name.rstrip(b"\0").decode() for _, _, name in entries]
    assert names == [room_name(4), "TEXTMAP", "ENDMAP", room_name(5), "TEXTMAP", "ENDMAP"]
    for number, (start, size, _) in zip((4, 5), (entries[1], entries[4]), strict=True):
        assert data[start : start + size].decode() == room_text(3, number)


def test_the_engine_shows_the_walls_where_the_text_puts_them(tmp_path):
    """The player starts at the room's door with the depth of the wall ahead as the geometry has it,
    in two rooms one after the other, one of them of the second file."""
    options = VizdoomOptions(frames=9, fps=16.0, seed=11, scenario="rooms")
    game = open_game(options, str(tmp_path), first_episode=256)
    try:
        for number in (256, 257):
            text = room_text(11, number)
            points = [(int(v["x"]), int(v["y"])) for v in of_kind(text, "vertex")]
            (start,) = of_kind(text, "thing")
            game.set_doom_map(room_name(number))
            game.new_episode()
            game.advance_action(15)
            state = game.get_state()
            x, y, _, yaw = state.game_variables[:4]
            assert (x, y) == (int(start["x"]), int(start["y"]))
            assert yaw == pytest.approx(int(start["angle"]), abs=0.5)
            seen = depth_metres(state.depth_buffer)[120]  # the row at eye height
            expected = [
                walls_ahead(points, (x, y), yaw, (column + 0.5 - 160) / 160)
                for column in range(0, 320, 8)
            ]
            difference = np.abs(seen[::8] - np.array(expected) * METRES_PER_UNIT)
            assert np.median(difference) < 0.12  # half a step of the depth
            assert (difference < 0.23).mean() > 0.9  # a column may hit a pillar's edge
    finally:
        game.close()


def walls_ahead(points, place, yaw, right):
    """Depth in units along the camera's axis of the first wall or pillar in a column whose ray goes
    `right` units to the right for each unit ahead."""
    c, s = math.cos(math.radians(yaw)), math.sin(math.radians(yaw))
    ray = np.array([c + right * s, s - right * c])
    found = []
    for first in range(0, len(points), 4):
        for i in range(4):
            a = np.array(points[first + i], float)
            b = np.array(points[first + (i + 1) % 4], float)
            matrix = np.stack([ray, a - b], axis=1)
            if abs(np.linalg.det(matrix)) > 1e-9:
                ahead, along = np.linalg.solve(matrix, a - np.array(place))
                if ahead > 1e-6 and 0 <= along <= 1:
                    found.append(ahead)
    return min(found)


def test_the_exact_depth_is_what_the_engine_saw_to_its_resolution(tmp_path):
    """Against the engine's own depth, and against walls met by solving for them one by one."""
    options = VizdoomOptions(frames=9, fps=16.0, seed=11, scenario="rooms", clips_per_episode=1)
    with closing(record_episodes(options, str(tmp_path))) as episodes:
        clip = next(clip for _, clips in episodes for clip in clips)
    room, size = make_room(11, clip.episode), clip.depth.shape[1:]
    points = [corner for outline in room.outlines for corner in outline]
    for i in (0, 8):
        exact = room_depth(room, clip.c2w[i], clip.intrinsics[i], size, METRES_PER_UNIT)
        difference = depth_metres(clip.depth[i]) - exact
        assert -0.35 < np.percentile(difference, 5) < np.percentile(difference, 95) < 0.13
        x, y = clip.c2w[i, :2, 3] / METRES_PER_UNIT
        yaw = math.degrees(math.atan2(clip.c2w[i, 1, 2], clip.c2w[i, 0, 2]))
        horizon = int(clip.intrinsics[i, 3])  # the row at eye height, where walls are seen alone
        for column in range(0, size[1], 16):
            wanted = walls_ahead(points, (x, y), yaw, (column + 0.5 - 80) / 80) * METRES_PER_UNIT
            assert exact[horizon, column] == pytest.approx(wanted, rel=1e-6)
    turned = clip.c2w[0].copy()  # a camera that looks straight down has the floor ahead
    turned[:3, 2], turned[:3, 1] = (0, 0, -1), -clip.c2w[0, :3, 2]
    below = room_depth(room, turned, np.array([800.0, 800.0, 8.0, 6.0]), (12, 16), METRES_PER_UNIT)
    assert np.allclose(below, clip.c2w[0, 2, 3])


def test_every_episode_is_another_room_and_is_recorded_again_to_the_bit(tmp_path):
    arguments = ["clips=2", "clips_per_episode=1", "frames=9", "scenario=rooms", "seed=5"]
    for name in ("a", "b"):
        assert record.main(["vizdoom", f"out={tmp_path / name}", *arguments]) == 0
    one, two = (RecordingSource(tmp_path / name) for name in ("a", "b"))
    assert [clip.episode for clip in one.clips] == ["e00000", "e00001"]
    assert one.description == two.description  # with the checksums of all files in it
    first, second = (one.array(clip.key, "video")[0] for clip in one.clips)
    assert np.abs(first.astype(int) - second).mean() > 5


def test_games_at_the_same_time_record_the_same_bytes(tmp_path):
    """Four clips of the first episodes, by one game and by two, which leave nothing else behind."""
    arguments = ["clips=4", "clips_per_episode=1", "frames=9", "scenario=rooms", "seed=5"]
    for workers in (1, 2):
        out = [f"out={tmp_path / str(workers)}", f"workers={workers}"]
        assert record.main(["vizdoom", *out, *arguments]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    one, two = (tmp_path / str(workers) for workers in (1, 2))
    files = [str(file.relative_to(one)) for file in one.rglob("*") if file.is_file()]
    assert len(files) == 1 + 4 * len(record.ARRAYS)
    assert sorted(files) == sorted(str(f.relative_to(two)) for f in two.rglob("*") if f.is_file())
    assert filecmp.cmpfiles(one, two, files, shallow=False)[1:] == ([], [])
