"""COLMAP text models whose images are not the video's frames one by one."""

import numpy as np
import pytest

from data_shards.beside.colmap import read_colmap
from data_shards.schema import DataError

FRAMES, SIZE = 20, (64, 160)
CAMERA = "1 SIMPLE_PINHOLE 160 64 120 80 32"


def write(folder, names, camera=CAMERA, lead="# images\n", points="\n", places=None):
    """A model whose image `names[i]` stands at z = i, or at `places[i]`."""
    folder.mkdir(exist_ok=True)
    (folder / "cameras.txt").write_text(camera + "\n")
    places = range(len(names)) if places is None else places
    lines = [
        f"{i + 1} 1 0 0 0 0 0 {-z} 1 {name}\n{points}"
        for i, (z, name) in enumerate(zip(places, names))
    ]
    (folder / "images.txt").write_text(lead + "".join(lines))
    return folder


def padded(count):
    return [f"frame_{i:04d}.png" for i in range(count)]


@pytest.mark.parametrize(
    "write_as",
    [
        {"names": padded(FRAMES)},
        {"names": [f"{i}.png" for i in range(FRAMES)]},  # 10 before 2 as text
        {"names": [f"cam1/{i + 1}" for i in range(FRAMES)]},  # no suffix, from 1
        {"names": [f"a b {i}.png" for i in range(FRAMES)]},
        {"names": padded(FRAMES), "lead": "\n"},
        {"names": padded(FRAMES), "points": ""},
        {"names": padded(FRAMES), "points": "1.5 2.5 -1 3 4 17\n"},
        {"names": padded(FRAMES)[::-1], "places": range(FRAMES)[::-1]},
    ],
)
def test_frames_come_in_the_order_of_their_numbers(tmp_path, write_as):
    c2w, intrinsics = read_colmap(write(tmp_path / "m", **write_as), FRAMES, SIZE)
    np.testing.assert_array_equal(c2w[:, 2, 3], np.arange(FRAMES))
    np.testing.assert_array_equal(intrinsics, np.tile([120, 120, 80, 32], (FRAMES, 1)))


@pytest.mark.parametrize(
    ("write_as", "message"),
    [
        ({"camera": "1 PINHOLE 80 32 60 60 40 16"}, "pictures of 80x32.*video's 160x64.*by 2$"),
        ({"names": [n for n in padded(FRAMES) if "3" not in n]}, "numbers 3, 13 are missing"),
        ({"names": padded(FRAMES - 3)}, "17 images numbered 0 to 16, .*video's 20 frames"),
        ({"names": padded(FRAMES + 1)}, "21 images numbered 0 to 20"),
        ({"names": ["x.png"] * FRAMES}, "'x.png', expected the frame's number"),
        ({"names": ["1.png", "01.png"]}, "frame 1 twice, as '1.png' and '01.png'"),
        ({"names": ["a1.png", "b2.png"]}, "images of 2 series"),
        ({"camera": "1 PINHOLE 160 64 60 60 40"}, "PINHOLE of 5 numbers"),
        ({"camera": "1 PINHOLE 160 64 60 nan 40 16"}, "line 1 of m/cameras.txt"),
        ({"camera": "1"}, "got camera model"),
        ({"camera": "2 SIMPLE_PINHOLE 160 64 120 80 32"}, "got camera '1', expected one of"),
        ({"lead": "1 2 0 0 0 0 0 0 1 x.png\n"}, "quaternion that is not of length 1"),
        ({"lead": "1 1 0 0 0 0 0 z 1 x.png\n"}, "line 1 of m/images.txt"),
        ({"lead": "1 2 3 4\n"}, "4 columns, expected 10"),
        ({"names": []}, "0 images numbered"),
    ],
)
def test_models_of_something_else_are_refused(tmp_path, write_as, message):
    folder = write(tmp_path / "m", **{"names": padded(FRAMES), **write_as})
    with pytest.raises(DataError, match=message) as caught:
        read_colmap(folder, FRAMES, SIZE)
    assert "\n" not in str(caught.value)


def test_a_binary_model_is_told_how_to_become_text(tmp_path):
    (tmp_path / "images.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"binary model.*model_converter --output_type TXT"):
        read_colmap(tmp_path, FRAMES, SIZE)
