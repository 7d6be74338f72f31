"""Run one attempt on Ray: place, start, watch and stop all ranks together."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launch.compat import accelerator_resources
from launch.progress import ProgressView
from launch.rank_actor import News, RankActor, Seat
from launch.restart import Death, Growth, cause
from launch.signals import Caught
from launch.spec import LaunchSpec, rank_environment

LISTEN_S = 0.5  # time to wait for lines of rank 0, and the longest delay of a signal
FITS_NOW_S = 5.0  # for Ray to answer whether a smaller number fits
START_S = 60.0  # for the actors' processes, once they have their place
# after a first death, how long to look for others: the peers of a killed rank die of their broken
# connections
WITNESS_S = 2.0
GROW_LOOK_S = 2.0  # how often to ask Ray whether there is room for more
# the others cannot finish a step without the dead rank, so they get little time
STOP_BROKEN_S = 2.0


class NoRoomError(RuntimeError):
    """Report that the cluster did not have the resources in time."""


def run_attempt(
    spec: LaunchSpec, number: int, view: ProgressView, stop: Caught, broken: Callable[[], str] = str
) -> Death | Growth | None:
    """Place the workers, start them and watch them.

    broken: returns what of Ray itself has ended, "" while it is whole.

    When the run continues with fewer workers after a loss, the attempt ends as soon as there is
    room for more again (Growth). Raises NoRoomError.
    """
    with _placed(spec, spec.fewer if number else (), view, broken) as actors:
        actors, environments, where = _seats(actors, spec)
        view.text(f"{len(actors)} workers on {where}")
        logs = [spec.logs / f"attempt_{number}" / f"rank_{rank}.log" for rank in range(len(actors))]
        try:
            pids = ray.get(
                [
                    actor.start.remote(spec, environments[rank], str(logs[rank]))
                    for rank, actor in enumerate(actors)
                ]
            )
        except RayError as error:
            return Death(0, None, f"could not start the workers: {error}")
        view.text(
            "process ids "
            + " ".join(f"rank {rank}: {pid}" for rank, pid in enumerate(pids[:8]))
            + (" ..." if len(pids) > 8 else "")
        )
        with _more_room(spec, len(actors), broken) as larger:
            deaths, workers = _watch(actors, view, stop, larger, broken)
            if broken():
                return cause(deaths)  # nobody answers any more
            if deaths:
                _end(actors, STOP_BROKEN_S, view)
            elif workers or stop.number is not None:
                codes = _end(actors, spec.grace_s, view)
                if workers and codes != [0] * len(actors):  # else all of them had finished
                    return Growth(workers)
        return cause(deaths)


@contextmanager
def _more_room(
    spec: LaunchSpec, workers: int, broken: Callable[[], str]
) -> Iterator[Callable[[], int]]:
    """Yield a function that returns a larger number of workers for which there is room, else 0.

    The missing resources stay requested from Ray, so that an autoscaler can provide them.
    """
    larger = min((number for number in (spec.workers, *spec.fewer) if number > workers), default=0)
    if not larger:
        yield lambda: 0
        return
    group = placement_group(_bundles(spec, larger - workers), strategy="PACK")
    looked = time.monotonic() + spec.grow_s - GROW_LOOK_S

    def look() -> int:
        nonlocal looked
        if time.monotonic() < looked + GROW_LOOK_S:
            return 0
        looked = time.monotonic()
        return larger if group.wait(0) else 0

    try:
        yield look
    finally:
        if not broken():
            remove_placement_group(group)


@contextmanager
def _placed(
    spec: LaunchSpec, fewer: tuple[int, ...], view: ProgressView, broken: Callable[[], str]
) -> Iterator[list[Any]]:
    """Yield one actor per worker, all or none, packed on few nodes.

    On exit the actors and everything they started are removed.
    """
    group, workers = _room(spec, fewer)
    if workers < spec.workers:
        view.text(f"room for {workers} of {spec.workers} workers: going on with {workers}")
    actors: list[Any] = []
    try:
        one, each = _bundle(spec), workers // group.bundle_count
        others = {name: amount for name, amount in one.items() if name not in ("CPU", "GPU")}
        for index in range(workers):
            strategy = PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=index // each
            )
            options = {
                "num_cpus": one["CPU"],
                "num_gpus": one.get("GPU", 0),
                "resources": others,
                "scheduling_strategy": strategy,
            }
            actors.append(
                ray.remote(RankActor)
                .options(**options, runtime_env=_where_our_code_is(spec))
                .remote()
            )
        yield actors
    finally:
        if not broken():  # else they have gone with it, and a call would wait for an answer
            for actor in actors:
                ray.kill(actor)  # the leash ends its worker, too
            remove_placement_group(group)


def _room(spec: LaunchSpec, fewer: tuple[int, ...]) -> tuple[PlacementGroup, int]:
    """Return a placement group for all workers within `place_s`, else for as many as fit now.

    The smaller numbers tried are those of `fewer`, largest first. Raises NoRoomError.
    """
    for workers in (spec.workers, *fewer):
        group = placement_group(_bundles(spec, workers), strategy="PACK")
        if group.wait(spec.place_s if workers == spec.workers else FITS_NOW_S):
            return group, workers
        remove_placement_group(group)
    bundle = _bundle(spec)
    free = {name: amount for name, amount in ray.available_resources().items() if name in bundle}
    asked = {name: amount * spec.workers for name, amount in bundle.items()}
    each = spec.workers // len(_bundles(spec, spec.workers))
    parts = f", {each} workers on one node at a time" if each > 1 else ""
    raise NoRoomError(
        f"placing {spec.workers} workers: got {free or 'nothing'} free within {spec.place_s:.0f} s,"
        f" expected {asked}{parts}. Fix: fewer launcher.workers or launcher.cpus_per_worker, or"
        " wait until other jobs have ended (`ray status`)"
    )


def _where_our_code_is(spec: LaunchSpec) -> dict[str, Any] | None:
    """Return the environment that lets a Ray cluster find this package.

    A cluster that was running before does not have our PYTHONPATH. One that we started has it, and
    starts actors faster without this.
    """
    if spec.address is None:
        return None
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    return {"env_vars": {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}}


def _bundles(spec: LaunchSpec, workers: int) -> list[dict[str, float]]:
    """Return the resources of all workers, in bundles that each come from one node.

    A bundle holds `together` workers, or the largest divisor of it that fits on the largest node.
    """
    one, nodes = _bundle(spec), [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fit = max(
        (min(int(node.get(name, 0) // amount) for name, amount in one.items()) for node in nodes),
        default=0,
    )
    each = max(
        (size for size in range(1, fit + 1) if spec.together % size == 0 and workers % size == 0),
        default=1,
    )
    return [{name: amount * each for name, amount in one.items()}] * (workers // each)


def _bundle(spec: LaunchSpec) -> dict[str, float]:
    """Return the resources of one worker: CPUs, and one accelerator if the cluster has any.

    Only kinds that the run can use count.
    """
    bundle: dict[str, float] = {"CPU": spec.cpus_per_worker}
    if not spec.accelerators:
        return bundle
    known = ray.cluster_resources()
    present = [name for name in accelerator_resources() if known.get(name, 0) > 0]
    kinds = sorted(present, key=lambda name: -known[name])
    return {**bundle, kinds[0]: 1} if kinds else bundle


def _seats(actors: list[Any], spec: LaunchSpec) -> tuple[list[Any], list[dict[str, str]], str]:
    """Return actors in rank order, their environments, and the nodes' names.

    Ranks of a node are consecutive, so that a sequence-parallel group stays inside the node.
    """
    try:
        seats: list[Seat] = ray.get([actor.seat.remote() for actor in actors], timeout=START_S)
    except RayError as error:
        reason = str(error).strip().splitlines()[-1].split(", expected")[0]
        raise NoRoomError(
            f"starting {len(actors)} workers: got {reason}, expected this package on every node"
            f" within {START_S:.0f} s. Fix: install it on every node, or `ray job submit"
            " --working-dir <checkout> ...`"
        ) from error
    nodes = list(dict.fromkeys(seat.node for seat in seats))
    order = sorted(range(len(actors)), key=lambda index: nodes.index(seats[index].node))
    actors, seats = [actors[index] for index in order], [seats[index] for index in order]
    address = "127.0.0.1" if len(nodes) == 1 else seats[0].address
    port = ray.get(actors[0].port.remote(address))
    environments = []
    for rank, seat in enumerate(seats):
        mates = [index for index, other in enumerate(seats) if other.node == seat.node]
        environment = rank_environment(
            rank, len(seats), mates.index(rank), len(mates), address, port
        )
        # Each worker sees all devices of its node's workers and takes the one that LOCAL_RANK says,
        # as under any other launcher.
        shared = {
            name: ",".join(seats[mate].devices[name] for mate in mates) for name in seat.devices
        }
        environments.append({**environment, **shared})
    return (
        actors,
        environments,
        f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}, rendezvous {address}:{port}",
    )


def _watch(
    actors: list[Any],
    view: ProgressView,
    stop: Caught,
    larger: Callable[[], int],
    broken: Callable[[], str],
) -> tuple[list[Death], int]:
    """Watch the ranks until all ended, some died, the driver must stop, or more workers fit.

    Returns (deaths, larger number of workers or 0); no deaths if all ranks ended with 0.
    """
    running = {_listen(actors, rank): rank for rank in range(len(actors))}
    deaths: list[Death] = []
    until: float | None = None
    while running and stop.number is None:
        if until is not None and time.monotonic() > until:
            break
        if gone := broken():
            return [Death(0, None, f"Ray's own process has ended: {gone}")], 0
        if until is None and (workers := larger()):
            return [], workers
        ready, _ = ray.wait(list(running), num_returns=1, timeout=LISTEN_S)
        for call in ready:
            rank = running.pop(call)
            try:
                news: News = ray.get(call)
            except RayError as error:
                deaths.append(Death(rank, None, str(error).strip().split("\n")[0]))
                continue
            for line in news.lines:
                view.feed(line)
            if news.code is None:
                running[_listen(actors, rank)] = rank
            elif news.code != 0:
                deaths.append(Death(rank, news.code, "\n".join(news.tail)))
        if deaths and until is None:
            until = time.monotonic() + WITNESS_S
    return deaths, 0


def _listen(actors: list[Any], rank: int) -> Any:
    return actors[rank].listen.remote(LISTEN_S if rank == 0 else 2 * LISTEN_S, rank == 0)


def _end(actors: list[Any], grace_s: float, view: ProgressView) -> list[int | None]:
    """Stop all running ranks at the same time and show rank 0's remaining output.

    Returns the exit codes, None where unknown.
    """
    calls = [actor.stop.remote(grace_s) for actor in actors]
    ready, _ = ray.wait(calls, num_returns=len(calls), timeout=grace_s + 5)
    codes: list[int | None] = []
    for call in calls:
        try:
            codes.append(ray.get(call) if call in ready else None)
        except RayError:
            codes.append(None)
    try:
        for line in ray.get(actors[0].listen.remote(0.1, True), timeout=2).lines:
            view.feed(line)
    except RayError as error:
        view.text(f"rank 0's last lines are lost: {str(error).strip().splitlines()[0]}")
    return codes
