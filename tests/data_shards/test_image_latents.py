"""Image latents: which raw frames have one, that they are what a clip cut there would start with,
and that damage to one is found."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from data_shards import encode, stats, verify
from data_shards.codecs import make_codec
from data_shards.schema import IMAGE_LATENTS, DataError, image_latent_count, info_to_json
from data_shards.sources import open_source
from data_shards.storage.facts import info_from_json
from data_shards.storage.read import open_dataset


@pytest.fixture(scope="module", params=["tar", pytest.param("zarr", marks=pytest.mark.full)])
def path(request, recording, tmp_path_factory):
    out = tmp_path_factory.mktemp("image") / "set"
    arguments = [
        f"source={recording}",
        f"out={out}",
        "shard_mb=0.05",
        "image_latents_every=8",
        f"container={request.param}",
    ]
    assert encode.main(arguments) == 0
    return out


def test_row_k_is_the_first_latent_of_a_clip_cut_there(path, recording):
    dataset, source = open_dataset(str(path)), open_source(str(recording))
    codec = make_codec(dataset.info.codec, dataset.info.codec_options)
    for clip in source.clips:
        entry = dataset.find(clip.key)
        member = dataset.members(entry)[IMAGE_LATENTS]
        assert member.shape[0] == image_latent_count(17, 8) == 2
        video = source.load(clip).video[:, 4:116]  # the centred crop to multiples of 16
        for k in range(2):
            stored = dataset.rows(entry, member, k, k + 1)[0]
            np.testing.assert_array_equal(
                stored, codec.encode(video[8 * (k + 1) :])[0].astype(np.float16)
            )
    assert verify.main([f"path={path}"]) == 0


def test_they_count_as_first_latents_in_the_statistics(path):
    dataset = open_dataset(str(path))
    firsts = []
    for entry in dataset.clips("train"):
        images = dataset.rows(entry, dataset.members(entry)[IMAGE_LATENTS], 0, 2).astype(np.float32)
        firsts.append(np.concatenate([dataset.read(entry, (0, 1)).latents, images]))
    mean = np.concatenate(firsts).astype(np.float64).mean(axis=(0, 2, 3))
    np.testing.assert_allclose(mean, dataset.info.mean[0], atol=2e-3)
    assert stats.measure(dataset, "train", 100)["mean_shift_in_std"] < 0.01


def test_a_clip_without_its_image_latents_is_refused(path, tmp_path):
    copy = shutil.copytree(path, tmp_path / "copy")
    facts = json.loads((copy / "dataset.json").read_text())
    for every, report in (
        (16, r"got shape \(2, 48, 7, 10\), expected \(1, 48, 7, 10\)"),
        (0, r"got shape \(2, .* expected \(0, "),
    ):
        (copy / "dataset.json").write_text(json.dumps({**facts, "image_latents_every": every}))
        dataset = open_dataset(str(copy))
        with pytest.raises(DataError, match=report):
            dataset.read(dataset.clips("train")[0])


def test_only_multiples_of_the_stride(recording, tmp_path, capsys, path):
    assert (
        encode.main([f"source={recording}", f"out={tmp_path / 'set'}", "image_latents_every=12"])
        == 2
    )
    assert "image_latents_every: got 12, expected 0 or a multiple of 8" in capsys.readouterr().err
    info = dataclasses.replace(open_dataset(str(path)).info, image_latents_every=12)
    with pytest.raises(DataError, match="image_latents_every 12"):
        info_from_json(info_to_json(info), "here")
    assert image_latent_count(9, 0) == image_latent_count(8, 8) == 0
    assert image_latent_count(9, 8) == 1
