"""Pools: what each of them is asked to train, noise that stays in its range without piling up at
the ends, and judging them as one."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from parallel.degrees import sequence_size
from parallel.layout import ClipLayout
from parallel.sequence import GroupSequence, LocalSequence
from parallel.virtual import run_virtual
from wm_train.conditioning import Conditions
from wm_train.config.compose import compose
from wm_train.config.curriculum import plan_stage
from wm_train.config.pools import boundaries, pool_runs
from wm_train.config.problems import ConfigError
from wm_train.config.typed import from_json
from wm_train.noise import NoiseKey
from wm_train.objectives.chunk_mixture import CLEAN_PAST, chunk_levels
from wm_train.objectives.config import FlowMatchingConfig, range_share
from wm_train.objectives.flow_matching import clip_sigma, plain_range, plain_sigma
from wm_train.sampling.experts import Experts
from wm_train.sampling.levels import sampling_levels
from wm_train.sampling.rollout import rollout

KEY = NoiseKey(3, "first")
DRAWS = torch.arange(4096)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.6), (0.6, 1.0), (0.3, 0.35), (0.9, 1.0)])
def test_noise_of_a_range_is_distributed_as_the_part_of_all_noise_that_falls_inside(
    low: float, high: float
) -> None:
    """Against the definition: draw without a range, keep what falls inside; Kolmogorov-Smirnov
    distance of the two samples."""
    whole = FlowMatchingConfig(sigma_mean=0.3, sigma_std=1.2, flow_shift=2.5)
    ranged = clip_sigma(KEY, DRAWS, replace(whole, sigma_min=low, sigma_max=high))
    assert float(ranged.min()) >= low
    assert float(ranged.max()) <= high
    kept = clip_sigma(KEY, torch.arange(200_000) + 10_000, whole)
    kept = kept[(kept >= low) & (kept <= high)]
    points = torch.linspace(low, high, 101)
    distance = (
        ((ranged[:, None] <= points).float().mean(0) - (kept[:, None] <= points).float().mean(0))
        .abs()
        .max()
    )
    limit = 1.95 * math.sqrt(
        1 / len(ranged) + 1 / len(kept)
    )  # passes 999 of 1000 samples of equal distributions
    assert float(distance) < limit
    clamped = clip_sigma(KEY, DRAWS, whole).clamp(low, high)
    assert (
        float(
            (
                (clamped[:, None] <= points).float().mean(0)
                - (kept[:, None] <= points).float().mean(0)
            )
            .abs()
            .max()
        )
        > limit
    )


def test_each_of_many_draws_is_in_its_pools_range_and_goes_to_its_expert() -> None:
    """Of Wan2.2-I2V: boundary 0.9 after a shift of 5."""
    experts = Experts((0.9, 0.0), ("high", "low"))  # type: ignore[arg-type]
    for name, (low, high) in {"high": (0.9, 1.0), "low": (0.0, 0.9)}.items():
        config = FlowMatchingConfig(sigma_min=low, sigma_max=high, flow_shift=5.0)
        sigma = clip_sigma(KEY, torch.arange(100_000), config).double()
        assert float(sigma.min()) >= low - 1e-7
        assert float(sigma.max()) <= high + 1e-7
        assert len(sigma.unique()) > 90_000 * (high - low)
        inside = sigma[(sigma - 0.9).abs() > 1e-7].tolist()
        assert {experts.at(level) for level in inside} == {name}
    assert experts.at(0.9) == "high"
    assert experts.at(0.9 - 1e-6) == "low"


@pytest.mark.parametrize(
    ("levels", "shift", "boundary", "steps"),
    [(40, 5.0, 0.9, 15), (40, 12.0, 0.875, 26), ([1.0, 0.9375, 0.833, 0.625], 5.0, 0.9, 2)],
)
def test_samplers_give_each_expert_its_steps(levels, shift, boundary, steps) -> None:
    """A level shift u / (1 + (shift - 1) u) is above the boundary from u = boundary / (shift -
    (shift - 1) boundary) on: 15 of the 40 steps of I2V, and 26 of T2V, begin there."""
    experts = Experts((boundary, 0.0), ("high", "low"))  # type: ignore[arg-type]
    asked = [experts.at(level) for level in sampling_levels(levels, shift)[:-1]]
    assert asked == ["high"] * steps + ["low"] * (len(asked) - steps)


def test_without_a_range_the_noise_is_what_it_was() -> None:
    config = FlowMatchingConfig()
    gaussian = torch.special.ndtri(
        torch.special.ndtr(torch.logit(plain_sigma(KEY, DRAWS, config).double()))
    )
    nearly = plain_sigma(KEY, DRAWS, replace(config, sigma_max=1.0 - 1e-9))
    assert torch.allclose(torch.logit(nearly.double()), gaussian, atol=1e-3)
    assert torch.equal(
        plain_sigma(KEY, DRAWS, replace(config, sigma_min=0.6).held_out(0.1)),
        torch.full((4096,), 0.1),
    )


def test_chunks_stay_in_the_range_too() -> None:
    config = FlowMatchingConfig(sigma_min=0.4, sigma_max=0.7, flow_shift=3.0)
    sigma, ends = plain_sigma(KEY, DRAWS, config), plain_range(config)
    for pattern in range(CLEAN_PAST):
        levels = chunk_levels(KEY, DRAWS, torch.full_like(DRAWS, pattern), sigma, 5, ends)
        assert float(levels.min()) >= ends[0] - 1e-6
        assert float(levels.max()) <= ends[1] + 1e-6


def test_the_share_of_a_range_is_how_often_it_is_hit() -> None:
    config = FlowMatchingConfig(sigma_mean=-0.5, sigma_std=0.8, flow_shift=4.0)
    drawn = clip_sigma(KEY, torch.arange(100_000), config)
    for low, high in ((0.0, 1.0), (0.2, 0.5), (0.8, 1.0)):
        hit = float(((drawn >= low) & (drawn <= high)).float().mean())
        assert range_share(replace(config, sigma_min=low, sigma_max=high)) == pytest.approx(
            hit, abs=0.006
        )
    assert range_share(replace(config, sigma_min=0.5, sigma_max=0.5)) == 0.0


def test_held_out_levels_are_those_that_a_pool_learns() -> None:
    assert FlowMatchingConfig().held_out_levels() == (0.1, 0.3, 0.5, 0.7, 0.9)
    assert FlowMatchingConfig(sigma_min=0.6).held_out_levels() == (0.7, 0.9)
    narrow = FlowMatchingConfig(sigma_min=0.9).held_out_levels()
    assert narrow == (0.9167, 0.95, 0.9833)  # of a grid of all noise it would have one or none
    assert FlowMatchingConfig(sigma_max=0.5).held_out_levels() + FlowMatchingConfig(
        sigma_min=0.5
    ).held_out_levels() == (0.1, 0.3, 0.5, 0.7, 0.9)


LINE = ["experiment=demo_pools", "data.path=/data", "model.depth=8"]


def test_a_pool_is_the_runs_own_command_line_with_its_overrides_behind(tmp_path: Path) -> None:
    line = [
        *LINE,
        f"out={tmp_path}",
        "pools.high.overrides=[launcher.workers=4, parallel.cp=2, recipe.stages.short.steps=7]",
    ]
    line = [
        text.replace("[launcher", '["launcher').replace(", ", '","').replace("=7]", '=7"]')
        for text in line
    ]
    runs = pool_runs(compose(line), line)
    assert list(runs) == ["high", "low"]
    high, low = runs["high"], runs["low"]
    assert (
        high.launcher.workers,
        sequence_size(high.parallel),
        high.recipe.stages["short"].steps,
    ) == (4, 2, 7)
    assert (low.launcher.workers, sequence_size(low.parallel)) == (1, 1)
    assert low.recipe.stages["short"].steps == compose(line).recipe.stages["short"].steps
    assert high.model.depth == low.model.depth == 8
    assert [
        (stage.objective.sigma_min, stage.objective.sigma_max)
        for stage in high.recipe.stages.values()
    ] == [(0.6, 1.0)] * 2
    assert [
        (stage.objective.sigma_min, stage.objective.sigma_max)
        for stage in low.recipe.stages.values()
    ] == [(0.0, 0.6)] * 2
    assert list(pool_runs(compose([*line, "pool=low"]), [*line, "pool=low"])) == ["low"]
    assert boundaries(runs, "short") == {"high": 0.6, "low": 0.0}
    gap = [*line, "pools.low.sigma_max=0.5"]
    assert boundaries(pool_runs(compose(gap), gap), "short") == {}


def test_a_pool_takes_its_part_of_each_stages_own_noise_levels() -> None:
    def ranges(*overrides: str) -> dict[str, list[tuple[float, float]]]:
        line = [*LINE, *overrides]
        runs = pool_runs(compose(line), line)
        noise = {
            name: [stage.objective for stage in run.recipe.stages.values()]
            for name, run in runs.items()
        }
        return {
            name: [(o.sigma_min, o.sigma_max) for o in stages] for name, stages in noise.items()
        }

    own = "recipe.stages.short.objective.sigma_min=0.3"
    assert ranges(own) == {"high": [(0.6, 1.0)] * 2, "low": [(0.3, 0.6), (0.0, 0.6)]}
    assert ranges(own, "pools.low.sigma_min=null", "pools.low.sigma_max=null")["low"] == [
        (0.3, 1.0),
        (0.0, 1.0),
    ]
    assert ranges(own, "pools.low.sigma_min=null", "pools.low.sigma_max=0.5")["low"] == [
        (0.3, 0.5),
        (0.0, 0.5),
    ]


def test_pools_are_judged_together_only_in_stages_where_they_make_all_noise_levels() -> None:
    line = [*LINE, "recipe.stages.short.objective.sigma_min=0.3"]
    runs = pool_runs(compose(line), line)
    assert boundaries(runs, "short") == {}
    assert boundaries(runs, "long") == {"high": 0.6, "low": 0.0}
    line = [*LINE, "pools.high.sigma_max=null", "pools.low.sigma_min=null"]
    assert boundaries(pool_runs(compose(line), line), "short") == {"high": 0.6, "low": 0.0}


def test_a_pool_without_a_noise_level_in_some_stage_is_one_problem() -> None:
    line = [*LINE, "recipe.stages.long.objective.sigma_min=0.7"]
    with pytest.raises(ConfigError) as error:
        pool_runs(compose(line), line)
    (problem,) = error.value.problems
    assert (
        str(problem)
        == "pools.low.sigma_min: got 0 to sigma_max 0.6, expected a rising range that overlaps with"
        " the noise levels of every stage: 0.7 to 1 in stage long. Fix: pools.low.sigma_min=null"
        " pools.low.sigma_max=null, which takes all of a stage's"
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            'pools.low.overrides=["model.dept=3"]',
            "pools.low.overrides: model.dept: got an unknown key",
        ),
        ('pools.low.overrides=["name=x"]', "pools.low.overrides: got another name"),
        (
            'pools.low.overrides=["launcher=torchrun"]',
            "pools.low.overrides: got another launcher.name",
        ),
        ("pool=middle", "pool: got 'middle', expected one of high, low"),
        ("pools.joint.sigma_min=0.5", "pools.joint: got 'joint'"),
        (
            "pools.high.sigma_max=1.2",
            "pools.high.sigma_max: got 1.2, expected a noise level from 0 to 1",
        ),
        (
            "pools.low.sigma_min=-0.1",
            "pools.low.sigma_min: got -0.1, expected a noise level from 0 to 1",
        ),
        (
            "pools.low.sigma_min=nan",
            "pools.low.sigma_min: got nan, expected a noise level from 0 to 1",
        ),
        (
            "pools.low.sigma_min=0.6",
            "pools.low.sigma_min: got 0.6 to sigma_max 0.6, expected a rising range",
        ),
        ("launcher=inline", "launcher.name: got 'inline', expected one that starts several groups"),
        ("launcher=slurm", "launcher.slurm.runner=ray"),
    ],
)
def test_a_mistake_in_a_pool_is_named(wrong: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        pool_runs(compose([*LINE, wrong]), [*LINE, wrong])
    assert said in str(error.value)


class Constant(torch.nn.Module):
    """Velocity `value`, and the noise levels it was asked at."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value, self.asked = value, []

    def forward(self, latents, sigma, conditions, sequence):
        self.asked += [float(sigma.max())] if sigma.numel() else []
        return torch.full_like(latents, self.value)


