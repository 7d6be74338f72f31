"""The figures of samples beside the frozen first frame, against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from wm_train.evaluation.first_frame import clip_psnr, over_clips, summary, verdict
from wm_train.evaluation.metrics.pictures import psnr


@pytest.mark.parametrize("step", [1, 7, 100])
def test_psnr_of_a_known_error(step: int) -> None:
    """20 log10(255 / d) for an error of d in every pixel, also where uint8 would wrap around."""
    truth = np.full((3, 4, 6, 3), 120, np.uint8)
    for sign in (1, -1):
        moved = (truth.astype(int) + sign * step).astype(np.uint8)
        assert psnr(truth, moved) == pytest.approx(20 * math.log10(255 / step))
    assert psnr(truth, truth) == pytest.approx(100)


def test_spans_leave_out_given_frames_and_the_first_second_ends_in_time() -> None:
    """Frame t of the truth is 10 + t, so the frozen first frame is wrong by t in frame t; the
    sample by 2 in each. At 4 frames a second the first second is frames 1 to 4."""
    frames = np.arange(9, dtype=np.uint8)[:, None, None, None]
    truth = np.broadcast_to(10 + frames, (9, 4, 4, 3))
    sample = truth + 2
    found = clip_psnr(truth, sample, 4.0)
    for span, last in (("clip", 8), ("first_second", 4)):
        frames = [20 * math.log10(255 / t) for t in range(1, last + 1)]  # the mean over frames
        assert found[f"frozen_psnr_{span}"] == pytest.approx(np.mean(frames))
        assert found[f"sample_psnr_{span}"] == pytest.approx(10 * math.log10(255**2 / 4))
    spoiled = sample.copy()
    spoiled[0] = 0
    assert clip_psnr(truth, spoiled, 4.0) == found
    # of a codec whose first latent encodes two frames
    spoiled[1] = 0
    found = clip_psnr(truth, spoiled, 4.0, given=2)
    for span, last in (("clip", 8), ("first_second", 5)):
        frames = [20 * math.log10(255 / t) for t in range(2, last + 1)]
        assert found[f"frozen_psnr_{span}"] == pytest.approx(np.mean(frames))
        assert found[f"sample_psnr_{span}"] == pytest.approx(10 * math.log10(255**2 / 4))


def test_mean_and_standard_error_over_clips() -> None:
    values = [20.0, 22.0, 27.0]
    found = over_clips(values)
    assert (found.mean, found.n) == (pytest.approx(23.0), 3)
    assert found.standard_error == pytest.approx(np.std(values, ddof=1) / math.sqrt(3))
    assert over_clips([5.0]).standard_error is None


@pytest.mark.parametrize("sample", [21.0, 27.0])
def test_the_verdict_names_clips_errors_and_a_loss(sample: float) -> None:
    row = {
        "sample_psnr_clip": sample,
        "frozen_psnr_clip": 24.0,
        "sample_psnr_first_second": sample + 1,
        "frozen_psnr_first_second": 25.0,
    }
    figures = summary([row, {name: value + 2 for name, value in row.items()}])
    assert figures["gain_clip"].mean == pytest.approx(sample - 24)
    assert figures["gain_clip"].standard_error == pytest.approx(0)
    said = verdict(figures)
    assert f"over 2 held-out clips: {sample + 1:.1f} +- 1.0 dB, frozen first frame 25.0" in said
    assert ("samples lose to the frozen first frame" in said) == (sample < 24)
