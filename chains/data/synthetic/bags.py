"""What people carry: nothing, a backpack with its straps, a shoulder bag, a handbag or a waist bag.

The one surprise: a backpack is painted twice, behind the body and over it; each time for the people whose body hides it
or does not.
"""

from __future__ import annotations

import numpy as np

from chains.data.synthetic.arrays import Mask, Small
from chains.data.synthetic.canvas import MIDDLE, choose, only, profile, span
from chains.data.synthetic.figure import Figure
from chains.data.synthetic.materials import BAG, BAG_2

# Of eight draws, the first three carry nothing.
_BACKPACK, _SHOULDER_BAG, _HANDBAG, _WAIST_BAG = (3, 4), (5,), (6,), (7,)
_AT_THE_HIP = _SHOULDER_BAG + _HANDBAG + _WAIST_BAG
_HIP_TOPS = (0, 0, 0, 0, 0, 108, 132, 104)  # the upper edge of each


def _carries(figure: Figure, draws: tuple[int, ...]) -> Mask:
    return np.isin(figure.person.pick(8, "bag"), draws)


def paint_backpack(figure: Figure, seen: Mask) -> None:
    """On the back; past the shoulders from the front, behind the body from the side."""
    rows, person = slice(54, 118), figure.person
    wide = 14 + person.pick(8, "backpack width")
    top, bottom = figure.narrow(wide * 2 // 3), figure.narrow(wide)
    end = np.where(seen & _carries(figure, _BACKPACK), person.between(88, 116, "backpack length"), np.int16(0))
    half = only(span(rows) <= end, profile(rows, (54, 62, 117), (top, bottom, bottom)))
    bag = figure.canvas.part(rows, slice(24, 104), MIDDLE - (figure.sin * 18 >> 6), half)
    bag.paint(BAG)
    pocket = (bag.down > person.between(76, 100, "backpack pocket")) & (np.abs(bag.across) < half - 4)
    bag.paint_detail(pocket, BAG_2)
    bag.paint_detail((bag.down % 16 < 2) & person.chance(40, "backpack lines"), BAG_2)


def paint_straps(figure: Figure) -> None:
    """One across the body for a shoulder bag, two down the chest for a backpack."""
    rows, cols = slice(52, 116), slice(24, 104)
    tilt = _strap_side(figure) * np.sign(figure.cos)
    slung = profile(rows, (52, 115), (MIDDLE - tilt * figure.narrow(14), MIDDLE + tilt * figure.narrow(18)))
    strap = figure.canvas.part(rows, cols, slung, only(_carries(figure, _SHOULDER_BAG), 2))
    strap.paint_detail(strap.inside, BAG)
    worn = _carries(figure, _BACKPACK) & figure.facing & (span(rows) < 92)
    for side in (-1, 1):
        centre = MIDDLE + side * figure.narrow(13) + (figure.sin * 4 >> 6)
        figure.canvas.part(rows, cols, centre, only(worn, 2)).paint(BAG)


def _strap_side(figure: Figure) -> Small:
    return figure.person.pick(2, "strap side") * 2 - 1


def paint_bag(figure: Figure) -> None:
    """A shoulder bag or handbag beside the hip, or a waist bag in front of it."""
    rows, person, waist = slice(96, 176), figure.person, _carries(figure, _WAIST_BAG)
    top = choose(_HIP_TOPS, person.pick(8, "bag"))
    tall = np.where(waist, np.int16(12), person.between(18, 34, "bag height"))
    wide = np.where(waist, np.int16(10), person.between(8, 15, "bag width"))
    seen = _carries(figure, _AT_THE_HIP) & ~(waist & figure.away)
    hip = np.where(waist, figure.sin * 12 >> 6, _strap_side(figure) * (figure.narrow(24) * figure.cos >> 6))
    half = only(seen & (span(rows) >= top) & (span(rows) < top + tall), wide)
    bag = figure.canvas.part(rows, slice(4, 124), MIDDLE + hip, half)
    bag.paint(BAG)
    bag.paint_detail((bag.down < top + tall // 3) & person.chance(50, "bag flap"), BAG_2)
