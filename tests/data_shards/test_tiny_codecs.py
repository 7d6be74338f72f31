"""Tiny autoencoders with random weights: TAEHV against the network written out frame by frame,
TAESD through diffusers."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import conv2d, interpolate, pixel_shuffle, pixel_unshuffle

from data_shards import encode
from data_shards.codecs import make_codec
from data_shards.schema import DataError

WIDTH, PATCH, CHANNELS = 4, 2, 5


def random_taehv(pools=(2, 2, 1), grows=(1, 2, 2)):
    """The weights of a TAEHV of 4 to 8 channels, under the published names."""
    random = torch.Generator().manual_seed(0)
    weights = {}

    def add(name, outputs, inputs, kernel=3, bias=True):
        weights[f"{name}.weight"] = (
            torch.randn(outputs, inputs, kernel, kernel, generator=random)
            / (inputs * kernel * kernel) ** 0.5
        )
        if bias:
            weights[f"{name}.bias"] = 0.1 * torch.randn(outputs, generator=random)

    def add_block(name, channels):
        add(f"{name}.conv.0", channels, 2 * channels)
        add(f"{name}.conv.2", channels, channels)
        add(f"{name}.conv.4", channels, channels)

    add("encoder.0", WIDTH, 3 * PATCH**2)
    for stage, pool in enumerate(pools):
        add(f"encoder.{2 + 5 * stage}.conv", WIDTH, WIDTH * pool, 1, bias=False)
        add(f"encoder.{3 + 5 * stage}", WIDTH, WIDTH, bias=False)
        for block in range(3):
            add_block(f"encoder.{4 + 5 * stage + block}", WIDTH)
    add("encoder.17", CHANNELS, WIDTH)
    widths = (8, 6, 4, 4)
    add("decoder.1", widths[0], CHANNELS)
    for stage, grow in enumerate(grows):
        for block in range(3):
            add_block(f"decoder.{3 + 6 * stage + block}", widths[stage])
        add(f"decoder.{7 + 6 * stage}.conv", widths[stage] * grow, widths[stage], 1, bias=False)
        add(f"decoder.{8 + 6 * stage}", widths[stage + 1], widths[stage], bias=False)
    add("decoder.22", 3 * PATCH**2, widths[3])
    return weights


@pytest.fixture
def taehv(tmp_path):
    save_file(random_taehv(), tmp_path / "tae.safetensors")
    return tmp_path / "tae.safetensors"


def layer(weights, name, x, **options):
    return conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), **options)


def remember(weights, name, frames):
    out = []
    for i, x in enumerate(frames):
        past = frames[i - 1] if i else torch.zeros_like(x)
        y = layer(weights, f"{name}.conv.0", torch.cat([x, past], 1), padding=1).relu()
        y = layer(weights, f"{name}.conv.2", y, padding=1).relu()
        out.append((layer(weights, f"{name}.conv.4", y, padding=1) + x).relu())
    return out


def encode_by_frame(weights, video, pools):
    """The published encoder, one frame and one layer at a time, on [F, H, W, 3]."""
    frames = list(torch.from_numpy(video).permute(0, 3, 1, 2)[:, None].float() / 255)
    frames += [frames[-1]] * (-len(frames) % int(np.prod(pools)))
    frames = [
        layer(weights, "encoder.0", pixel_unshuffle(x, PATCH), padding=1).relu() for x in frames
    ]
    for stage, pool in enumerate(pools):
        joined = [torch.cat(frames[i : i + pool], 1) for i in range(0, len(frames), pool)]
        frames = [layer(weights, f"encoder.{2 + 5 * stage}.conv", x) for x in joined]
        frames = [
            layer(weights, f"encoder.{3 + 5 * stage}", x, stride=2, padding=1) for x in frames
        ]
        for block in range(3):
            frames = remember(weights, f"encoder.{4 + 5 * stage + block}", frames)
    return torch.cat([layer(weights, "encoder.17", x, padding=1) for x in frames]).numpy()


def decode_by_frame(weights, latents, grows, warm=None):
    """The published decoder; `warm`: frames left out at the start, as many as come before the
    first."""
    warm = int(np.prod(grows)) - 1 if warm is None else warm
    frames = [
        layer(weights, "decoder.1", torch.tanh(x / 3) * 3, padding=1).relu()
        for x in torch.from_numpy(latents)[:, None]
    ]
    for stage, grow in enumerate(grows):
        for block in range(3):
            frames = remember(weights, f"decoder.{3 + 6 * stage + block}", frames)
        grown = [
            layer(weights, f"decoder.{7 + 6 * stage}.conv", interpolate(x, scale_factor=2))
            for x in frames
        ]
        frames = [
            layer(weights, f"decoder.{8 + 6 * stage}", part, padding=1)
            for x in grown
            for part in x.chunk(grow, 1)
        ]
    frames = [
        pixel_shuffle(layer(weights, "decoder.22", x.relu(), padding=1), PATCH) for x in frames
    ]
    return torch.cat(frames)[warm:].clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255


def test_taehv_is_the_published_network(taehv):
    codec = make_codec("taehv", {"model": str(taehv)})
    assert (codec.temporal_stride, codec.spatial_stride, codec.channels) == (4, 16, CHANNELS)
    weights, video = (
        load_file(taehv),
        np.random.default_rng(0).integers(0, 256, (25, 32, 48, 3), dtype=np.uint8),
    )
    latents = codec.encode(video)  # 7 latents: more than go through at a time
    assert latents.shape == (7, CHANNELS, 2, 3)
    np.testing.assert_allclose(latents, encode_by_frame(weights, video, (2, 2, 1)), atol=1e-5)
    decoded = codec.decode(latents)
    assert decoded.shape == video.shape
    np.testing.assert_allclose(decoded, decode_by_frame(weights, latents, (1, 2, 2)), atol=0.51)
    assert decoded.std() > 1
    assert codec.encode(video[:1]).shape == (1, CHANNELS, 2, 3)


def test_a_grouped_taehv_encodes_and_decodes_whole_groups(taehv):
    """As Waypoint-1.5 uses it: r k frames make k latents, and all r k come back."""
    codec = make_codec("taehv", {"model": str(taehv), "layout": "grouped"})
    video = np.random.default_rng(0).integers(0, 256, (24, 32, 48, 3), dtype=np.uint8)
    latents, weights = codec.encode(video), load_file(taehv)
    assert latents.shape == (6, CHANNELS, 2, 3)
    np.testing.assert_allclose(latents, encode_by_frame(weights, video, (2, 2, 1)), atol=1e-5)
    decoded = codec.decode(latents)
    assert decoded.shape == video.shape
    expected = decode_by_frame(weights, latents, (1, 2, 2), warm=0)
    np.testing.assert_allclose(decoded, expected, atol=0.51)
    assert make_codec("taehv", dict(codec.options)).time_layout == "grouped"
    with pytest.raises(DataError, match="got 25, expected a multiple of 4 "):
        codec.encode(np.concatenate([video, video[:1]]))


@pytest.mark.parametrize("layout", ["grouped", "causal"])
def test_a_warm_decoder_has_seen_the_first_latent_before(taehv, layout):
    """As in engines of Waypoint-1.5: three times more, and the frames of these are not kept."""
    cold = make_codec("taehv", {"model": str(taehv), "layout": layout})
    codec = make_codec("taehv", {**cold.options, "warm_up": 3})
    assert codec.options == {**cold.options, "warm_up": 3}
    latents = np.random.default_rng(0).normal(size=(3, CHANNELS, 2, 3)).astype(np.float32)
    fed, unkept = np.concatenate([latents[:1]] * 3 + [latents]), 3 * 4 + 3 * (layout == "causal")
    expected = decode_by_frame(load_file(taehv), fed, (1, 2, 2), warm=unkept)
    decoded = codec.decode(latents)
    np.testing.assert_allclose(decoded, expected, atol=0.51)
    assert np.abs(decoded.astype(int) - cold.decode(latents))[:4].max() > 1


def test_a_decoder_trained_to_grow_more_keeps_the_last_frames(tmp_path):
    weights = random_taehv(grows=(2, 2, 2))
    save_file(weights, tmp_path / "tae.safetensors")
    codec = make_codec("taehv", {"model": str(tmp_path)})
    latents = np.random.default_rng(1).normal(size=(3, CHANNELS, 2, 2)).astype(np.float32)
    weights["decoder.7.conv.weight"] = weights["decoder.7.conv.weight"][-8:]
    np.testing.assert_allclose(
        codec.decode(latents), decode_by_frame(weights, latents, (1, 2, 2)), atol=0.51
    )


def test_other_files_are_refused(tmp_path, taehv):
    torch.save({}, tmp_path / "tae.pth")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    save_file(random_taehv(grows=(1, 1, 2)), tmp_path / "y.safetensors")
    for name, report in (
        ("tae.pth", "expected a .safetensors file"),
        ("x.safetensors", "lacks or misstates"),
        ("y.safetensors", "another time stride"),
    ):
        with pytest.raises(DataError, match=report):
            make_codec("taehv", {"model": str(tmp_path / name)}).encode(
                np.zeros((5, 16, 16, 3), np.uint8)
            )


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
FOREIGN = {
    "pointer": (POINTER.encode(), "git lfs pull"),
    "page": (b"<!DOCTYPE html><html>", "a web page"),
    "pickle": (b"PK\3\4 archive/data.pkl", "a pickle, which may run code"),
    "empty": (b"", "which is empty"),
    "cut": (None, "damaged or cut short at"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_that_are_no_safetensors_are_named_with_their_fix(taehv, kind):
    content, told = FOREIGN[kind]
    taehv.write_bytes(taehv.read_bytes()[:500] if content is None else content)
    with pytest.raises(DataError, match=told) as caught:
        make_codec("taehv", {"model": str(taehv)}).weights  # noqa: B018
    assert str(taehv) in str(caught.value)


@pytest.mark.parametrize("kind", ["int8", "missing", "shape", "flat"])
def test_weights_that_make_no_network_are_refused_before_a_clip_is_encoded(taehv, kind):
    """8-bit numbers were taken for weights, a missing layer was a KeyError in the first clip."""
    weights = load_file(taehv)
    name = "encoder.6.conv.2.weight"
    changed = {
        "int8": lambda w: (w * 100).to(torch.int8),
        "shape": lambda w: w[:, :-1].contiguous(),
        "flat": lambda w: w.flatten(),
    }
    if kind == "missing":
        del weights[name]
    else:
        weights[name] = changed[kind](weights[name])
    save_file(weights, taehv)
    with pytest.raises(DataError, match=r"codec taehv") as caught:
        make_codec("taehv", {"model": str(taehv)}).weights  # noqa: B018
    assert kind not in ("int8", "missing") or name in str(caught.value)


def test_single_image_autoencoders_go_frame_by_frame(tmp_path):
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    blocks = {
        "encoder_block_out_channels": (8, 8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8, 8),
    }
    network = AutoencoderTiny(
        **blocks, num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1)
    ).eval()
    network.save_pretrained(tmp_path)
    codec = make_codec("tiny", {"model": str(tmp_path)})
    assert (codec.temporal_stride, codec.spatial_stride, codec.channels) == (1, 8, 4)
    video = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)
    latents = codec.encode(video)
    assert latents.shape == (3, 4, 2, 3)
    pixels = torch.from_numpy(video).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        np.testing.assert_allclose(latents, network.encode(pixels).latents.numpy(), atol=1e-5)
    assert codec.decode(latents).shape == video.shape


def test_other_weights_behind_one_name_are_seen(taehv, write_video, tmp_path, monkeypatch, capsys):
    """An interrupted run encodes all clips anew; a finished set says what has changed."""
    videos, out = tmp_path / "videos", tmp_path / "set"
    videos.mkdir()
    for key in "ab":
        write_video(videos / f"{key}.mp4", frames=9)
    command = [f"source={videos}", f"out={out}", "psnr=no", "codec=taehv", f"model={taehv}"]
    with monkeypatch.context() as patch:
        patch.setattr(encode, "finish", interrupt)
        assert encode.main(command) == 130
    weights = load_file(taehv)
    weights["encoder.17.bias"] += 1
    save_file(weights, taehv)
    assert encode.main(command) == 0
    assert "model= has other content than before" in capsys.readouterr().out
    assert encode.main([*command[:1], f"out={tmp_path / 'anew'}", *command[2:]]) == 0
    names = [file.relative_to(out) for file in out.rglob("*") if file.is_file()]
    assert [(out / name).read_bytes() for name in names] == [
        (tmp_path / "anew" / name).read_bytes() for name in names
    ]
    weights["encoder.17.bias"] += 1
    save_file(weights, taehv)
    assert encode.main(command) == 2
    assert "model= has other content than before" in capsys.readouterr().err


def interrupt(*_):
    raise KeyboardInterrupt
