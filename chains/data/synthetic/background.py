"""What stands behind people: every camera has a panorama, every shot a window of it.

The one surprise: no person takes part in a draw here, so the background never tells who stands in front of it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from chains.data.synthetic.arrays import Ints, Words, pack
from chains.data.synthetic.canvas import COLS, ROWS
from chains.data.synthetic.choices import Shot
from chains.data.synthetic.draws import pick, smooth_noise, state

_HEIGHT, _WIDTH = 384, 1024  # of a panorama, in canvas points
_BOXES = 90  # pieces of furniture


@lru_cache(maxsize=64)
def _panorama(seed: int, camid: int) -> Words:
    """Wall, floor, furniture and texture of one camera, packed. (384, 1024)"""
    boxes = state(np.arange(_BOXES), seed, camid)
    horizon = _HEIGHT // 3 + int(pick(_HEIGHT // 3, "horizon", state(seed, camid))[0])
    scene = np.empty((_HEIGHT, _WIDTH, 3), np.int64)
    scene[:horizon], scene[horizon:] = _surfaces(2, "ground", seed, camid)
    tops, lefts = pick(_HEIGHT, "top", boxes), pick(_WIDTH, "left", boxes)
    talls, wides = 8 + pick(120, "tall", boxes), 4 + pick(90, "wide", boxes)
    paints = _surfaces(_BOXES, "box", seed, camid)
    for top, left, tall, wide, paint in zip(tops, lefts, talls, wides, paints, strict=True):
        scene[top : top + tall, left : left + wide] = paint
    scene += (smooth_noise(_HEIGHT, _WIDTH, 48, "mist", seed, camid) // 3 - 42)[..., None]
    scene += (smooth_noise(_HEIGHT, _WIDTH, 5, "grain", seed, camid) // 6 - 21)[..., None]
    return pack(np.clip(scene, 0, 255))


def _surfaces(n: int, name: str, *keys: int) -> Ints:
    """Colours for n surfaces: mostly greyish, now and then a painted one. (n, 3)"""
    surfaces = state(np.arange(n), *keys)
    tint = np.stack([pick(200, f"{name} {channel}", surfaces) for channel in range(3)], axis=1) - 100
    strength = np.where(pick(100, name + " painted", surfaces) < 20, 60, 16)
    light = 40 + pick(170, name + " light", surfaces)
    return np.asarray(light[:, None] + tint * strength[:, None] // 100)


def backgrounds(shot: Shot) -> Words:
    """A window of the camera's panorama per image, packed. (n, 2 height, 2 width)"""
    height, width = 2 * shot.settings.height, 2 * shot.settings.width
    y = np.arange(height) * ROWS // height
    x = np.arange(width) * COLS // width
    top = shot.pick(_HEIGHT - ROWS, "window top")
    left = shot.pick(_WIDTH - COLS, "window left")
    out = np.empty((len(top), height, width), np.uint32)
    for i, camid in enumerate(shot.camids):
        out[i] = _panorama(shot.settings.seed, int(camid))[(y + top[i])[:, None], x + left[i]]
    return out
