"""Head, neck and all that grows or is worn there.

The one surprise: the scarf comes before the head, which hides its upper edge, and long hair after it, over the clothes.
"""

from __future__ import annotations

import numpy as np

from chains.data.synthetic.arrays import Small
from chains.data.synthetic.canvas import FLAT, MIDDLE, Part, choose, ellipse, only, profile, span
from chains.data.synthetic.figure import Figure
from chains.data.synthetic.materials import DARK, FACE, HAIR, HAT, HAT_TRIM, SCARF, TRIM

_COLS = slice(36, 92)


def paint_head(figure: Figure) -> None:
    rows = slice(8, 52)
    centre, wide = MIDDLE + (figure.sin * 3 >> 6), 12 - (figure.turned >> 6)
    neck = profile(rows, (8, 38, 39, 51), (-1, -1, 6, 7))
    figure.canvas.part(rows, _COLS, centre, neck).paint(FACE, FLAT - 8)
    _paint_scarf(figure)
    head = figure.canvas.part(rows, _COLS, centre, ellipse(rows, 28, 17, wide))
    head.paint(FACE)
    _paint_face(figure, head)
    _paint_hair(figure, head, wide)
    _paint_hat(figure, head)


def _paint_scarf(figure: Figure) -> None:
    rows, cols = slice(42, 62), slice(40, 88)
    worn = figure.is_warm("scarf") & figure.has("scarf", 3)
    scarf = figure.canvas.part(rows, cols, MIDDLE, only(worn, profile(rows, (42, 52, 61), (9, 13, 9))))
    scarf.paint(SCARF)
    scarf.paint_detail((scarf.down % 6 < 2) & figure.person.chance(50, "scarf stripes"), TRIM)


def _paint_face(figure: Figure, head: Part) -> None:
    """Eyes, glasses, beard."""
    face, down = head.without(figure.away), head.down
    aside = np.abs(head.across - (figure.sin * 8 >> 6))
    face.paint_detail((np.abs(aside - 5) <= 1) & (np.abs(down - 26) <= 1), DARK)
    face.paint_detail((np.abs(down - 26) <= 2) & (aside < 9) & figure.person.chance(20, "glasses"), DARK)
    face.paint_detail((down > 35) & (aside < 9) & figure.person.chance(20, "beard"), HAIR)


def _paint_hair(figure: Figure, head: Part, wide: Small) -> None:
    person = figure.person
    line = np.where(figure.facing, 20, np.where(figure.away, 38, 26)).astype(np.int16)
    nape = figure.sideways & (head.across * figure.heading < -2) & (head.down < 36)
    head.paint_detail((head.down < line - 3 * person.pick(3, "hairline")) | nape, HAIR)
    style = person.pick(5, "hair style")  # 0 short, 1 a bun, 2-4 long
    _paint_long_hair(figure, choose((0, 0, 46, 62, 92), style), wide)
    rows = slice(4, 20)
    bun = only(style == 1, ellipse(rows, 12, 7, 6))
    figure.canvas.part(rows, _COLS, MIDDLE - (figure.sin * 8 >> 6), bun).paint(HAIR, FLAT - 6)


def _paint_long_hair(figure: Figure, end: Small, wide: Small) -> None:
    rows = slice(18, 96)
    outer = np.where(figure.away, wide + 1, np.where(figure.facing, wide + 2, wide - 3))
    half = only(span(rows) < end, profile(rows, (18, 30), (outer - 5, outer)))
    hair = figure.canvas.part(rows, _COLS, MIDDLE - (figure.sin * 8 >> 6), half)
    face = figure.facing & (np.abs(hair.across) < wide - 2)
    hair.without(face).paint(HAIR, FLAT - 6)


def _paint_hat(figure: Figure, head: Part) -> None:
    person = figure.person
    brim = np.where(person.chance(30, "hat"), 18 + 2 * person.pick(3, "hat depth"), np.int16(0))
    hat = head.without(head.down >= brim)
    hat.paint_detail(hat.inside, HAT)
    hat.paint_detail((head.down > brim - 5) & person.chance(50, "hat band"), HAT_TRIM)
