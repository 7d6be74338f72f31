"""The step guard: what it lets through, what it stops, and what it remembers."""

import json

import pytest

from wm_train.config.schema import TrainerConfig
from wm_train.resilience.guard import WINDOW, BadStepError, Guard, RewindError

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "by_rank", [[(1.0, 2.0), (NAN, 2.0)], [(1.0, INF), (1.0, 1.0)], [(INF, NAN)]]
)
def test_stop_names_the_step_and_the_rank(by_rank):
    guard = Guard(TrainerConfig())
    bad = next(
        rank
        for rank, row in enumerate(by_rank)
        if NAN in row or INF in row or any(x != x for x in row)
    )
    with pytest.raises(
        BadStepError, match=rf"step 7: got rank {bad}.*Parameters are as after step 6"
    ):
        guard.accepts(7, by_rank[0][0], by_rank)


def test_skip_has_a_budget_and_bad_losses_are_not_remembered():
    guard = Guard(TrainerConfig(on_bad_step="skip", bad_step_budget=2, rewinds=0))
    assert guard.accepts(1, 1.0, [(1.0, 1.0)])
    assert not guard.accepts(2, NAN, [(NAN, 1.0)])
    assert not guard.accepts(3, 1.0, [(1.0, NAN)])
    assert list(guard.recent["student"]) == [1.0]
    with pytest.raises(
        BadStepError,
        match=r"steps \[2, 3, 4\] exceed trainer.bad_step_budget.*skip_steps=\[2, 3, 4\]",
    ):
        guard.accepts(4, NAN, [(NAN, 1.0)])


def test_a_spike_is_measured_against_the_median_and_does_not_raise_it():
    guard = Guard(TrainerConfig(on_bad_step="skip", spike_factor=10.0))
    for step in range(WINDOW // 4):
        assert guard.accepts(step, 1000.0 if step == 0 else 1.0, [(1.0, 1.0)]), (
            "too few steps to judge by"
        )
    assert guard.accepts(20, 9.0, [(9.0, 1.0)])
    assert not guard.accepts(21, 1000.0, [(1000.0, 1.0)])
    assert not guard.accepts(22, 1000.0, [(1000.0, 1.0)])


def test_a_continued_guard_judges_as_the_undisturbed_one():
    config = TrainerConfig(on_bad_step="skip", spike_factor=2.0)
    whole = Guard(config)
    for step in range(10):
        whole.accepts(step, 1.0 + step / 10, [(1.0, 1.0)])
    continued = Guard(config, json.loads(json.dumps(whole.memory())))
    for loss in (2.9, 3.1, 1.0):
        assert whole.accepts(11, loss, [(loss, 1.0)]) == continued.accepts(11, loss, [(loss, 1.0)])


def test_a_spent_budget_asks_to_go_back_and_remembers_what_that_left_out():
    config = TrainerConfig(on_bad_step="skip", bad_step_budget=1, rewinds=1, skip_steps=(3,))
    guard = Guard(config)
    assert not guard.accepts(7, NAN, [(NAN, 1.0)])
    guard = Guard(config, json.loads(json.dumps(guard.memory())))  # through a checkpoint
    with pytest.raises(RewindError) as asked:
        guard.accepts(9, NAN, [(NAN, 1.0)])
    assert (asked.value.first, asked.value.last) == (7, 9)
    guard = Guard(config, {"rewound": [[5, 9]]})
    assert [step for step in range(1, 12) if guard.leaves_out(step)] == [3, 5, 6, 7, 8, 9]
    assert not guard.accepts(10, NAN, [(NAN, 1.0)])
    with pytest.raises(BadStepError, match="after 1 rewinds"):
        guard.accepts(11, NAN, [(NAN, 1.0)])


def test_each_role_has_losses_of_its_own_to_be_compared_with():
    """A critic's loss is on another scale than its student's; with one window every turn of the
    other would look like a spike. The memory of both goes through a checkpoint."""
    config = TrainerConfig(on_bad_step="skip", spike_factor=3.0)
    guard, fine = Guard(config), [(1.0, 1.0)]
    for step in range(1, 41):
        role, loss = ("student", 50.0) if step % 4 == 0 else ("critic", 1.0)
        assert guard.accepts(step, loss, fine, role)
    assert not guard.accepts(41, 50.0, fine, "critic")
    again = Guard(config, json.loads(json.dumps(guard.memory())))
    assert not again.accepts(42, 50.0, fine, "critic")
    assert again.accepts(43, 50.0, fine, "student")
    assert set(Guard(config).memory()) == {"recent", "skipped", "rewound"}
