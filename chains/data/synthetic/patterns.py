"""480 cloth patterns and 96 emblems, drawn once and looked up by number.

The one surprise: they belong to no site. Their draws have no seed, so pattern 17 is the same cloth everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from chains.data.synthetic.arrays import Bytes, Ints, Mask, Small
from chains.data.synthetic.draws import pick, state

PATTERNS, EMBLEMS = 480, 96
PLAIN = 0  # the number of the pattern that is none

_TILE = 128  # a power of two, so that & wraps a position
_AXIS = np.arange(_TILE, dtype=np.int64)
_X, _Y = np.meshgrid(_AXIS, _AXIS)
_PERIODS = (6, 8, 10, 12, 16, 20, 24, 30)  # 3 to 15 pixels of the crop


@dataclass(frozen=True)
class _Weave:
    """The measures of a cloth pattern, in canvas points."""

    period: int
    duty: int  # how much of a period is in the second colour
    variant: int  # 0..996; every rule takes a remainder of it in its own way

    @property
    def half(self) -> int:
        return self.period // 2

    def stripes(self, along: Ints) -> Ints:
        """Bands across `along`: a wide one in the second colour, in most weaves a narrow one in the third."""
        phase, thin = along % self.period, (self.variant % 3) * max(1, self.period // 8)
        return np.where(phase < self.duty, 1, np.where(phase >= self.period - thin, 2, 0))

    def zigzag(self, along: Ints) -> Ints:
        """0 at the middle of every period, rising to half a period at its ends."""
        return np.asarray(np.abs(along % self.period - self.half))

    def bars(self, along: Ints, widen: int = 1) -> Ints:
        return (along % (widen * self.period) < self.duty).astype(np.int64)

    def dots(self) -> Ints:
        x = self.zigzag(_X + (_Y // self.period % 2) * self.half * (self.variant % 2))
        return (x * x + self.zigzag(_Y) ** 2 <= (self.duty // 2 + 1) ** 2).astype(np.int64)

    def diamonds(self) -> Ints:
        distance = self.zigzag(_X) + self.zigzag(_Y)
        return (distance < self.half) + (distance < self.half // 2) * np.int64(self.variant % 2)

    def camouflage(self) -> Ints:
        cell = max(3, self.half)
        mosaic = pick(100, "cells", state(_X // cell, _Y // cell, self.variant))
        return (mosaic < 40) + (mosaic < 15) * np.int64(self.variant % 3)

    def grid(self) -> Ints:
        return ((_X % self.period < 2) | (_Y % self.period < 2)).astype(np.int64)

    def bricks(self) -> Ints:
        joint = (_X + (_Y // self.half % 2) * self.half) % self.period < 2
        return ((_Y % self.half < 2) | joint).astype(np.int64)

    def print(self) -> Ints:
        cell, slot = max(2, self.period // 6), np.int64(1 + self.variant % 2)
        return np.asarray(_emblems()[self.variant % EMBLEMS][_Y // cell % 6, _X // cell % 6] * slot)

    def blocks(self) -> Ints:
        return np.where(_Y % (4 * self.period) < 2 * self.period, self.bars(_X), 2 * self.bars(_Y))


# A pattern of number n is drawn by rule n mod 16; a rule answers colour slots 0..3. (128, 128)
_RULES: tuple[Callable[[_Weave], Ints], ...] = (
    lambda w: w.stripes(_Y),
    lambda w: w.stripes(_X),
    lambda w: w.stripes(_X + _Y),
    lambda w: w.stripes(_X - _Y + _TILE),
    lambda w: (_X // w.half + _Y // w.half) % 2,
    lambda w: w.bars(_X) + w.bars(_Y),
    lambda w: w.bars(_X) + 2 * w.bars(_Y, widen=2),
    _Weave.dots,
    lambda w: w.stripes(_Y + w.zigzag(_X)),
    lambda w: w.stripes(_X + w.zigzag(_Y)),
    _Weave.diamonds,
    _Weave.camouflage,
    _Weave.grid,
    _Weave.bricks,
    _Weave.print,
    _Weave.blocks,
)


@lru_cache(maxsize=1)
def _patterns() -> Bytes:
    """Colour slots of all cloth patterns. (480, 128, 128)"""
    numbers = state(np.arange(PATTERNS))
    period = np.take(_PERIODS, pick(len(_PERIODS), "period", numbers))
    duty = np.maximum(2, period * (1 + pick(3, "duty", numbers)) // 5)
    variant = pick(997, "extra", numbers)
    weaves = [_Weave(int(p), int(d), int(v)) for p, d, v in zip(period, duty, variant, strict=True)]
    tiles = [_RULES[n % len(_RULES)](weave) for n, weave in enumerate(weaves)]
    tiles[PLAIN] = np.zeros_like(_X)
    return np.stack(tiles).astype(np.uint8)


@lru_cache(maxsize=1)
def _emblems() -> Bytes:
    """Emblems of 5 x 5 cells, mirror-symmetric like most logos, with an empty margin on two sides. (96, 6, 6)"""
    numbers, rows, cols = np.meshgrid(np.arange(EMBLEMS), np.arange(6), np.arange(6), indexing="ij")
    cells = pick(2, "glyph", state(numbers, rows, np.minimum(cols, 4 - cols)))
    return (cells * (rows < 5) * (cols < 5)).astype(np.uint8)


def colour_slots(number: Small, y: Small, x: Small) -> Bytes:
    """Slot 0..3 of each person's pattern at canvas points, repeated in all directions. Broadcast together."""
    row = (y & (_TILE - 1)).astype(np.int64)
    return np.asarray(_patterns().reshape(-1)[(number.astype(np.int64) * _TILE + row) * _TILE + (x & (_TILE - 1))])


def inked(number: Small, row: Small, col: Small) -> Mask:
    """Whether a cell of an emblem is ink. row, col: 0..4, and 5 for outside of it. Broadcast together."""
    return np.asarray(_emblems().reshape(-1)[number * 36 + row * 6 + col] > 0)
