"""Codecs and sources of another package: found by entry point, used without an edit here."""

import textwrap

import numpy as np
import pytest

from data_shards import encode, sources
from data_shards.codecs import CODECS, make_codec
from data_shards.registry import load, names
from data_shards.schema import DataError
from data_shards.storage.read import open_dataset

LAB = '''
"""A codec that keeps the mean colour of a block, and a source of grey clips."""
from dataclasses import dataclass
import numpy as np
from data_shards.arguments import Option, whole
from data_shards.codecs import CodecRow
from data_shards.sources.clips import ClipContent, SourceClip

@dataclass(frozen=True)
class Mean:
    block: int
    name: str = "mean"
    channels: int = 3
    temporal_stride: int = 8
    @property
    def spatial_stride(self): return self.block
    @property
    def options(self): return {"block": self.block}
    def encode(self, video):
        f, h, w, _ = video[::8].shape
        blocks = video[::8].reshape(f, h // self.block, self.block, w // self.block, self.block, 3)
        return blocks.mean((2, 4), dtype=np.float32).transpose(0, 3, 1, 2)
    def decode(self, latents):
        frames = latents.transpose(0, 2, 3, 1).repeat(self.block, 1).repeat(self.block, 2)
        return np.rint(np.concatenate([frames[:1], frames[1:].repeat(8, 0)])).astype(np.uint8)

MEAN = CodecRow(Mean, {"block": Option(whole(1, 64), "side of a block in pixels", 16)})

class Grey:
    description, notes, stored = "grey clips", (), None
    fps, metres_per_unit, control_names, control_sums = 8.0, 1.0, (), ()
    def __init__(self, count):
        self.clips = tuple(SourceClip(f"g{i}", f"e{i}", 9, 32, 32) for i in range(count))
    def load(self, clip):
        return ClipContent(np.full((9, 32, 32, 3), 10 * int(clip.key[1:]), np.uint8))

def grey(place):
    return Grey(int(place.path.removeprefix("grey://")))
'''
POINTS = """
[data_shards.codecs]
mean = lab_package:MEAN
bare = lab_package:Mean
gone = lab_package:NOTHING
[data_shards.sources]
grey = lab_package:grey
"""


@pytest.fixture
def lab(tmp_path, monkeypatch, declare_package):
    """An installed package, as importlib.metadata sees it."""
    folder = tmp_path / "site"
    declare_package(folder, "lab_package", POINTS)
    (folder / "lab_package.py").write_text(textwrap.dedent(LAB))
    monkeypatch.syspath_prepend(folder)
    return folder


def test_a_codec_and_a_source_of_another_package_make_a_data_set(lab, tmp_path, capsys):
    out = tmp_path / "set"
    arguments = ["source=grey://4", "kind=grey", "codec=mean", "block=8", "validation=0"]
    assert encode.main([*arguments, f"out={out}"]) == 0
    dataset = open_dataset(str(out))
    assert (dataset.info.codec, dict(dataset.info.codec_options)) == ("mean", {"block": 8})
    latents = dataset.read("g3").latents
    assert latents.shape == (2, 3, 4, 4)
    video = make_codec(dataset.info.codec, dataset.info.codec_options).decode(
        np.full((2, 3, 4, 4), 30, np.float32)
    )
    assert video.shape == (9, 32, 32, 3)
    assert (video == 30).all()
    assert encode.main(["--help", "codec=mean"]) == 0
    assert "side of a block in pixels (default 16)" in capsys.readouterr().out


def test_an_option_of_another_codec_is_unknown(lab, tmp_path, capsys):
    arguments = ["source=grey://1", "kind=grey", f"out={tmp_path / 'set'}"]
    assert encode.main([*arguments, "codec=mean", "channels=3", "block=0"]) == 2
    error = capsys.readouterr().err
    assert "channels: unknown key" in error
    assert "block: got '0', expected a whole number from 1 to 64" in error


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vae", r"codec: got 'vae', expected one of linear, .*mean.*data_shards.codecs"),
        ("gone", r"codec gone: cannot import lab_package:NOTHING .*NOTHING"),
        ("bare", r"codec bare: got type .*expected a data_shards.codecs.CodecRow"),
    ],
)
def test_what_cannot_be_used_is_named(lab, name, message):
    with pytest.raises(DataError, match=message):
        make_codec(name)


def test_a_name_that_two_offer_is_refused(lab):
    (lab / "lab_package-1.0.dist-info" / "entry_points.txt").write_text(
        "[data_shards.codecs]\nlinear = lab_package:MEAN\n"
    )
    with pytest.raises(DataError, match=r"which is data_shards.*:LINEAR and lab_package:MEAN"):
        make_codec("linear")


@pytest.mark.parametrize("registry", [CODECS, sources.SOURCES])
def test_everything_built_in_can_be_imported(registry):
    assert all(load(registry, name) for name in registry.table)
    assert set(registry.table) <= set(names(registry))
