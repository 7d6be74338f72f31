"""Damage of every kind to what lies beside a user's videos: one clear error or a right result.

A few draws run in `make test`, 2,000 of each reader in `make test-full`, which prints how many were
refused. The damage itself is in damage.py.
"""

import io
import math

import numpy as np
import pytest

from data_shards.beside.colmap import read_colmap
from data_shards.beside.video import read_beside, read_listed
from data_shards.cameras import camera_problem
from data_shards.controls import CONTROL_NAMES
from data_shards.encoding.text import read_embedding
from data_shards.sources import read_captions
from data_shards.storage.files import read_selection

FRAMES, SIZE, FEW = 17, (32, 32), 25
K = [20.0, 21.0, 16.0, 17.0]


def poses():
    c2w = np.tile(np.eye(4), (FRAMES, 1, 1))
    c2w[:, 2, 3] = 0.1 * np.arange(FRAMES)
    return c2w


SIDECAR = {
    "c2w": poses(),
    "intrinsics": np.array(K),
    "controls": np.ones((FRAMES, 2)),
    "control_names": np.array(["gas", "dx"]),
    "control_sums": np.array([False, True]),
    "caption": np.array("a walk"),
    "text": np.ones((3, 4), np.float32),
    "text_mask": np.array([1, 1, 0], np.uint8),
    "episode": np.array("tape1"),
    "metres_per_unit": np.array(2.0),
}
EVENTS = {
    "time_ns": np.array([-5, 0, 10**8, 2 * 10**8]),
    "kind": np.array([0, 1, 2, 3], np.uint8),
    "code": np.array([65, 65, 0, 0]),
    "dx": np.array([0, 0, 3, 0]),
    "dy": np.array([0, 0, -3, 1]),
}
COLMAP = {
    "cameras.txt": "# cameras\n1 PINHOLE 32 32 20 21 16 17\n",
    "images.txt": "# images\n"
    + "".join(f"{i + 1} 1 0 0 0 0 0 {-i} 1 f_{i}.png\n1 2 -1\n" for i in range(FRAMES)),
    "points3D.txt": "# points\n1 0 0 1 128 128 128 0.5 1 0\n",
}


def check_beside(folder):
    video = folder / "a.mp4"
    episode, metres, names, sums = read_listed(video)
    assert episode.isprintable()
    assert 0 < metres < math.inf
    assert len(names) == len(sums)
    beside = read_beside(video, FRAMES, SIZE, 16.0)
    if beside.c2w is not None:
        assert beside.c2w.shape == (FRAMES, 4, 4)
        assert beside.intrinsics.shape == (FRAMES, 4)
        assert camera_problem(beside.c2w, beside.intrinsics, *SIZE) == ""
    if beside.controls is not None:
        assert beside.controls.shape == (FRAMES, len(names))
        assert np.isfinite(beside.controls).all()
    if beside.events is not None:
        assert names == CONTROL_NAMES
        assert (np.diff(beside.events.time_ns) >= 0).all()
    if beside.text is not None:
        assert np.isfinite(beside.text[0]).all()
        assert set(beside.text[1].tolist()) <= {0, 1}
    assert beside.caption is None or isinstance(beside.caption, str)


class NpzSidecar:
    def damage(self, tools, random, folder):
        (folder / "a.npz").write_bytes(tools.file(random, SIDECAR, tools.npz, text=False))

    read = staticmethod(check_beside)


class JsonSidecar:
    def damage(self, tools, random, folder):
        (folder / "a.json").write_bytes(tools.file(random, SIDECAR, tools.json, text=True))

    read = staticmethod(check_beside)


class EventsFile:
    def damage(self, tools, random, folder):
        (folder / "a.events.npz").write_bytes(tools.file(random, EVENTS, tools.npz, text=False))

    read = staticmethod(check_beside)


class CaptionText:
    def damage(self, tools, random, folder):
        good = "a walk café 散歩 ".encode("utf-16" if random.integers(2) else "utf-8") * 5
        (folder / "a.txt").write_bytes(tools.maybe(random, good))

    read = staticmethod(check_beside)


class CaptionsJson:
    VALUES = {"a": "one", "b": {"prompt": "two"}, "c": "three"}  # noqa: RUF012

    def damage(self, tools, random, folder):
        data = tools.file(random, self.VALUES, tools.json, text=True)
        (folder / "captions.json").write_bytes(data)

    def read(self, folder):
        captions = read_captions(folder / "captions.json")
        assert all(isinstance(text, str) for pair in captions.items() for text in pair)


class Colmap:
    def damage(self, tools, random, folder):
        (folder / "m").mkdir()
        hit = sorted(COLMAP)[random.integers(3)]
        for name, text in COLMAP.items():
            data = text.encode()
            if name == hit:
                data = tools.bytes(random, data) if random.integers(2) else self.words(random, text)
            (folder / "m" / name).write_bytes(data)

    def words(self, random, text):
        """One column of one line is another word, or lines come in another number or order."""
        lines = text.split("\n")
        at = int(random.integers(len(lines)))
        words = lines[at].split(" ")
        odd = ("nan", "inf", "-1", "1e400", "x", "", "9" * 30, "\x1b[2J", "0", "PINHOLE", "2")
        words[random.integers(len(words))] = odd[random.integers(len(odd))]
        kind = random.integers(5)
        if kind == 0:
            lines.insert(at, lines[random.integers(len(lines))])
        elif kind == 1:
            del lines[at]
        else:
            lines[at] = " ".join(words)
        return "\n".join(lines).encode()

    def read(self, folder):
        c2w, intrinsics = read_colmap(folder / "m", FRAMES, SIZE)
        assert c2w.shape == (FRAMES, 4, 4)
        assert np.isfinite(c2w).all()
        assert intrinsics.shape == (FRAMES, 4)
        assert np.isfinite(intrinsics).all()


class NullText:
    def damage(self, tools, random, folder):
        array = np.ones((3, 4), np.float32)
        array = tools.odd(random, array, text=False) if random.integers(2) else array
        buffer = io.BytesIO()
        np.save(buffer, np.asarray(array), allow_pickle=True)
        (folder / "null.npy").write_bytes(tools.maybe(random, buffer.getvalue()))

    def read(self, folder):
        array = read_embedding(str(folder / "null.npy"), "null_text")
        assert array.ndim == 2
        assert array.dtype == np.float32
        assert np.isfinite(array).all()


class Selection:
    VALUES = {"dataset_fingerprint": "f" * 64, "kept": ["a", "b"], "dropped": {}}  # noqa: RUF012

    def damage(self, tools, random, folder):
        data = tools.file(random, self.VALUES, tools.json, text=True)
        (folder / "s.json").write_bytes(data)

    def read(self, folder):
        fingerprint, kept = read_selection(str(folder / "s.json"))
        assert isinstance(fingerprint, str)
        assert all(isinstance(key, str) for key in kept)


READERS = {
    "npz": NpzSidecar(),
    "json": JsonSidecar(),
    "events": EventsFile(),
    "caption": CaptionText(),
    "captions": CaptionsJson(),
    "colmap": Colmap(),
    "null_text": NullText(),
    "selection": Selection(),
}


@pytest.mark.parametrize(
    ("name", "draws"),
    [
        *((name, FEW) for name in READERS),
        *(pytest.param(name, 2000, marks=pytest.mark.full) for name in READERS),
    ],
)
def test_damaged_files_are_one_error_or_right(damage, name, draws, tmp_path):
    damage.draw_all(READERS[name], name, draws, tmp_path)
