"""Frames, edges and the mesh: pure integers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from parallel.degrees import Coordinate, MeshDegrees
from parallel.layout import ClipLayout, FrameRange, edges


def test_split_gives_the_first_members_one_frame_more():
    assert [len(r) for r in ClipLayout(11).split(4)] == [3, 3, 3, 2]
    assert [len(r) for r in ClipLayout(2).split(4)] == [1, 1, 0, 0]
    assert ClipLayout(11).split(2) == (FrameRange(0, 6), FrameRange(6, 11))


def test_edges_of_packed_chunked_clips():
    layout = ClipLayout(7, document_starts=(0, 4), chunk_starts=(0, 2, 4, 6))
    assert [i for i, is_open in enumerate(edges(layout, "forward")) if is_open] == [1, 2, 3, 5, 6]
    assert [i for i, is_open in enumerate(edges(layout, "reverse")) if is_open] == [1, 3, 5]


def test_positions_restart_in_every_document():
    assert [ClipLayout(6, document_starts=(0, 4)).position_of(i) for i in range(6)] == [
        0,
        1,
        2,
        3,
        0,
        1,
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        {"frames": 0},
        {"frames": 4, "document_starts": (1,)},
        {"frames": 4, "document_starts": ()},
        {"frames": 4, "chunk_starts": (0, 2, 2)},
        {"frames": 4, "chunk_starts": (0, 4)},
        {"frames": 4, "valid_frames": (5,)},
        {"frames": 4, "valid_frames": (-1,)},
    ],
)
def test_impossible_layouts_say_what_they_got_and_what_they_expect(arguments):
    with pytest.raises(ValueError, match=r"got .*expected "):
        ClipLayout(**arguments)


@dataclass(frozen=True)
class Wanted:
    dp_replicate: int = 1
    dp_shard: int | None = None
    cp: int | None = None
    ulysses: int | None = None
    ring: int | None = None


@pytest.mark.parametrize(
    ("wanted", "world", "heads", "expected"),
    [
        (Wanted(), 4, 4, (1, 4, 1, 1)),
        (Wanted(cp=8), 64, 20, (1, 8, 2, 4)),
        (Wanted(cp=4, ring=4), 8, 20, (1, 2, 4, 1)),
        (Wanted(cp=4, ulysses=2), 8, 20, (1, 2, 2, 2)),
        (Wanted(dp_replicate=2, cp=2), 8, 4, (2, 2, 1, 2)),
        (Wanted(ulysses=2, ring=2), 8, 20, (1, 2, 2, 2)),
        (Wanted(ring=4), 8, 20, (1, 2, 4, 1)),
        (Wanted(ulysses=3), 6, 4, (1, 2, 1, 3)),  # uneven heads: 2, 1, 1
    ],
)
def test_open_degrees_are_derived(wanted, world, heads, expected):
    found = MeshDegrees.from_config(wanted, world, heads)
    assert (found.dp_replicate, found.dp_shard, found.ring, found.ulysses) == expected


@pytest.mark.parametrize(("cp", "expected"), [(8, (1, 8)), (32, (2, 16)), (24, (3, 8))])
def test_derived_ulysses_does_not_split_key_heads(cp, expected):
    """Waypoint's 32 query and 16 key heads: no key head goes to two processes unasked."""
    found = MeshDegrees.from_config(Wanted(cp=cp), cp, 32, 16)
    assert (found.ring, found.ulysses) == expected
    asked = MeshDegrees.from_config(Wanted(cp=32, ulysses=32), 32, 32, 16)
    assert (asked.ring, asked.ulysses) == (1, 32)


@pytest.mark.parametrize(
    ("wanted", "world", "words"),
    [
        (Wanted(cp=3), 4, ["parallel.cp: got 3", "4 workers: 1, 2, 4", "Fix: launcher.workers=3"]),
        (
            Wanted(dp_shard=3),
            4,
            ["dp_replicate 1 x dp_shard 3 x cp 1", "launcher.workers=3, or parallel.dp_shard=4"],
        ),
        (Wanted(cp=4, ulysses=3), 4, ["ring 1 x ulysses 3", "cp = 4", "parallel.cp=null, or"]),
        (
            Wanted(cp=8, ulysses=8),
            8,
            ["ulysses 8", "4 heads", "Fix: parallel.ulysses=4 parallel.ring=2"],
        ),
        (Wanted(dp_replicate=0), 4, ["dp_replicate"]),
    ],
)
def test_impossible_meshes_print_the_degrees_and_a_remedy(wanted, world, words):
    with pytest.raises(ValueError) as error:
        MeshDegrees.from_config(wanted, world, 4)
    for word in words:
        assert word in str(error.value)


def test_ranks_and_coordinates_are_inverse_and_ulysses_runs_fastest():
    degrees = MeshDegrees(2, 3, 2, 4)
    for rank in range(degrees.world):
        assert degrees.rank(degrees.coordinate(rank)) == rank
    assert degrees.coordinate(1) == Coordinate(0, 0, 0, 1)
    assert degrees.coordinate(4) == Coordinate(0, 0, 1, 0)
    assert degrees.coordinate(8) == Coordinate(0, 1, 0, 0)
    assert degrees.coordinate(24) == Coordinate(1, 0, 0, 0)


def test_groups_partition_the_world_and_sequence_groups_are_consecutive():
    degrees = MeshDegrees(1, 2, 2, 2)
    assert degrees.groups("sequence") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert degrees.groups("ulysses") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert degrees.groups("ring") == [[0, 2], [1, 3], [4, 6], [5, 7]]
