"""The FLOP formula against PyTorch's own count of the operations that run."""

from dataclasses import replace

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from parallel.layout import ClipLayout
from parallel.sequence import LocalSequence
from wm_train.config.schema import ModelConfig
from wm_train.models import build_model
from wm_train.models.flops import forward_flops, mfu, step_flops
from wm_train.plan import memory

SHAPE = memory.ClipShape(clips=1, frames=5, channels=8, height=6, width=8, temporal_stride=8)


def counted(config: ModelConfig) -> int:
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        build_model(config)(*memory._inputs(config, SHAPE), LocalSequence(ClipLayout(SHAPE.frames)))
    return counter.get_total_flops()


@pytest.mark.parametrize("camera", [False, True])
@pytest.mark.parametrize("softmax_every", [0, 1])
def test_the_formula_counts_what_runs(camera, softmax_every):
    config = ModelConfig(
        width=128,
        heads=4,
        depth=1,
        latent_channels=8,
        softmax_every=softmax_every,
        camera=camera,
        plucker=camera,
    )
    flops = forward_flops(config, SHAPE.frames, SHAPE.height * SHAPE.width)
    # PyTorch has no count for the CPU's attention kernel, so the softmax share is checked by its
    # closed form below
    assert flops.total - flops.softmax == pytest.approx(counted(config), rel=0.06)


def test_softmax_grows_with_the_square_and_gdn_in_proportion():
    config = ModelConfig(width=64, heads=2, depth=4, latent_channels=8)
    short, long = forward_flops(config, 4, 16), forward_flops(config, 8, 16)
    assert long.softmax == 4 * short.softmax
    assert long.gdn == 2 * short.gdn
    assert long.dense == 2 * short.dense
    n = 4 * 16
    assert short.softmax == 2 * 2 * (2 * n * n * 64), (
        "two branches, one block of scores and one of values each"
    )


def test_softmax_is_counted_under_its_mask():
    """By hand: seven frames in chunks of 3, 2, 2; causal, then with a window of one chunk and one
    frame that stays."""
    config = ModelConfig(width=64, heads=2, depth=4, latent_channels=8)
    full = forward_flops(config, 7, 16).softmax
    causal = forward_flops(replace(config, causal=True), 7, 16, chunk_frames=2).softmax
    assert causal * 49 == full * (3 * 3 + 2 * 5 + 2 * 7)
    window = forward_flops(
        replace(config, causal=True, window_chunks=1), 7, 16, chunk_frames=2
    ).softmax
    assert window * 49 == full * (3 * 3 + 2 * 3 + 2 * 3)


def test_the_released_model_at_one_minute():
    """Design §4: about 1.54e15 forward at 60 s, of which five softmax layers of two branches make
    1.02e15."""
    config = ModelConfig(width=2240, heads=20, depth=20, latent_channels=128)
    flops = forward_flops(config, 121, 880)
    assert flops.softmax == pytest.approx(1.02e15, rel=0.01)
    assert flops.total == pytest.approx(1.54e15, rel=0.1)


def test_mfu_of_a_step():
    flops = step_flops(forward_flops(ModelConfig(), 6, 70), clips=4)
    assert mfu(flops, 2.0, 3, 1e9) == pytest.approx(flops / 6e9)
