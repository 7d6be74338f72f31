"""Perturb one frame: outputs that may not see it must not change by a bit, and those that may must
change. Every verb, layout and mesh."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from parallel.masks import AttentionMask

GRIDS = [(1, 1), (1, 3), (3, 1), (2, 2)]
KINDS = ("plain", "chunks 4,3,3", "documents", "ragged", "all")
MASKS = {
    "full": {},
    "frame": {"causality": "frame"},
    "window": {"causality": "frame", "window": 2, "sink": 1, "dilation": 3, "reach": 7},
    "chunk": {"causality": "chunk"},
    "chunk window": {"causality": "chunk", "window": 1, "sink": 1},
}
FRAMES = 9


def changed(before, after, axis: int = 1):
    """[row, frame]: does anything at this frame differ by a bit?"""
    different = (before != after).movedim(axis, 1).movedim(0, 0)
    return different.flatten(2).any(2)


def compare(oracles, case, grid, expected) -> None:
    """expected(row j's frame j, frame i, output name) -> must change (True), must not (False), may
    (None)"""
    base, _ = oracles.joined(oracles.virtual_run(case, *grid)[0])
    for row, j in ((0, 0), (1, 3), (0, 4), (1, 5), (0, 6), (1, 8)):
        moved, _ = oracles.joined(oracles.virtual_run(replace(case, perturbed=(row, j)), *grid)[0])
        for name in base:
            if name.endswith(("final", "mean")):
                continue
            pieces = [(None, base[name], moved[name])]
            if name.endswith("taps"):
                pieces = [(n, base[name][n], moved[name][n]) for n in range(len(base[name]))]
            for tap, a, b in pieces:
                found = changed(a, b)
                for other in range(case.batch):
                    for i in range(FRAMES):
                        rule = False if other != row else expected(row, i, j, tap)
                        if rule is not None:
                            what = (
                                case.layout,
                                grid,
                                name,
                                f"tap {tap}",
                                f"row {row} frame {j} -> row {other} frame {i}",
                            )
                            assert bool(found[other, i]) == rule, what


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reverse", [None, "inclusive", "exclusive"])
def test_scan_sees_exactly_what_it_may(oracles, kind, reverse):
    layout = oracles.layouts(FRAMES)[kind]

    def expected(row, i, j, tap):
        if not oracles.is_real(layout, row, j):
            return False
        ahead = j <= i and oracles.same_document(layout, i, j)
        behind = (
            reverse is not None
            and (j > i or (j == i and reverse == "inclusive"))
            and oracles.same_chunk(layout, i, j)
        )
        return ahead or behind

    for members in (1, 3, 4):
        compare(
            oracles,
            oracles.Case(layout, ("scan",), reverse=reverse, heads=2),
            (1, members),
            expected,
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edges", ["clip", "document", "chunk"])
def test_halo_sees_exactly_what_it_may(oracles, kind, edges):
    layout = oracles.layouts(FRAMES)[kind]
    case = oracles.Case(layout, ("halo",), before=3, after=2, halo_edges=edges)

    def expected(row, i, j, tap):
        return (
            i + tap - case.before == j
            and oracles.may_read(layout, edges, i, j)
            and oracles.is_real(layout, row, j)
        )

    for members in (1, 3, 8):
        compare(oracles, case, (1, members), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", MASKS)
def test_attention_sees_exactly_what_it_may(oracles, kind, mask):
    layout = oracles.layouts(FRAMES)[kind]
    rule = AttentionMask(**MASKS[mask])

    def expected(row, i, j, tap):
        if not oracles.is_real(layout, row, max(i, j)):
            return False
        return (
            None if i == j else oracles.may_attend(layout, rule, i, j)
        )  # (its own query changed as well)

    case = oracles.Case(layout, ("attend",), mask=rule, tokens=1)
    for grid in GRIDS:
        compare(oracles, case, grid, expected)
    compare(oracles, replace(case, exchange="need"), (1, 3), expected)


def test_padding_weighs_nothing(oracles):
    layout = oracles.layouts(FRAMES)["ragged"]
    case = oracles.Case(layout, ("mean",))
    base, _ = oracles.joined(oracles.virtual_run(case, 1, 4)[0])
    for row, j in ((0, 2), (0, 7), (1, 4), (1, 5)):
        moved, _ = oracles.joined(oracles.virtual_run(replace(case, perturbed=(row, j)), 1, 4)[0])
        assert torch.equal(base["mean"][1 - row], moved["mean"][1 - row])
        assert bool(base["mean"][row] == moved["mean"][row]) != oracles.is_real(layout, row, j)


@pytest.mark.parametrize("verb", ["scan", "halo", "attend", "mean"])
def test_padding_may_even_hold_nan(oracles, verb):
    """Check that padding frames reach neither the values nor the gradients of real frames."""
    layout = oracles.layouts(FRAMES)["ragged"]
    case = oracles.Case(layout, (verb,), mask=AttentionMask("frame"))
    clean = oracles.inputs
    try:
        oracles.inputs = lambda case: poisoned(clean(case), oracles, layout)
        outputs, grads = oracles.joined(oracles.virtual_run(case, 1, 2)[0])
    finally:
        oracles.inputs = clean
    expected_outputs, expected_grads = oracles.serial_run(case)
    for found, expected in ((outputs, expected_outputs), (grads, expected_grads)):
        for name, x in found.items():
            for row, valid in enumerate(layout.valid_frames):
                if name.endswith("taps"):
                    a, b = x[:, row, :valid], expected[name][:, row, :valid]
                elif x.shape[1:2] == (FRAMES,):
                    a, b = x[row, :valid], expected[name][row, :valid]
                else:
                    a, b = x[row], expected[name][row]
                assert oracles.relative(a, b) <= 1e-11, (name, row)


def poisoned(found, oracles, layout):
    for name in (n for names in oracles.LEAVES.values() for n in names):
        for row, valid in enumerate(layout.valid_frames):
            found[name][row, valid:] = float("nan")
    return found