def test_a_rollout_switches_experts_at_the_boundary_on_every_mesh() -> None:
    """Closed form: from noise x the straight pieces end at x - 2 * (sigma at high's steps) - 5 *
    (at low's). A rank whose only frame is given sees no noise level, and must switch with the
    others all the same."""
    draws, first = torch.tensor([4, 9]), torch.zeros(2, 3, 2, 2)

    def made(high: Constant, low: Constant, sequence, boundary: float = 0.5) -> torch.Tensor:
        experts = Experts((boundary, 0.0), (high, low))
        return rollout(
            experts, first, Conditions((96, 160), 8), sampling_levels(4), KEY, draws, sequence
        )

    high, low, nothing = Constant(2.0), Constant(5.0), Constant(0.0)
    whole = made(high, low, LocalSequence(ClipLayout(4)))
    assert (high.asked, low.asked) == ([1.0, 0.75, 0.5], [0.25])
    start = made(nothing, nothing, LocalSequence(ClipLayout(4)))
    assert torch.allclose(whole[:, 1:], start[:, 1:] - 2.0 * 0.75 - 5.0 * 0.25, atol=1e-6)
    asked = [(Constant(2.0), Constant(5.0)) for _ in range(4)]
    ranks = iter(asked)
    parts, _ = run_virtual(
        lambda comm: made(*next(ranks), GroupSequence(ClipLayout(4), comm)), 1, 4
    )
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert {(len(high.asked), len(low.asked)) for high, low in asked} == {(3, 1)}


