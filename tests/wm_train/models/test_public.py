"""The backbone against the public class `diffusers.SanaWMTransformer3DModel`: same weights by name,
same outputs, same gradients."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch

from parallel.layout import ClipLayout
from parallel.sequence import LocalSequence
from wm_train.conditioning import Conditions
from wm_train.models.sana_wm.config import SanaWMConfig
from wm_train.models.spec import build_model

STRIDE = 8


@pytest.fixture(autouse=True)
def softmax_in_full_precision(monkeypatch):
    """The public softmax blocks cast fp32 to bf16 before attention. Make that cast do nothing, for
    the comparison only."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self)


def public_model(config: SanaWMConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    model = diffusers.SanaWMTransformer3DModel(
        in_channels=config.latent_channels,
        num_layers=config.depth,
        hidden_size=config.width,
        num_attention_heads=config.heads,
        patch_size=(1, config.patch_size, config.patch_size),
        softmax_every_n=config.softmax_every,
        linear_head_dim=config.width // config.heads,
        conv_kernel_size=config.conv_kernel,
        caption_channels=config.text_width,
        mlp_ratio=config.ffn_ratio,
        use_chunk_plucker_post_attn=config.plucker,
        chunk_plucker_post_attn_blocks=config.depth,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # wake everything that starts at zero
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def public_camera(
    c2w: torch.Tensor, intrinsics: torch.Tensor, size: tuple[int, int], stride: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T, 20] camera conditions and [B, 48, T, h, w] raymaps by the public pipeline's own
    functions."""
    from diffusers.pipelines.sana_wm.cam_utils import prepare_camera

    rows = [
        prepare_camera(
            np.asarray(c), np.asarray(i), target_size=size, vae_stride=(STRIDE, stride, stride)
        )
        for c, i in zip(c2w, intrinsics)
    ]
    return torch.stack([row["raymap"] for row in rows]), torch.stack(
        [row["chunk_plucker"] for row in rows]
    )


SMALL = SanaWMConfig(latent_channels=6, depth=2, width=48, heads=2, text_width=10, softmax_every=2)
CASES = {  # name: (shape, latent frames, camera given, text masked)
    "released shape": (replace(SMALL, depth=4, softmax_every=4), 5, True, False),
    "odd heads, one frame": (replace(SMALL, width=72, heads=3), 1, True, True),
    "no camera given": (SMALL, 7, False, True),
    "no plucker": (replace(SMALL, width=32, plucker=False), 6, True, True),
    "patch 2, no short convolution": (replace(SMALL, patch_size=2, conv_kernel=0), 4, True, True),
    "GDN only": (replace(SMALL, width=80, heads=5, softmax_every=0), 11, True, True),
}


@pytest.mark.parametrize("case", CASES)
def test_forward_and_every_gradient_equal_the_public_model(case, camera_path):
    config, frames, camera, masked = CASES[case]
    batch, h, w, length = 2, 6, 10, 5
    generator = torch.Generator().manual_seed(2)
    public = public_model(config)
    ours = build_model(config)
    ours.load_state_dict(public.state_dict(), strict=True)
    ours.eval()

    latents = torch.randn(batch, frames, config.latent_channels, h, w, generator=generator)
    timestep = torch.randint(1, 1000, (batch, frames), generator=generator)
    timestep[:, 0] = 0
    text = torch.randn(batch, length, config.text_width, generator=generator)
    mask = torch.ones(batch, length, dtype=torch.int64)
    if masked:
        mask[0, 3:], mask[1, 1:] = 0, 0
    c2w, intrinsics = camera_path(batch, (frames - 1) * STRIDE + 1, generator)
    raymap, plucker = public_camera(c2w, intrinsics, (h * 16, w * 16), 16)

    expected = public(
        latents.transpose(1, 2),
        timestep[:, None],
        text[:, None],
        mask=mask,
        camera_conditions=raymap if camera else None,
        chunk_plucker=plucker if camera and config.plucker else None,
    ).sample.transpose(1, 2)
    conditions = Conditions.of(
        (h * 16, w * 16),
        STRIDE,
        c2w if camera else None,
        intrinsics if camera else None,
        text=text,
        text_mask=mask.bool(),
    )
    actual = ours(latents, timestep / 1000.0, conditions, LocalSequence(ClipLayout(frames)))
    assert relative(actual, expected) < 1e-5

    weight = torch.randn(expected.shape, generator=generator)
    (expected * weight).sum().backward()
    (actual * weight).sum().backward()
    theirs = dict(public.named_parameters())
    unread = set()
    for name, parameter in ours.named_parameters():
        if theirs[name].grad is None:
            assert parameter.grad is None, name
            unread.add(name)
        else:
            assert parameter.grad is not None, name
            assert relative(parameter.grad, theirs[name].grad) < 1e-4, name
    if camera:
        assert unread == ours.unused_parameters()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-6)).detach())


def test_full_size_has_the_public_parameters():
    """2.66 B parameters, on the meta device: names and shapes are the public ones."""
    config = SanaWMConfig(latent_channels=128, depth=20, width=2240, heads=20, text_width=2304)
    with torch.device("meta"):
        ours, public = build_model(config), diffusers.SanaWMTransformer3DModel()
    assert {n: p.shape for n, p in ours.state_dict().items()} == {
        n: p.shape for n, p in public.state_dict().items()
    }
    assert sum(p.numel() for p in ours.parameters()) == 2_661_800_448
