"""FLOPs and traffic by kind of block, against closed forms."""

from __future__ import annotations

from wm_train.config.compose import compose
from wm_train.config.curriculum import plan_stages
from wm_train.models.examples import ExampleShape
from wm_train.models.waypoint.config import WaypointConfig
from wm_train.plan.speed.blocks import GroupMesh, block_kinds, block_lines


def test_kinds_of_waypoints_blocks():
    """Three local blocks, of which the first takes in controls, and a global one, on two ranks of 8
    frames of 6 tokens: attention and linear layers by hand, and the frames that travel."""
    config = WaypointConfig(
        latent_channels=3, depth=4, width=64, noise_features=16, window=3, dilation=4, reach=8
    )
    shape = ExampleShape(1, 16, 4, 6, 4)
    local, far = block_kinds(config, shape, GroupMesh(1, 2, precision="bf16"))
    assert (local.name, local.blocks) == ("attend frame window 3 by need", 3)
    assert (far.name, far.blocks) == ("attend frame window 1 dilation 4 reach 8 by need", 1)
    tokens, width = 6, 64
    linear = 2 * 16 * tokens * (2 * width**2 + 2 * width * 32 + 2 * 4 * width**2)
    pairs = sum(min(i + 1, 3) for i in range(16))
    assert local.flops == 3 * (linear + 4 * pairs * tokens**2 * width)
    frame = 2 * tokens * 32 * 2  # keys and values of two key heads of 16, bf16
    assert local.sent == (2 * frame, 2 * frame)
    assert far.sent == (1 * frame, 1 * frame)  # of 0 and 4, frame 8 sees 4 alone


def test_lines_count_the_text_that_a_rehearsal_reads():
    text = ["model.text_width=64", "model.depth=1", "model.softmax_every=0"]
    words = ["experiment=demo", "recipe=demo", "stage=1", "data.path=x", *text]
    (plan,) = plan_stages(compose(words))
    (kind,) = block_kinds(plan.config.model, ExampleShape(1, 6, 7, 10, 8, 300), GroupMesh())
    line = block_lines(plan.config, 6, (7, 10, 8), grouped=False)[-1]
    assert line.endswith(f": {kind.flops / 1e12:.3g} TFLOP")
