"""Check the evaluation of a trained stage: at its end, later by command, on several processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_shards.schema import DataError
from wm_train import evaluate
from wm_train.config.typed import to_json

QUICK = (
    "recipe.stages.short.steps=4",
    "trainer.checkpoint_every=2",
    "trainer.async_checkpoint=false",
    "trainer.samples=2",
    "trainer.sample_steps=2",
    "trainer.validation_clips=2",
    "trainer.validate_every=2",
    "trainer.evaluate_every=1",
)


@pytest.fixture(scope="module")
def trained(train_here, demo_run, tmp_path_factory) -> Path:
    """A stage of four steps, judged at step 2 and at its end by pictures alone."""
    folder = tmp_path_factory.mktemp("judged")
    train_here(folder, *QUICK)
    stage = folder / "demo" / "short"
    (stage / "config.json").write_text(to_json(demo_run(folder, *QUICK)))
    return stage


def given(**changes) -> dict:
    values = {name: option.default for name, option in evaluate.OPTIONS.items()}
    return {**values, "clips": 2, "metrics": ("psnr",), **changes}


def found_in(folder: Path) -> dict:
    return json.loads((folder / "evaluation" / "evaluation.json").read_text())


def test_a_stage_ends_with_numbers_beside_ceiling_floor_and_the_checkpoint_before(trained):
    found = found_in(trained)
    assert (found["step"], len(found["clips"])) == (4, 2)
    psnr = found["summary"]["psnr"]
    assert psnr["sample"]["coverage"] == 1
    assert psnr["ceiling"]["mean"] == 100
    page = (trained / "evaluation" / "report.md").read_text()
    assert "Before: step 2." in page
    for clip in found["clips"]:
        assert (trained / "evaluation" / "samples" / f"{clip['key']}.mp4").stat().st_size > 1000
    rows = [json.loads(r)["row"] for r in (trained / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[1]["eval/psnr"] == psnr["sample"]["mean"]
    assert rows[1]["eval/psnr.floor"] == psnr["floor"]["mean"]


def judged_on(workers: int, trained: Path, folder: Path, run_ranks, gameplay: Path) -> dict:
    """Judge a copy of the stage on so many processes, as the command does."""
    copy = folder / str(workers) / "demo" / "short"
    shutil.copytree(trained, copy)
    shutil.rmtree(copy / "evaluation")
    recording = str(gameplay.parent / "recording")
    own = given(workers=workers, metrics=("psnr", "cameras"), recording=recording)
    (copy / "judge.json").write_text(to_json(evaluate.judged_config(copy, own)))
    run_ranks(workers, "-m", "wm_train.evaluate", "--config", copy / "judge.json")
    # the checkpoint before had not been judged here
    assert (copy / "evaluation" / "step_00000002.json").exists()
    return found_in(copy)


@pytest.mark.full  # two starts of all ranks: a minute
@pytest.mark.parametrize("many", [2, 4])
def test_the_command_gives_the_numbers_of_the_stages_end_on_any_number_of_processes(
    trained, tmp_path, run_ranks, gameplay, many
):
    expected = found_in(trained)
    results = [judged_on(n, trained, tmp_path, run_ranks, gameplay) for n in (1, many)]
    for found in results:
        assert [clip["key"] for clip in found["clips"]] == [c["key"] for c in expected["clips"]]
        for name in ("psnr", "ssim"):
            for column in ("sample", "floor", "other"):
                want = expected["summary"][name][column]["mean"]
                assert found["summary"][name][column]["mean"] == pytest.approx(want, rel=1e-4)
    for name in ("rot_err_deg", "trans_err_m", "rot_err_deg_rotations"):
        ceiling, other = (found["summary"][name]["ceiling"]["mean"] for found in results)
        assert other == pytest.approx(ceiling, rel=1e-6)


def test_what_the_command_cannot_do_is_said_at_once(tmp_path, capsys):
    for words, message in (
        ([], "run, bench: got both or neither"),
        (["run=a", "bench=b"], "run, bench: got both or neither"),
        ([f"run={tmp_path}"], "expected the folder of a trained stage"),
        ([f"bench={tmp_path}"], "videos: missing"),
        (["run=a", "metrics=fid"], "metrics: got 'fid', expected some of psnr,cameras"),
    ):
        assert evaluate.main(words) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(DataError, match="divisor"):
        evaluate.evaluate_run(tmp_path, given(workers=3, cp=2))
