"""Yield the batches of a stage on this rank, and quarantine bad shards on all ranks at once.

A shard may be damaged on one node only, or in the frames of one rank only. So with
`data.on_bad_shard=quarantine` the ranks gather, before a batch is used, the shards that could not
be read; if there are any, all ranks leave them out and read the batch again. The draws from those
shards take other clips by keys of their own, so no other sample of this or a later batch changes.
The list is part of the state: it is in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from data_shards.loading.load import Batch, ClipLoader
from data_shards.schema import DataError, ShardError
from wm_train.config.schema import DataConfig
from wm_train.resilience.preemption import StopRequest
from wm_train.world import World

LOOK_S = 0.2  # longest delay of a request to stop while data are awaited


class Feed:
    """Iterate over batches; use as a context manager.

    open_loader: (first step, quarantined shards) -> loader. quarantined: the list of a checkpoint.
    report: called with a line about shards that were left out.

    Raises DataError while iterating: with `on_bad_shard=fail` the error of the reader, else when
    more than `bad_shard_budget` shards are bad; with both, when storage is unreachable for
    `data.retry_s`.
    """

    def __init__(
        self,
        open_loader: Callable[[int, frozenset[str]], ClipLoader],
        config: DataConfig,
        world: World,
        first_step: int,
        quarantined: tuple[str, ...],
        report: Callable[[str], None],
    ) -> None:
        self._open, self._config, self._world, self._report = open_loader, config, world, report
        self.quarantined = tuple(sorted(quarantined))
        # The next batch. A loader that has read its batch is one ahead of those that failed to.
        self._step = first_step
        self._loader = open_loader(first_step, frozenset(quarantined))

    @property
    def packing(self) -> str:
        """Return how full packed rows are, as text; empty without packing."""
        packing = self._loader.schedule.packing()
        if packing is None:
            return ""
        clips = packing.packed_clips + packing.left_out_clips
        return (
            f"packing: {packing.filled:.1%} of latent frames hold a clip,"
            f" {packing.left_out_clips} of {clips} clips find no room"
            f" (the first {packing.sequences} rows)"
        )

    def next_unless(self, stop: StopRequest) -> Batch | None:
        """Return the next batch, or None when a process was asked to stop before all had theirs.

        Every process must call this.
        """
        while not (stop.raised or self._loader.ready(LOOK_S)):
            pass
        return None if stop.agreed(self._world) else next(self)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._config.on_bad_shard == "fail":
            return next(self._loader)
        while True:
            batch, bad_shard, message = None, "", ""
            try:
                batch = next(self._loader)
            except ShardError as error:
                if error.passing:  # storage is unreachable: the shard may be good
                    raise
                bad_shard, message = error.shard, str(error)
            # one number a step; names and messages are gathered only when a shard is bad
            if not self._world.gather_numbers([float(bool(bad_shard))]).any():
                assert batch is not None
                self._step += 1
                return batch
            self._leave_out([pair for pair in self._world.gather([bad_shard, message]) if pair[0]])

    def _leave_out(self, bad_shards: list[list[str]]) -> None:
        """Start again at this step without these shards, which are the same on every rank."""
        self.quarantined = tuple(sorted({*self.quarantined, *(shard for shard, _ in bad_shards)}))
        self._loader.close()
        budget = self._config.bad_shard_budget
        if len(self.quarantined) > budget:
            raise DataError(
                f"quarantine: got {len(self.quarantined)} bad shards, expected at most {budget}"
                f" (key data.bad_shard_budget; the last: {bad_shards[0][1]}). Fix: mend the data"
                " set, `python -m data_shards.verify` lists all damage"
            )
        self._loader = self._open(self._step, frozenset(self.quarantined))
        total, out = sum(map(len, self._loader.tables)), self._loader.quarantined_clips
        names = ", ".join(sorted({shard for shard, _ in bad_shards}))
        self._report(
            f"quarantined after {self._step} steps: {names}; now {total - out} clips to draw from +"
            f" {out} quarantined = {total} of the manifest. {bad_shards[0][1]}"
        )

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._loader.close(wait=kind is None)  # storage may be silent, and nobody waits for it now
