"""scan: exact over any number of members, frames, chunks, documents and padding, in the values and
in every gradient."""

from __future__ import annotations

import itertools

import pytest
import torch

from parallel.sequence import LocalSequence

MEMBERS = (1, 2, 3, 4, 8)
FRAMES = (1, 2, 5, 11, 61, 121)
KINDS = ("plain", "chunks 4,3,3", "chunks given", "documents", "ragged", "all")
VARIANTS = list(itertools.product((None, "inclusive", "exclusive"), KINDS, (False, True)))


def check(oracles, members, frames, variant, dtype=torch.float64, limits=(1e-12, 1e-11)):
    reverse, kind, initial = variant
    case = oracles.Case(
        oracles.layouts(frames)[kind],
        ("scan",),
        reverse=reverse,
        initial=initial,
        heads=2,
        dim=4,
        dtype=dtype,
    )
    found = oracles.joined(oracles.virtual_run(case, 1, members)[0])
    exact = oracles.serial_run(oracles.Case(**{**vars(case), "dtype": torch.float64}))
    errors = oracles.worst(found, exact)
    assert errors[0] <= limits[0], (case, errors)
    assert errors[1] <= limits[1], (case, errors)


@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize("members", MEMBERS)
def test_scan_equals_the_serial_recurrence(oracles, members, frames):
    """Every variant meets every member count and every clip length, and every pair of those meets a
    fifth of the variants."""
    for variant in VARIANTS[(MEMBERS.index(members) + FRAMES.index(frames)) % 5 :: 5]:
        check(oracles, members, frames, variant)


@pytest.mark.full
@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize("members", MEMBERS)
def test_scan_equals_the_serial_recurrence_in_every_combination(oracles, members, frames):
    for variant in VARIANTS:
        check(oracles, members, frames, variant)


@pytest.mark.parametrize("members", [1, 3, 8])
def test_scan_in_single_precision(oracles, members):
    for frames in (5, 61):
        for variant in VARIANTS[1::5]:
            check(oracles, members, frames, variant, torch.float32, (5e-6, 3e-5))


def test_the_graph_does_not_grow_with_the_frames(oracles):
    """One node over the leaves, and what it keeps: its inputs and, per stream, two boundary states
    and the members' composites."""
    case = oracles.Case(oracles.ClipLayout(61), ("scan",), heads=2)
    leaves, outputs, _ = oracles.member_run(case, LocalSequence(case.layout))
    node = outputs["numerator.states"].grad_fn
    assert {type(parent).__name__ for parent, _ in node.next_functions if parent is not None} == {
        "AccumulateGrad"
    }
    assert node is outputs["normaliser.final"].grad_fn
    kept = [x for x in node.saved_tensors if x is not None]
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in leaves.values()}
