"""The noise levels of score networks, the frames they judge, and draws of a turn."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from parallel.layout import ClipLayout
from wm_train.config.roles import ScoreSigmaConfig, frames_of
from wm_train.noise import NoiseKey
from wm_train.objectives.score_levels import at_the_clamp, score_sigma, scored_range, turn_choice
from wm_train.sampling.levels import unshift_sigma

KEY = NoiseKey(5, "distill")
CHUNKS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])
COUNT = 3


def drawn(config: ScoreSigmaConfig, clips: int = 20_000) -> torch.Tensor:
    return score_sigma(KEY, torch.arange(clips), config, CHUNKS, COUNT)


@pytest.mark.parametrize("shift", [1.0, 10.0])
def test_clamped_uniform_levels_follow_their_distribution_and_pile_up(shift):
    """P(sigma <= s) is the level before the shift; with shift 10, 17 % sit at 0.98."""
    config = ScoreSigmaConfig(shift=shift)
    sigma = drawn(config)[:, 0].double()
    for level in (0.1, 0.5, 0.9, 0.97):
        expected = unshift_sigma(level, shift)
        assert float((sigma <= level).double().mean()) == pytest.approx(expected, abs=0.015)
    high = float((sigma == sigma.max()).double().mean())
    assert high == pytest.approx(1 - unshift_sigma(0.98, shift), abs=0.01)
    ends = at_the_clamp(drawn(config), config).mean()
    assert float(ends) == pytest.approx(high + unshift_sigma(0.02, shift), abs=0.01)


def test_truncated_logit_normal_levels_do_not_pile_up():
    config = ScoreSigmaConfig(law="logit_normal", shift=3.0, mean=0.5, std=1.5, low=0.1, high=0.9)
    sigma = drawn(config)[:, 0]
    assert 0.1 <= float(sigma.min()) < 0.11
    assert 0.89 < float(sigma.max()) <= 0.9

    def below(level: float) -> float:
        plain = unshift_sigma(level, 3.0)
        z = (math.log(plain / (1 - plain)) - 0.5) / 1.5
        return 0.5 * (1 + math.erf(z / math.sqrt(2)))

    for level in (0.3, 0.6, 0.85):
        expected = (below(level) - below(0.1)) / (below(0.9) - below(0.1))
        assert float((sigma <= level).double().mean()) == pytest.approx(expected, abs=0.015)
    assert float(at_the_clamp(drawn(config), config).mean()) < 1e-3


def test_a_level_belongs_to_a_clip_or_a_chunk_wherever_its_frames_are():
    per_clip, per_chunk = drawn(ScoreSigmaConfig(), 50), drawn(ScoreSigmaConfig(per="chunk"), 50)
    assert torch.equal(per_clip, per_clip[:, :1].expand(50, 9))
    assert torch.equal(per_chunk[:, :4], per_chunk[:, :1].expand(50, 4))
    assert (per_chunk[:, 3] != per_chunk[:, 4]).all()
    draws = torch.arange(50)
    part = score_sigma(KEY, draws, ScoreSigmaConfig(per="chunk"), CHUNKS[5:], COUNT)
    assert torch.equal(part, per_chunk[:, 5:])
    empty = score_sigma(KEY, draws, ScoreSigmaConfig(per="chunk"), CHUNKS[9:], COUNT)
    assert empty.shape == (50, 0)


def test_choices_of_a_turn_are_uniform_and_repeat():
    found = Counter(turn_choice(KEY, "exit", turn, 4) for turn in range(2000))
    assert set(found) == {0, 1, 2, 3}
    assert all(abs(count - 500) < 90 for count in found.values())
    assert [turn_choice(KEY, "exit", turn, 4) for turn in range(5)] == [
        turn_choice(KEY, "exit", turn, 4) for turn in range(5)
    ]


def test_scored_frames_are_all_the_last_or_a_window_of_the_turn():
    layout = ClipLayout(11, chunk_starts=(0, 4, 7, 10))
    assert frames_of("all") is None
    whole = scored_range("all", layout, KEY, 0)
    assert (whole.start, whole.stop) == (0, 11)
    last = scored_range("last 4", layout, KEY, 0)
    assert (last.start, last.stop) == (7, 11)
    windows = [scored_range("window 4", layout, KEY, turn) for turn in range(200)]
    assert {w.start for w in windows} == set(range(8))
    assert {len(w) for w in windows} == {4}
    assert len(scored_range("last 40", layout, KEY, 0)) == 11
