"""Random numbers without a generator: a hash of integer keys and of the name of what is drawn.

    pick(6, "trouser cut", state(seed, pid))    one of 0..5, today and on every machine

The one surprise: names and keys are part of the data set. Renaming a draw changes pictures; adding one changes nothing
else, and so does the order in which draws are made.
"""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from chains.data.synthetic.arrays import Ints

State: TypeAlias = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, SplitMix64's step from one state to the next


def _mix(value: State) -> State:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): a bijection of 64 bits that scatters close keys."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def state(*keys: npt.ArrayLike) -> State:
    """64 scattered bits per element for some integer keys, broadcast together; arrays, so that products wrap."""
    bits = np.zeros(1, dtype=np.uint64)
    for key in keys:
        bits = _mix((bits + _GOLDEN) ^ (np.atleast_1d(np.asarray(key)).astype(np.uint64) * _GOLDEN))
    return bits


@lru_cache(maxsize=4096)
def _name_bits(name: str) -> State:
    return np.array([zlib.crc32(name.encode())], np.uint64) * _GOLDEN


def pick(n: int, name: str, of: State) -> Ints:
    """A choice of 0..n-1 per element, independent for every name. The remainder's bias is below n / 2^32."""
    bits = _mix(of ^ _name_bits(name)) >> np.uint64(32)
    return np.asarray((bits % np.uint64(n)).astype(np.int64))


def smooth_noise(height: int, width: int, cell: int, name: str, *keys: int) -> Ints:
    """Value noise 0..255: random numbers on a coarse grid, joined linearly, in integers. (height, width)"""
    y, x = np.arange(height)[:, None], np.arange(width)[None]
    rows, cols = np.arange(height // cell + 2)[:, None], np.arange(width // cell + 2)[None]
    grid = pick(256, name, state(rows, cols, *keys))
    fy, fx = y % cell, x % cell
    upper = grid[y // cell, x // cell] * (cell - fx) + grid[y // cell, x // cell + 1] * fx
    lower = grid[y // cell + 1, x // cell] * (cell - fx) + grid[y // cell + 1, x // cell + 1] * fx
    return np.asarray((upper * (cell - fy) + lower * fy) // (cell * cell), np.int64)
