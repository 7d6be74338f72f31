"""Text from the data set to the model: embeddings, mask and null text of a small encoded set,
through the code every worker runs."""

from __future__ import annotations

from dataclasses import replace

import av
import numpy as np
import pytest
import torch

from data_shards import encode
from wm_train.backends import get_backend
from wm_train.boxes import local_tensor, whole_tensor
from wm_train.checks.values import problems_of
from wm_train.config.curriculum import plan_stage
from wm_train.training import step
from wm_train.training.data import conditions_of, open_loader
from wm_train.training.stage import open_stage
from wm_train.training.state import build_state
from wm_train.world import join_world, leave_world

LENGTH, WIDTH = 4, 6
SMALL = (
    "model.width=32",
    "model.heads=2",
    "recipe.stages.short.global_batch=4",
    "recipe.stages.short.frames=9",
)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """6 clips of 9 frames with cameras, and text ready made: (folder of the data set, key -> (text,
    mask), null text)."""
    source, random = tmp_path_factory.mktemp("captioned"), np.random.default_rng(0)
    texts = {}
    for name in "abcdef":
        with av.open(str(source / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=16)
            stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
            for picture in random.integers(0, 255, (9, 32, 64, 3), np.uint8):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        real = int(random.integers(1, LENGTH + 1))
        texts[name] = (
            random.standard_normal((LENGTH, WIDTH)).astype(np.float32),
            np.arange(LENGTH) < real,
        )
        camera = {
            "c2w": np.tile(np.eye(4), (9, 1, 1)),
            "intrinsics": np.tile([32.0, 32.0, 32.0, 16.0], (9, 1)),
        }
        controls = {
            "controls": np.zeros((9, 1), np.float32),
            "control_names": np.array(["forward"]),
        }
        text = {"text": texts[name][0], "text_mask": texts[name][1].astype(np.uint8)}
        np.savez(source / f"{name}.npz", **camera, **controls, **text)
    null = random.standard_normal((2, WIDTH)).astype(np.float32)
    np.save(source / "null.npy", null)
    out = source / "set"
    ready = [
        "text=ready",
        f"text_length={LENGTH}",
        "text_dtype=bfloat16",
        f"null_text={source / 'null.npy'}",
        "validation=0.2",
    ]
    assert (
        encode.main([f"source={source}", f"out={out}", "codec=linear", "channels=24", *ready]) == 0
    )
    return out, texts, null


@pytest.fixture
def opened(demo_run, captioned, tmp_path):
    """opened(*overrides): the demo's first stage on the captioned set, in this process."""

    def open_it(*overrides):
        run = demo_run(tmp_path, f"data.path={captioned[0]}", *SMALL, *overrides)
        return open_stage(plan_stage(run, run.stage), backend, world)

    backend = get_backend("cpu")
    world = join_world(backend, 60.0)
    yield open_it
    leave_world()


@torch.no_grad()
def awake(stage):
    """The stage's model with a text branch and an output that are not zero, as they start."""
    state = build_state(stage.plan, stage.mesh.fsdp, stage.backend.device)
    random = torch.Generator().manual_seed(0)
    for layer in [
        *(block.cross_attn.proj for block in state.model.blocks),
        state.model.final_layer.linear,
    ]:
        local_tensor(layer.weight).normal_(std=0.1, generator=random)
    return state


def test_text_reaches_the_model_and_every_parameter_learns(opened, captioned):
    stage = opened(f"model.text_width={WIDTH}", "recipe.stages.short.objective.text_dropout=0.5")
    with open_loader(stage, "train", 4) as loader:
        batch = next(loader)
    seen = conditions_of(stage, batch)
    for row, key in enumerate(batch.keys):
        text, mask = captioned[1][key]
        np.testing.assert_allclose(seen.text[row], text, rtol=2**-8)
        assert seen.text_mask[row].tolist() == mask.tolist()
    np.testing.assert_array_equal(seen.null_text, captioned[2])
    state = awake(stage)
    loss = step.gradients(stage, state, batch)["loss"]
    without = [
        name for name, p in state.model.named_parameters() if p.requires_grad and p.grad is None
    ]
    assert not without
    assert all(
        p.grad.any()
        for name, p in state.model.named_parameters()
        if "cross_attn" in name and not name.endswith("bias")
    )
    other = replace(batch, fields={**batch.fields, "text": batch.fields["text"] + 1})
    assert step.gradients(stage, state, other)["loss"] != loss


def test_a_model_without_text_ignores_it(opened):
    stage = opened()
    with open_loader(stage, "train", 4) as loader:
        batch = next(loader)
    assert "text" in batch.fields
    assert conditions_of(stage, batch).text is None
    assert stage.null_text is None


def test_which_text_is_dropped_is_a_matter_of_the_draw_not_of_who_holds_the_clip(opened):
    found = []
    for change in (
        "trainer.accumulate=1",
        "trainer.accumulate=4",
        "recipe.stages.short.objective.text_dropout=0",
    ):
        stage = opened(
            f"model.text_width={WIDTH}", "recipe.stages.short.objective.text_dropout=0.5", change
        )
        with open_loader(stage, "train", 4) as loader:
            batch = next(loader)
        state = awake(stage)
        loss = step.gradients(stage, state, batch)["loss"]
        found.append(
            (loss, whole_tensor(state.model.get_parameter("y_embedder.y_proj.fc1.weight").grad))
        )
    (whole, parts, kept) = found
    assert parts[0] == pytest.approx(whole[0], rel=1e-6, abs=0)
    assert (parts[1] - whole[1]).abs().max() <= 1e-5 * whole[1].abs().max()
    assert kept[0] != pytest.approx(whole[0], rel=1e-4, abs=0), "no draw dropped its text"


@pytest.mark.parametrize(
    ("width", "fix"), [(WIDTH + 1, f"model.text_width={WIDTH}"), (0, None), (WIDTH, None)]
)
def test_the_models_text_is_the_data_sets(demo_run, captioned, tmp_path, width, fix):
    run = demo_run(tmp_path, f"data.path={captioned[0]}", *SMALL, f"model.text_width={width}")
    assert [problem.fix for problem in problems_of(run) if problem.where == "model.text_width"] == (
        [fix] if fix else []
    )


def test_text_that_is_not_there_is_refused(demo_run, tmp_path):
    (problem,) = [
        problem
        for problem in problems_of(demo_run(tmp_path, "model.text_width=8"))
        if problem.where == "model.text_width"
    ]
    assert (problem.rule, problem.fix) == (
        "0, as the data set has no text",
        "model.text_width=0, or encode with text=<encoder>",
    )
