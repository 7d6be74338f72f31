"""Find the process whose own work takes longest, not counting the time it waits for others.

Every process sends the times of its last step with the figures that are gathered anyway, so this
needs no collective of its own and all processes reach the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

# steps summed before a rank is reported, so that one pause of the system does not count
WINDOW = 4
SECTIONS = ("data", "train")


class Stragglers:
    """Compare processes over windows of steps.

    factor: a process is slow at this multiple of the others' median; 0 turns it off.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self._sums: list[list[float]] = []
        self._count = -1  # the first step pays for warm-up
        self._named: tuple[int, str] | None = None

    def seen(self, step: int, by_rank: Sequence[Sequence[float]]) -> str | None:
        """Return a message when a process has become slow, or is no longer slow.

        by_rank: seconds of (data wait, own work) in step - 1 of every process.
        """
        self._count += 1
        if not self.factor or len(by_rank) < 2 or self._count <= 1:
            return None
        if not self._sums:
            self._sums = [[0.0] * len(SECTIONS) for _ in by_rank]
        for sums, times in zip(self._sums, by_rank, strict=True):
            for section, seconds in enumerate(times):
                sums[section] += seconds
        if (self._count - 1) % WINDOW:
            return None
        window, self._sums = self._sums, []
        return self._judge(step, window)

    def _judge(self, step: int, sums: list[list[float]]) -> str | None:
        totals = [sum(times) for times in sums]
        slow = max(range(len(totals)), key=totals.__getitem__)
        others = median(total for rank, total in enumerate(totals) if rank != slow)
        if totals[slow] <= self.factor * others:
            was, self._named = self._named, None
            return f"rank {was[0]} keeps up again (step {step})" if was else None
        usual = [
            median(times[section] for rank, times in enumerate(sums) if rank != slow)
            for section in range(len(SECTIONS))
        ]
        section = SECTIONS[max(range(len(SECTIONS)), key=lambda s: sums[slow][s] - usual[s])]
        if (slow, section) == self._named:
            return None
        self._named = (slow, section)
        return (
            f"rank {slow} is slow (step {step}, section {section}): {totals[slow] / WINDOW:.3f} s"
            f" of its own per step, the others' median is {others / WINDOW:.3f} s; they wait for it"
        )
