"""`python -m wm_train.launch`: one report and exit code 2 for every mistake, with nothing heavy
imported; stages one after the other."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from wm_train import launch as command
from wm_train.config.typed import from_json

ROOT = Path(__file__).resolve().parents[3]
PROBE = """
import sys
from wm_train.launch import main
code = main(sys.argv[1:])
print("HEAVY", sorted({"torch", "ray", "mlflow", "pyarrow"} & set(sys.modules)))
sys.exit(code)
"""


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path) -> Callable[..., int]:
    """train(program, *overrides): the demo in this process, on one inline worker that runs
    `program` instead of training."""

    def run(program: str, *overrides: str) -> int:
        monkeypatch.setattr(command, "WORKER", ("{python}", "-S", "-c", program, "{config}"))
        return command.main(
            [
                "experiment=demo",
                "recipe=demo",
                "launcher=inline",
                f"data.path={data}",
                f"out={tmp_path / 'runs'}",
                *overrides,
            ]
        )

    return run


MISTAKES = {
    "unknown key": (
        ["model.dept=3"],
        ["model.dept: got an unknown key", "did you mean model.depth?"],
    ),
    "wrong type": (["seed=many"], ["seed: got 'many' (str), expected a whole number"]),
    "NaN learning rate": (
        ["recipe.stages.short.optimizer.lr=nan"],
        ["recipe.stages.short.optimizer.lr: got nan"],
    ),
    "missing data path": (
        ["data.path=/nowhere/at/all"],
        ["data.path: got /nowhere/at/all, which does not exist"],
    ),
    "empty data directory": (["data.path={empty}"], ["data.path: got {empty}, an empty folder"]),
    "cp that does not fit": (
        ["parallel.cp=3"],
        ["parallel.cp: got 3, expected a divisor of the 2 workers: 1, 2"],
    ),
    "no such stage": (["stage=9"], ["stage: got '9', expected one of 1 short, 2 long"]),
    "unknown key beside a wrong value": (
        ["model.dept=3", "parallel.cp=3"],
        ["2 problems", "model.dept: got", "parallel.cp: got 3"],
    ),
    "several at once": (
        ["stage=9", "seed=-1", "name=../x"],
        ["3 problems", "stage: got", "seed: got", "name: got"],
    ),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_gets_one_report_and_starts_nothing(
    kind: str, data: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    given, expected = MISTAKES[kind]
    overrides = [
        "experiment=demo",
        "recipe=demo",
        f"data.path={data}",
        f"out={tmp_path / 'runs'}",
        *(text.format(empty=empty) for text in given),
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *overrides],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stdout == "HEAVY []\n"
    for part in expected:
        assert part.format(empty=empty) in done.stderr
    assert done.stderr.count("nothing was started") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_the_file_itself_is_no_command() -> None:
    done = subprocess.run(
        [sys.executable, "wm_train/launch.py", "experiment=demo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "python -m wm_train.launch experiment=demo" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("HEAVY []\n")
    assert "recipe" in done.stdout
    assert "  model.depth = 4  (sana_wm, wan)\n" in done.stdout
    assert "  recipe.stages.<stage>.optimizer.momentum = 0.95  (normuon)\n" in done.stdout


def test_a_dry_run_shows_config_commands_and_the_plan_of_every_stage_and_starts_nothing(
    train, tmp_path: Path, capsys
) -> None:
    shallow = ["model.depth=2", "model.softmax_every=2"]  # planned in seconds
    assert train("print('started')", "--dry-run", "stage=all", *shallow) == 0
    shown = capsys.readouterr().out
    assert '"recipe": {' in shown
    assert "# stage long, inline: 1 x" in shown
    assert "stage 1 short: 41 frames = 6 latent frames" in shown
    assert "starts from short (ema weights)" in shown
    assert not (tmp_path / "runs").exists()


def test_a_password_in_an_address_is_shown_nowhere_and_stored_for_its_owner_only(
    train, tmp_path: Path, capsys
) -> None:
    line = ["stage=1", "tracker.uri=postgresql://zoe9:pass-word@db/mlflow"]
    assert train("print('trained')", *line) == 0
    assert train("print('started')", *line, "--dry-run") == 0
    shown = capsys.readouterr()
    assert "postgresql://db/mlflow" in shown.out
    assert "tracker.uri=postgresql://db/mlflow stage=2" in shown.out
    assert "pass-word" not in shown.out + shown.err
    assert "zoe9" not in shown.out + shown.err
    holders = [
        file
        for file in tmp_path.rglob("*")
        if file.is_file() and "pass-word" in file.read_text(errors="replace")
    ]
    assert [file.name for file in holders] == ["config.json"]
    assert holders[0].stat().st_mode & 0o777 == 0o600


def test_an_unknown_option_is_a_mistake_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(["--turbo"])
    assert stopped.value.code == 2
    assert "--turbo" in capsys.readouterr().err


TELL = """
import json, sys
config = json.load(open(sys.argv[1]))
print("training", config["stage"], config["recipe"]["stages"][config["stage"]]["frames"])
"""


def test_stages_run_one_after_the_other_and_say_what_to_type_next(
    train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(TELL, "stage=all") == 0
    shown = capsys.readouterr().out
    assert shown.index("training short 41") < shown.index("training long 81")
    assert f"  page        {tmp_path / 'runs' / 'demo' / 'report.html'}" in shown
    assert "the last stage" in shown
    assert train(TELL, "stage=1", "name=other") == 0
    shown = capsys.readouterr().out
    assert "training long" not in shown
    assert "stage=2" in shown.splitlines()[-1]
    assert "name=other" in shown.splitlines()[-1]


def test_one_pool_trains_its_own_stages_and_leaves_out_those_of_all_pools(
    train, capsys: pytest.CaptureFixture[str]
) -> None:
    pools = [
        "+pools={high: {sigma_min: 0.6}, low: {sigma_max: 0.6}}",
        "recipe.stages.long.pools=together",
        "pool=high",
    ]
    assert train(TELL, "stage=all", *pools) == 0
    shown = capsys.readouterr().out
    assert "training short 41" in shown
    assert "training long" not in shown
    last = shown.splitlines()[-1]
    assert "stage=2" in last
    assert "pool=high" not in last
    assert train(TELL, "stage=2", *pools) == 2
    assert "pool: got 'high', expected null" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            [
                "launcher.workers=2",
                'pools.high.overrides=["launcher.workers=1"]',
                'pools.low.overrides=["launcher.workers=1"]',
                "recipe.stages.short.global_batch=1",
            ],
            "recipe.stages.short.global_batch: got 1 for pool high in the joint evaluation",
        ),
        (
            ['pools.low.overrides=["recipe.stages.short.sampler.guidance={camera: 2.0}"]'],
            "sampler.guidance: got [] of pool high, ['camera'] of pool low, expected the run's []",
        ),
    ],
)
def test_pools_that_cannot_be_judged_together_are_refused_before_they_train(
    given: list[str], said: str, data: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(command, "run_stages", lambda *given: 1)  # as if training failed
    line = ["experiment=demo_pools", "stage=1", f"data.path={data}", f"out={tmp_path / 'runs'}"]
    assert command.main([*line, *given]) == 2
    assert said in capsys.readouterr().err
    alone = [*line, *given, "pool=low"]
    assert command.main(alone) == 1


def test_the_resolved_config_is_stored_for_its_owner(train, tmp_path: Path) -> None:
    assert train("", "stage=1", "model.depth=8") == 0
    file = tmp_path / "runs" / "demo" / "short" / "config.json"
    config = from_json(file.read_text())
    assert (config.stage, config.model.depth, config.launcher.name) == ("short", 8, "inline")
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_failing_stage_ends_the_run_with_its_code(
    train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("import sys; print('started'); sys.exit(5)", "stage=all") == 5
    assert capsys.readouterr().out.count("started") == 1


def test_workers_send_no_statistics(train, capsys: pytest.CaptureFixture[str]) -> None:
    names = (
        "MLFLOW_DISABLE_TELEMETRY",
        "DO_NOT_TRACK",
        "RAY_USAGE_STATS_ENABLED",
        "OMP_NUM_THREADS",
    )
    assert (
        train(
            f"import os; print(*(os.environ[name] for name in {names}))",
            "stage=1",
            "backend.threads=3",
        )
        == 0
    )
    assert "true true 0 3" in capsys.readouterr().out


def test_a_run_folder_that_cannot_be_written_is_a_mistake(
    train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").write_text("a file in the way")
    assert train("", "stage=1") == 2
    assert "run folder: got" in capsys.readouterr().err
