"""Fine-tune a released checkpoint: a stage begins with its weights, trains, and what it learned is
exported as the release has it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from wm_train.checkpoint.__main__ import main as checkpoint
from wm_train.models.public import export_pretrained, load_pretrained_

SHORT = "recipe.stages.short."
FILE = "model.safetensors"


@pytest.mark.full
@pytest.mark.parametrize("lr", [1.0e-12, 1.0e-2])
def test_a_stage_begins_with_a_release_and_ends_as_one(
    demo_run, train_here, pretrained_waypoint, awake, tmp_path, capsys, lr
):
    """At a rate that moves no weight, every number comes back; at a real one, all tied copies are
    still equal, or the export could not be read."""
    release, run, out = (tmp_path / name for name in ("release", "run", "out"))
    optimizer = f"{{name:normuon,normuon_scale:muon,lr:{lr},warmup_steps:0,weight_decay:0}}"
    settings = (
        *pretrained_waypoint,
        "model.noise_features=512",  # as the released engine has it
        f"{SHORT}inherit={release}",
        f"{SHORT}optimizer={optimizer}",
        f"{SHORT}steps=2",
    )
    stage = demo_run(run, *settings).recipe.stages["short"]
    model = awake(stage.model, torch.float32)
    export_pretrained(dict(model.named_parameters()), stage.model, release)
    train_here(run, *settings)
    checkpoints = run / "demo" / "short" / "checkpoints"
    command = ["export", str(checkpoints), str(out), "--layout", "diffusers", "--weights", "raw"]
    assert checkpoint(command) == 0, capsys.readouterr().err
    before, after = load_file(release / FILE), load_file(out / FILE)
    assert before.keys() == after.keys()
    apart = {n: float((after[n] - before[n]).abs().max()) for n in before}
    if lr < 1e-9:
        assert max(apart.values()) < 1e-9
        return
    # the first block mixes its values with themselves
    unmoved = {name for name, distance in apart.items() if distance == 0}
    assert unmoved == {"transformer.blocks.0.attn.v_lamb"}
    load_pretrained_(model, out)
    names = {n: p for n, p in model.named_parameters() if n.startswith("cond_proj.0")}
    block = "transformer.blocks.3.attn_cond_head.cond_proj.0.weight"
    assert torch.equal(names["cond_proj.0.weight"], after[block])
