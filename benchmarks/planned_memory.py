"""Compare the planned memory of a step with that of real steps on real processes.

    python benchmarks/planned_memory.py --seed 21 --count 12
    python benchmarks/planned_memory.py --tape

Configurations are drawn by the seed: sizes, mesh, precision, recomputation, optimizer, turns of a
distillation. The truth is what tensors hold at the start of a step and the events of the allocator
in it, of the rank that holds most; the plan is a rehearsal of the first rank alone. A buffer that
one of gloo's threads is the last to let go of is released unseen: each collective is therefore
given time to be forgotten there, and of several steps the one with the fewest such is taken.
--tape: a Wan on four processes, each way to recompute (parallel.recompute); what it holds more than
`collectives`, which keeps nothing of attention, is its tape.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.managers import DictProxy
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from launch.inline import free_port
from wm_train.config.compose import compose
from wm_train.config.curriculum import StagePlan, plan_stages
from wm_train.config.roles import STUDENT, Turn
from wm_train.plan.device_memory import turn_memories_of
from wm_train.plan.latents import Frame
from wm_train.plan.rehearsal import example_batch, open_shapes
from wm_train.training.networks import build_networks
from wm_train.training.step import add_gradients
from wm_train.world import World

FRAME = Frame(channels=24, height=8, width=8, temporal_stride=8)
WARM, STEPS = 2, 6  # steps that are not measured, and all
TRIES = 4
FORGOTTEN_S = 0.01  # after which a thread of gloo's holds nothing of a collective that has ended
UNSEEN = 0.02  # of the peak, that may be released in threads which no profile sees
ZERO3 = "parallel.sharding=zero3"
MESHES = (
    ["launcher.workers=1"],
    ["launcher.workers=2"],
    ["launcher.workers=2", "parallel.cp=2"],
    ["launcher.workers=2", "parallel.cp=2", "parallel.ulysses=1", "parallel.ring=2"],
    ["launcher.workers=4", "parallel.cp=4", "parallel.ulysses=2", "parallel.ring=2"],
    ["launcher.workers=4", "parallel.cp=2"],
    ["launcher.workers=4", "parallel.dp_replicate=2"],
    ["launcher.workers=2", ZERO3],
)
# of turns of several networks, whose batch is two clips
TWO_CLIPS = [one for one in MESHES if one[-1] not in (ZERO3, "parallel.dp_replicate=2")]
FIRST = ["experiment=demo", "recipe=demo", "stage=1", "data.path=elsewhere"]
TURNS = ["experiment=demo", "recipe=sana_wm", "stage=7", "data.path=elsewhere"]
WAN = (
    "recipe.stages.short.model={name:wan,latent_channels:24,depth:8,width:128,heads:4,"
    "ffn_width:256,patch_size:1,text_width:0,activation_checkpointing:block}"
)
TAPES = ("answers", "keep_attention")
RINGS = {"1x4": (1, 4), "2x2": (2, 2), "4x1": (4, 1)}  # ring x ulysses


def draw(seed: int, count: int) -> list[tuple[str, list[str]]]:
    """Return roles and overrides of `count` configurations; every sixth is a turn of a
    distillation."""
    generator, drawn = random.Random(seed), []
    for number in range(count):
        pick = generator.choice
        turns = number % 6 == 5
        mesh = pick(TWO_CLIPS if turns else MESHES)
        modes = ["none", "block", "block"] if ZERO3 in mesh else ["none", "block", "selective"]
        mode, tape = pick(modes), pick(["answers", "answers", "collectives"])
        words = [
            f"model.width={pick([64, 96, 128])}",
            f"model.depth={pick([4, 6, 8])}",
            f"model.softmax_every={pick([2, 4])}",
            f"model.activation_checkpointing={mode}",
            f"parallel.precision={pick(['fp32', 'bf16'])}",
            *mesh,
        ]
        if mode != "none" and "parallel.cp" in " ".join(mesh):
            words.append(f"parallel.recompute={tape}")
        if turns:
            drawn.append((pick([STUDENT, "critic"]), [*TURNS, *words]))
            continue
        stage = "recipe.stages.short"
        words += [
            f"{stage}.frames={pick([25, 41, 57])}",
            f"{stage}.global_batch={pick([4, 8])}",
            f"{stage}.optimizer.name={'adamw' if ZERO3 in mesh else pick(['adamw', 'normuon'])}",
            f"trainer.accumulate={pick([1, 1, 2])}",
        ]
        drawn.append((STUDENT, [*FIRST, *words]))
    return drawn


def tape_words(mesh: str, recompute: str) -> list[str]:
    """Return the words of a step whose activations are what it mostly holds."""
    ring, ulysses = RINGS[mesh]
    stage = "recipe.stages.short"
    clips = [f"{stage}.frames=161", f"{stage}.global_batch=1"]
    split = [f"parallel.ring={ring}", f"parallel.ulysses={ulysses}"]
    return [*FIRST, WAN, *clips, "launcher.workers=4", *split, f"parallel.recompute={recompute}"]


def tape(mesh: str) -> dict[str, tuple[int, int, int, int]]:
    """Return for each way to recompute the planned and the measured bytes of a step, and of its
    tape."""
    found = {}
    for recompute in ("collectives", *TAPES):
        words = tape_words(mesh, recompute)
        found[recompute] = (planned_bytes(words, STUDENT), measured_bytes(words, STUDENT))
    least = found["collectives"]
    return {
        name: (planned, measured, planned - least[0], measured - least[1])
        for name, (planned, measured) in found.items()
    }


def plan_of(words: list[str]) -> StagePlan:
    return plan_stages(compose(words))[0]


def measure(
    rank: int, words: list[str], role: str, port: int, peaks: DictProxy[int, tuple[int, int]]
) -> None:
    """Take real steps as one rank, and note the most bytes that it held in the last."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    plan = plan_of(words)
    dist.init_process_group("gloo", rank=rank, world_size=plan.launcher.workers)
    stage = open_shapes(plan, FRAME, World(rank, plan.launcher.workers))
    state = build_networks(plan, stage.mesh.fsdp, stage.backend.device)
    batch = example_batch(stage, FRAME)
    found = []
    for step in range(STEPS):
        for own in (state, *state.roles.values()):
            own.optimizer.zero_grad(set_to_none=True)
        if step < WARM:
            add_gradients(stage, state, batch, Turn(role, 0))
        else:
            held = bytes_alive()
            seen = [torch.profiler.ProfilerActivity.CPU]
            with (
                patient_waits(),
                torch.profiler.profile(activities=seen, profile_memory=True) as profile,
            ):
                add_gradients(stage, state, batch, Turn(role, 0))
            most, last = allocated(profile)
            found.append((held + last - bytes_alive(), held + most))
        state.of(role).optimizer.step()
    # of the step whose releases were seen best
    peaks[rank] = min(found, key=lambda one: abs(one[0]))
    dist.destroy_process_group()


