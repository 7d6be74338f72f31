"""Check the metrics of pictures, time and sets against closed forms and papers' own rows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from wm_train.evaluation.metrics import benchmarks
from wm_train.evaluation.metrics.frechet import frechet, gaussian_distance
from wm_train.evaluation.metrics.lasting import drift, memory_symmetry, windows
from wm_train.evaluation.metrics.pictures import by_frame, by_second, psnr, ssim
from wm_train.evaluation.metrics.revisit import RevisitPair, remapped, revisit, revisit_pairs
from wm_train.evaluation.metrics.score import Score, mean_score, summarise, unknown


def constant(value: int, size: tuple[int, ...] = (20, 30, 3)) -> np.ndarray:
    return np.full(size, value, np.uint8)


def noise(seed: int, *size: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


@pytest.mark.parametrize("difference", [1, 7, 100])
def test_psnr_of_a_constant_difference(difference):
    base = np.random.default_rng(0).integers(100, 150, (20, 30, 3)).astype(np.uint8)
    expected = 20 * math.log10(255 / difference)
    assert psnr(base, base + difference) == pytest.approx(expected, abs=1e-12)
    assert psnr(base, base - difference) == pytest.approx(expected, abs=1e-12)  # not modulo 256
    assert psnr(base, base) == 100


def test_ssim_of_equal_pictures_and_of_constants():
    assert ssim(noise(0, 20, 30), noise(0, 20, 30)) == pytest.approx(1, abs=1e-12)
    c1 = (0.01 * 255) ** 2
    for a, b in ((10, 200), (0, 255), (90, 91)):
        expected = (2 * a * b + c1) / (a**2 + b**2 + c1)
        assert ssim(constant(a), constant(b)) == pytest.approx(expected, abs=1e-12)


def test_ssim_of_one_window_is_its_formula():
    a, b = noise(1, 11, 11), noise(2, 11, 11)
    expected = []
    for channel in range(3):
        x, y = (p[..., channel].astype(float).ravel() for p in (a, b))
        (vx, both), (_, vy) = np.cov(x, y, bias=True)
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        likeness = (2 * x.mean() * y.mean() + c1) * (2 * both + c2)
        expected.append(likeness / ((x.mean() ** 2 + y.mean() ** 2 + c1) * (vx + vy + c2)))
    assert ssim(a, b) == pytest.approx(np.mean(expected), abs=1e-12)
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(a[:10], b[:10])


def test_seconds_leave_out_the_given_frame_and_keep_a_short_last_one():
    values = np.array([100.0, 1, 2, 3, 5, 7, np.nan, 9, 11])
    assert by_second(values, 4) == pytest.approx([2, 7, 11])
    assert by_second(np.array([100.0, np.nan]), 1) == [None, None]
    video = np.stack([constant(10), constant(20)])
    assert by_frame(video, video[:, :, ::-1], psnr).tolist() == [100, 100]


def test_a_palindrome_is_symmetric_and_unlike_halves_score_the_closed_form():
    forth = noise(3, 5, 12, 12)
    assert memory_symmetry(np.concatenate([forth, forth[::-1]])).value == 1
    halves = np.stack([constant(50)] * 4 + [constant(150)] * 4)
    expected = math.exp(-1e-4 * 9000**1.1)
    assert expected == pytest.approx(0.106778, abs=1e-6)
    assert memory_symmetry(halves).value == pytest.approx(expected, abs=1e-12)
    # odd count: the middle frame is no pair; here only the innermost of two pairs is unlike
    five = np.stack([constant(v) for v in (50, 50, 9, 150, 50)])
    outer, inner = math.exp(0.1 * 2), math.exp(0.1 * 1)
    assert memory_symmetry(five).value == pytest.approx(
        (outer + inner * expected) / (outer + inner), abs=1e-12
    )


def test_drift_of_a_fading_score_is_slope_times_span_and_drops_a_tail():
    fps, slope = 16, 0.02
    fading = 70 - slope * np.arange(35 * fps + 7) / fps
    score = drift(fading, fps)
    assert score.value == pytest.approx(slope * 20, abs=1e-12)  # three windows, 20 s apart
    fading[30 * fps :] = 1e9  # the tail
    assert drift(fading, fps).value == pytest.approx(score.value, abs=1e-12)
    assert len(windows(fading, fps)) == 3
    short = drift(fading[: 19 * fps], fps)
    assert short.value is None
    assert "1 whole windows of 10 s" in short.reason


def test_frames_are_remapped_by_time_and_end_at_the_last():
    assert [remapped(i, 24, 1000) for i in (0, 1, 2, 3, 100, 960)] == [0, 2, 3, 4, 150, 999]
    assert [remapped(i, 16, 961) for i in (0, 7, 960)] == [0, 7, 960]


def test_a_path_that_returns_has_its_turning_points_as_pairs():
    fps, there = 4, np.linspace(0, 8, 17)
    c2w = np.tile(np.eye(4), (33, 1, 1))
    c2w[:, 2, 3] = np.concatenate([there, there[-2::-1]])
    pairs = revisit_pairs(c2w, fps)
    assert len(pairs) == 5
    assert all(pair.frame_a + pair.frame_b == 32 and pair.quality == 0 for pair in pairs)
    assert all(pair.frame_b - pair.frame_a >= 2 * fps for pair in pairs)
    c2w[17:, :3, :3] = [[-1, 0, 0], [0, 1, 0], [0, 0, -1]]  # looking back: another view
    assert not revisit_pairs(c2w, fps)
    video = np.stack([constant(i) for i in range(50)])
    score, each = revisit(video, 24, [RevisitPair(2, 10, 0, 0, 0)], psnr)
    assert each == [score.value] == [pytest.approx(20 * math.log10(255 / 12))]  # frames 3 and 15
    assert revisit(video, 24, [], psnr)[0].value is None


def test_frechet_of_commuting_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    s1, s2, m1, m2 = rng.uniform(0.1, 3, (4, 5))
    found = gaussian_distance(m1, basis * s1**2 @ basis.T, m2, basis * s2**2 @ basis.T)
    assert found == pytest.approx(((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum(), abs=1e-10)
    features = rng.normal(size=(300, 4)) @ rng.normal(size=(4, 4))
    assert frechet(features, features[::-1]).value == pytest.approx(0, abs=1e-9)
    assert frechet(features, features + np.array([3, 0, 4, 0])).value == pytest.approx(25, abs=1e-9)
    few = frechet(features[:100], features)
    assert few.value is None
    assert "100 videos, expected at least 256" in few.reason


# SANA-WM Tab. 2: SC BC TF MS AQ IQ DD, Overall
ROWS = {
    "Infinite-World simple": (79.48, 87.79, 97.35, 98.78, 51.99, 69.34, 88.75, 79.18),
    "LingBot-World simple": (93.77, 95.46, 97.13, 98.34, 64.06, 73.18, 41.25, 81.82),
    "SANA-WM simple": (87.46, 91.87, 94.99, 97.69, 55.70, 69.69, 72.50, 79.29),
    "SANA-WM refined simple": (88.62, 93.21, 96.18, 98.61, 58.05, 72.12, 61.25, 80.62),
    "HY-WorldPlay hard": (68.33, 83.06, 95.31, 96.71, 41.76, 53.71, 91.25, 70.46),
    "SANA-WM refined hard": (87.26, 92.55, 95.54, 98.49, 56.67, 71.38, 91.25, 81.89),
}
SANA_WM = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "aesthetic_quality",
    "imaging_quality",
    "dynamic_degree",
)


@pytest.mark.parametrize("row", ROWS)
def test_vbench_overall_is_that_of_the_papers_table(row):
    *raw, overall = ROWS[row]
    scores = {name: value / 100 for name, value in zip(SANA_WM, raw, strict=True)}
    assert benchmarks.vbench_overall(scores).value == pytest.approx(overall, abs=0.011)
    del scores["imaging_quality"]
    missing = benchmarks.vbench_overall(scores)
    assert missing.value is None
    assert missing.reason.endswith("missing: imaging_quality")


MOWORLD = {  # Tab. 1: SC BC MS DD AQ IQ I2V-S I2V-B, Quality, Average
    "SEVA": (87.07, 90.18, 97.62, 62.00, 52.65, 61.40, 93.83, 95.64, 76.35, 80.05),
    "Lingbot": (93.91, 94.94, 97.80, 46.00, 57.54, 71.20, 97.27, 97.14, 79.71, 81.97),
    "MoWorld": (95.47, 95.68, 98.13, 60.00, 64.63, 71.11, 98.04, 98.68, 82.73, 85.22),
}


@pytest.mark.parametrize("row", MOWORLD)
def test_moworlds_two_aggregates_are_those_of_its_table(row):
    *raw, quality, average = MOWORLD[row]
    names = (*(SANA_WM[i] for i in (0, 1, 3, 6, 4, 5)), "i2v_subject", "i2v_background")
    scores = {name: value / 100 for name, value in zip(names, raw, strict=True)}
    assert benchmarks.moworld_quality(scores).value == pytest.approx(quality, abs=0.011)
    assert benchmarks.moworld_average(scores).value == pytest.approx(average, abs=0.011)
    assert benchmarks.moworld_average({"i2v_subject": 1.0}).value is None


def test_means_say_how_much_they_cover_and_how_sure_they_are():
    score = mean_score([1.0, np.nan, 3.0, np.nan], "frames", least=0.5)
    assert (score.value, score.n, score.coverage) == (2.0, 2, 0.5)
    none = mean_score([1.0, np.nan, np.nan], "frames", least=0.5)
    assert none.value is None
    assert none.reason == "1 of 3 frames could be measured, expected at least 50%"
    values = np.random.default_rng(1).normal(5, 2, 40)
    whole = summarise([Score(v, 10, 0.9, "") for v in values] + [unknown("lost")] * 10)
    assert (whole.n, whole.videos) == (40, 50)
    assert whole.coverage == pytest.approx(0.9 * 40 / 50)
    assert whole.mean == pytest.approx(values.mean())
    assert whole.median == pytest.approx(np.median(values))
    assert whole.standard_error == pytest.approx(values.std(ddof=1) / 40**0.5)
    low, high = whole.interval
    wanted = 1.96 * whole.standard_error  # of a normal mean
    assert (high - low) / 2 == pytest.approx(wanted, rel=0.1)
    assert low < whole.mean < high
    nothing = summarise([unknown("lost"), unknown("lost")])
    assert (nothing.mean, nothing.interval, nothing.reason) == (None, None, "lost")
