"""Damage files of users: cut, empty, flipped bits, values of other types, shapes and contents.

A draw is keyed by (reader, number), so a failing one is made again by its name. Draw 0 does no
damage.
"""

import io
import json
import math
import warnings
import zipfile
import zlib
from types import SimpleNamespace

import numpy as np

from data_shards.schema import DataError

ODD_NUMBERS = (math.nan, math.inf, -math.inf, 0, -1, 1e300, -1e-300, 2**63, 10**400, 0.5)
ODD_VALUES = (
    *(None, True, "x\x1b[2J\n@progress {}", "", [], {}, [[1], [1, 2]], {"a": [1]}),
    *ODD_NUMBERS,
)


class Nothing:
    """Stand in for a random generator where nothing is to be damaged."""

    def integers(self, *_):
        return 0


def damage_bytes(random, data):
    """Cut, empty, flipped, overwritten or with a piece twice."""
    if isinstance(random, Nothing):
        return data
    data = bytearray(data)
    kind = random.integers(6)
    if kind == 0 or not data:
        return b""
    low, high = sorted(random.integers(0, len(data) + 1, 2).tolist())
    if kind == 1:
        return bytes(data[:low])
    if kind == 2:
        return bytes(data[:high] + data[low:])
    if kind == 3:
        data[low:high] = random.bytes(high - low)
        return bytes(data)
    for place in random.integers(0, len(data), random.integers(1, 9)):
        data[place] ^= 1 << int(random.integers(8))
    return bytes(data)


def odd_value(random, value, text):
    """Another type, shape or content. text: only what JSON can say."""
    if isinstance(random, Nothing) or isinstance(value, list | dict | None):
        return value
    array = np.asarray(value)
    kind = random.integers(7)
    if kind == 0:
        odd = ODD_VALUES[random.integers(len(ODD_VALUES))]
        return odd if text else np.array(odd, dtype=None if np.isscalar(odd) else object)
    if kind == 1 and array.ndim:
        array = array[: random.integers(len(array) + 1)]
    elif kind == 2:
        array = np.concatenate([array.ravel()] * 2)
    elif kind == 3:
        array = array[None]
    elif kind == 4:
        array = array.T
    elif kind == 5:
        array = array.astype(
            ("U8", "bool", "f4", "c16", "i8")[random.integers(4 if text else 5)]
            if array.dtype.kind in "biuf"
            else "U2"
        )
    if array.size and array.dtype.kind in "iuf" and random.integers(2):
        array = array.astype(np.float64)
        array.flat[random.integers(array.size)] = float(ODD_NUMBERS[random.integers(8)])
    return array


def damage_values(random, values, text):
    """One or two keys gone, renamed, swapped, of another type, shape or content."""
    if isinstance(random, Nothing):
        return values
    values = dict(values)
    for _ in range(random.integers(1, 3)):
        keys = sorted(values)
        a, b = (keys[i] for i in random.integers(0, len(keys), 2))
        kind = random.integers(8)
        if kind == 0 and len(keys) > 1:
            del values[a]
        elif kind == 1:
            names = ("K", "extrinsics", f"{a}s", a.upper(), "c2w ", "w2c", "x\x1b[31m\n")
            values[names[random.integers(len(names))]] = values.pop(a)
        elif kind == 2:
            values[a], values[b] = values[b], values[a]
        else:
            values[a] = odd_value(random, values[a], text)
    return values


def npz(values):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, value in values.items():
            member = io.BytesIO()
            np.save(member, np.asarray(value), allow_pickle=True)
            archive.writestr(f"{name}.npy", member.getvalue())
    return buffer.getvalue()


def plain_value(value):
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    return str(value) if isinstance(value, complex) else value


def as_json(values):
    return json.dumps({k: plain_value(v) for k, v in values.items()}, default=str).encode()


def maybe_bytes(random, data):
    return damage_bytes(random, data) if random.integers(2) else data


def damaged_file(random, values, write, text):
    """Damaged values, damaged bytes, or both."""
    if random.integers(3):
        values = damage_values(random, values, text)
        return maybe_bytes(random, write(values)) if not random.integers(4) else write(values)
    return damage_bytes(random, write(values))


TOOLS = SimpleNamespace(
    bytes=damage_bytes, maybe=maybe_bytes, file=damaged_file, odd=odd_value, npz=npz, json=as_json
)


def draw(reader, name, number, folder):
    """Return the message of the error, '' for a result; anything else is raised."""
    folder.mkdir()
    keyed = np.random.default_rng([zlib.crc32(name.encode()), number])
    random = keyed if number else Nothing()
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        reader.damage(TOOLS, random, folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            reader.read(folder)
    except DataError as error:
        message = str(error)
    except Exception as error:
        raise AssertionError(f"{name} {number}: {type(error).__name__}: {error}") from error
    else:
        return ""
    assert message.isprintable(), f"{name} {number}: {message!r}"
    assert len(message) < 2000, f"{name} {number}: {message!r}"
    return message


def draw_all(reader, name, draws, folder):
    """Draw so many files and print what came of them; each must be right or one error."""
    said = [draw(reader, name, number, folder / str(number)) for number in range(draws)]
    assert said[0] == "", f"{name}: the good file is refused: {said[0]}"
    refused = sum(message != "" for message in said)
    print(f"{name}: {draws} draws, {refused} refused, {draws - refused} right results")
    assert refused, "nothing was damaged"
