"""A field that neither data_shards nor wm_train knows, from another package's entry point to
`Conditions.fields`, on two processes of one sequence group."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data_shards.sources.recording import RecordingSource
from wm_train.config.typed import to_json

ROOT = Path(__file__).resolve().parents[3]
WORKER = Path(__file__).with_name("field_worker.py")
SHORT = "recipe.stages.short."
PACKAGE = """
from data_shards.fields import Field

DEPTH = Field(
    "depth", ("image_height", "image_width"), ("uint8",), "raw", by_row=True, padding="zero"
)
"""
R = 8  # raw frames in a latent after the first


@pytest.fixture(scope="module")
def package(tmp_path_factory, declare_package):
    """The folder of an installed package that declares the field `depth`."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "laboratory.py").write_text(PACKAGE)
    declare_package(folder, "laboratory", "[data_shards.fields]\ndepth = laboratory:DEPTH\n")
    return folder


def data_shards(package, module, *arguments):
    """Run a command of data_shards where the package is installed."""
    subprocess.run(
        [sys.executable, "-m", f"data_shards.{module}", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{package}"},
        check=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def recordings(gameplay, package, tmp_path_factory):
    """latent frames of a clip -> recording: the gameplay, and clips of 25 raw frames."""
    short = tmp_path_factory.mktemp("short") / "recording"
    data_shards(package, "record", "vizdoom", f"out={short}", "clips=6", "frames=25", "fps=16")
    return {6: gameplay.parent / "recording", 4: short}


@pytest.fixture(scope="module")
def sets(recordings, package, tmp_path_factory):
    """latent frames of a clip -> data set with depth and an image latent for every 8th frame."""
    found = {}
    for frames, recording in recordings.items():
        found[frames] = tmp_path_factory.mktemp("depth") / "set"
        arguments = [f"source={recording}", f"out={found[frames]}", "channels=24", "psnr=no"]
        data_shards(package, "encode", *arguments, "image_latents_every=8", "fields=depth")
    return found


# Rows of 13 latents hold two or three clips of 6 or 4. The longest clips of a window lie in its
# first rows, so with few of them the first batch has rows of both kinds.
PACKED = ("data.pack=true", "data.mixture={SIX: 1, FOUR: 40}", SHORT + "frames=97")
BUCKETS = ("data.buckets=[25]", SHORT + "frames=57")  # cuts of 4 latents, from anywhere


@pytest.mark.parametrize(
    "overrides", [BUCKETS, pytest.param(PACKED, marks=pytest.mark.full)], ids=["bucket", "packed"]
)
def test_it_reaches_the_model_on_two_processes_without_a_line_of_ours(
    demo_run, recordings, sets, package, run_ranks, tmp_path, overrides
):
    given = [text.replace("SIX", str(sets[6])).replace("FOUR", str(sets[4])) for text in overrides]
    few = [f"data.path={sets[6]}", "parallel.cp=2", SHORT + "global_batch=4", *given]
    config = tmp_path / "run.json"
    config.write_text(to_json(demo_run(tmp_path, *few)))
    run_ranks(2, WORKER, config, package, tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert ranks[0]["cuts"] == ranks[1]["cuts"]
    sources = {frames: RecordingSource(folder) for frames, folder in recordings.items()}
    cuts = iter(ranks[0]["cuts"])
    for first, second in zip(*(rank["parts"] for rank in ranks), strict=True):
        assert torch.equal(first["fields"]["c2w"], second["fields"]["c2w"])
        parts = [part["fields"]["depth"] for part in (first, second)]
        assert all(part.shape[1] for part in parts), "each has its share"
        for row, keys in enumerate(first["keys"]):
            takes, expected = next(cuts), []
            for key, (start, frames) in zip(keys.split("+"), takes, strict=True):
                source = sources[frames if overrides == PACKED else 6]
                whole = source.array(key, "depth")[:, 4:116]  # cropped like the video
                expected.append(whole[R * start : R * (start + frames - 1) + 1])
            padding = first["frames"] - sum(frames for _, frames in takes)
            expected.append(np.zeros((R * padding, 112, 160), np.uint8))
            found = torch.cat([part[row] for part in parts])
            np.testing.assert_array_equal(found, np.concatenate(expected).astype(np.float32))
    assert next(cuts, None) is None
    assert {len(takes) for takes in ranks[0]["cuts"]} == ({2, 3} if overrides == PACKED else {1})
