"""Check what is said of many clips: order, columns, gaps and missing scorers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data_shards.schema import DataError
from data_shards.time_layout import TimeLayout
from wm_train.config.schema import METRICS as GROUPS
from wm_train.evaluation import results
from wm_train.evaluation.metrics.score import unknown
from wm_train.evaluation.poses import KnownScene, PoseTrack
from wm_train.evaluation.scorers import FRAME_SCORERS, PAIR_SCORERS, make_scorer
from wm_train.evaluation.scoring import Judge, JudgedClip, Other, score_clip

FACTS = {"name": "demo/short", "step": 20, "poses": "map"}
FPS, F = 4.0, 12


class Told:
    """An estimator that says what it is told, about 16 x 16 pictures numbered in their first
    pixel."""

    def __init__(self, path: np.ndarray) -> None:
        self.path = path

    def estimate(self, video, fps, known) -> PoseTrack:
        return PoseTrack(self.path.copy(), True, np.ones(len(video)), "told", 0.0)


def walk(seed: int) -> np.ndarray:
    c2w = np.tile(np.eye(4), (F, 1, 1))
    c2w[:, :3, 3] = np.cumsum(np.random.default_rng(seed).normal(size=(F, 3)), axis=0)
    return c2w


def film(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (F, 16, 16, 3)).astype(np.uint8)


def judged(number: int, quality="musiq is missing", shift: float = 0.0):
    truth, c2w = film(number), walk(number)
    made = np.clip(truth.astype(int) + 8, 0, 255).astype(np.uint8)
    made[0] = truth[0]
    scene = KnownScene(f"clip{number}", np.ones((F, 4)), c2w[0])
    clip = JudgedClip(f"clip{number}", number, made, truth, FPS, c2w, scene)
    found = c2w.copy()
    found[1:, 0, 3] += shift
    other = Other(film(number + 1), walk(number + 1))
    return score_clip(clip, other, Judge(GROUPS, Told(found), quality))


@pytest.fixture(scope="module")
def records() -> list[dict]:
    made = [judged(number, shift=0.1 * number).as_json() for number in range(5)]
    return [json.loads(json.dumps(record)) for record in made]  # as they come from other processes


def test_every_metric_stands_between_its_ceiling_and_floor(records):
    found = results.combine(records, FACTS)["summary"]
    assert 25 < found["psnr"]["sample"]["mean"] < 32  # 8 of 255 is 30.1 dB, clipped less
    assert found["psnr"]["ceiling"]["mean"] == 100
    assert found["psnr"]["floor"]["mean"] < 10
    assert found["psnr"]["other"]["mean"] < 10
    assert found["psnr"]["own_better"] == 1
    assert found["psnr"]["gain"]["mean"] == pytest.approx(
        found["psnr"]["sample"]["mean"] - found["psnr"]["floor"]["mean"]
    )
    # shifts of 0 to 0.4 m after frame 0
    assert found["trans_err_m"]["sample"]["mean"] == pytest.approx(0.2 * (F - 1) / F)
    assert found["trans_err_m"]["floor"]["mean"] > 1
    assert found["trans_err_m"]["gain"]["mean"] > 0  # less is better
    assert found["rot_err_deg"]["floor"]["mean"] == 0  # these paths do not turn


def test_frames_of_the_given_latent_are_not_counted():
    """A grouped codec's first latent gives three frames here; whatever they are, scores stay."""

    def scores(spoiled: int) -> tuple[float, float]:
        truth, time = film(0), TimeLayout(3, "grouped")
        made = np.clip(truth.astype(int) + 8, 0, 255).astype(np.uint8)
        made[:spoiled] = 0
        clip = JudgedClip("clip0", 0, made, truth, FPS, None, None, time=time)
        record = score_clip(clip, Other(film(1), None), Judge(("psnr",), None, ""))
        second = record.seconds["psnr"]["sample"][0]
        return record.scores["psnr"]["sample"].value, second

    assert scores(3) == scores(0)
    assert scores(4)[0] < scores(0)[0]


def test_results_do_not_depend_on_the_order_in_which_clips_come(records):
    plain = results.combine(records, FACTS)
    assert results.combine(records[3:] + records[:3], FACTS) == plain
    assert results.report(plain, None) == results.report(
        results.combine(records[::-1], FACTS), None
    )


