"""Declare the keys of a stage that trains several networks: their roles, turns and distillation.

A step of such a stage is one turn of one role: it alone takes an optimizer step. `turns: CCCCCS`
repeats five turns of the critic and one of the student, so the role of a step is a function of its
number and resuming inside a cycle needs no state.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

from wm_train.config import registry
from wm_train.config.kinds import HistoryConfig, ModelConfig, OptimizerConfig, falls_from_one
from wm_train.config.problems import AT, Problem
from wm_train.config.rules import (
    AtLeastZero,
    Count,
    CountOrZero,
    Finite,
    NoiseLevel,
    Positive,
    Rule,
    Share,
    one_of,
)

STUDENT, TEACHER, CRITIC = "student", "teacher", "critic"
LETTERS = {"S": STUDENT, "C": CRITIC}  # of `turns`
ALONE = "S"  # the turns of a stage with one network
SCORED = re.compile(r"all|(?:last|window) ([1-9]\d{0,5})")
MOST_TURNS = 64  # of a cycle

OpenShare = Annotated[float, Rule(lambda value: 0 < value < 1, "more than 0 and less than 1")]
Turns = Annotated[
    str,
    Rule(
        lambda turns: 0 < len(turns) <= MOST_TURNS and set(turns) <= set(LETTERS),
        f"1 to {MOST_TURNS} letters, each S (student) or C (critic), such as CCCCCS",
    ),
]
FALLING = Rule(
    falls_from_one, "noise levels that fall from 1 to above 0, as the last step goes to 0 by itself"
)
WEIGHTS = Rule(
    lambda weights: all(math.isfinite(weight) for weight in weights.values()), "finite weights"
)
BOUNDARIES = Rule(
    lambda levels: (
        all(0 < level < 1 for level in levels.values()) and len({*levels.values()}) == len(levels)
    ),
    "noise levels above 0 and below 1, none twice",
)
SCORED_RULE = Rule(lambda text: SCORED.fullmatch(text) is not None, "all, last <n> or window <n>")
BOUNDS = Rule(lambda pair: 0 < pair[0] < pair[1] < math.inf, "two rising numbers above 0")


@dataclass(frozen=True)
class Turn:
    """Name the role that trains in a step, and how many turns it had before (from 0)."""

    role: str
    index: int


def turn_of(turns: str, step: int) -> Turn:
    """Return the turn of step `step`, counted from 0, when `turns` repeats."""
    cycles, place = divmod(step, len(turns))
    letter = turns[place]
    index = cycles * turns.count(letter) + turns[:place].count(letter)
    return Turn(LETTERS[letter], index)


def turns_of(turns: str, role: str, steps: int) -> int:
    """Return how many of the first `steps` steps are turns of this role."""
    letters = [letter for letter, name in LETTERS.items() if name == role]
    cycles, rest = divmod(steps, len(turns))
    return sum(cycles * turns.count(x) + turns[:rest].count(x) for x in letters)


@dataclass(frozen=True)
class ScoreSigmaConfig:
    """Configure the noise levels at which score networks compare clips."""

    # uniform_clamped (Self-Forcing, SANA-WM's public code: mass piles up at the ends) |
    # logit_normal (truncated)
    law: Annotated[str, one_of("uniform_clamped", "logit_normal")] = "uniform_clamped"
    shift: Positive = 1.0  # sigma -> shift * sigma / (1 + (shift - 1) * sigma)
    low: OpenShare = 0.02
    high: OpenShare = 0.98
    # one for each clip, each chunk of the student, or all clips of a turn (a network of experts)
    per: Annotated[str, one_of("clip", "chunk", "turn")] = "clip"
    mean: Finite = 0.0  # logit_normal: sigma = sigmoid(mean + std * normal), then shifted
    std: Positive = 1.0

    def problems(self) -> Iterator[Problem]:
        """Yield a range that does not rise."""
        if self.low >= self.high:
            rule = f"less than high, {self.high}"
            yield Problem("low", str(self.low), rule, f"{AT}low=0.02 {AT}high=0.98")


@dataclass(frozen=True)
class RoleConfig:
    """Configure a network beside the student. Its `model` holds, before the keys given here, those
    of the stage that it inherits from, or else the student's."""

    # a stage's name | "previous" | a checkpoint directory, ours or a diffusers one | "student": as
    # the student starts
    inherit: str | None = None
    inherit_role: Annotated[str, one_of(STUDENT, CRITIC)] = STUDENT  # whose weights of that stage
    inherit_weights: Annotated[str, one_of("ema", "raw")] = "ema"
    model: ModelConfig = field(default_factory=lambda: registry.default("models"))
    chunk_frames: CountOrZero = 0  # latent frames of a chunk; 0 = one chunk, bidirectional
    # null: the network is frozen, held in the compute type and never saved
    optimizer: OptimizerConfig | None = None


