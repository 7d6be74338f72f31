"""The loop in one process: what it refuses to continue, what it skips, what it hands on."""

import dataclasses
import gzip
import json
import shutil
import signal

import pytest
import torch

from wm_train.checkpoint import store
from wm_train.checkpoint.manifest import read_manifest
from wm_train.errors import SetupError
from wm_train.objectives import flow_matching
from wm_train.resilience.guard import BadStepError
from wm_train.resilience.preemption import Preempted, StopRequest
from wm_train.tracking.tracker import read_steps
from wm_train.training import resume


def newest(folder, stage="short"):
    return store.committed(folder / "demo" / stage / "checkpoints")[-1]


def tensors(folder):
    """Every tensor of the newest checkpoint, whole."""
    found = newest(folder)
    manifest = read_manifest(found)
    kinds = {"F32": torch.float32}
    targets = {
        name: torch.empty(entry.shape, dtype=kinds[entry.dtype])
        for name, entry in manifest.tensors.items()
    }
    store.load(found, manifest, targets)
    return targets


def poison(monkeypatch, step: int, factor: float, until: int | None = None) -> None:
    """Multiply the loss of one global batch of two clips, or of all `until` another."""
    true = flow_matching.flow_matching

    def poisoned(model, clips, config):
        out = true(model, clips, config)
        scale = torch.where(
            (clips.draws // 2 >= step - 1) & (clips.draws // 2 < (until or step)), factor, 1.0
        )
        return dataclasses.replace(out, loss=out.loss * scale)

    monkeypatch.setattr(flow_matching, "flow_matching", poisoned)


FIVE = ("recipe.stages.short.steps=5", "trainer.async_checkpoint=false")


@pytest.fixture(scope="module")
def five_steps(train_here, tmp_path_factory):
    """A run of five steps that others try to continue."""
    folder = tmp_path_factory.mktemp("five")
    train_here(folder, *FIVE)
    return folder


STAGE = "recipe.stages.short."


@pytest.mark.parametrize(
    "change",
    [
        "seed=7",
        "model.width=32",
        STAGE + "global_batch=4",
        STAGE + "frames=33",
        STAGE + "chunk_frames=2",
    ],
)
def test_continuing_another_run_is_refused_with_what_differs(train_here, five_steps, change):
    key, value = change.split("=")
    with pytest.raises(SetupError, match=rf"{key.rpartition('.')[2]} was .* and is now {value}"):
        train_here(five_steps, *FIVE, change)


def test_continuing_on_another_data_set_is_refused_and_both_are_named(
    train_here, five_steps, gameplay, tmp_path
):
    other = shutil.copytree(gameplay, tmp_path / "other")
    facts = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps(facts | {"fingerprint": "0" * 64}))
    with pytest.raises(
        SetupError,
        match=rf"data was '{gameplay} \(\w{{12}}\)' and is now '{other} \(000000000000\)'",
    ):
        train_here(five_steps, *FIVE, f"data.path={other}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("optimizer.name=normuon", "optimizer.name was 'adamw' and is now 'normuon'"),
        ("optimizer.ema_decay=0", "optimizer.ema_decay was 0.99[0-9]* and is now 0.0"),
    ],
)
def test_continuing_with_another_optimizer_or_average_is_refused(
    train_here, five_steps, change, words
):
    with pytest.raises(SetupError, match=words) as caught:
        train_here(five_steps, *FIVE, STAGE + change)
    assert "missing" not in str(caught.value)
    assert "use the model" not in str(caught.value)


def test_a_setting_that_the_old_run_had_and_the_new_one_lacks_is_named():
    assert resume._difference("model", {"a": 1, "b": 2}, {"a": 1}) == (
        "model.b was 2 and is now None"
    )


@pytest.mark.full
def test_asynchronous_saves_accumulation_and_a_second_start_change_nothing(
    alone, train_here, losses, tmp_path
):
    train_here(tmp_path / "sync", "trainer.async_checkpoint=false")
    assert losses(tmp_path / "sync") == alone
    train_here(tmp_path / "sync", "trainer.async_checkpoint=false")  # all steps are done already
    assert losses(tmp_path / "sync") == alone
    train_here(tmp_path / "accumulated", "trainer.accumulate=2")
    assert losses(tmp_path / "accumulated") == pytest.approx(alone, rel=1e-6, abs=0)


def test_signals_of_schedulers_and_of_a_terminal_ask_to_stop():
    asking = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in asking}
    try:
        for number in before:
            asked = StopRequest().listen()
            with pytest.raises(Preempted, match="nothing to save"):
                signal.raise_signal(number)
            asked = StopRequest().listen()
            asked.work_from_here()
            assert not asked.raised
            signal.raise_signal(number)
            assert asked.raised
            with pytest.raises(Preempted, match="all is saved"):
                asked.all_saved("all is saved")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    "factor", [float("inf"), pytest.param(float("nan"), marks=pytest.mark.full)]
)
def test_a_bad_step_stops_the_run_before_its_update(train_here, tmp_path, monkeypatch, factor):
    train_here(tmp_path / "reference", "recipe.stages.short.steps=7", "trainer.checkpoint_every=7")
    poison(monkeypatch, 8, factor)
    with pytest.raises(BadStepError, match="step 8: got rank 0"):
        train_here(
            tmp_path / "poisoned", "trainer.checkpoint_every=7", "recipe.stages.short.steps=20"
        )
    before, after = tensors(tmp_path / "reference"), tensors(tmp_path / "poisoned")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.full