def test_a_number_without_floor_ceiling_or_coverage_does_not_appear(records):
    page = results.report(results.combine(records, FACTS), None)
    table = page.split("## ")[0]
    assert "| psnr ↑ dB |" in table
    assert "| drift" not in table
    assert "- drift: sample: musiq is missing (coverage 0%)" in page
    broken = json.loads(json.dumps(records))
    for record in broken:
        record["scores"]["psnr"]["floor"] = vars(unknown("nobody froze it"))
    found = results.combine(broken, FACTS)
    assert "| psnr" not in results.report(found, None).split("Not shown")[0]
    assert "eval/psnr" not in results.figures(found)
    figures = results.figures(results.combine(records, FACTS))
    assert {"eval/psnr", "eval/psnr.floor", "eval/psnr.ceiling", "eval/psnr.coverage"} <= set(
        figures
    )


def test_unknown_poses_give_coverage_and_a_reason(records):
    clip = judged(0)
    half = clip.track.c2w.copy()
    half[F // 2 - 1 :] = np.nan
    scene = KnownScene("clip0", np.ones((F, 4)), half[0])
    lost = score_clip(
        JudgedClip("clip0", 0, film(0), film(0), FPS, walk(0), scene),
        None,
        Judge(("cameras",), Told(half), ""),
    )
    score = lost.scores["rot_err_deg"]["sample"]
    assert (score.value, score.coverage) == (None, 5 / 12)
    assert lost.scores["rot_err_deg"]["other"].reason == "there is no other clip to compare with"
    summary = results.combine([*records[1:], lost.as_json()], FACTS)["summary"]["rot_err_deg"]
    assert (summary["sample"]["n"], summary["sample"]["videos"]) == (4, 5)
    assert summary["sample"]["coverage"] == pytest.approx(0.8)


def test_results_of_an_earlier_step_stand_beside(records, tmp_path):
    for step, shift in ((10, 1), (20, 0), (30, 0)):
        rows = records[shift:]
        found = results.combine(rows, {**FACTS, "step": step})
        results.write_json(results.history_file(tmp_path, step), found)
    before = results.earlier(tmp_path, 30)
    assert before["step"] == 20
    assert results.earlier(tmp_path, 10) is None
    page = results.report(found, results.earlier(tmp_path, 20))
    assert "Before: step 10, of other clips or estimator." in page


def test_a_missing_weight_is_a_reason_and_with_strict_an_error():
    for registry, name in ((FRAME_SCORERS, "musiq"), (PAIR_SCORERS, "lpips")):
        scorer, reason = make_scorer(registry, name)
        assert scorer is None
        assert "weights" in reason
        with pytest.raises(DataError, match="strict=true"):
            make_scorer(registry, name, strict=True)
    with pytest.raises(DataError, match="expected one of musiq"):
        make_scorer(FRAME_SCORERS, "unheard")
    exact, reason = make_scorer(PAIR_SCORERS, "psnr", strict=True)
    assert (reason, dict(exact.weights)) == ("", {})
    assert exact.compare(film(0), film(0)).tolist() == [100] * F


def test_drift_takes_any_scorer_of_frames():
    bright = judged(0, quality=lambda video: video.mean(axis=(1, 2, 3)))
    assert bright.scores["drift"]["sample"].reason.startswith("the video has 0 whole windows")


def test_the_table_has_a_row_of_each_clip_and_metric_in_the_layout_of_mlflow(records):
    found = results.combine(records, FACTS)
    table = results.table_of_clips(found)
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert len(rows) == sum(len(record["scores"]) for record in records)
    for row in rows:
        own = next(r for r in records if r["key"] == row["clip"])["scores"][row["metric"]]
        for column in ("sample", "ceiling", "floor", "other"):
            assert row[column] == own[column]["value"]
            assert row[f"{column}_coverage"] == own[column]["coverage"]
        assert (row["sample"] is None) == bool(row["reason"])
    psnr = next(row for row in rows if row["metric"] == "psnr")
    assert (psnr["unit"], psnr["ceiling"]) == ("dB", 100)
    assert json.loads(json.dumps(table, allow_nan=False)) == table
