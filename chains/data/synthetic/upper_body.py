"""Torso and arms: tops, coats, what is worn around, on the front and on the sleeves.

The one surprise: emblems are on the back too, so that a picture from the front and one from behind can be matched by
them.
"""

from __future__ import annotations

import numpy as np

from chains.data.synthetic.arrays import Small
from chains.data.synthetic.canvas import FLAT, MIDDLE, Part, choose, only, profile, span
from chains.data.synthetic.figure import Figure
from chains.data.synthetic.materials import BAND, BELT, DARK, EMBLEM, EMBLEM_2, INNER, SKIN, SLEEVE, TOP, TRIM
from chains.data.synthetic.patterns import EMBLEMS, inked


def paint_torso(figure: Figure) -> None:
    rows, cols, person, build = slice(46, 158), slice(24, 104), figure.person, figure.build
    coat = figure.is_warm("coat") & person.chance(30, "long coat")
    hem = person.between(116, 136, "hem") + np.where(coat, np.int16(20), np.int16(0))
    neck, shoulder, chest, waist, hip = (
        figure.narrow(h + build // s) for h, s in ((8, 8), (23, 2), (22, 1), (20, 1), (22, 1))
    )
    half = only(span(rows) <= hem, profile(rows, (46, 54, 76, 108, 150), (neck, shoulder, chest, waist, hip)))
    torso = figure.canvas.part(rows, cols, MIDDLE, half)
    torso.paint(figure.cloth(torso, "top", TOP), FLAT + 2)
    _paint_bands(figure, torso, hem)
    _paint_front(figure, torso)
    for name, material, cell in (("print", EMBLEM, 3), ("logo", EMBLEM_2, 2)):
        _paint_emblem(figure, torso.between(54, 124), name, material, cell)


def _paint_bands(figure: Figure, torso: Part, hem: Small) -> None:
    """What runs all around the body: chest band, yoke, hem, belt."""
    person, down = figure.person, torso.down
    band = np.abs(down - person.between(64, 108, "band height")) <= person.between(2, 9, "band thickness")
    torso.paint_detail(band & figure.has("band", 2), BAND)
    torso.paint_detail(figure.has("yoke", 3) & (down < person.between(60, 70, "yoke depth")), SLEEVE)
    torso.paint_detail(figure.has("hem trim", 2) & (down > hem - 1 - person.pick(5, "hem trim height")), TRIM)
    torso.paint_detail(figure.has("belt", 3) & (np.abs(down - person.between(104, 116, "belt height")) <= 2), BELT)


def _paint_front(figure: Figure, torso: Part) -> None:
    """What only the front shows: open jacket, zip or buttons, collar, pockets."""
    person, down, front = figure.person, torso.down, torso.without(~figure.facing)
    aside = np.abs(torso.across - (figure.sin * 14 >> 6))
    front.paint_detail(figure.has("open jacket", 3) & (aside < person.between(3, 8, "jacket gap")), INNER)
    closure = person.pick(4, "closure")  # 1 a zip, 2 buttons
    button = (closure == 2) & (down % (6 + 2 * person.pick(4, "button spacing")) < 3)
    front.paint_detail((aside <= 1) & ((closure == 1) | button), TRIM)
    front.paint_detail(aside < (52 + 5 * person.pick(4, "collar depth") - down) // 2, INNER)
    pocket = np.abs(down - person.between(98, 112, "pocket height")) < 4
    front.paint_detail(figure.has("pockets", 3) & pocket & (np.abs(aside - 11) < 4), TRIM)


def _paint_emblem(figure: Figure, chest: Part, name: str, material: int, cell: int) -> None:
    """A mark on the chest and the same on the back; narrower the more the person is turned, and gone from the side."""
    person, shown = figure.person, np.maximum(figure.frontal, 1)
    size = cell + person.pick(2, name + " size")
    left = person.between(-12, 2, name + " x") - 2 * cell
    left = np.where(figure.away, -left - 5 * cell, left).astype(np.int16)
    col = _cells(chest.across, left * shown >> 6, size * shown >> 6)
    row = _cells(chest.down, person.between(60, 92, name + " y"), size)
    ink = inked(person.pick(EMBLEMS, name), row, col)
    chest.paint_detail(ink & figure.has(name) & (shown > 20), material)


def _cells(position: Small, start: Small, size: Small) -> Small:
    """Which of the five cells of an emblem that starts at `start` a position falls in; 5, the empty one, outside."""
    cell = (position - start) // np.maximum(size, 1)
    return np.where((cell < 0) | (cell > 4), np.int16(5), cell)


def paint_arm(figure: Figure, near: int) -> None:
    """near: 1 for the arm nearer to the camera, -1 for the other"""
    rows, cols = slice(50, 132), slice(12, 116)
    side = near * figure.heading
    shoulder = MIDDLE + (side * figure.narrow(24 + figure.build // 2) * figure.frontal >> 6)
    swing = -near * figure.stride * figure.turned >> 6
    out = side * figure.elbows
    centre = profile(rows, (50, 90, 131), (shoulder, shoulder + out + swing // 3, shoulder + out // 2 + swing))
    slim = figure.build // 4
    half = profile(rows, (50, 56, 90, 122, 131), (3, 8 + slim, 7 + slim, 5, 5))
    arm = figure.canvas.part(rows, cols, centre, half)
    _paint_sleeve(figure, arm, own_side=side * figure.mirror, bright=FLAT + 4 if near > 0 else FLAT - 12)


def _paint_sleeve(figure: Figure, arm: Part, own_side: Small, bright: int) -> None:
    person, down = figure.person, arm.down
    bare = down > np.where(figure.is_warm("sleeves"), 122, choose((100, 78, 60), person.pick(3, "sleeve length")))
    cloth = np.where(figure.has("contrast sleeves", 3), np.uint8(SLEEVE), figure.cloth(arm, "top", TOP))
    arm.paint(np.where(bare, np.uint8(SKIN), cloth), bright)
    sleeve = arm.without(bare)
    for name, low, high, material in (("armband", 62, 96, BAND), ("cuff", 108, 120, TRIM)):
        side = person.pick(3, name + " side") - 1  # 0: on both arms
        worn = figure.has(name) & (side * own_side >= 0)
        sleeve.paint_detail(worn & (np.abs(down - person.between(low, high, name + " height")) <= 3), material)
    sleeve.paint_detail((np.abs(arm.across) <= 1) & figure.has("sleeve stripe", 3), TRIM)
    watch = figure.has("watch", 2) & ((1 - 2 * person.pick(2, "watch side")) * own_side > 0)
    arm.paint_detail(bare & watch & (np.abs(down - 118) <= 2), DARK)
