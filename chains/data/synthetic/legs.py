"""Legs, trousers, shoes and skirts.

The one surprise: a skirt is worn over the trousers, not in their place, and is cut from the same cloth.
"""

from __future__ import annotations

import numpy as np

from chains.data.synthetic.arrays import Small
from chains.data.synthetic.canvas import FLAT, MIDDLE, Part, choose, only, profile, span
from chains.data.synthetic.figure import Figure
from chains.data.synthetic.materials import LEGS, PATCH, SEAM, SHOE, SKIN, SOCK, SOLE


def paint_leg(figure: Figure, near: int) -> None:
    """near: 1 for the leg nearer to the camera, -1 for the other"""
    rows, cols = slice(122, 236), slice(16, 112)
    side = near * figure.heading
    apart = side * (9 + figure.build // 3) * figure.cos >> 6
    step = near * figure.stride * figure.turned >> 6
    ankle = MIDDLE + apart + step * 3 // 2 + side * (figure.stride // 4)
    centre = profile(rows, (122, 178, 235), (MIDDLE + apart * 3 // 4, MIDDLE + apart + step // 2, ankle))
    slim, flare = figure.build // 3, figure.person.pick(4, "trouser cut") * 2
    half = profile(rows, (122, 150, 180, 235), (12 + slim, 11 + slim, 8 + slim, 5 + flare))
    leg = figure.canvas.part(rows, cols, centre, half)
    _paint_trousers(figure, leg, outside=side * figure.mirror, bright=FLAT if near > 0 else FLAT - 10)
    _paint_shoe(figure, ankle)


def _paint_trousers(figure: Figure, leg: Part, outside: Small, bright: int) -> None:
    person = figure.person
    end = np.where(figure.is_warm("trousers"), 236, choose((214, 184, 170), person.pick(3, "trouser length")))
    bare = leg.down > end
    leg.paint(np.where(bare, np.uint8(SKIN), figure.cloth(leg, "trousers", LEGS)), bright)
    leg.paint_detail(bare & figure.has("socks") & (leg.down > person.between(206, 226, "sock height")), SOCK)
    cloth = leg.without(bare)
    cloth.paint_detail(figure.has("cuffs", 3) & (leg.down > end - 7), SEAM)
    seam = np.abs(leg.across - outside * leg.half * 3 // 4) <= 1 + person.pick(2, "seam width")
    cloth.paint_detail(seam & figure.has("seam", 2), SEAM)
    knee = np.abs(leg.down - person.between(160, 190, "knee patch height")) < 6
    cloth.paint_detail(knee & figure.has("knee patch", 3), PATCH)


def _paint_shoe(figure: Figure, ankle: Small) -> None:
    rows, cols = slice(228, 248), slice(8, 120)
    person, toe = figure.person, figure.sin * 7 >> 6
    below_the_top = span(rows) >= 238 - 3 * person.pick(3, "shoe height")
    half = only(below_the_top, profile(rows, (228, 238, 247), (5, 6, 7 + np.abs(toe) // 3)))
    shoe = figure.canvas.part(rows, cols, profile(rows, (228, 247), (ankle, ankle + toe)), half)
    shoe.paint(SHOE)
    shoe.paint_detail(shoe.down > 245 - person.pick(3, "sole height"), SOLE)
    shoe.paint_detail((shoe.down % 4 < 2) & person.chance(30, "shoe stripes"), SOLE)


def paint_skirt(figure: Figure) -> None:
    rows, cols, person = slice(116, 204), slice(20, 108), figure.person
    end = np.where(person.chance(16, "skirt"), person.between(160, 202, "skirt length"), np.int16(0))
    hem = figure.narrow(20 + person.pick(10, "skirt width"))
    half = only(span(rows) <= end, profile(rows, (116, 203), (figure.narrow(20), hem)))
    skirt = figure.canvas.part(rows, cols, MIDDLE, half)
    skirt.paint(figure.cloth(skirt, "trousers", LEGS))
    skirt.paint_detail(skirt.down > end - 6, SEAM)
