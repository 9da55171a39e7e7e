"""What a detector's box shows of a painted figure, and what stands in front of it.

The one surprise: nothing is ever painted on the outermost rows and columns of a canvas, so a look past its edge, which
is a look at the edge, sees background.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from chains.data.synthetic.arrays import Bytes, Ints, Small
from chains.data.synthetic.canvas import COLS, FLAT, MIDDLE, ROWS
from chains.data.synthetic.choices import Shot
from chains.data.synthetic.materials import FRONT, FRONT_2

_Box: TypeAlias = tuple[slice, slice]


@dataclass(frozen=True)
class Crop:
    """Where each pixel of the doubled output looks on the canvas: a detector's box is never quite right."""

    rows: Ints  # (n, 2 height)
    cols: Small  # (n, 2 height, 2 width); a leaning person moves sideways from row to row

    @classmethod
    def of(cls, shot: Shot) -> Crop:
        settings = shot.settings
        height, width = 2 * settings.height, 2 * settings.width
        jitter, shift = settings.scale_jitter_percent, settings.shift_jitter_percent
        zoom = 1024 * (100 + shot.between(-jitter, jitter, "scale")) // 106  # 1024ths
        wide = zoom * (100 + shot.between(-jitter // 2, jitter // 2, "aspect")) // 112
        up = shot.between(-shift, shift, "up") * ROWS // 100
        aside = shot.between(-shift, shift, "aside") * COLS // 100
        y = np.arange(height) * ROWS // height - ROWS // 2
        x = np.arange(width) * COLS // width - COLS // 2
        rows = (zoom[:, None] * y >> 10) + ROWS // 2 + up[:, None]
        lean = shot.between(-16, 16, "lean")[:, None] * (rows - 240) >> 8  # about the feet
        across = (wide[:, None] * x >> 10).astype(np.int16)
        cols = across[:, None, :] + (MIDDLE + aside[:, None] + lean).astype(np.int16)[:, :, None]
        return cls(np.clip(rows, 0, ROWS - 1), np.clip(cols, 0, COLS - 1))

    def look(self, layer: Bytes) -> Bytes:
        """The canvas through the crop. (n, 256, 128) -> (n, 2 height, 2 width)"""
        rows = self.rows + np.arange(len(layer))[:, None] * ROWS
        return np.asarray(layer.reshape(-1)[(rows * COLS)[:, :, None] + self.cols])


def paint_occluders(material: Bytes, shade: Bytes, shot: Shot) -> None:
    """Put a post, a low wall or a passing box before some images, never over more than two fifths of the crop."""
    height, width = material.shape[1:]
    occluded = shot.pick(100, "occluded") < shot.settings.occlusion_percent
    kind, place, size = shot.pick(3, "occluder"), shot.pick(100, "occluder place"), shot.pick(100, "occluder size")
    for i in np.flatnonzero(occluded):
        box, stripes = _obstacle(int(kind[i]), int(place[i]), int(size[i]), height, width)
        material[i][box] = FRONT
        material[i][box][stripes] = FRONT_2
        shade[i][box] = FLAT


def _obstacle(kind: int, place: int, size: int, height: int, width: int) -> tuple[_Box, _Box]:
    """The box an occluder covers, and inside it where its second colour goes. place, size: 0..99"""
    if kind == 0:  # a post
        wide = width * (8 + size // 8) // 100
        left = place * (width - wide) // 100
        return (slice(None), slice(left, left + wide)), (slice(None), slice(0, wide // 3))
    if kind == 1:  # a low wall
        return (slice(height * (65 + size // 5) // 100, None), slice(None)), (slice(0, height // 40), slice(None))
    # a passing box, in one of the lower corners
    wide, tall = width * (20 + size // 5) // 100, height * (25 + place // 4) // 100
    left = 0 if place % 2 else width - wide
    return (slice(height - tall, None), slice(left, left + wide)), (slice(None, None, 8), slice(None))
