"""n people in their pose, before they are painted: what each module of body parts is given.

The one surprise: left and right. Rows and columns are canvas points, so +1 is the right of the picture; a detail on one
side only belongs to the person's own side and changes sides on the picture when the person turns round.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from chains.data.synthetic.arrays import Bytes, Ints, Mask, Small, each
from chains.data.synthetic.canvas import MIDDLE, Canvas, Part, choose
from chains.data.synthetic.choices import Person, Shot
from chains.data.synthetic.patterns import PATTERNS, PLAIN, colour_slots

# Eight viewing directions, 45 degrees apart, 0 = facing the camera; in 64ths.
_COS = (64, 45, 0, -45, -64, -45, 0, 45)
_SIN = (0, 45, 64, 45, 0, -45, -64, -45)


@dataclass(frozen=True)
class Figure:
    """People, the canvas they are painted on and how they stand there. Numbers and masks are (n, 1, 1)."""

    person: Person
    canvas: Canvas
    cos: Small  # 64ths; 64 faces the camera, -64 walks away from it
    sin: Small  # 64ths; 64 walks to the right of the picture, -64 to the left
    stride: Small
    elbows: Small
    build: Small  # canvas points that a slim person lacks and a broad one has more

    @classmethod
    def of(cls, person: Person, shot: Shot) -> Figure:
        yaw = each(_direction(shot))
        return cls(
            person=person,
            canvas=Canvas.blank(len(person.own)),
            cos=choose(_COS, yaw),
            sin=choose(_SIN, yaw),
            stride=each(shot.between(-16, 16, "stride")),
            elbows=each(shot.between(1, 7, "elbows")),
            build=person.between(-4, 6, "build"),
        )

    @property
    def frontal(self) -> Small:
        """How much of the front or the back is seen, 0..64."""
        return np.abs(self.cos)

    @property
    def turned(self) -> Small:
        """How much of the side is seen, 0..64."""
        return np.abs(self.sin)

    @property
    def facing(self) -> Mask:
        return self.cos > 0

    @property
    def away(self) -> Mask:
        return self.cos < 0

    @property
    def sideways(self) -> Mask:
        return self.turned > 50

    @property
    def heading(self) -> Small:
        """The side of the picture a person walks to: 1 right, -1 left."""
        return np.where(self.sin >= 0, np.int16(1), np.int16(-1))

    @property
    def mirror(self) -> Small:
        """-1 where the person has turned round, so that own and picture sides differ; else 1."""
        return np.where(self.cos >= 0, np.int16(1), np.int16(-1))

    @property
    def width(self) -> Small:
        """64ths of the frontal width: a person is narrower from the side."""
        return 42 + (22 * self.frontal >> 6)

    def narrow(self, half: npt.ArrayLike) -> Small:
        """A frontal half width seen from this direction."""
        return np.asarray(half, np.int16) * self.width >> 6

    def has(self, detail: str, share: int = 1) -> Mask:
        """Whether the person wears an optional detail: one in `share` of those the settings grant details to."""
        return self.person.chance(self.person.settings.detail_percent // share, detail)

    def is_warm(self, garment: str) -> Mask:
        """Whether a garment is the kind for cold days."""
        return self.person.chance(self.person.settings.warm_percent, "warm " + garment)

    def cloth(self, part: Part, garment: str, first: int) -> Bytes:
        """Materials of a garment with its pattern, `first` and the three after it. (n, rows, cols)"""
        plain = self.person.chance(self.person.settings.plain_percent, garment + " plain")
        number = np.where(plain, np.int16(PLAIN), self.person.pick(PATTERNS, garment + " pattern"))
        # The texture turns with the body.
        x = (part.across * (4096 // self.width) >> 6) + MIDDLE + (self.sin * 20 >> 6)
        return np.asarray(colour_slots(number, part.down, x) + np.uint8(first))


def _direction(shot: Shot) -> Ints:
    """Which of the eight directions a person is seen from: every camera has a usual one and sees all the others."""
    return np.where(shot.pick(100, "unusual") < 50, shot.pick(8, "direction"), shot.of_camera(8, "direction"))
