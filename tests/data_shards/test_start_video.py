"""The encoding of a clip's first image followed by zeros, which Wan's image models read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data_shards import encode, verify
from data_shards.codecs import make_codec
from data_shards.codecs.clip_features import ImageEncoder
from data_shards.encoding.arrays import start_video
from data_shards.fields import START_LATENTS
from data_shards.loading.batch import normalise
from data_shards.loading.cut import read_fields
from data_shards.schema import DataError
from data_shards.storage.read import open_dataset


@pytest.fixture(scope="module")
def dataset(recording, tmp_path_factory):
    out = tmp_path_factory.mktemp("start") / "set"
    line = [f"source={recording}", f"out={out}", "start_video=yes", "latent_dtype=float32"]
    assert encode.main([*line, "psnr=no", "resize=16x32"]) == 0
    assert verify.main([f"path={out}"]) == 0
    return open_dataset(str(out))


def test_it_is_the_image_and_zeros_normalised_as_the_clips_latents_are(dataset):
    """The first latent is the clip's own, as both encode the first image alone; the zeros behind it
    are those of a transform without an offset."""
    info = dataset.info
    for entry in dataset.clips("train")[:2]:
        count = entry.latent_frames
        found = read_fields(dataset, info, entry, 0, count, (0, count))["start_video"]
        shape = (START_LATENTS, info.channels, info.latent_height, info.latent_width)
        assert found.shape == shape
        expected = np.zeros(shape, np.float32)
        expected[0] = dataset.read(entry, (0, 1)).latents[0]
        assert torch.equal(found[:1], torch.from_numpy(normalise(expected, info))[:1])
        torch.testing.assert_close(found, torch.from_numpy(normalise(expected, info)))
        assert found[1:].abs().max() > 1e-3  # zeros of the codec are not zeros of the model


@pytest.mark.full
def test_a_public_autoencoder_gives_a_prefix_that_ends_in_a_constant(small_autoencoder):
    """Facts of §1.4: a longer one begins with the same bits, and goes on as the last latent is."""
    codec = make_codec("wan", {"model": str(small_autoencoder)})
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    stored = start_video(image, codec)
    video = np.full((1 + 4 * (START_LATENTS + 4), 16, 16, 3), 127.5, np.float32)
    video[0] = image
    longer = codec.encode(video)
    assert np.array_equal(longer[:START_LATENTS], stored)
    rest = np.broadcast_to(stored[-1], longer[START_LATENTS:].shape)
    np.testing.assert_allclose(longer[START_LATENTS:], rest, atol=1e-6)
    assert np.abs(stored[1] - stored[-1]).max() > 1e-3
    black = video.copy()
    black[1:] = 0.0
    assert np.abs(codec.encode(black)[1:START_LATENTS] - stored[1:]).max() > 1e-2


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """The folder of a CLIP vision model of the released one's sizes, but of two thin layers."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    folder = tmp_path_factory.mktemp("vision") / "clip"
    torch.manual_seed(0)
    sizes = {"hidden_size": 1280, "intermediate_size": 32, "patch_size": 14, "image_size": 224}
    config = CLIPVisionConfig(**sizes, num_hidden_layers=2, num_attention_heads=16)
    CLIPVisionModel(config).save_pretrained(folder)
    return folder


@pytest.mark.full
def test_clip_features_are_the_public_models_before_its_last_layer(vision):
    """Of a picture of its own size, and of another that is resized."""
    from transformers import CLIPVisionModel

    image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    encoder = ImageEncoder(str(vision))
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = torch.tensor((image / 255.0 - mean) / std).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        public = CLIPVisionModel.from_pretrained(vision)
        states = public(pixel_values=pixels, output_hidden_states=True).hidden_states
    assert len(states) == 3
    np.testing.assert_allclose(encoder.features(image), states[1][0], atol=1e-5)
    assert encoder.features(image[:112]).shape == (257, 1280)


@pytest.mark.full
def test_an_encoder_of_another_size_is_refused(vision, tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 32, "intermediate_size": 32, "patch_size": 14, "image_size": 28}
    config = CLIPVisionConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    CLIPVisionModel(config).save_pretrained(tmp_path / "small")
    with pytest.raises(DataError, match=r"got features of \(5, 32\), expected \(257, 1280\)"):
        ImageEncoder(str(tmp_path / "small")).features(np.zeros((28, 28, 3), np.uint8))
    with pytest.raises(DataError, match="image_encoder: cannot load"):
        ImageEncoder(str(tmp_path)).features(np.zeros((28, 28, 3), np.uint8))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["image_latents_every=8"], "image_latents_every=8 and causal latents"),
        (["codec=lapped", "layout=grouped"], "image_latents_every=0 and grouped latents"),
        (["fields=start_video"], "fields=start_video, expected one of them"),
    ],
)
def test_where_clips_have_no_one_first_image_it_is_refused(
    recording, tmp_path, capsys, words, told
):
    line = [f"source={recording}", f"out={tmp_path / 'set'}", "start_video=yes", *words]
    assert encode.main(line) == 2
    said = capsys.readouterr().err
    assert f"start_video: got yes with {told}" in said
    assert "Fix: leave start_video out" in said
    assert not (tmp_path / "set").exists()
