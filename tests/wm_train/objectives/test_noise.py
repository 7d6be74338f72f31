"""The counter-based generator: published vectors, slices, independence, distribution."""

import math

import pytest
import torch

from wm_train.config.schema import NAME
from wm_train.noise import (
    PARAMETERS,
    PARITY,
    VALIDATION,
    NoiseKey,
    host_uniform,
    normal,
    philox4x32,
    random_words,
    uniform,
)

KEY = NoiseKey(seed=7, stage="first")

# Random123's known-answer file (kat_vectors, "philox4x32 10").
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_gives_the_published_words(counter, key, expected):
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in words) == expected


def test_a_slice_of_frames_is_the_slice_of_the_whole():
    draws = torch.tensor([5, 11, 2**40 + 3])
    whole = normal(KEY, "noise", draws, range(9), (3, 5, 7))
    assert whole.shape == (3, 9, 3, 5, 7)
    assert torch.equal(normal(KEY, "noise", draws[1:], (4, 7), (3, 5, 7)), whole[1:, 4:7])
    assert normal(KEY, "noise", draws, (4, 4), (3, 5, 7)).shape == (3, 0, 3, 5, 7)


@pytest.mark.parametrize(
    ("key", "purpose", "draw"),
    [
        (NoiseKey(8, "first"), "noise", 5),
        (NoiseKey(7, "second"), "noise", 5),
        (KEY, "sigma", 5),
        (KEY, "noise", 6),
        (KEY, "noise", 5 + 2**32),
    ],
)
def test_every_part_of_the_key_changes_the_numbers(key, purpose, draw):
    reference = random_words(KEY, "noise", torch.tensor([5]), (0, 1), 400)
    other = random_words(key, purpose, torch.tensor([draw]), (0, 1), 400)
    assert (reference == other).float().mean() < 0.01


def test_normals_are_standard_normal_and_uncorrelated():
    x = normal(KEY, "noise", torch.arange(4), range(8), (50_00,)).double()
    n = x.numel()
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96 / n)
    # Kolmogorov-Smirnov against the normal distribution function, 0.1 % level.
    ordered = torch.special.ndtr(x.flatten().sort().values)
    grid = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert (ordered - grid).abs().max() < 1.95 / math.sqrt(n)
    rows = x.reshape(32, -1)
    correlation = torch.corrcoef(rows) - torch.eye(32)
    assert correlation.abs().max() < 5 / math.sqrt(rows.shape[1])


def test_uniforms_stay_inside_the_open_interval_and_are_uniform():
    u = uniform(KEY, "camera_dropout", torch.arange(20_000)).double()
    assert u.shape == (20_000,)
    assert 0 < u.min() < u.max() < 1
    assert (u.sort().values - (torch.arange(20_000) + 0.5) / 20_000).abs().max() < 1.95 / math.sqrt(
        20_000
    )


@pytest.mark.parametrize("draw", [0, 1, 7, 2**31 + 5, 2**33 + 3, 123456789012])
def test_the_hosts_uniform_is_the_devices_to_the_bit(draw):
    """Integers of Python do not wrap, those of tensors do: the words must be the same."""
    for purpose in ("exit/student", "score/window", "isg/middle"):
        device = uniform(KEY, purpose, torch.tensor([draw]))
        assert host_uniform(KEY, purpose, draw) == float(device)


def test_no_stage_can_have_the_name_of_a_reserved_key():
    assert len({PARAMETERS, VALIDATION, PARITY}) == 3
    assert not any(NAME.fullmatch(name) for name in (PARAMETERS, VALIDATION, PARITY))
