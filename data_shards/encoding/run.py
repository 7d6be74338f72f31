"""Decide what one run of `encode` has to do: which clips can be encoded, and which are already."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from data_shards.codecs import LatentCodec
from data_shards.encoding import check
from data_shards.encoding.job import Job, plan_jobs
from data_shards.encoding.kept import MadeShard, find_made, made_clips, set_aside
from data_shards.encoding.plan import (
    LeftOut,
    Plan,
    differing_clips,
    differing_libraries,
    differing_weights,
    identify_clips,
    shortened,
)
from data_shards.encoding.target import Target
from data_shards.schema import PLAN, DataError
from data_shards.sources.clips import ClipSource

FIX = "mend or remove them, or on_bad_clip=skip to leave them out; what is encoded already is kept"


@dataclass
class Run:
    """Hold the state of a run. model: what its jobs share; found: file or clip -> why it cannot be
    encoded; checked: key -> members of the clips that can."""

    source: ClipSource
    codec: LatentCodec
    target: Target
    plan: Plan
    model: Job
    skip: bool
    found: dict[str, str] = field(default_factory=dict)
    checked: dict[str, frozenset[str]] = field(default_factory=dict)

    def choose(self) -> tuple[list[Job], list[Job]]:
        """Return all jobs, and those that are not done, after every clip has been checked.

        Raises:
            DataError: clips that cannot be encoded, all in one message, unless they are skipped.
        """
        settings = self.model.settings
        made, every = find_made(self.target, settings.container)
        while True:
            jobs = self._jobs()
            done = done_jobs(jobs, made)
            usable = made if not self.target.in_store else list(done.values())
            have = made_clips(usable)
            planned_now = {p.identity for job in jobs for p in job.clips}
            self.checked |= check.fields_of_rows(
                made_clip.row for name, made_clip in have.items() if name in planned_now
            )
            unknown = [
                planned
                for job in jobs
                for planned in job.clips
                if planned.identity not in have and planned.clip.key not in self.checked
            ]
            fields, problems = check.check_clips(self.source, unknown, self.codec, settings)
            self.checked |= fields
            keys = [planned.clip.key for job in jobs for planned in job.clips]
            known = {key: self.checked[key] for key in keys if key in self.checked}
            problems |= check.unlike(known)
            self.found |= problems
            if self.found and (not self.skip or not jobs):
                raise self.refusal()
            if not problems:
                break
        self.plan = self.plan.without(self._left_out())
        self.target.prepare()
        self.target.write(PLAN, self.plan.to_json())
        kept = set_aside(self.target, made, {shard.result for shard in done.values()}, every)
        have = made_clips(kept)
        todo = [
            dataclasses.replace(
                job, made={p.identity: have[p.identity] for p in job.clips if p.identity in have}
            )
            for job in jobs
            if job.number not in done
        ]
        return jobs, todo

    def _jobs(self) -> list[Job]:
        clips = [clip for clip in self.source.clips if clip.key not in self.found]
        identify = identify_clips(self.plan, self.source, self.codec)
        return plan_jobs(self.model, clips, self.codec, self.plan.clips, identify) if clips else []

    def _left_out(self) -> dict[str, LeftOut]:
        files = {**self.plan.clips, **{k: v.files for k, v in self.plan.left_out.items()}}
        return {name: LeftOut(why, files.get(name, {})) for name, why in self.found.items()}

    def refusal(self) -> DataError:
        """Return one error with every problem, by file or clip."""
        keys = {clip.key for clip in self.source.clips}
        lines = [f"clip {k}: {v}" if k in keys else f"{k}: {v}" for k, v in self.found.items()]
        good = len(keys - self.found.keys())
        head = f"source: got {len(lines)} that cannot be encoded, beside {good} clips that can"
        return DataError("\n".join([f"{head}. Fix: {FIX}", *lines]))


def begin(
    source: ClipSource,
    codec: LatentCodec,
    target: Target,
    plan: Plan,
    old: Plan | None,
    model: Job,
    skip: bool,
) -> Run:
    """Return a run with what is known without reading a clip: files that are none, keys that come
    twice, other sizes, and what an earlier run left out that is still the same."""
    found = {**source.problems, **check.repeated(source.clips)}
    found |= check.unlike_sizes(
        [clip for clip in source.clips if clip.key not in found],
        codec.spatial_stride,
        model.settings.resize,
    )
    if skip and old is not None:
        found |= {
            key: entry.why
            for key, entry in old.left_out.items()
            if entry.files and plan.clips.get(key) == entry.files
        }
    return Run(source, codec, target, plan, model, skip, found)


def done_jobs(jobs: Iterable[Job], made: Iterable[MadeShard]) -> dict[int, MadeShard]:
    """Return number -> shard of the jobs that an earlier run has finished."""
    by_result = {shard.result: shard for shard in made}
    wanted = {
        job.number: (job.result, [(planned.identity, planned.split) for planned in job.clips])
        for job in jobs
    }
    return {
        number: by_result[result]
        for number, (result, content) in wanted.items()
        if result in by_result and by_result[result].content == content
    }


def changes(old: Plan, new: Plan, problems: Mapping[str, str]) -> list[str]:
    """Return what to tell about a source that is not as an interrupted run found it."""
    lines = [*differing_libraries(old, new), *differing_weights(old, new)]
    lines += differing_clips(old, new, problems)
    if not lines:
        return []
    return ["since the run that was interrupted, this has changed and is encoded again:"] + [
        f"  {line}" for line in shortened(lines)
    ]
