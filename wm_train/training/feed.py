"""The batches of a stage on this process, with one decision for all processes when a shard turns
out to be bad.

A shard may be damaged on one node only, or in the frames of one process only. So with
`data.on_bad_shard=quarantine` every process says, before it uses a batch, which shard it could not
read; if any did, all leave those shards out and make the batch again. The draws that fell there
take other clips by keys of their own, so no other sample of this or a later batch moves. The list
is state: it is in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from data_shards.loading.load import Batch, ClipLoader
from data_shards.schema import DataError, ShardError
from wm_train.config.schema import DataConfig
from wm_train.world import World


class Feed:
    """Iterates over batches; a context manager.

    open_loader: (first step, quarantined shards) -> loader. quarantined: what a checkpoint has
    recorded. report: says what was left out.

    Raises DataError while iterating: with `on_bad_shard=fail` what the reader found, else when
    there are more than `bad_shard_budget`; with both, when storage does not answer for
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
        # of the next batch; a loader that could read its batch is one ahead of those that could not
        self._step = first_step
        self._loader = open_loader(first_step, frozenset(quarantined))

    @property
    def packing(self) -> str:
        """How full packed rows are; empty without packing."""
        found = self._loader.schedule.packing()
        if found is None:
            return ""
        clips = found.packed_clips + found.left_out_clips
        return (
            f"packing: {found.filled:.1%} of latent frames hold a clip, {found.left_out_clips} of"
            f" {clips} clips find no room (the first {found.sequences} rows)"
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._config.on_bad_shard == "fail":
            return next(self._loader)
        while True:
            batch, found, message = None, "", ""
            try:
                batch = next(self._loader)
            except ShardError as error:
                if error.passing:  # of silent storage every shard looks bad
                    raise
                found, message = error.shard, str(error)
            # one small collective a step; names and words only when there is something to say
            if not self._world.gather_numbers([float(bool(found))]).any():
                assert batch is not None
                self._step += 1
                return batch
            self._leave_out([pair for pair in self._world.gather([found, message]) if pair[0]])

    def _leave_out(self, found: list[list[str]]) -> None:
        """Start again at this step without these shards. The same on every process, as `found`
        is."""
        self.quarantined = tuple(sorted({*self.quarantined, *(shard for shard, _ in found)}))
        self._loader.close()
        budget = self._config.bad_shard_budget
        if len(self.quarantined) > budget:
            raise DataError(
                f"quarantine: got {len(self.quarantined)} bad shards, expected at most {budget}"
                f" (key data.bad_shard_budget; the last: {found[0][1]}). Fix: mend the data set,"
                " `python -m data_shards.verify` lists all damage"
            )
        self._loader = self._open(self._step, frozenset(self.quarantined))
        total, out = sum(map(len, self._loader.tables)), self._loader.quarantined_clips
        names = ", ".join(sorted({shard for shard, _ in found}))
        self._report(
            f"quarantined after {self._step} steps: {names}; now {total - out} clips to draw from +"
            f" {out} quarantined = {total} of the manifest. {found[0][1]}"
        )

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self._loader.close()
