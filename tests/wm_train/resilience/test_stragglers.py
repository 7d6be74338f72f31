"""Name the slow rank: the one whose own work takes longer, within ten steps; none for one pause or
for waiting."""

from wm_train.resilience.stragglers import WINDOW, Stragglers


def watch(by_rank, steps=range(1, 31), factor=1.5):
    """Return step -> message when rank r's (data wait, own work) of step s is by_rank(s)[r]."""
    stragglers = Stragglers(factor)
    said = ((step, stragglers.seen(step, by_rank(step - 1))) for step in steps)
    return [(step, text) for step, text in said if text]


def test_a_slow_rank_is_named_once_with_its_section_within_ten_steps():
    for slow, section in ((0, "data"), (1, "train"), (2, "train")):
        for begins in range(1, 12):

            def times(step, slow=slow, section=section, begins=begins):
                extra = (1.0, 0.0) if section == "data" else (0.0, 1.0)
                return [
                    (0.1 + extra[0], 0.5 + extra[1])
                    if step >= begins and rank == slow
                    else (0.1, 0.5)
                    for rank in range(3)
                ]

            ((step, text),) = watch(times)
            assert f"rank {slow} is slow" in text
            assert f"section {section}" in text
            assert step <= begins + 10


def test_two_ranks_are_enough_and_recovery_is_said():
    (slow, quick) = watch(lambda step: [(0.0, 1.0), (0.0, 3.0 if step < 15 else 1.0)])
    assert "rank 1 is slow" in slow[1]
    assert quick == (quick[0], f"rank 1 keeps up again (step {quick[0]})")


def test_one_pause_warm_up_even_ranks_and_a_factor_of_zero_name_nobody():
    assert not watch(lambda step: [(0.0, 100.0 if step == 1 else 1.0), (0.0, 1.0)])
    assert not watch(lambda step: [(0.0, 1.0 + (1.5 if step == 9 else 0.0)), (0.0, 1.0)])
    assert not watch(lambda step: [(0.0, 1.3), (0.0, 1.0), (0.0, 1.0)])
    assert not watch(lambda step: [(0.0, 9.0), (0.0, 1.0)], factor=0.0)
    assert not watch(lambda step: [(0.0, 9.0)])
    assert WINDOW > 1