def test_skipping_a_bad_step_equals_the_run_without_that_batch(train_here, tmp_path, monkeypatch):
    train_here(tmp_path / "without", "trainer.skip_steps=[8]")
    poison(monkeypatch, 8, float("nan"))
    train_here(tmp_path / "skipped", "trainer.on_bad_step=skip")
    without, skipped = tensors(tmp_path / "without"), tensors(tmp_path / "skipped")
    assert without.keys() == skipped.keys()
    assert all(torch.equal(without[name], skipped[name]) for name in without)
    rows = read_steps(tmp_path / "skipped" / "demo" / "short" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["skipped"]] == [8]


def test_a_spike_is_skipped_when_asked(train_here, tmp_path, monkeypatch):
    poison(monkeypatch, 12, 1000.0)
    train_here(tmp_path, "trainer.on_bad_step=skip", "trainer.spike_factor=20")
    rows = read_steps(tmp_path / "demo" / "short" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["skipped"]] == [12]


@pytest.mark.full
def test_when_skipping_does_not_help_the_run_goes_back_and_leaves_out_what_led_there(
    train_here, tmp_path, monkeypatch
):
    """Steps 12 to 14 are bad and two may be skipped: back to the checkpoint of step 10, without the
    batches 11 to 14."""
    train_here(tmp_path / "without", "trainer.skip_steps=[11,12,13,14]")
    poison(monkeypatch, 12, float("nan"), until=14)
    train_here(tmp_path / "rewound", "trainer.on_bad_step=skip", "trainer.bad_step_budget=2")
    without, rewound = tensors(tmp_path / "without"), tensors(tmp_path / "rewound")
    assert all(torch.equal(without[name], rewound[name]) for name in without)
    rows = read_steps(tmp_path / "rewound" / "demo" / "short" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["step"] for row in rows if row["skipped"]] == [11, 12, 13, 14]
    assert read_manifest(newest(tmp_path / "rewound")).facts["guard"]["rewound"] == [[11, 14]]


@pytest.mark.full
def test_without_a_checkpoint_before_the_bad_steps_there_is_nothing_to_go_back_to(
    train_here, tmp_path, monkeypatch
):
    poison(monkeypatch, 2, float("nan"), until=4)
    with pytest.raises(BadStepError, match="no checkpoint before step 2"):
        train_here(tmp_path, "trainer.on_bad_step=skip", "trainer.bad_step_budget=1")


@pytest.mark.full
def test_profiled_steps_become_a_trace_and_change_nothing(alone, train_here, tmp_path):
    train_here(tmp_path, "trainer.profile=3-4", "recipe.stages.short.steps=5")
    assert [
        row["loss"] for row in read_steps(tmp_path / "demo" / "short" / "metrics.jsonl")
    ] == alone[:5]
    with gzip.open(tmp_path / "demo" / "short" / "profile" / "steps_3-4.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    assert (
        "profile/steps_3-4.json.gz" in (tmp_path / "demo" / "short" / "artifacts.jsonl").read_text()
    )
    row = read_steps(tmp_path / "demo" / "short" / "metrics.jsonl")[-1]
    assert 0 <= row["comm_share"] < 1
    assert row["cpu_cores"] > 0
    assert row["memory_host_bytes"] > 10**7


def test_the_second_stage_starts_from_the_averaged_weights_of_the_first(train_here, tmp_path):
    train_here(tmp_path, "recipe.stages.short.steps=5")
    averaged = {n: t for n, t in tensors(tmp_path).items() if n.startswith("ema/")}
    second = (
        "stage=long",
        "recipe.stages.long.frames=41",
        "recipe.stages.long.global_batch=2",
        "recipe.stages.long.steps=1",
    )
    train_here(
        tmp_path,
        *second,
        "recipe.stages.long.optimizer.lr=1e-9",
        "recipe.stages.long.optimizer.warmup_steps=0",
    )
    manifest = read_manifest(newest(tmp_path, "long"))
    weights = {n.replace("ema/", "model/"): torch.empty_like(t) for n, t in averaged.items()}
    store.load(newest(tmp_path, "long"), manifest, weights, may_ignore=manifest.tensors)
    for name, tensor in averaged.items():
        torch.testing.assert_close(
            weights[name.replace("ema/", "model/")], tensor, rtol=0, atol=1e-6
        )


def test_a_stage_without_its_source_says_which_to_train_first(train_here, tmp_path):
    with pytest.raises(SetupError, match="Fix: train that stage first"):
        train_here(
            tmp_path,
            "stage=long",
            "recipe.stages.long.frames=41",
            "recipe.stages.long.global_batch=2",
        )


@pytest.mark.full
def test_looking_at_held_out_clips_changes_neither_training_nor_what_is_saved(
    alone, train_here, losses, tmp_path
):
    looking = (
        "trainer.validation_clips=2",
        "trainer.validate_every=5",
        "trainer.samples=1",
        "trainer.sample_steps=2",
    )
    train_here(tmp_path, *looking, "recipe.stages.short.steps=10")
    assert any(name.startswith("optimizer/x_embedder.proj.weight/") for name in tensors(tmp_path))
    train_here(tmp_path, *looking)
    assert losses(tmp_path) == alone


def test_held_out_loss_falls(train_here, tmp_path):
    optimizer = [
        f"recipe.stages.short.optimizer.{setting}" for setting in ("ema_decay=0", "lr=5e-3")
    ]
    train_here(tmp_path, "trainer.validation_clips=4", "trainer.validate_every=10", *optimizer)
    rows = read_steps(tmp_path / "demo" / "short" / "metrics.jsonl")
    held_out = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert len(held_out) == 2
    assert held_out[1] < held_out[0]
    assert json.dumps(rows[-1])  # every figure is a plain number
