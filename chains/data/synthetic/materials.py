"""What a point of a picture is made of, and the colour each material has on each person.

The one surprise: the numbers are data. A material's number is part of the name of its draws, and a garment's four
colours are its first number plus a pattern's slot 0..3; so the order below cannot change without changing pictures.
"""

from __future__ import annotations

import numpy as np

from chains.data.synthetic.arrays import Words, pack
from chains.data.synthetic.choices import Person, Shot

MATERIALS = 32
(
    BACKGROUND, SKIN, FACE, HAIR, HAT, HAT_TRIM, TOP, TOP_2, TOP_3, TOP_4, LEGS, LEGS_2, LEGS_3, LEGS_4,
    SHOE, SOLE, BAG, BAG_2, EMBLEM, EMBLEM_2, TRIM, INNER, BELT, SOCK, SEAM, BAND, SLEEVE, SCARF, FRONT, FRONT_2,
    PATCH, DARK,
) = range(MATERIALS)  # fmt: skip
# FRONT and FRONT_2 are the occluder's two colours, INNER is what shows under an open jacket, PATCH is on the knee.

# Clothing colours as seen in streets: many dark and neutral ones, some strong ones. (24, 3) RGB
_CLOTH = np.array(
    [
        (28, 28, 32), (44, 46, 54), (70, 72, 78), (104, 104, 108), (150, 150, 150), (196, 196, 192), (236, 234, 228),
        (24, 36, 70), (74, 48, 36), (40, 66, 122), (70, 110, 176), (130, 168, 206), (26, 84, 84), (36, 92, 48),
        (92, 120, 60), (160, 176, 84), (206, 180, 60), (222, 132, 44), (196, 60, 44), (128, 28, 36), (206, 110, 140),
        (120, 62, 120), (126, 90, 60), (190, 160, 120),
    ],
    dtype=np.int64,
)  # fmt: skip
_MUTED = 9  # the first colours are the dark and neutral ones
_SKIN = np.array([(236, 196, 170), (214, 166, 132), (184, 132, 98), (140, 94, 66), (98, 64, 46), (68, 46, 36)])
_HAIR = np.array(
    [(20, 18, 18), (40, 28, 22), (70, 46, 30), (112, 76, 44), (176, 140, 84), (140, 60, 34), (150, 148, 146)]
)


def palette(person: Person, shot: Shot) -> Words:
    """Colour of every material of every figure, packed. BACKGROUND stays black: pixels come from elsewhere. (n, 32)"""
    colours = np.zeros((len(person.own), MATERIALS, 3), np.int64)
    for material in range(HAT, PATCH + 1):
        muted = person.chance(person.settings.muted_percent, f"muted {material}")
        cloth = person.pick(len(_CLOTH), f"colour {material}")
        # Three digits of base 17, one per channel: no two blacks are quite the same.
        dye = person.pick(17**3, f"dye {material}").ravel()[:, None] // (1, 17, 289) % 17 - 8
        colours[:, material] = _CLOTH[np.where(muted, cloth % _MUTED, cloth).ravel()] + dye
    colours[:, SKIN] = colours[:, FACE] = _SKIN[person.pick(len(_SKIN), "skin").ravel()]
    colours[:, HAIR] = _HAIR[person.pick(len(_HAIR), "hair colour").ravel()]
    colours[:, DARK] = 24
    for material in (FRONT, FRONT_2):  # an occluder does not belong to the person
        colours[:, material] = _CLOTH[shot.pick(len(_CLOTH), f"occluder colour {material}")]
    return pack(np.clip(colours, 4, 250))
