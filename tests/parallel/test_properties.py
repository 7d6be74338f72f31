"""Drawn cases: any layout, mesh, mask and head count; all verbs against brute force, values and
gradients."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parallel.layout import ClipLayout
from parallel.masks import AttentionMask
from parallel.sequence import GroupSequence
from parallel.traffic import expected_cost
from parallel.virtual import run_virtual


@st.composite
def starts(draw, frames: int) -> tuple[int, ...]:
    return (
        (0, *sorted(draw(st.sets(st.integers(1, frames - 1), max_size=4)))) if frames > 1 else (0,)
    )


@st.composite
def masks(draw) -> AttentionMask:
    kind = draw(st.sampled_from(["full", "frame", "chunk"]))
    if kind == "full":
        return AttentionMask()
    window = draw(st.none() | st.integers(1, 6))
    sink = draw(st.integers(0, 2))
    if kind == "chunk":
        return AttentionMask("chunk", window, sink)
    return AttentionMask(
        "frame",
        window,
        sink,
        draw(st.none() | st.integers(1, 4)),
        draw(st.none() | st.integers(1, 9)),
    )


@st.composite
def layouts(draw) -> ClipLayout:
    frames = draw(st.integers(1, 18))
    valid = draw(st.none() | st.tuples(st.integers(0, frames), st.integers(0, frames)))
    return ClipLayout(frames, draw(starts(frames)), draw(starts(frames)), valid)


@st.composite
def meshes(draw) -> tuple[tuple[int, int], int, int]:
    """(ring, ulysses), heads, key heads"""
    key_heads = draw(st.integers(1, 4))
    heads = key_heads * draw(st.integers(1, 3))
    ring = draw(st.integers(1, 4))
    return (ring, draw(st.integers(1, min(heads, 8 // ring)))), heads, key_heads


@settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(
    layout=layouts(),
    mesh=meshes(),
    mask=masks(),
    reverse=st.sampled_from([None, "inclusive", "exclusive"]),
    initial=st.booleans(),
    sides=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    edges=st.sampled_from(["clip", "document", "chunk"]),
    exchange=st.sampled_from(["usp", "need"]),
    seed=st.integers(0, 9),
)
def test_any_mesh_computes_what_one_device_does(
    oracles, layout, mesh, mask, reverse, initial, sides, edges, exchange, seed
):
    grid, heads, key_heads = mesh
    case = oracles.Case(
        layout,
        reverse=reverse,
        initial=initial,
        before=sides[0],
        after=sides[1],
        halo_edges=edges,
        mask=mask,
        tokens=1,
        heads=heads,
        key_heads=key_heads,
        dim=3,
        seed=seed,
        exchange=exchange,
    )
    errors = oracles.worst(
        oracles.joined(oracles.virtual_run(case, *grid)[0]), oracles.serial_run(case)
    )
    assert errors[0] <= 1e-11
    assert errors[1] <= 1e-11


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    layout=layouts(),
    mesh=meshes(),
    mask=masks(),
    sides=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    initial=st.booleans(),
    exchange=st.sampled_from(["usp", "need"]),
)
def test_counted_traffic_equals_the_formulas(oracles, layout, mesh, mask, sides, initial, exchange):
    """Bytes and collectives of every member, from drawn shapes; the formulas know nothing of the
    algorithms."""
    (ring, ulysses), heads, key_heads = mesh
    case = oracles.Case(
        layout,
        before=sides[0],
        after=sides[1],
        mask=mask,
        tokens=1,
        heads=heads,
        key_heads=key_heads,
        dim=3,
        initial=initial,
    )
    calls = {}

    def body(comm):
        result = oracles.member_run(case, GroupSequence(layout, comm, exchange=exchange))
        calls[comm.members[0]] = list(comm.calls)
        return result

    results, traffic = run_virtual(body, ring, ulysses)
    sum(loss for *_, loss in results).backward()
    for member, counted in zip(sorted(calls, key=lambda m: m.index), traffic, strict=True):
        for call in calls[member]:
            for way, cost in expected_cost(call.verb, call.tensors, member).items():
                label = f"{call.verb.name} {way}"
                assert counted.sent.get(label, 0) == (cost.sent if member.size > 1 else 0), (
                    label,
                    member,
                )
                assert counted.collectives.get(label, 0) == (
                    cost.collectives if member.size > 1 else 0
                ), (label, member)
