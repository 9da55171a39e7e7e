"""From packed points to the pixels of a photograph: light, lens, tone curve and sensor noise.

The one surprise: there is no floating point and no power function. Shares are 64ths and hundredths, the gamma is a
rational curve, noise is a table; so every processor gives the same bits.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from chains.data.synthetic.arrays import Bytes, Ints, Small, Words, each, unpack
from chains.data.synthetic.choices import Shot
from chains.data.synthetic.draws import smooth_noise, state


def develop(points: Words, shot: Shot) -> Bytes:
    """Points with shade in the top byte -> RGB. (n, 2 height, 2 width) -> (n, height, width, 3)"""
    settings = shot.settings
    packed = _halve(points)
    out = np.empty((*packed.shape, 3), np.uint8)
    shade = unpack(packed, 3) + _windows(_folds(), shot, "folds")
    curves = _tone_curves(shot).reshape(-1)
    first = (np.arange(len(packed)) * 3 * 256)[:, None, None]  # where the curves of each image begin
    blur = each((shot.of_camera(64, "focus") + shot.pick(32, "motion")) * settings.blur_percent // 100)
    noise = each((shot.of_camera(24, "sensor") + 4) * settings.noise_percent // 100)
    grain = _windows(_grain(), shot, "grain") * noise >> 6
    for channel in range(3):
        lit = np.minimum(unpack(packed, channel) * shade >> 6, 255)
        toned = curves[first + channel * 256 + _blurred(lit, blur)]
        out[..., channel] = np.clip(toned + grain, 0, 255)
    return out


def _halve(packed: Words) -> Words:
    """Mean of 2 x 2 points on four bytes at once: halving each byte first keeps them apart."""
    keep = np.uint32(0xFEFEFEFE)
    rows = ((packed[:, ::2] & keep) >> np.uint32(1)) + ((packed[:, 1::2] & keep) >> np.uint32(1))
    rows &= keep
    rows >>= np.uint32(1)
    return np.asarray(rows[:, :, ::2] + rows[:, :, 1::2])


@lru_cache(maxsize=1)
def _folds() -> Small:
    """Soft light and dark of cloth and uneven light, about -20..20. (512, 512)"""
    fine = smooth_noise(512, 512, 6, "folds")
    broad = smooth_noise(512, 512, 40, "shadows")
    return ((fine - 128) // 16 + (broad - 128) // 10).astype(np.int16)


@lru_cache(maxsize=1)
def _grain() -> Small:
    """Sensor noise, roughly bell-shaped: the sum of four uniform bytes, about -100..100. (1024, 512)"""
    bits = state(np.arange(1024 * 512))
    total: Ints = np.zeros(len(bits), np.int64)
    for byte in range(4):
        total += ((bits >> np.uint64(8 * byte)) & np.uint64(255)).astype(np.int64)
    return ((total - 510) // 5).astype(np.int16).reshape(1024, 512)


def _windows(table: Small, shot: Shot, name: str) -> Small:
    """A random window of a table per image. (n, height, width)"""
    height, width = shot.settings.height, shot.settings.width
    if table.shape[0] < 2 * height or table.shape[1] < 2 * width:
        table = np.tile(table, (-(-2 * height // table.shape[0]), -(-2 * width // table.shape[1])))
    top = shot.pick(table.shape[0] - height, name + " top")
    left = shot.pick(table.shape[1] - width, name + " left")
    return np.stack([table[t : t + height, s : s + width] for t, s in zip(top, left, strict=True)])


def _blurred(plane: Small, strength: Small) -> Small:
    """Towards the 3 x 3 binomial mean by strength 64ths, in place of a lens out of focus. plane: (n, height, width)"""
    padded = np.pad(plane, ((0, 0), (1, 1), (1, 1)), mode="edge")
    tall = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    mean = (tall[:, :, :-2] + 2 * tall[:, :, 1:-1] + tall[:, :, 2:]) >> 4
    return np.asarray(plane + ((mean - plane) * strength >> 6))


def _tone_curves(shot: Shot) -> Bytes:
    """Per image and channel, the camera's curve: gain, cast, gamma, lifted blacks. (n, 3, 256)

    The gamma is Schlick's rational bias curve x / (x + g (1 - x)): no power function, the same bits everywhere.
    """
    cast = shot.settings.cast_percent
    x = np.arange(256)
    curves = []
    for channel in range(3):
        steady = shot.of_camera(2 * cast + 1, f"cast {channel}") - cast
        passing = (shot.pick(2 * cast + 1, f"light {channel}") - cast) // 2
        gain = 100 + steady + passing + (shot.pick(41, "exposure") - 20)
        bend = 65 + shot.of_camera(60, "gamma") + (steady + passing) // 2  # 100 g
        lift = shot.of_camera(18, f"lift {channel}") + shot.pick(12, "haze")
        light = np.clip(x * gain[:, None] // 100, 0, 255)
        curve = 255 * 100 * light // np.maximum(1, 100 * light + bend[:, None] * (255 - light))
        curves.append(lift[:, None] + curve * (255 - lift[:, None]) // 255)
    return np.asarray(np.clip(np.stack(curves, axis=1), 0, 255).astype(np.uint8))