PRETEND = (
    "import json, sys; config = json.load(open(sys.argv[1])); print('training', config['pool'],"
    " config['stage'])"
)


@pytest.mark.full
def test_the_launch_command_runs_all_pools_of_a_stage_together(
    monkeypatch, data, tmp_path, capsys
) -> None:
    from wm_train import launch as command

    monkeypatch.setattr(command, "WORKER", ("{python}", "-S", "-c", PRETEND, "{config}"))
    monkeypatch.setattr(
        command,
        "JUDGE",
        ("{python}", "-S", "-c", PRETEND.replace("training", "judging"), "{config}"),
    )
    line = [
        "experiment=demo_pools",
        f"data.path={data}",
        f"out={tmp_path / 'runs'}",
        "launcher=torchrun",
        "launcher.workers=1",
    ]
    assert command.main([*line, "stage=1"]) == 0
    said = capsys.readouterr().out
    assert all(
        text in said
        for text in (
            "high | training high short",
            "low | training low short",
            "judging joint short",
            "stage=2",
        )
    )
    stored = from_json(
        (tmp_path / "runs" / "demo_pools" / "high" / "short" / "config.json").read_text()
    )
    assert (stored.pool, stored.recipe.stages["short"].objective.sigma_min) == ("high", 0.6)
    assert (
        stored.tracker.parent
        == json.loads((tmp_path / "runs" / "demo_pools" / "mlflow.json").read_text())["run_id"]
    )


