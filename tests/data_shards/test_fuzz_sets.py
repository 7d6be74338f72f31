"""Damage of every kind to data sets and to archives of clips: one clear error or a right result.

A few draws run in `make test`, 2,000 of each reader in `make test-full`, which prints how many were
refused. The damage itself is in damage.py.
"""

import copy
import io
import json
import math
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_shards.cameras import camera_problem
from data_shards.schema import DatasetInfo, index_schema
from data_shards.sources import Place, open_source
from data_shards.storage.facts import info_from_json
from data_shards.storage.read import open_dataset

FRAMES, SIZE, FEW = 17, (32, 32), 25
NAMES = ("dataset.json", "index", "tar", "zips")


def poses():
    c2w = np.tile(np.eye(4), (FRAMES, 1, 1))
    c2w[:, 2, 3] = 0.1 * np.arange(FRAMES)
    return c2w


CLIP = {
    "c2w": poses(),
    "intrinsics": [20.0, 21.0, 16.0, 17.0],
    "caption": "a walk",
    "text": np.ones((3, 4)),
    "text_mask": [1, 1, 0],
    "episode": "tape1",
    "metres_per_unit": 2.0,
}


class Facts:
    def __init__(self, dataset_path):
        self.values = json.loads((dataset_path / "dataset.json").read_text())

    def damage(self, tools, random, folder):
        data = tools.file(random, self.values, tools.json, text=True)
        (folder / "dataset.json").write_bytes(data)

    def read(self, folder):
        info = info_from_json((folder / "dataset.json").read_bytes(), "here")
        assert isinstance(info, DatasetInfo)
        assert info.temporal_stride > 0 < info.fps < math.inf
        assert len(info.mean[0]) == info.channels
        assert info.codec.isprintable()


class Index:
    """index.parquet: bytes, and rows of other contents in a good file."""

    def __init__(self, dataset_path):
        self.data = (dataset_path / "index.parquet").read_bytes()
        self.facts = json.loads((dataset_path / "dataset.json").read_text())
        self.rows = pq.read_table(dataset_path / "index.parquet").to_pylist()

    def damage(self, tools, random, folder):
        data = self.data
        if random.integers(2):
            rows = copy.deepcopy(self.rows)
            row = rows[random.integers(len(rows))]
            target = row if random.integers(2) else row["members"][random.integers(3)]
            name = sorted(target)[random.integers(len(target))]
            odd = (None, -1, 0, 2**31 - 1, "x\x1b[2J\n@", "../../x", "", [], [-1], [2**20, 5])
            target[name] = odd[random.integers(len(odd))]
            try:
                table = pa.Table.from_pylist(rows, index_schema())
            except (pa.ArrowException, OverflowError, TypeError):
                table = pa.Table.from_pylist(self.rows[: random.integers(3)], index_schema())
            buffer = io.BytesIO()
            pq.write_table(table, buffer)
            data = buffer.getvalue()
        else:
            data = tools.bytes(random, data)
        (folder / "index.parquet").write_bytes(data)
        facts = {**self.facts, "index_bytes": len(data)}
        (folder / "dataset.json").write_text(json.dumps(facts))

    def read(self, folder):
        dataset = open_dataset(str(folder), check=False)
        for split in ("train", "validation"):
            for entry in dataset.clips(split):
                assert entry.latent_frames > 0
                assert entry.key.isprintable()
                dataset.members(entry)


class Tar:
    """A tar of a video with text and JSON, as WebDataset has them."""

    def __init__(self, video):
        self.video = video

    def damage(self, tools, random, folder):
        facts = CLIP
        hit = random.integers(3)
        files = {"x.mp4": self.video, "x.txt": b"a walk", "x.json": tools.json(facts)}
        if hit == 0:
            files["x.json"] = tools.file(random, facts, tools.json, text=True)
            if random.integers(2):
                del files["x.txt"]
        elif hit == 1:
            files["x.txt"] = tools.bytes(random, files["x.txt"])
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        data = bytearray(buffer.getvalue())
        if hit == 2:  # not in the video: decoders are their own matter
            place = [0, 512 + len(self.video) + -len(self.video) % 512]
            at = place[random.integers(2)] + random.integers(512)
            data[at] ^= 1 << int(random.integers(8))
        (folder / "t.tar").write_bytes(data)

    def read(self, folder):
        source = open_source(str(folder / "t.tar"))
        for clip in source.clips:
            content = source.load(clip)
            if content.c2w is not None:
                assert content.c2w.shape == (FRAMES, 4, 4)
                assert camera_problem(content.c2w, content.intrinsics, *SIZE) == ""
            assert content.caption is None or isinstance(content.caption, str)


class LatentZips:
    """The JSON, latents, cameras and scales of SANA-WM's layout."""

    FACTS = {"prompt": "room", "height": 64, "width": 64, "fps": 16.0}  # noqa: RUF012
    CAMERA = {  # noqa: RUF012
        "ids": np.array(["x"]),
        "ranges": np.array([[0, FRAMES]]),
        "pose": poses().astype(np.float32),
        "intrinsics": np.tile(np.float32([40, 42, 32, 33]), (FRAMES, 1)),
    }
    LATENTS = {"z": np.ones((4, 3, 1, 1), np.float16)}  # noqa: RUF012

    def damage(self, tools, random, folder):
        hit = random.integers(6)
        parts = [  # values, how they are written, and if only as JSON can say them
            (self.FACTS, tools.json, True),
            (self.LATENTS, tools.npz, False),
            (self.CAMERA, tools.npz, False),
            ({"x": 2.0}, tools.json, True),
        ]
        facts, latents, camera, scale = (
            tools.file(random, *part) if number == hit else part[1](part[0])
            for number, part in enumerate(parts)
        )
        (folder / "raw").mkdir()
        (folder / "cache").mkdir()
        for place, name, data in (("raw", "x.json", facts), ("cache", "x.npz", latents)):
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(name, data)
            data = buffer.getvalue()
            if (hit, place) in ((4, "raw"), (5, "cache")):
                data = tools.bytes(random, data)
            (folder / place / "s.zip").write_bytes(data)
        (folder / "raw" / "s_camera.npz").write_bytes(camera)
        (folder / "raw" / "s_metric_scale_stats.json").write_bytes(scale)

    def read(self, folder):
        source = open_source(Place(str(folder / "raw"), str(folder / "cache")))
        assert 0 < source.fps < math.inf
        for clip in source.clips:
            content = source.load(clip)
            assert content.latents.ndim == 4
            assert content.c2w.shape == (clip.frames, 4, 4)
            assert camera_problem(content.c2w, content.intrinsics, clip.height, clip.width) == ""
            assert content.caption is None or isinstance(content.caption, str)


@pytest.fixture(scope="module")
def readers(dataset_path, write_video, tmp_path_factory):
    video = tmp_path_factory.mktemp("video") / "a.mp4"
    write_video(video, FRAMES)
    made = (Facts(dataset_path), Index(dataset_path), Tar(video.read_bytes()), LatentZips())
    return dict(zip(NAMES, made, strict=True))


@pytest.mark.parametrize(
    ("name", "draws"),
    [
        *((name, FEW) for name in NAMES),
        *(pytest.param(name, 2000, marks=pytest.mark.full) for name in NAMES),
    ],
)
def test_damaged_files_are_one_error_or_right(readers, damage, name, draws, tmp_path):
    damage.draw_all(readers[name], name, draws, tmp_path)
