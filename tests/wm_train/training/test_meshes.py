"""Every way to spread or to save memory trains the same: replicas, shards, sequence members,
checkpointing, accumulation, bf16."""

import pytest
import torch._dynamo

from wm_train.tracking.tracker import read_steps


@pytest.mark.parametrize(
    ("workers", "overrides"),
    [
        pytest.param(2, ("parallel.dp_replicate=2",), marks=pytest.mark.full),
        pytest.param(
            2, ("parallel.cp=2", "parallel.ring=2", "parallel.ulysses=1"), marks=pytest.mark.full
        ),
        pytest.param(
            2, ("parallel.cp=2", "model.activation_checkpointing=block"), marks=pytest.mark.full
        ),
        pytest.param(1, ("model.activation_checkpointing=block",), marks=pytest.mark.full),
    ],
    ids=["hsdp", "ring", "checkpointed cp", "checkpointed"],
)
def test_losses_do_not_depend_on_how_work_is_spread(
    alone, worker_config, losses, tmp_path, run_ranks, workers, overrides
):
    run_ranks(workers, "-m", "wm_train.worker", "--config", worker_config(tmp_path, *overrides))
    assert losses(tmp_path) == pytest.approx(alone, rel=1e-5, abs=0)


SAVERS = {
    "block": "model.activation_checkpointing=block",
    "selective": "model.activation_checkpointing=selective",
    "activations on the host": "parallel.offload_activations=true",
    "state on the host": "parallel.offload_state=cpu",
}


@pytest.mark.full
@pytest.mark.parametrize("kind", SAVERS)
def test_saving_memory_does_not_change_a_bit(alone, train_here, losses, tmp_path, kind):
    train_here(tmp_path, SAVERS[kind], "recipe.stages.short.steps=20")
    assert losses(tmp_path) == alone


@pytest.mark.full
def test_compiled_blocks_train_the_same(
    alone, train_here, worker_config, losses, tmp_path, run_ranks, monkeypatch
):
    monkeypatch.setattr(
        torch._dynamo.config, "fail_on_recompile_limit_hit", True
    )  # else what is too often compiled anew runs as it is
    train_here(tmp_path / "plain", "parallel.compile=true")
    assert losses(tmp_path / "plain") == pytest.approx(alone, rel=1e-6, abs=0)
    train_here(tmp_path / "block", "parallel.compile=true", "model.activation_checkpointing=block")
    # Not to the bit: what is recomputed is compiled into other sums.
    assert losses(tmp_path / "block") == pytest.approx(alone, rel=1e-5, abs=0)
    split = worker_config(tmp_path / "split", "parallel.compile=true", "parallel.cp=2")
    run_ranks(2, "-m", "wm_train.worker", "--config", split, timeout=600)
    assert losses(tmp_path / "split") == pytest.approx(alone, rel=1e-5, abs=0)


@pytest.mark.full
@pytest.mark.parametrize(
    "overrides",
    [
        ("parallel.dp_replicate=2", "parallel.dp_shard=2"),
        ("parallel.cp=4",),
        ("parallel.cp=2", "parallel.dp_shard=2"),
    ],
    ids=["hsdp 2x2", "cp4", "dp2 x cp2"],
)
def test_four_processes(train_here, worker_config, losses, tmp_path, run_ranks, overrides):
    batch = "recipe.stages.short.global_batch=4"
    train_here(tmp_path / "alone", batch)
    run_ranks(
        4,
        "-m",
        "wm_train.worker",
        "--config",
        worker_config(tmp_path / "four", batch, *overrides),
        timeout=400,
    )
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5, abs=0)
    norms = [
        [
            row["grad_norm"]
            for row in read_steps(tmp_path / name / "demo" / "short" / "metrics.jsonl")
        ]
        for name in ("four", "alone")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4, abs=0), (
        "what is clipped by is the norm of the whole gradient"
    )


@pytest.mark.full
def test_bf16_stays_close_to_fp32_and_normuon_does_not_care_for_the_mesh(
    alone, train_here, worker_config, losses, tmp_path, run_ranks
):
    train_here(tmp_path / "bf16", "parallel.precision=bf16")
    assert losses(tmp_path / "bf16") != alone
    assert losses(tmp_path / "bf16") == pytest.approx(alone, rel=0.03)
    optimizer = "recipe.stages.short.optimizer.name=normuon"
    train_here(tmp_path / "one", optimizer)
    run_ranks(2, "-m", "wm_train.worker", "--config", worker_config(tmp_path / "two", optimizer))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5, abs=0)