def test_mlflow_shows_the_curves_of_all_pools_in_one_parent_run(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    from wm_train.tracking.tracker import Tracker, parent_run

    said: list[str] = []
    line = [*LINE, f"out={tmp_path}"]
    config = compose(line)
    parent = parent_run(config, tmp_path, said.append)
    assert parent == parent_run(config, tmp_path, said.append), "a restart goes on with it"
    for offset, (pool, run) in enumerate(pool_runs(config, line).items()):
        folder = tmp_path / pool
        folder.mkdir()
        part = replace(run, tracker=replace(run.tracker, parent=parent))
        tracker = Tracker(plan_stage(part, "short"), folder, 0, said.append)
        for step in (1, 2, 3):
            tracker.step(step, {"loss": offset + 1 / step, "lr": 0.1})
        tracker.close()
    assert parent_run(config, tmp_path, said.append, "FINISHED") == parent
    assert not [line for line in said if "MLflow" in line]
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("wm_train").experiment_id
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert sorted(child.info.run_name for child in children) == [
        "demo_pools/high/short",
        "demo_pools/low/short",
    ]
    curve = {
        pool: [(m.step, m.value) for m in client.get_metric_history(parent, f"{pool}/short/loss")]
        for pool in ("high", "low")
    }
    assert curve == {
        "high": [(1, 1.0), (2, 0.5), (3, 1 / 3)],
        "low": [(1, 2.0), (2, 1.5), (3, 1 + 1 / 3)],
    }
    assert "high/short/lr" not in client.get_run(parent).data.metrics
    assert client.get_run(parent).info.status == "FINISHED"
