"""Paths that no shell has expanded, addresses where a folder is asked for, and shipped jobs."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("key", "value", "rule", "fix"),
    [
        ("out", "s3://bucket/runs", "a folder of this machine", "trainer.checkpoint_to=s3://"),
        ("out", "s3:/bucket/runs", "a folder of this machine", "trainer.checkpoint_to=s3:/"),
        ("out", "gs://bucket", "a folder of this machine", "trainer.checkpoint_to=gs://"),
        ("out", "file:///scratch/runs", "a folder, not an address", "out=/scratch/runs"),
        ("out", "~/runs", "only a shell expands ~", "out={home}/runs"),
        ("data.path", "~/set", "only a shell expands ~", "data.path={home}/set"),
        ("trainer.checkpoint_to", "~/x", "only a shell", "trainer.checkpoint_to={home}/x"),
        ("recipe.stages.short.inherit", "~/w", "only a shell", "inherit={home}/w"),
        ("data.cache", "s3://bucket", "a folder of this machine", "data.cache=<folder>"),
        ("out", "runs\n#SBATCH --nodes=99", "printable letters on one line", ""),
        ("out", "a\x1b[2Jb", "printable letters on one line", ""),
        ("data.path", "a\rb", "printable letters on one line", ""),
        ("out", "bad\udc80byte", "printable letters on one line", ""),
    ],
)
def test_a_path_that_cannot_be_meant(
    found, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key, value, rule, fix
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    problem = found({key: value})[key]
    assert rule in problem.rule
    assert fix.format(home=tmp_path) in problem.fix
    assert problem.got.isprintable()
    assert not list(tmp_path.glob("s3*"))


def test_a_path_beyond_ascii_is_taken_in_the_c_locale_too(found) -> None:
    """Python keeps the bytes of a command line that its locale cannot read as surrogates."""
    as_in_c = "läufe µ".encode().decode("ascii", "surrogateescape")
    assert "out" not in found({"out": as_in_c})


@pytest.mark.parametrize("key", ["data.mixture", "data.selection"])
def test_paths_inside_lists_and_mappings_are_judged_as_well(found, key: str) -> None:
    value = {"~/other": 1.0} if key == "data.mixture" else ["~/other"]
    assert any("only a shell" in problem.rule for problem in found({key: value}).values())


def test_a_shipped_job_takes_no_relative_paths(found, monkeypatch, tmp_path: Path) -> None:
    """`ray job submit --working-dir`: the job runs in a copy that Ray deletes."""
    relative = {"out": "runs", "trainer.checkpoint_to": "saved"}
    assert not set(relative) & set(found(relative))
    copy = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    problems = found(relative)
    for key, value in relative.items():
        assert "an absolute path" in problems[key].rule
        assert problems[key].fix == f"{key}=/<shared folder>/{value}"
    absolute = {"out": str(tmp_path), "trainer.checkpoint_to": "s3://bucket/saved"}
    assert not any("an absolute path" in problem.rule for problem in found(absolute).values())


@pytest.mark.parametrize("beside", [{"tracker.name": "none"}, {"tracker.uri": "http://host:5000"}])
def test_a_folder_that_makes_another_address_of_mlflows_file(
    found, monkeypatch, tmp_path: Path, beside: dict[str, str]
) -> None:
    """SQLite opened `runs` for `runs?1` and `runsA` for `runs%41`."""
    for name in ("runs?1", "runs%41"):
        assert "without ? and %" in found({"out": name, "tracker.name": "mlflow"})["out"].rule
        assert "out" not in found({"out": name, **beside})
    for name in ("runs#1", "runs;1&a=b"):
        assert "out" not in found({"out": name, "tracker.name": "mlflow"})
    (tmp_path / "a?b").mkdir()
    monkeypatch.chdir(tmp_path / "a?b")
    assert "without ?" in found({"out": "runs", "tracker.name": "mlflow"})["out"].rule


@pytest.mark.parametrize("endpoint", ["nobody.invalid:29400", "a" * 64 + ":29400", "host:99999"])
def test_an_endpoint_that_cannot_be_reached_is_named(found, endpoint: str) -> None:
    changes = {"launcher.name": "torchrun", "launcher.nodes": 2, "launcher.endpoint": endpoint}
    problem = found(changes)["launcher.endpoint"]
    assert "launcher.endpoint=<" in problem.fix
    changes["launcher.endpoint"] = "127.0.0.1:29400"
    assert "launcher.endpoint" not in found(changes)


def test_the_address_of_another_service_is_a_problem_before_anything_starts(
    found, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    assert "head:6379" in found()["RAY_ADDRESS"].fix
    assert "RAY_ADDRESS" not in found({"launcher.name": "torchrun"})
    assert "RAY_ADDRESS" not in found({"launcher.address": "head:6379"})
    assert "launcher.address" in found({"launcher.address": "ray://head:10001"})


@pytest.mark.parametrize("name", ["x" * 260, "-x", "a b", ""])
def test_the_rule_of_names_says_all_of_it(found, name: str) -> None:
    rule = found({"name": name})["name"].rule
    assert "at most 100" in rule
    assert "the first a letter or digit" in rule