@contextmanager
def patient_waits() -> Iterator[None]:
    """Let threads of gloo's forget each collective before the rank that waited for it goes on."""
    original = dist.Work.wait

    def wait(work: dist.Work, *timeout: Any) -> bool:
        done = original(work, *timeout)
        time.sleep(FORGOTTEN_S)
        return done

    dist.Work.wait = wait
    try:
        yield
    finally:
        dist.Work.wait = original


def bytes_alive() -> int:
    """Return the bytes of all tensors that Python holds now and of their gradients, each storage
    once: a gradient that was never read is no object yet."""
    gc.collect()
    plain = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    plain += [t.grad for t in plain if t.is_leaf and t.grad is not None]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in plain}
    return sum(storages.values())


def allocated(profile: Any) -> tuple[int, int]:
    """Return the most bytes that were allocated at once since a profile began, and those at its
    end. Releases in threads of gloo's own are not seen."""
    events = profile.profiler.kineto_results.events()
    memory = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    now = most = 0
    for event in memory:
        now += event.nbytes()
        most = max(most, now)
    return int(most), int(now)


def measured_bytes(words: list[str], role: str) -> int:
    """Return the most bytes that any rank held in a real step. It is measured anew where releases
    were missed, as the peak may then be too high; raises RuntimeError if they always were."""
    workers = plan_of(words).launcher.workers
    for _ in range(TRIES):
        with mp.Manager() as manager:
            peaks: DictProxy[int, tuple[int, int]] = manager.dict()
            mp.spawn(measure, (words, role, free_port("127.0.0.1"), peaks), nprocs=workers)
            unseen, peak = max(peaks.values(), key=lambda one: one[1])
        if unseen <= UNSEEN * peak:
            return peak
    raise RuntimeError(f"{unseen} of {peak} bytes were released unseen in each of {TRIES} tries")


def planned_bytes(words: list[str], role: str) -> int:
    """Return the planned bytes of the gradients' part of a step."""
    memory, _, made = turn_memories_of(plan_of(words), FRAME, "cpu")
    # without the optimizer's step, which is not measured
    return sum(made[role].at_peak.values()) if made else memory[role].device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=21)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--tape", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.tape:
        return print_tapes()
    errors = []
    for role, words in draw(options.seed, options.count):
        planned, measured = planned_bytes(words, role), measured_bytes(words, role)
        errors.append(planned / measured - 1)
        own = [word.split(".")[-1] for word in words if "=" in word and "experiment" not in word]
        print(
            f"{planned / 2**20:8.1f} MiB planned, {measured / 2**20:8.1f} measured,"
            f" {errors[-1]:+6.1%}  {role}: {' '.join(own)}",
            flush=True,
        )
    within = sum(abs(error) <= 0.1 for error in errors)
    mean = sum(map(abs, errors)) / len(errors)
    print(
        f"{within} of {len(errors)} within 10 %; mean {mean:.1%}, worst {max(errors, key=abs):+.1%}"
    )


def print_tapes() -> None:
    worst = 0.0
    for mesh in RINGS:
        for recompute, (planned, measured, own, true) in tape(mesh).items():
            errors = [planned / measured - 1, *([own / true - 1] if true else [])]
            worst = max(worst, *map(abs, errors))
            print(
                f"ring x ulysses {mesh} {recompute:>14}: {planned / 2**20:6.2f} MiB planned,"
                f" {measured / 2**20:6.2f} measured; tape {own / 2**20:6.2f} and"
                f" {true / 2**20:6.2f}; {', '.join(f'{error:+.1%}' for error in errors)}",
                flush=True,
            )
    print(f"worst {worst:.1%}: {'within' if worst <= 0.1 else 'beyond'} 10 %")


if __name__ == "__main__":
    main()