@dataclass(frozen=True)
class DistillConfig:
    """Configure distribution matching of a few-step student on its own rollouts (Self-Forcing)."""

    levels: Annotated[tuple[float, ...], FALLING]  # noise levels of the student's steps
    # renoise (Self-Forcing, SANA-WM) | euler (Waypoint): from a level to the next; as deployed
    sampler: Annotated[str, one_of("renoise", "euler")] = "renoise"
    # turn: each turn draws at which level its rollouts end | last: always at the last one
    exit: Annotated[str, one_of("turn", "last")] = "turn"
    # chunk: one chunk after another, each through all steps (Self-Forcing)
    # | windows: so too, but by a student without a memory, which sees `history` beside its chunk
    # (MoWorld)
    schedule: Annotated[str, one_of("chunk", "windows")] = "chunk"
    history: HistoryConfig | None = None  # of schedule=windows
    # late: of one chunk at a time, its past without gradients | packed: of all chunks of a clip in
    # one pass, each behind the clean frames before it (Waypoint); for models of attention alone
    gradient: Annotated[str, one_of("late", "packed")] = "late"
    # keep | replay: the past of each chunk until its gradient, stored or computed again
    history_states: Annotated[str, one_of("keep", "replay")] = "keep"
    # each: a turn's rollouts when it comes | ahead: those of all turns up to the student's next at
    # once, with its weights gathered once; the same bits
    rollouts: Annotated[str, one_of("each", "ahead")] = "each"
    context_sigma: NoiseLevel = 0.0  # at which a finished chunk enters the past
    # condition -> weight of the teacher's guidance: without + weight * (with - without); {}: none.
    # context: the other frames of the clip
    guidance: Annotated[dict[str, float], WEIGHTS] = field(default_factory=dict)
    # role -> noise level from which that frozen network answers in the teacher's place, as models
    # of several experts do (Wan2.2, MoWorld §4.4); {}: one teacher
    experts: Annotated[dict[str, float], BOUNDARIES] = field(default_factory=dict)
    score_sigma: ScoreSigmaConfig = field(default_factory=ScoreSigmaConfig)
    # of the score difference (wm_train/objectives/score_difference.py)
    weight: Annotated[str, one_of("normalised", "velocity", "score")] = "normalised"
    normaliser: Annotated[str, one_of("clip", "chunk")] = "clip"  # scope of weight=normalised
    # all | last n | window n: the latent frames that have a loss; the rest of a clip is noised and
    # shown to the score networks all the same
    scored_frames: Annotated[str, SCORED_RULE] = "all"
    # after each turn of the student: critic <- ida * critic + (1 - ida) * student; 1 = off
    ida: Share = 1.0
    # weight of intra-segment guidance (SenseFlow): a step of the student is drawn to one of the
    # teacher and one of the student; 0 = off
    isg: AtLeastZero = 0.0
    # stop | warn: if before the first turn the student's rollouts are outside these bounds
    gate: Annotated[str, one_of("stop", "warn")] = "stop"
    gate_std: Annotated[tuple[float, float], BOUNDS] = (0.5, 2.0)  # over the data's
    gate_motion: Annotated[tuple[float, float], BOUNDS] = (0.25, 4.0)  # over the data's


@dataclass(frozen=True)
class TrajectoriesConfig:
    """Configure the data job that a stage begins with: it makes a data set of the clips of
    `data.path` with a teacher's trajectories at `objective.levels`, on which the stage trains."""

    teacher: RoleConfig  # bidirectional, or causal with chunk_frames
    # Euler steps from noise to the clean end: levels spaced evenly, then shifted, and between them
    # those of the objective
    steps: Count = 48
    shift: Positive = 1.0  # sigma -> shift * sigma / (1 + (shift - 1) * sigma)
    # condition -> weight of the teacher's guidance: without + weight * (with - without); {}: none
    guidance: Annotated[dict[str, float], WEIGHTS] = field(default_factory=dict)
    # the folder or address of the data set; null: `trajectories` in the stage's own folder
    path: Annotated[str, Rule(bool, "a folder, an address or null")] | None = None
    clips: CountOrZero = 0  # of training, drawn by key; 0 = all
    held_out: CountOrZero = 0  # of validation; 0 = all
    batch: Count = 1  # clips in a pass: a part of what is made, as rounding depends on it
    shard_clips: Count = 16  # clips of a shard, which is lost when the job is killed
    dtype: Annotated[str, one_of("float16", "bfloat16", "float32")] = "float16"


def frames_of(scored: str) -> int | None:
    """Return n of `last n` and `window n`, None for `all`."""
    match = SCORED.fullmatch(scored)
    assert match, scored
    return int(match[1]) if match[1] else None
