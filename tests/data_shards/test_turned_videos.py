"""Pictures that a file says are to be turned or mirrored: they are stored as a player shows them,
as cameras and intrinsics made from its frames are."""

import re
import shutil

import cv2
import numpy as np
import pytest

from data_shards import encode, inspect
from data_shards.metrics import camera_metrics
from data_shards.sources import open_source
from data_shards.storage.read import open_dataset

# all turns by a quarter, mirrored or not: (a, b, c, d) of the display matrix
MATRICES = {
    "as it is": (1, 0, 0, 1),
    "quarter": (0, 1, -1, 0),
    "half": (-1, 0, 0, -1),
    "three quarters": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1),
    "upside down": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "transposed the other way": (0, -1, -1, 0),
}


@pytest.fixture(scope="module")
def straight(films, tmp_path_factory):
    """A video without a matrix of its own."""
    return films.write(tmp_path_factory.mktemp("straight") / "a.mp4", films.pictures(9))


def by_definition(picture, a, b, c, d):
    """Move each pixel (column p, row q) to (a p + c q, b p + d q), shifted into the picture."""
    height, width = picture.shape[:2]
    q, p = np.mgrid[0:height, 0:width]
    column, row = a * p + c * q, b * p + d * q
    shown = np.empty((width, height, 3) if b else (height, width, 3), np.uint8)
    shown[row - row.min(), column - column.min()] = picture
    return shown


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_pictures_are_turned_as_the_matrix_says(films, straight, tmp_path, matrix):
    plain = open_source(str(straight.parent))
    stored = plain.load(plain.clips[0]).video
    films.set_matrix(shutil.copy(straight, tmp_path / "a.mp4"), *matrix)
    source = open_source(str(tmp_path))
    clip = source.clips[0]
    shown = source.load(clip).video
    assert shown.shape == (clip.frames, clip.height, clip.width, 3)
    np.testing.assert_array_equal(shown, [by_definition(frame, *matrix) for frame in stored])
    assert bool(source.notes and "turned as their files say: a" in source.notes[-1]) == (
        matrix != (1, 0, 0, 1)
    )


@pytest.mark.parametrize("name", ["quarter", "half", "three quarters"])
def test_opencv_turns_them_alike(films, straight, tmp_path, name):
    """COLMAP gets the frames of OpenCV or FFmpeg; OpenCV turns, but does not mirror."""
    path = tmp_path / "a.mp4"
    shutil.copy(straight, path)
    films.set_matrix(path, *MATRICES[name])
    ok, theirs = cv2.VideoCapture(str(path)).read()
    source = open_source(str(tmp_path))
    ours = source.load(source.clips[0]).video[0]
    assert ok
    assert theirs.shape == ours.shape
    assert np.abs(theirs[..., ::-1].astype(int) - ours).max() <= 6  # its own colour arithmetic


def test_a_turned_video_has_its_own_size_in_the_set_and_in_commands(
    films, tmp_path, capsys, monkeypatch
):
    folder, out = tmp_path / "videos", tmp_path / "set"
    folder.mkdir()
    films.set_matrix(films.write(folder / "a.mp4", films.pictures(9)), *MATRICES["quarter"])
    height, width = films.SIZE[1], films.SIZE[0]
    np.savez(folder / "a.npz", c2w=films.poses(9), intrinsics=[60.0, 60, width / 2, height / 2])
    assert encode.main([f"source={folder}", f"out={out}"]) == 0
    assert "1 videos are turned as their files say: a" in capsys.readouterr().out
    info = open_dataset(str(out)).info
    assert (info.image_height, info.image_width) == (height, width)
    clip = open_dataset(str(out)).read("a")
    seen = camera_metrics(clip.c2w, clip.intrinsics, info.image_width, info.image_height)
    assert seen["fov_y_degrees"] == pytest.approx(2 * np.degrees(np.arctan(height / 2 / 60)))
    drawn, sheet = [], inspect.contact_sheet
    monkeypatch.setattr(
        inspect,
        "contact_sheet",
        lambda video, *rest: drawn.append(video.shape) or sheet(video, *rest),
    )
    assert inspect.main([f"path={out}", f"out={tmp_path / 'clip.png'}"]) == 0
    assert drawn == [(9, height, width, 3)]


def test_another_angle_is_refused_with_its_number(films, straight, tmp_path):
    path = tmp_path / "a.mp4"
    shutil.copy(straight, path)
    films.set_matrix(path, 0.866, 0.5, -0.5, 0.866)
    problem = open_source(str(tmp_path)).problems["a.mp4"]
    assert re.search(r"turned by 30 degrees in a\.mp4.*Fix: ffmpeg", problem)


@pytest.mark.parametrize("matrix", [1, 5], ids=["BT.709", "BT.601"])
def test_colours_are_those_of_the_tagged_matrix(films, tmp_path, matrix):
    """PyAV before 17 read BT.709, the standard of HD, with the matrix of BT.601."""
    colour = np.array([200, 50, 20], np.uint8)
    films.write_tagged(tmp_path / "a.mp4", np.tile(colour, (720, 1280, 1)), matrix)
    source = open_source(str(tmp_path))
    read = source.load(source.clips[0]).video[0, 300, 300]
    assert np.abs(read.astype(int) - colour).max() <= 4, read
