"""Settings that do not go together end in the one report before any worker starts; those that do
nothing are named once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from wm_train import launch as command
from wm_train.checks.stages import warnings_of
from wm_train.checks.values import problems_of
from wm_train.config.compose import compose
from wm_train.config.curriculum import plan_stages
from wm_train.config.pools import pool_runs
from wm_train.config.problems import Problem
from wm_train.errors import SetupError
from wm_train.objectives import flow_matching
from wm_train.plan.report import main as plan
from wm_train.plan.report import without_data

SHORT, LONG = "recipe.stages.short.", "recipe.stages.long."
MIXTURE, CAUSAL = SHORT + "objective.name=chunk_mixture", SHORT + "model.causal=true"
STREAM = SHORT + "sampler.name=stream"  # what a causal model is sampled with
DEEPSPEED = ["parallel.attention=deepspeed", "parallel.cp=2"]

# overrides of the demo's first stage (41 frames = 6 latent frames, 4 clips, 2 workers) -> the key
# of the one mistake, words of its rule, words of its fix
MISTAKES = {
    "mixture without chunks": (
        [MIXTURE],
        SHORT + "chunk_frames",
        "a noise level for each",
        SHORT + "model.causal=true, or",
    ),
    "causal without chunks": (
        [CAUSAL],
        SHORT + "chunk_frames",
        "sees all frames",
        SHORT + "model.causal=false",
    ),
    "all causal": (
        ["model.causal=true"],
        SHORT + "chunk_frames",
        "sees all frames",
        "chunk_frames=3, or model.causal=false",
    ),
    "chunks without causal": (
        [SHORT + "chunk_frames=3"],
        SHORT + "chunk_frames",
        "0, as",
        CAUSAL + ", or ",
    ),
    "one chunk": (
        [MIXTURE, CAUSAL, SHORT + "chunk_frames=5"],
        SHORT + "frames",
        "at least two chunks, 7 latent frames",
        SHORT + "chunk_frames=4",
    ),
    "one chunk in a bucket": (
        [MIXTURE, CAUSAL, SHORT + "chunk_frames=4", "data.buckets=[33]"],
        "data.buckets",
        "at least two chunks, 6 latent frames",
        SHORT + "chunk_frames=3",
    ),
    "more parts than clips": (
        ["trainer.accumulate=3"],
        "trainer.accumulate",
        "the 2 clips",
        "trainer.accumulate=2",
    ),
    "engine, causal": (
        [*DEEPSPEED, CAUSAL, SHORT + "chunk_frames=3"],
        "parallel.attention",
        "a model that is not causal",
        "parallel.attention=native",
    ),
    "engine, packed rows": (
        [*DEEPSPEED, "data.pack=true"],
        "parallel.attention",
        "one clip a row",
        "data.pack=false",
    ),
    "engine, ring": (
        [*DEEPSPEED, "parallel.ring=2"],
        "parallel.attention",
        "ring 1",
        "parallel.ring=1",
    ),
    "engine, uneven heads": (
        ["parallel.attention=deepspeed", "parallel.ulysses=3", "launcher.workers=3"],
        "parallel.attention",
        "a multiple of ulysses 3",
        "parallel.attention=native",
    ),
    "engine, uneven frames": (
        ["parallel.attention=xfuser", "parallel.cp=4", "launcher.workers=4"],
        SHORT + "frames",
        "a multiple of the 4 processes",
        "parallel.attention=native",
    ),
}
SOUND = {
    "two chunks": [MIXTURE, CAUSAL, SHORT + "chunk_frames=4"],
    "one chunk, one noise level": [CAUSAL, SHORT + "chunk_frames=5"],
    "as many parts as clips": ["trainer.accumulate=2"],
    "all clips on one sequence group": ["trainer.accumulate=4", "parallel.cp=2"],
    "engine": DEEPSPEED,
    "engine of one process": ["parallel.attention=deepspeed", CAUSAL, SHORT + "chunk_frames=3"],
    "engine that no block asks": [
        *DEEPSPEED,
        CAUSAL,
        SHORT + "chunk_frames=3",
        "model.softmax_every=0",
    ],
    "xfuser with a ring": ["parallel.attention=xfuser", "parallel.ring=2"],
}


def demo(data: Path, *overrides: str):
    return compose(["experiment=demo", "recipe=demo", "stage=1", f"data.path={data}", *overrides])


def streamed(overrides: list[str]) -> list[str]:
    """Return the overrides with a sampler that fits a causal model which has chunks."""
    causal = CAUSAL in overrides and any("chunk_frames=" in text for text in overrides)
    return [*overrides, STREAM] if causal else overrides


@pytest.mark.parametrize("kind", MISTAKES)
def test_settings_that_do_not_go_together_are_found_before_the_start(kind: str, data: Path) -> None:
    overrides, where, rule, fix = MISTAKES[kind]
    found = problems_of(demo(data, *streamed(overrides)))
    # A causal model without chunks has the wrong sampler too, which is said at the same time.
    (problem,) = [one for one in found if not one.where.endswith("sampler.name")]
    assert problem.where == where
    assert rule in problem.rule
    assert fix in problem.fix


@pytest.mark.parametrize("kind", SOUND)
def test_settings_that_go_together_pass(kind: str, data: Path) -> None:
    assert problems_of(demo(data, *streamed(SOUND[kind]))) == []


@pytest.mark.parametrize(
    "line",
    [
        ["experiment=demo", "recipe=demo"],
        ["experiment=demo_pools"],
        ["experiment=demo", "recipe=sana_wm"],
        ["experiment=sana_wm"],
    ],
    ids=" ".join,
)
def test_what_is_shipped_has_no_problem_and_no_setting_without_effect(line: list[str]) -> None:
    line = [*line, "data.path=/shared/demo"]
    for run in pool_runs(compose(line), line).values():
        assert without_data(run, data_is_here=False) == []
        assert warnings_of(plan_stages(run)) == []


DROPOUT = ["model.camera=false", SHORT + "objective.camera_dropout=0.1"]
TEXT = [SHORT + "objective.text_dropout=0.1", LONG + "objective.text_dropout=0.2"]


def warned(data: Path, *overrides: str) -> list[Problem]:
    return warnings_of(plan_stages(demo(data, *overrides)))


def test_dropout_of_what_a_model_does_not_take_is_named_once(data: Path) -> None:
    camera, text = warned(data, *DROPOUT, *TEXT, "stage=all")
    assert str(camera) == (
        f"{SHORT}objective.camera_dropout: got 0.1 in short, expected 0 where the model "
        f"takes no camera, as it does nothing there. Fix: {SHORT}objective.camera_dropout=0"
    )
    assert text.got == "0.1, 0.2 in short, long"
    assert len(warned(data, *DROPOUT, *TEXT)) == 2
    assert warned(data, *DROPOUT, SHORT + "model.camera=true") == []


def test_the_warning_is_shown_before_the_start_and_by_the_plan(
    data: Path, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(command, "WORKER", ("{python}", "-S", "-c", "", "{config}"))
    line = [
        "experiment=demo",
        "recipe=demo",
        "stage=1",
        "launcher=inline",
        f"data.path={data}",
        f"out={tmp_path}",
        *DROPOUT,
    ]
    for run in (
        lambda: command.main(line),
        lambda: command.main([*line, "--dry-run"]),
        lambda: plan(line),
    ):
        assert run() == 0
        assert (
            capsys.readouterr().err.count(
                "warning: recipe.stages.short.objective.camera_dropout: got 0.1"
            )
            == 1
        )


def fail_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The objective raises ValueError for the clips of one step."""
    true = flow_matching.flow_matching

    def failing(model, clips, config):
        if bool((clips.draws // 2 == step - 1).any()):
            raise ValueError("objective failed: got that, expected this")
        return true(model, clips, config)

    monkeypatch.setattr(flow_matching, "flow_matching", failing)


def test_a_value_error_of_the_first_step_is_a_mistake_of_the_setup_and_later_ones_are_failures(
    train_here, monkeypatch, tmp_path
) -> None:
    steps = [
        "recipe.stages.short.steps=5",
        "trainer.checkpoint_every=2",
        "trainer.async_checkpoint=false",
    ]
    fail_at(monkeypatch, 1)
    with pytest.raises(SetupError, match="got that"):
        train_here(tmp_path, *steps)
    monkeypatch.undo()
    fail_at(monkeypatch, 3)
    with pytest.raises(ValueError, match="got that") as later:
        train_here(tmp_path, *steps)
    assert not isinstance(later.value, SetupError)
    with pytest.raises(
        SetupError, match="got that"
    ):  # step 3 is the first after resuming from step 2
        train_here(tmp_path, *steps)


def test_a_worker_ends_such_a_first_step_with_the_message_its_rank_and_code_2(
    worker_config, tmp_path
) -> None:
    config = worker_config(tmp_path, MIXTURE)
    line = [sys.executable, "-m", "wm_train.worker", "--config", str(config)]
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "rank 0 on " in said
    assert "chunk mixture failed: got 6 latent frames in one chunk" in said
    assert "Traceback" not in said
