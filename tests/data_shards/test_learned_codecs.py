"""The adapters of learned autoencoders, with randomly initialised small networks saved and loaded
as real ones are."""

import json
import shutil

import numpy as np
import pytest
import torch

from data_shards import encode
from data_shards.codecs import make_codec
from data_shards.schema import DataError
from data_shards.storage.read import open_dataset


@pytest.fixture(scope="module")
def models(tmp_path_factory, small_autoencoder):
    """codec -> folder of a tiny network of the real class; wan22: Wan 2.2's, of TI2V-5B, which
    halves pictures before its first layer and keeps more channels."""
    from diffusers import AutoencoderKLLTX2Video, AutoencoderKLWan

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    wan22 = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=6,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 6,
        latents_std=[1.0] * 6,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    )
    wan22.save_pretrained(folder / "wan22")
    ltx2 = AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(8, 16, 32, 64),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    ltx2.save_pretrained(folder / "ltx2")
    return {"wan": small_autoencoder, "wan22": folder / "wan22", "ltx2": folder / "ltx2"}


@pytest.mark.parametrize(
    ("name", "strides", "channels"),
    [
        ("wan", (4, 8), 4),
        pytest.param("wan22", (4, 16), 6, marks=pytest.mark.full),
        ("ltx2", (8, 32), 8),
    ],
)
def test_layout_is_causal_and_deterministic(models, name, strides, channels):
    codec = make_codec(name.removesuffix("22"), {"model": str(models[name])})
    assert (codec.temporal_stride, codec.spatial_stride, codec.channels) == (*strides, channels)
    video = np.random.default_rng(0).integers(0, 256, (17, 64, 64, 3), dtype=np.uint8)
    latents = codec.encode(video)
    assert latents.shape == (16 // strides[0] + 1, channels, 64 // strides[1], 64 // strides[1])
    np.testing.assert_array_equal(codec.encode(video), latents)
    assert codec.decode(latents).shape == video.shape
    changed = video.copy()
    changed[9:] = 255 - changed[9:]
    first = 8 // strides[0] + 1  # latents of the frames 0 to 8
    np.testing.assert_allclose(codec.encode(changed)[:first], latents[:first], atol=1e-5)
    assert np.abs(codec.encode(changed)[first:] - latents[first:]).max() > 1e-4


def test_ready_latents_are_decoded_from_the_networks_own_normalisation(models, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(models["ltx2"], tmp_path / "ltx2")
    file = next(folder.glob("*.safetensors"))
    weights = load_file(file)
    weights["latents_mean"], weights["latents_std"] = (
        torch.linspace(-1, 1, 8),
        torch.linspace(0.5, 2, 8),
    )
    save_file(weights, file, {"format": "pt"})
    latents = np.random.default_rng(0).normal(size=(2, 8, 2, 2)).astype(np.float32)
    mean, std = (
        weights[name].numpy()[None, :, None, None] for name in ("latents_mean", "latents_std")
    )
    plain, normalised = (
        make_codec("ltx2", {"model": str(folder), **extra}) for extra in ({}, {"normalised": True})
    )
    shown = plain.decode(latents).astype(int)
    assert np.abs(normalised.decode((latents - mean) / std) - shown).max() <= 1
    assert np.abs(normalised.decode(latents) - shown).max() > 5
    assert normalised.options == {"model": str(folder), "dtype": "float32", "normalised": True}


def test_weights_that_are_missing_are_not_made_up(models, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(models["wan"], tmp_path / "wan")
    file = next(folder.glob("*.safetensors"))
    weights = load_file(file)
    weights.pop(sorted(weights)[0])
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(DataError, match="no weights for"):
        make_codec("wan", {"model": str(folder)}).encode(np.zeros((5, 16, 16, 3), np.uint8))


FOREIGN = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs"),
    "page": (b"<!DOCTYPE html><html>", "a web page"),
    "pickle": (b"\x80\x04 a pickle", "a pickle, which may run code"),
    "cut": (None, "damaged or cut short at"),
    "8 bit": (8, "I8 .*quantised"),
    "mis-shaped": ((3, 3), "codec wan: cannot load"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_weights_that_are_none_are_one_error(models, tmp_path, kind):
    from safetensors.torch import load_file, save_file

    content, told = FOREIGN[kind]
    folder = shutil.copytree(models["wan"], tmp_path / "wan")
    file = next(folder.glob("*.safetensors"))
    weights = load_file(file)
    name = sorted(weights)[0]
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is None:
        file.write_bytes(file.read_bytes()[:1000])
    else:
        odd = weights[name].to(torch.int8) if content == 8 else torch.ones(content)
        save_file({**weights, name: odd}, file, {"format": "pt"})
    with pytest.raises(DataError, match=told) as caught:
        make_codec("wan", {"model": str(folder)}).network  # noqa: B018
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", '{"_class_name": "AutoencoderKLWan", "z_dim": "x"}']
)
def test_a_config_that_is_none_is_one_error(models, tmp_path, text):
    folder = shutil.copytree(models["wan"], tmp_path / "wan")
    (folder / "config.json").write_text(text)
    with pytest.raises(DataError, match="codec wan: cannot load"):
        make_codec("wan", {"model": str(folder)}).network  # noqa: B018


def test_a_recording_is_encoded_with_it(models, recording, tmp_path):
    out, short = tmp_path / "set", shutil.copytree(recording, tmp_path / "recording")
    facts = json.loads((short / "recording.json").read_text())
    (short / "recording.json").write_text(
        json.dumps({**facts, "clips": facts["clips"][:1]})
    )  # one clip: these networks are slow here
    model = f"model={models['wan']}"
    assert (
        encode.main(
            [
                f"source={short}",
                f"out={out}",
                "codec=wan",
                model,
                "psnr=no",
                "latent_dtype=bfloat16",
            ]
        )
        == 0
    )
    dataset = open_dataset(str(out))
    info = dataset.info
    assert (
        info.codec,
        info.channels,
        info.temporal_stride,
        info.latent_height,
        info.latent_width,
    ) == ("wan", 4, 4, 15, 20)
    assert info.psnr_db is None
    clip = dataset.read(dataset.clips("train")[0])
    assert clip.latents.shape == (5, 4, 15, 20)
    assert clip.fields["controls"].shape == (5, 6)


def test_a_missing_model_is_one_report(recording, tmp_path, capsys):
    arguments = [f"source={recording}", f"out={tmp_path / 'set'}", "codec=ltx2"]
    assert encode.main(arguments) == 2
    assert "model: missing (folder or hub name" in capsys.readouterr().err
    assert encode.main([*arguments, f"model={tmp_path}"]) == 2
    assert "cannot load" in capsys.readouterr().err
    with pytest.raises(DataError, match="got 'int4'"):
        make_codec("wan", {"model": "x", "dtype": "int4"})
