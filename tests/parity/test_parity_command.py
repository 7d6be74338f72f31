"""`python -m wm_train.parity`: says OK when the mesh computes what one device does, and notices
when it does not."""

from __future__ import annotations

import pytest
import torch

from parallel.gdn_scan import ScanVerb
from wm_train.models.sana_wm.config import SanaWMConfig
from wm_train.objectives.config import FlowMatchingConfig
from wm_train.parity import __main__ as parity
from wm_train.parity import case as parity_case

SMALL = [
    "experiment=demo",
    "recipe=demo",
    "model.depth=2",
    "model.softmax_every=2",
    "model.width=32",
    "model.heads=4",
    "--frames",
    "5",
    "--grid",
    "2x2",
]


@pytest.mark.parametrize(
    "mesh",
    [
        ["parallel.ulysses=2", "parallel.ring=2"],
        ["parallel.ulysses=3", "parallel.ring=2"],  # 4 heads dealt 2, 1, 1
        ["parallel.cp=8"],  # three members hold no frames
        [
            "parallel.cp=3",
            "model.activation_checkpointing=block",
            "model.causal=true",
            "model.text_width=8",
        ],
    ],
    ids=str,
)
def test_the_real_model_agrees_over_virtual_ranks(mesh, capsys):
    assert parity.main([*SMALL, *mesh]) == 0
    printed = capsys.readouterr().out
    for word in (
        "loss",
        "velocity",
        "blocks.0.attn.qkv.weight",
        "blocks.1.mlp.t_conv.weight",
        "declared unused",
        "OK",
    ):
        assert word in printed


@pytest.mark.full
def test_every_pool_is_proven_on_its_own_mesh(capsys):
    pools = [
        "experiment=demo_pools",
        *SMALL[1:],
        'pools.high.overrides=["launcher.workers=2","parallel.cp=2"]',
        "--worst",
        "1",
    ]
    assert parity.main(pools) == 0
    high, low = capsys.readouterr().out.split("demo_pools, pool low: ")
    assert high.startswith("demo_pools, pool high: ")
    assert "against 2 virtual ranks" in high
    assert "against 1 virtual ranks" in low
    assert parity.main([*pools, "pool=low"]) == 0
    assert "pool high" not in capsys.readouterr().out
    assert parity.main([*pools, "--checkpoint", "step_1"]) == 2
    assert "pool=high" in capsys.readouterr().err


def test_a_stages_own_mesh_is_the_one_that_is_proven(capsys):
    assert (
        parity.main([*SMALL, "stage=short", "recipe.stages.short.parallel.cp=2", "--worst", "1"])
        == 0
    )
    assert "against 2 virtual ranks" in capsys.readouterr().out


def test_collectives_per_block_with_and_without_checkpointing():
    """The real hybrid: GDN block 1 all-gather and 2 halos, softmax block 2 all-to-alls and 1 halo,
    forward and backward."""
    for checkpointing in ("none", "block"):
        case = small_case(activation_checkpointing=checkpointing)
        _, rows = parity_case.on_virtual_ranks(case, 1, 4)
        assert all(row.agree for row in rows)
        assert {row.label: row.counted[0] for row in rows} == {
            "blocks.0/scan forward": 1,
            "blocks.0/halo forward": 2,
            "blocks.0/scan backward": 1,
            "blocks.0/halo backward": 2,
            "blocks.1/attend forward": 2,
            "blocks.1/halo forward": 1,
            "blocks.1/attend backward": 2,
            "blocks.1/halo backward": 1,
            "mean forward": 1,
        }


def small_case(**changes):
    model = SanaWMConfig(depth=2, softmax_every=2, width=32, heads=4, latent_channels=4, **changes)
    return parity_case.ParityCase(model, FlowMatchingConfig(), 0, 6, 8, 2, (2, 2), False)


def test_agreement_in_double_precision_is_to_the_last_digits(capsys):
    assert (
        parity.main(
            [*SMALL, "parallel.ulysses=2", "parallel.ring=2", "--double", "--tolerance", "1e-12"]
        )
        == 0
    )
    assert "float64" in capsys.readouterr().out


def test_a_wrong_gradient_fails_and_is_named(monkeypatch, capsys):
    """The backward prefix of the scan loses what comes from the right: forward stays exact,
    gradients do not."""
    real = ScanVerb.backward

    def broken(self, member, kept, facts, grads):
        program = real(self, member, kept, facts, grads)
        answer = None
        while True:
            try:
                request = program.send(answer)
            except StopIteration as done:
                return done.value
            answer = [torch.zeros_like(x) for x in (yield request)]

    monkeypatch.setattr(ScanVerb, "backward", broken)
    assert parity.main([*SMALL, "parallel.cp=2", "--worst", "5"]) == 1
    printed = capsys.readouterr().out
    assert "beyond tolerance" in printed
    assert "FAILED" in printed
    loss = next(line for line in printed.splitlines() if line.startswith("loss"))
    assert "beyond" not in loss


def test_parameters_that_nothing_exercises_fail(monkeypatch, capsys):
    """Without the waking noise the fresh model's zero gates hide most branches."""
    monkeypatch.setattr(parity_case, "wake_", lambda model, seed: None)
    assert parity.main([*SMALL, "parallel.cp=2", "--worst", "1"]) == 1
    printed = capsys.readouterr().out
    assert "NOT EXERCISED" in printed
    assert "blocks.0.attn.qkv.weight" in printed


def test_wrong_arguments_end_in_a_report(capsys):
    assert parity.main(["experiment=demo", "recipe=demo", "parallel.ulyses=2"]) == 2
    assert "ulyses" in capsys.readouterr().err
    assert (
        parity.main(["experiment=demo", "recipe=demo", "parallel.ulysses=9", "parallel.ring=1"])
        == 2
    )
    assert "expected ulysses <= 4 heads" in capsys.readouterr().err
    assert parity.main(["experiment=demo", "recipe=demo", "model.width=30", "parallel.cp=2"]) == 2
    assert "model.width: got 30" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        parity.main(["experiment=demo", "recipe=demo", "--grid", "4"])
    assert end.value.code == 2


def test_processes_with_sharded_parameters_agree(capsys):
    assert parity.main([*SMALL, "--processes", "launcher.workers=2", "parallel.cp=2"]) == 0
    assert "2 processes" in capsys.readouterr().out


@pytest.mark.full
@pytest.mark.parametrize(
    "mesh",
    [
        ["parallel.cp=2"],
        ["parallel.ulysses=2", "parallel.ring=2"],
        ["parallel.dp_replicate=2", "parallel.cp=2"],
    ],
    ids=str,
)
def test_four_processes_agree(mesh, capsys):
    assert parity.main([*SMALL, "--processes", "launcher.workers=4", *mesh]) == 0


def test_weights_may_come_from_a_checkpoint(tmp_path, capsys):
    from wm_train.checkpoint import writer
    from wm_train.world import World

    case = small_case()
    model = parity_case.make_model(case)
    tensors = {f"model/{name}": p.detach() * 1.5 for name, p in model.named_parameters()}
    folder = writer.save(tmp_path, 1, "short", tensors, {}, World(rank=0, size=1))
    loaded = parity_case.make_model(
        parity_case.ParityCase(**{**vars(case), "checkpoint": str(folder)})
    )
    for name, p in loaded.named_parameters():
        assert torch.equal(p.detach(), tensors[f"model/{name}"])
