"""The canvas of n figures and the parts painted on it: each a box, a centre line and a half width for every row.

The one surprise: a half width of -1 means that the part is not there. So all n figures go through the same steps, and
who has no bag gets one of width -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isqrt

import numpy as np
import numpy.typing as npt

from chains.data.synthetic.arrays import Bytes, Ints, Mask, Small, each

ROWS, COLS = 256, 128  # canvas points; twice the default crop, so that each pixel averages four
MIDDLE = COLS // 2
FLAT = 54  # shade of a surface that faces the light, in 64ths
_ABSENT = np.int16(-1)


def span(rows: slice) -> Small:
    """The canvas rows of a box. (rows, 1)"""
    return np.arange(rows.start, rows.stop, dtype=np.int16)[:, None]


def choose(options: Sequence[int], index: Small) -> Small:
    """One of a few numbers per figure."""
    return np.asarray(np.array(options, np.int16)[index])


def only(where: Mask, half: npt.ArrayLike) -> Small:
    """A half width where the part is there, and none elsewhere."""
    return np.where(where, np.asarray(half, np.int16), _ABSENT)


def profile(rows: slice, knots: Sequence[int], values: Sequence[npt.ArrayLike]) -> Small:
    """Per-figure numbers at some canvas rows, joined by straight lines. values: k of (n, 1, 1) -> (n, rows, 1)

    >>> profile(slice(0, 5), (0, 4), (np.array([0]), np.array([8]))).ravel().tolist()
    [0, 2, 4, 6, 8]
    """
    y = span(rows).astype(np.int64)
    bounded = np.clip(y, knots[0], knots[-1])
    total = np.zeros((1, len(y), 1), np.int64)
    for k, value in enumerate(values):
        total = total + each(value).astype(np.int64) * _tent(bounded, knots, k)
    return np.asarray((total >> 8).astype(np.int16))


def _tent(y: Ints, knots: Sequence[int], k: int) -> Ints:
    """How much knot k counts at row y, in 256ths: 256 at the knot, falling to 0 at its neighbours."""
    weight = np.where(y == knots[k], 256, 0)
    for other in knots[max(k - 1, 0) : k + 2]:
        between = (y > min(other, knots[k])) & (y < max(other, knots[k]))
        weight = np.where(between, 256 - np.abs(y - knots[k]) * 256 // max(1, abs(other - knots[k])), weight)
    return weight


def ellipse(rows: slice, middle: int, tall: int, half: npt.ArrayLike) -> Small:
    """Half widths of an ellipse around row `middle`, `tall` up and down. half: (n, 1, 1) -> (n, rows, 1)"""
    chord = [isqrt(max(0, tall * tall - (y - middle) ** 2)) for y in range(rows.start, rows.stop)]
    across = np.array(chord, np.int16)[:, None]
    return only(across > 0, np.asarray(half, np.int16) * across // tall)


@dataclass(frozen=True)
class Part:
    """A part on the canvas: the box it lies in, how far each point is across it, and which points are inside."""

    material: Bytes  # (n, rows, cols), a view of the canvas
    shade: Bytes  # (n, rows, cols), a view of the canvas
    across: Small  # (n, rows, cols), columns from the centre line
    down: Small  # (rows, 1), canvas rows
    half: Small  # (n, rows, 1)
    inside: Mask  # (n, rows, cols)

    def paint(self, material: npt.ArrayLike, bright: int = FLAT) -> None:
        """Paint the part as something round: darker towards its edges, there by 14 of 64 at most."""
        bend = np.minimum(1792 // np.maximum(self.half, 2) // np.maximum(self.half, 2), 200).astype(np.int16)
        np.copyto(self.material, np.asarray(material, np.uint8), where=self.inside)
        np.copyto(self.shade, (bright - ((self.across * self.across * bend) >> 7)).astype(np.uint8), where=self.inside)

    def paint_detail(self, where: Mask, material: int) -> None:
        """Paint points of the part, keeping its shading."""
        np.copyto(self.material, np.uint8(material), where=where & self.inside)

    def between(self, top: int, bottom: int) -> Part:
        """The canvas rows top..bottom of the part only."""
        rows = slice(top - int(self.down[0, 0]), bottom - int(self.down[0, 0]))
        box = (slice(None), rows)
        return Part(
            self.material[box], self.shade[box], self.across[box], self.down[rows], self.half[box], self.inside[box]
        )

    def without(self, where: Mask) -> Part:
        return replace(self, inside=self.inside & ~where)


@dataclass(frozen=True)
class Canvas:
    """Material and shade of every point of n figures. Both (n, 256, 128)"""

    material: Bytes
    shade: Bytes

    @classmethod
    def blank(cls, n: int) -> Canvas:
        """All background, which is material 0."""
        return cls(np.zeros((n, ROWS, COLS), np.uint8), np.full((n, ROWS, COLS), FLAT, np.uint8))

    def part(self, rows: slice, cols: slice, centre: npt.ArrayLike, half: npt.ArrayLike) -> Part:
        """The part from centre - half to centre + half in each row. centre, half: broadcast to (n, rows, 1)"""
        box, shape = (slice(None), rows, cols), (len(self.material), rows.stop - rows.start, 1)
        middle = np.broadcast_to(np.asarray(centre, np.int16), shape)
        reach = np.broadcast_to(np.asarray(half, np.int16), shape)
        across = np.arange(cols.start, cols.stop, dtype=np.int16) - middle
        return Part(self.material[box], self.shade[box], across, span(rows), reach, np.abs(across) <= reach)
