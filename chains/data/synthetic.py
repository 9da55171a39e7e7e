"""Synthetic people: a deterministic renderer of pedestrians, the data set of the tests, the demo and the benchmarks.

Every image is a function of (settings, pid, camid, shot) and of nothing else: all choices come from one counter-based
hash, so a crop does not depend on its batch, on the order of calls or on the machine. Pixels are integer arithmetic.

How a crop comes to be: a figure is painted part by part on a canvas of material numbers (256 x 128, twice the output
resolution), seen from one of eight directions; the canvas is scaled, leant and shifted, occluders are put in front;
materials become colours; 2 x 2 pixels are averaged; the camera adds its light, colour cast, blur and noise.

The one surprise: identities come in families of look-alikes. A family shares every attribute, and each member redraws
only some of them, so that two members may differ in a chest emblem and a trouser seam.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count
from math import isqrt
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from chains.data.images import ImageSet
from chains.errors import DataError

Ints: TypeAlias = npt.NDArray[np.int64]
Small: TypeAlias = npt.NDArray[np.int16]
Bytes: TypeAlias = npt.NDArray[np.uint8]
Words: TypeAlias = npt.NDArray[np.uint32]
Mask: TypeAlias = npt.NDArray[np.bool_]
_Box: TypeAlias = tuple[slice, slice]


FIRST_TEST_PID = 5001  # training people count from 1, test people from here, up to the 9999 of four digits


@dataclass(frozen=True)
class PeopleSettings:
    """One synthetic site: how many people, seen by which cameras, how hard to tell apart.

    Percentages are integers 0..100. `family_size` people share a wardrobe and each redraws an attribute with
    `family_change_percent`. How many people there are changes none of them, so a study may train on fewer and test on
    the same pictures. Raises `DataError` for numbers that cannot be rendered or that make a query unanswerable.
    """

    seed: int = 0
    train_identities: int = 2000
    train_images_per_identity: int = 8
    test_identities: int = 200
    queries_per_identity: int = 2
    gallery_images_per_identity: int = 8
    cameras: int = 6
    height: int = 128
    width: int = 64
    family_size: int = 4
    family_change_percent: int = 20
    plain_percent: int = 50  # garments without a pattern
    detail_percent: int = 70  # people with a given detail; rarer details take a half or a third of it
    warm_percent: int = 50  # long sleeves, long trousers, coats
    muted_percent: int = 20  # clothes dyed in dark and neutral colours only
    cast_percent: int = 10  # how far a camera's gain per colour may be off, either way; half as much again per shot
    blur_percent: int = 40  # 0: sharp; 100: a 3 x 3 binomial blur and more
    noise_percent: int = 30
    occlusion_percent: int = 25  # images with something in front
    scale_jitter_percent: int = 10
    shift_jitter_percent: int = 6

    def __post_init__(self) -> None:
        self._check("train_identities", 1, FIRST_TEST_PID - 1)
        self._check("test_identities", 1, 10000 - FIRST_TEST_PID)
        self._check("train_images_per_identity", 1, 9999)
        self._check("queries_per_identity", 1, 9999)
        self._check("cameras", 2, 64)
        self._check("gallery_images_per_identity", 2, 9999)
        self._check("family_size", 1, 9999)
        self._check("height", 16, 1024)
        self._check("width", 8, 512)
        self._check("seed", 0, 2**32 - 1)
        for name in self.__dataclass_fields__:
            if name.endswith("_percent"):
                self._check(name, 0, 100)

    def _check(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if type(value) is not int or not low <= value <= high:
            raise DataError(f"{name} must be an integer from {low} to {high}, not {value!r}")


# A second, unlike site for studies across scenarios: indoors in winter. Muted warm clothes, other cameras with stronger
# casts, more noise and blur, looser boxes; look-alikes in pairs.
STATION = PeopleSettings(
    seed=1,
    cameras=8,
    family_size=2,
    family_change_percent=24,
    plain_percent=45,
    warm_percent=90,
    muted_percent=60,
    cast_percent=20,
    blur_percent=60,
    noise_percent=60,
    occlusion_percent=15,
    scale_jitter_percent=14,
    shift_jitter_percent=8,
)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): a bijection of 64 bits that scatters close keys."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _state(*keys: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """64 scattered bits per element for some integer keys, broadcast together; arrays, so that products wrap."""
    state = np.zeros(1, dtype=np.uint64)
    for key in keys:
        state = _mix((state + _GOLDEN) ^ (np.atleast_1d(np.asarray(key)).astype(np.uint64) * _GOLDEN))
    return state


@lru_cache(maxsize=4096)
def _name(name: str) -> npt.NDArray[np.uint64]:
    return np.array([zlib.crc32(name.encode())], np.uint64) * _GOLDEN


def _pick(n: int, name: str, state: npt.NDArray[np.uint64]) -> Ints:
    """A choice of 0..n-1 per element, independent for every name. The remainder's bias is below n / 2^32."""
    bits = _mix(state ^ _name(name)) >> np.uint64(32)
    return np.asarray((bits % np.uint64(n)).astype(np.int64))


@dataclass(frozen=True)
class _Person:
    """Choices that belong to an identity: the same in every image of it, and mostly shared with its look-alikes."""

    settings: PeopleSettings
    own: npt.NDArray[np.uint64]
    family: npt.NDArray[np.uint64]

    @classmethod
    def of(cls, settings: PeopleSettings, pids: Ints) -> _Person:
        is_test = pids >= FIRST_TEST_PID
        family = np.where(is_test, pids - FIRST_TEST_PID, pids - 1) // settings.family_size
        return cls(settings, _state(settings.seed, 1, pids), _state(settings.seed, 2, is_test, family))

    def pick(self, n: int, name: str) -> Small:
        """One of 0..n-1 per person: the family's, unless this person redraws the attribute. (n, 1, 1)"""
        redrawn = _pick(100, name + " redrawn", self.own) < self.settings.family_change_percent
        return _each(_pick(n, name, np.where(redrawn, self.own, self.family)))

    def chance(self, percent: int, name: str) -> Mask:
        return self.pick(100, name) < percent

    def between(self, low: int, high: int, name: str) -> Small:
        return low + self.pick(high - low + 1, name)


@dataclass(frozen=True)
class _Shot:
    """Choices that belong to one image: pose, crop, light, what stands in front."""

    settings: PeopleSettings
    camids: Ints
    own: npt.NDArray[np.uint64]
    camera: npt.NDArray[np.uint64]

    @classmethod
    def of(cls, settings: PeopleSettings, pids: Ints, camids: Ints, shots: Ints) -> _Shot:
        seed = settings.seed
        return cls(settings, camids, _state(seed, 3, pids, camids, shots), _state(seed, 4, camids))

    def pick(self, n: int, name: str) -> Ints:
        return _pick(n, name, self.own)

    def of_camera(self, n: int, name: str) -> Ints:
        return _pick(n, name, self.camera)

    def between(self, low: int, high: int, name: str) -> Ints:
        return low + self.pick(high - low + 1, name)


(
    BACKGROUND, SKIN, FACE, HAIR, HAT, HAT_TRIM, TOP, TOP_2, TOP_3, TOP_4, LEGS, LEGS_2, LEGS_3, LEGS_4,
    SHOE, SOLE, BAG, BAG_2, EMBLEM, EMBLEM_2, TRIM, INNER, BELT, SOCK, SEAM, BAND, SLEEVE, SCARF, FRONT, FRONT_2,
    PATCH, DARK,
) = range(32)  # fmt: skip

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
MUTED = 9  # the first colours are the dark and neutral ones
_SKIN = np.array([(236, 196, 170), (214, 166, 132), (184, 132, 98), (140, 94, 66), (98, 64, 46), (68, 46, 36)])
_HAIR = np.array(
    [(20, 18, 18), (40, 28, 22), (70, 46, 30), (112, 76, 44), (176, 140, 84), (140, 60, 34), (150, 148, 146)]
)


TILE = 128
PATTERNS = 480
_AXIS = np.arange(TILE, dtype=np.int64)
_X, _Y = np.meshgrid(_AXIS, _AXIS)
_PERIODS = (6, 8, 10, 12, 16, 20, 24, 30)  # 3 to 15 pixels of the crop


@dataclass(frozen=True)
class _Weave:
    """The measures of a cloth pattern, in canvas points."""

    period: int
    duty: int
    extra: int

    @property
    def half(self) -> int:
        return self.period // 2

    def stripes(self, along: Ints) -> Ints:
        """Bands across `along`: a wide one in the second colour, in most weaves a narrow one in the third."""
        phase, thin = along % self.period, (self.extra % 3) * max(1, self.period // 8)
        return np.where(phase < self.duty, 1, np.where(phase >= self.period - thin, 2, 0))

    def zigzag(self, along: Ints) -> Ints:
        return np.asarray(np.abs(along % self.period - self.half))

    def bars(self, along: Ints, widen: int = 1) -> Ints:
        return (along % (widen * self.period) < self.duty).astype(np.int64)

    def dots(self) -> Ints:
        x = self.zigzag(_X + (_Y // self.period % 2) * self.half * (self.extra % 2))
        return (x * x + self.zigzag(_Y) ** 2 <= (self.duty // 2 + 1) ** 2).astype(np.int64)

    def diamonds(self) -> Ints:
        distance = self.zigzag(_X) + self.zigzag(_Y)
        return (distance < self.half) + (distance < self.half // 2) * np.int64(self.extra % 2)

    def camouflage(self) -> Ints:
        cell = max(3, self.half)
        mosaic = _pick(100, "cells", _state(_X // cell, _Y // cell, self.extra))
        return (mosaic < 40) + (mosaic < 15) * np.int64(self.extra % 3)

    def bricks(self) -> Ints:
        joint = (_X + (_Y // self.half % 2) * self.half) % self.period < 2
        return ((_Y % self.half < 2) | joint).astype(np.int64)

    def print(self) -> Ints:
        cell = max(2, self.period // 6)
        return np.asarray(_glyphs()[self.extra % GLYPHS][_Y // cell % 6, _X // cell % 6] * np.int64(1 + self.extra % 2))

    def blocks(self) -> Ints:
        return np.where(_Y % (4 * self.period) < 2 * self.period, self.bars(_X), 2 * self.bars(_Y))


# A pattern of number n is drawn by rule n mod 16; a rule answers colour slots 0..3. (128, 128)
_RULES: tuple[Callable[[_Weave], Ints], ...] = (
    lambda w: w.stripes(_Y),
    lambda w: w.stripes(_X),
    lambda w: w.stripes(_X + _Y),
    lambda w: w.stripes(_X - _Y + TILE),
    lambda w: (_X // w.half + _Y // w.half) % 2,
    lambda w: w.bars(_X) + w.bars(_Y),
    lambda w: w.bars(_X) + 2 * w.bars(_Y, widen=2),
    _Weave.dots,
    lambda w: w.stripes(_Y + w.zigzag(_X)),
    lambda w: w.stripes(_X + w.zigzag(_Y)),
    _Weave.diamonds,
    _Weave.camouflage,
    lambda w: ((_X % w.period < 2) | (_Y % w.period < 2)).astype(np.int64),
    _Weave.bricks,
    _Weave.print,
    _Weave.blocks,
)


GLYPHS = 96


@lru_cache(maxsize=1)
def _glyphs() -> Bytes:
    """Emblems of 5 x 5 cells, mirror-symmetric like most logos, with an empty margin on two sides. (96, 6, 6)"""
    numbers, rows, cols = np.meshgrid(np.arange(GLYPHS), np.arange(6), np.arange(6), indexing="ij")
    cells = _pick(2, "glyph", _state(numbers, rows, np.minimum(cols, 4 - cols)))
    return (cells * (rows < 5) * (cols < 5)).astype(np.uint8)


@lru_cache(maxsize=1)
def _patterns() -> Bytes:
    """All cloth patterns; number 0 is plain. (480, 128, 128)"""
    state = _state(np.arange(PATTERNS))
    period = np.take(_PERIODS, _pick(len(_PERIODS), "period", state))
    duty = np.maximum(2, period * (1 + _pick(3, "duty", state)) // 5)
    extra = _pick(997, "extra", state)
    weaves = [_Weave(int(p), int(d), int(e)) for p, d, e in zip(period, duty, extra, strict=True)]
    tiles = [_RULES[n % len(_RULES)](weave) for n, weave in enumerate(weaves)]
    tiles[0] = np.zeros_like(_X)
    return np.stack(tiles).astype(np.uint8)


ROWS, COLS, MIDDLE = 256, 128, 64


def _each(values: npt.ArrayLike) -> Small:
    """One number per image, shaped to meet that image's pixels. (n,) -> (n, 1, 1)"""
    return np.asarray(values).astype(np.int16).reshape(-1, 1, 1)


def _choose(options: Sequence[int], index: Small) -> Small:
    return np.asarray(np.array(options, np.int16)[index])


def _span(rows: slice) -> Small:
    """The canvas rows of a box. (rows, 1)"""
    return np.arange(rows.start, rows.stop, dtype=np.int16)[:, None]


def _profile(rows: slice, knots: Sequence[int], values: Sequence[npt.ArrayLike]) -> Small:
    """Per-image numbers at some canvas rows, joined by straight lines. values: k of (n, 1, 1) -> (n, rows, 1)

    >>> _profile(slice(0, 5), (0, 4), (np.array([0]), np.array([8]))).ravel().tolist()
    [0, 2, 4, 6, 8]
    """
    y = _span(rows).astype(np.int64)
    bounded = np.clip(y, knots[0], knots[-1])
    total = np.zeros((1, len(y), 1), np.int64)
    for k, value in enumerate(values):
        total = total + _each(value).astype(np.int64) * _tent(bounded, knots, k)
    return np.asarray((total >> 8).astype(np.int16))


def _tent(y: Ints, knots: Sequence[int], k: int) -> Ints:
    """How much knot k counts at row y, in 256ths: 256 at the knot, falling to 0 at its neighbours."""
    weight = np.where(y == knots[k], 256, 0)
    for other in knots[max(k - 1, 0) : k + 2]:
        between = (y > min(other, knots[k])) & (y < max(other, knots[k]))
        weight = np.where(between, 256 - np.abs(y - knots[k]) * 256 // max(1, abs(other - knots[k])), weight)
    return weight


def _ellipse(rows: slice, middle: int, tall: int, half: Small) -> Small:
    """Half widths of an ellipse, -1 outside it. half: (n, 1, 1) -> (n, rows, 1)"""
    chord = [isqrt(max(0, tall * tall - (y - middle) ** 2)) for y in range(rows.start, rows.stop)]
    across = np.array(chord, np.int16)[:, None]
    return np.where(across > 0, half * across // tall, np.int16(-1))


@dataclass(frozen=True)
class _Patch:
    """A body part on the canvas: the box it lies in, how far each point is across it, and which points are inside."""

    material: Bytes  # (n, rows, cols), a view of the canvas
    shade: Bytes
    across: Small
    down: Small  # (rows, 1), canvas rows
    half: Small  # (n, rows, 1)
    inside: Mask

    def fill(self, material: npt.ArrayLike, bright: int = 54) -> None:
        """Paint the part as something round: darker towards its edges."""
        bend = np.minimum(1792 // np.maximum(self.half, 2) // np.maximum(self.half, 2), 200).astype(np.int16)
        np.copyto(self.material, np.asarray(material, np.uint8), where=self.inside)
        np.copyto(self.shade, (bright - ((self.across * self.across * bend) >> 7)).astype(np.uint8), where=self.inside)

    def detail(self, where: Mask, material: int) -> None:
        """Paint points of the part, keeping its shading."""
        np.copyto(self.material, np.uint8(material), where=where & self.inside)

    def between(self, top: int, bottom: int) -> _Patch:
        """The canvas rows top..bottom of the part only."""
        part = slice(top - int(self.down[0, 0]), bottom - int(self.down[0, 0]))
        box = (slice(None), part)
        return _Patch(
            self.material[box], self.shade[box], self.across[box], self.down[part], self.half[box], self.inside[box]
        )

    def without(self, where: Mask) -> _Patch:
        return replace(self, inside=self.inside & ~where)


@dataclass(frozen=True)
class _Canvas:
    """Material and shade of every point of n figures. Both (n, 256, 128)"""

    material: Bytes
    shade: Bytes

    @classmethod
    def blank(cls, n: int) -> _Canvas:
        return cls(np.zeros((n, ROWS, COLS), np.uint8), np.full((n, ROWS, COLS), FLAT, np.uint8))

    def part(self, rows: slice, cols: slice, centre: npt.ArrayLike, half: Small) -> _Patch:
        """The part spanning centre +- half in each row; half < 0 means not there. half: (n, rows, 1)"""
        box = (slice(None), rows, cols)
        middle = np.broadcast_to(np.asarray(centre, np.int16), half.shape)
        across = np.arange(cols.start, cols.stop, dtype=np.int16) - middle
        return _Patch(self.material[box], self.shade[box], across, _span(rows), half, np.abs(across) <= half)


FLAT = 54  # shade of a surface that faces the light, in 64ths


# Eight viewing directions, 45 degrees apart, 0 = facing the camera; in 64ths.
_COS = (64, 45, 0, -45, -64, -45, 0, 45)
_SIN = (0, 45, 64, 45, 0, -45, -64, -45)


class _Figure:
    """Paints n people; attributes come from `person`, pose and direction from `shot`.

    Rows and columns are canvas points. Left and right are the person's own where a detail sits on one side only, so
    that it changes sides on the picture when the person turns round.
    """

    def __init__(self, person: _Person, shot: _Shot) -> None:
        self.person, self.settings = person, person.settings
        self.canvas = _Canvas.blank(len(person.own))
        yaw = _each(_direction(shot))
        self.cos, self.sin = _choose(_COS, yaw), _choose(_SIN, yaw)
        self.turned, self.frontal = np.abs(self.sin), np.abs(self.cos)
        self.heading = np.where(self.sin >= 0, np.int16(1), np.int16(-1))
        self.mirror = np.where(self.cos >= 0, np.int16(1), np.int16(-1))
        self.facing, self.away, self.sideways = self.cos > 0, self.cos < 0, self.turned > 50
        self.width = 42 + (22 * self.frontal >> 6)  # of 64: a person is narrower from the side
        self.build = person.between(-4, 6, "build")
        self.stride, self.elbows = _each(shot.between(-16, 16, "stride")), _each(shot.between(1, 7, "elbows"))

    def paint(self) -> _Canvas:
        """From far to near."""
        self._backpack(seen=~self.away)
        self._arm(-1)
        self._leg(-1)
        self._leg(1)
        self._torso()
        self._skirt()
        self._arm(1)
        self._head()
        self._backpack(seen=self.away)
        self._straps()
        self._bag()
        return self.canvas

    def _narrow(self, half: npt.ArrayLike) -> Small:
        """A frontal half width seen from this direction."""
        return np.asarray(half, np.int16) * self.width >> 6

    def _has(self, name: str, share: int = 1) -> Mask:
        """Whether the person wears an optional detail: one in `share` of those the settings grant details to."""
        return self.person.chance(self.settings.detail_percent // share, name)

    def _warm(self, garment: str) -> Mask:
        return self.person.chance(self.settings.warm_percent, "warm " + garment)

    def _cloth(self, patch: _Patch, garment: str, base: int) -> Bytes:
        """Material numbers of a garment's pattern; the texture turns with the body. (n, rows, cols)"""
        plain = self.person.chance(self.settings.plain_percent, garment + " plain")
        number = np.where(plain, 0, self.person.pick(PATTERNS, garment + " pattern")).astype(np.int64)
        u = ((patch.across * (4096 // self.width) >> 6) + MIDDLE + (self.sin * 20 >> 6)) & (TILE - 1)
        v = (patch.down & (TILE - 1)).astype(np.int64)
        return np.asarray(_patterns().reshape(-1)[(number * TILE + v) * TILE + u] + np.uint8(base))

    def _leg(self, near: int) -> None:
        rows, cols = slice(122, 236), slice(16, 112)
        side = near * self.heading
        apart = side * (9 + self.build // 3) * self.cos >> 6
        step = near * self.stride * self.turned >> 6
        ankle = MIDDLE + apart + step * 3 // 2 + side * (self.stride // 4)
        centre = _profile(rows, (122, 178, 235), (MIDDLE + apart * 3 // 4, MIDDLE + apart + step // 2, ankle))
        slim, flare = self.build // 3, self.person.pick(4, "trouser cut") * 2
        half = _profile(rows, (122, 150, 180, 235), (12 + slim, 11 + slim, 8 + slim, 5 + flare))
        self._trousers(self.canvas.part(rows, cols, centre, half), side * self.mirror, FLAT if near > 0 else FLAT - 10)
        self._shoe(ankle)

    def _trousers(self, leg: _Patch, outside: Small, bright: int) -> None:
        person = self.person
        end = np.where(self._warm("trousers"), 236, _choose((214, 184, 170), person.pick(3, "trouser length")))
        bare = leg.down > end
        leg.fill(np.where(bare, np.uint8(SKIN), self._cloth(leg, "trousers", LEGS)), bright)
        leg.detail(bare & self._has("socks") & (leg.down > person.between(206, 226, "sock height")), SOCK)
        cloth = leg.without(bare)
        cloth.detail(self._has("cuffs", 3) & (leg.down > end - 7), SEAM)
        seam = np.abs(leg.across - outside * leg.half * 3 // 4) <= 1 + person.pick(2, "seam width")
        cloth.detail(seam & self._has("seam", 2), SEAM)
        knee = np.abs(leg.down - person.between(160, 190, "knee patch height")) < 6
        cloth.detail(knee & self._has("knee patch", 3), PATCH)

    def _shoe(self, ankle: Small) -> None:
        rows, cols = slice(228, 248), slice(8, 120)
        person, toe = self.person, self.sin * 7 >> 6
        half = _profile(rows, (228, 238, 247), (5, 6, 7 + np.abs(toe) // 3))
        half = np.where(_span(rows) < 238 - 3 * person.pick(3, "shoe height"), np.int16(-1), half)
        shoe = self.canvas.part(rows, cols, _profile(rows, (228, 247), (ankle, ankle + toe)), half)
        shoe.fill(SHOE)
        shoe.detail(shoe.down > 245 - person.pick(3, "sole height"), SOLE)
        shoe.detail((shoe.down % 4 < 2) & person.chance(30, "shoe stripes"), SOLE)

    def _skirt(self) -> None:
        rows, cols = slice(116, 204), slice(20, 108)
        end = np.where(self.person.chance(16, "skirt"), self.person.between(160, 202, "skirt length"), np.int16(0))
        hem = self._narrow(20 + self.person.pick(10, "skirt width"))
        half = np.where(_span(rows) > end, np.int16(-1), _profile(rows, (116, 203), (self._narrow(20), hem)))
        skirt = self.canvas.part(rows, cols, MIDDLE, half)
        skirt.fill(self._cloth(skirt, "trousers", LEGS))
        skirt.detail(skirt.down > end - 6, SEAM)

    def _torso(self) -> None:
        rows, cols = slice(46, 158), slice(24, 104)
        coat = self._warm("coat") & self.person.chance(30, "long coat")
        hem = self.person.between(116, 136, "hem") + np.where(coat, np.int16(20), np.int16(0))
        halves = [self._narrow(h + self.build // s) for h, s in ((8, 8), (23, 2), (22, 1), (20, 1), (22, 1))]
        half = np.where(_span(rows) > hem, np.int16(-1), _profile(rows, (46, 54, 76, 108, 150), halves))
        torso = self.canvas.part(rows, cols, MIDDLE, half)
        torso.fill(self._cloth(torso, "top", TOP), FLAT + 2)
        self._bands(torso, hem)
        self._front(torso)
        for name, material, cell, share in (("print", EMBLEM, 3, 1), ("logo", EMBLEM_2, 2, 1)):
            self._emblem(torso.between(54, 124), name, material, cell, share)

    def _bands(self, torso: _Patch, hem: Small) -> None:
        """What runs all around the body: chest band, yoke, hem, belt."""
        person, down = self.person, torso.down
        band = np.abs(down - person.between(64, 108, "band height")) <= person.between(2, 9, "band thickness")
        torso.detail(band & self._has("band", 2), BAND)
        torso.detail(self._has("yoke", 3) & (down < person.between(60, 70, "yoke depth")), SLEEVE)
        torso.detail(self._has("hem trim", 2) & (down > hem - 1 - person.pick(5, "hem trim height")), TRIM)
        torso.detail(self._has("belt", 3) & (np.abs(down - person.between(104, 116, "belt height")) <= 2), BELT)

    def _front(self, torso: _Patch) -> None:
        """What only the front shows: open jacket, zip or buttons, collar, pockets."""
        person, down, front = self.person, torso.down, torso.without(~self.facing)
        aside = np.abs(torso.across - (self.sin * 14 >> 6))
        front.detail(self._has("open jacket", 3) & (aside < person.between(3, 8, "jacket gap")), INNER)
        closure = person.pick(4, "closure")
        button = (closure == 2) & (down % (6 + 2 * person.pick(4, "button spacing")) < 3)
        front.detail((aside <= 1) & ((closure == 1) | button), TRIM)
        front.detail(aside < (52 + 5 * person.pick(4, "collar depth") - down) // 2, INNER)
        pocket = np.abs(down - person.between(98, 112, "pocket height")) < 4
        front.detail(self._has("pockets", 3) & pocket & (np.abs(aside - 11) < 4), TRIM)

    def _emblem(self, chest: _Patch, name: str, material: int, cell: int, share: int) -> None:
        """A mark on the chest that the back carries too, so that no view but the side is without this evidence."""
        person, shown = self.person, np.maximum(self.frontal, 1)
        size = cell + person.pick(2, name + " size")
        left = person.between(-12, 2, name + " x") - 2 * cell
        left = np.where(self.away, -left - 5 * cell, left).astype(np.int16)
        x = _cells(chest.across, left * shown >> 6, size * shown >> 6)
        y = _cells(chest.down, person.between(60, 92, name + " y"), size)
        inked = _glyphs().reshape(-1)[person.pick(GLYPHS, name) * 36 + y * 6 + x] > 0
        chest.detail(inked & self._has(name, share) & (shown > 20), material)

    def _arm(self, near: int) -> None:
        rows, cols = slice(50, 132), slice(12, 116)
        side = near * self.heading
        shoulder = MIDDLE + (side * self._narrow(24 + self.build // 2) * self.frontal >> 6)
        swing = -near * self.stride * self.turned >> 6
        out = side * self.elbows
        centre = _profile(rows, (50, 90, 131), (shoulder, shoulder + out + swing // 3, shoulder + out // 2 + swing))
        slim = self.build // 4
        half = _profile(rows, (50, 56, 90, 122, 131), (3, 8 + slim, 7 + slim, 5, 5))
        arm = self.canvas.part(rows, cols, centre, half)
        self._sleeve(arm, side * self.mirror, FLAT + 4 if near > 0 else FLAT - 12)

    def _sleeve(self, arm: _Patch, body_side: Small, bright: int) -> None:
        person, down = self.person, arm.down
        bare = down > np.where(self._warm("sleeves"), 122, _choose((100, 78, 60), person.pick(3, "sleeve length")))
        cloth = np.where(self._has("contrast sleeves", 3), np.uint8(SLEEVE), self._cloth(arm, "top", TOP))
        arm.fill(np.where(bare, np.uint8(SKIN), cloth), bright)
        sleeve = arm.without(bare)
        for name, low, high, material in (("armband", 62, 96, BAND), ("cuff", 108, 120, TRIM)):
            worn = self._has(name) & ((person.pick(3, name + " side") - 1) * body_side >= 0)
            sleeve.detail(worn & (np.abs(down - person.between(low, high, name + " height")) <= 3), material)
        sleeve.detail((np.abs(arm.across) <= 1) & self._has("sleeve stripe", 3), TRIM)
        watch = self._has("watch", 2) & ((1 - 2 * person.pick(2, "watch side")) * body_side > 0)
        arm.detail(bare & watch & (np.abs(down - 118) <= 2), DARK)

    def _head(self) -> None:
        rows, cols = slice(8, 52), slice(36, 92)
        centre, wide = MIDDLE + (self.sin * 3 >> 6), 12 - (self.turned >> 6)
        neck = _profile(rows, (8, 38, 39, 51), (-1, -1, 6, 7)) + 0 * centre
        self.canvas.part(rows, cols, centre, neck).fill(FACE, FLAT - 8)
        self._scarf()
        head = self.canvas.part(rows, cols, centre, _ellipse(rows, 28, 17, wide))
        head.fill(FACE)
        self._face(head)
        self._hair(head, wide)
        self._hat(head)

    def _scarf(self) -> None:
        rows, cols = slice(42, 62), slice(40, 88)
        worn = self._warm("scarf") & self._has("scarf", 3)
        half = np.where(worn, _profile(rows, (42, 52, 61), (9, 13, 9)), np.int16(-1))
        scarf = self.canvas.part(rows, cols, MIDDLE, half)
        scarf.fill(SCARF)
        scarf.detail((scarf.down % 6 < 2) & self.person.chance(50, "scarf stripes"), TRIM)

    def _face(self, head: _Patch) -> None:
        face, down = head.without(self.away), head.down
        aside = np.abs(head.across - (self.sin * 8 >> 6))
        face.detail((np.abs(aside - 5) <= 1) & (np.abs(down - 26) <= 1), DARK)
        face.detail((np.abs(down - 26) <= 2) & (aside < 9) & self.person.chance(20, "glasses"), DARK)
        face.detail((down > 35) & (aside < 9) & self.person.chance(20, "beard"), HAIR)

    def _hair(self, head: _Patch, wide: Small) -> None:
        person = self.person
        line = np.where(self.facing, 20, np.where(self.away, 38, 26)).astype(np.int16) - 3 * person.pick(3, "hairline")
        nape = self.sideways & (head.across * self.heading < -2) & (head.down < 36)
        head.detail((head.down < line) | nape, HAIR)
        style = person.pick(5, "hair style")
        self._long_hair(_choose((0, 0, 46, 62, 92), style), wide)
        rows = slice(4, 20)
        bun = _ellipse(rows, 12, 7, np.where(style == 1, np.int16(6), np.int16(-9)))
        self.canvas.part(rows, slice(36, 92), MIDDLE - (self.sin * 8 >> 6), bun).fill(HAIR, FLAT - 6)

    def _long_hair(self, end: Small, wide: Small) -> None:
        rows, cols = slice(18, 96), slice(36, 92)
        outer = np.where(self.away, wide + 1, np.where(self.facing, wide + 2, wide - 3))
        half = np.where(_span(rows) < end, _profile(rows, (18, 30), (outer - 5, outer)), np.int16(-1))
        hair = self.canvas.part(rows, cols, MIDDLE - (self.sin * 8 >> 6), half)
        hair.without(self.facing & (np.abs(hair.across) < wide - 2)).fill(HAIR, FLAT - 6)

    def _hat(self, head: _Patch) -> None:
        brim = np.where(self.person.chance(30, "hat"), 18 + 2 * self.person.pick(3, "hat depth"), np.int16(0))
        hat = head.without(head.down >= brim)
        hat.detail(hat.inside, HAT)
        hat.detail((head.down > brim - 5) & self.person.chance(50, "hat band"), HAT_TRIM)

    def _carries(self, *kinds: int) -> Mask:
        """0-2 nothing, 3-4 backpack, 5 shoulder bag, 6 handbag, 7 waist bag"""
        return np.isin(self.person.pick(8, "bag"), kinds)

    def _backpack(self, seen: Mask) -> None:
        """On the back; past the shoulders from the front, behind the body from the side."""
        rows, person = slice(54, 118), self.person
        wide = 14 + person.pick(8, "backpack width")
        shape = _profile(rows, (54, 62, 117), (self._narrow(wide * 2 // 3), self._narrow(wide), self._narrow(wide)))
        end = np.where(seen & self._carries(3, 4), person.between(88, 116, "backpack length"), np.int16(0))
        half = np.where(_span(rows) > end, np.int16(-1), shape)
        bag = self.canvas.part(rows, slice(24, 104), MIDDLE - (self.sin * 18 >> 6), half)
        bag.fill(BAG)
        bag.detail((bag.down > person.between(76, 100, "backpack pocket")) & (np.abs(bag.across) < half - 4), BAG_2)
        bag.detail((bag.down % 16 < 2) & person.chance(40, "backpack lines"), BAG_2)

    def _straps(self) -> None:
        rows, cols = slice(52, 116), slice(24, 104)
        tilt = self._strap_side() * np.sign(self.cos)
        slung = _profile(rows, (52, 115), (MIDDLE - tilt * self._narrow(14), MIDDLE + tilt * self._narrow(18)))
        half = np.where(self._carries(5), np.int16(2), np.int16(-1)) + np.zeros((64, 1), np.int16)
        self.canvas.part(rows, cols, slung, half).detail(np.ones((1, 1, 1), np.bool_), BAG)
        worn = self._carries(3, 4) & self.facing & (_span(rows) < 92)
        for side in (-1, 1):
            at = MIDDLE + side * self._narrow(13) + (self.sin * 4 >> 6)
            self.canvas.part(rows, cols, at, np.where(worn, np.int16(2), np.int16(-1))).fill(BAG)

    def _strap_side(self) -> Small:
        return self.person.pick(2, "strap side") * 2 - 1

    def _bag(self) -> None:
        """A shoulder bag or handbag beside the hip, or a waist bag in front of it."""
        rows, person, waist = slice(96, 176), self.person, self._carries(7)
        top = _choose((0, 0, 0, 0, 0, 108, 132, 104), person.pick(8, "bag"))
        tall = np.where(waist, np.int16(12), person.between(18, 34, "bag height"))
        wide = np.where(waist, np.int16(10), person.between(8, 15, "bag width"))
        hung = self._carries(5, 6, 7) & ~(waist & self.away) & (_span(rows) >= top) & (_span(rows) < top + tall)
        hip = np.where(waist, self.sin * 12 >> 6, self._strap_side() * (self._narrow(24) * self.cos >> 6))
        bag = self.canvas.part(rows, slice(4, 124), MIDDLE + hip, np.where(hung, wide, np.int16(-1)))
        bag.fill(BAG)
        bag.detail((bag.down < top + tall // 3) & person.chance(50, "bag flap"), BAG_2)


def _direction(shot: _Shot) -> Ints:
    """Which of the eight directions a person is seen from: every camera has a usual one and sees all the others."""
    return np.where(shot.pick(100, "unusual") < 50, shot.pick(8, "direction"), shot.of_camera(8, "direction"))


def _cells(position: Small, start: Small, size: Small) -> Small:
    """Which of the five cells of an emblem that starts at `start` a position falls in; 5, the empty one, outside."""
    cell = (position - start) // np.maximum(size, 1)
    return np.where((cell < 0) | (cell > 4), np.int16(5), cell)


def _palette(person: _Person, shot: _Shot) -> Words:
    """Colour of every material of every figure, packed. (n, 32)"""
    colours = np.zeros((len(person.own), 32, 3), np.int64)
    for material in range(HAT, PATCH + 1):
        muted = person.chance(person.settings.muted_percent, f"muted {material}")
        cloth = person.pick(len(_CLOTH), f"colour {material}")
        dye = person.pick(17**3, f"dye {material}").ravel()[:, None] // (1, 17, 289) % 17 - 8
        colours[:, material] = _CLOTH[np.where(muted, cloth % MUTED, cloth).ravel()] + dye
    colours[:, SKIN] = colours[:, FACE] = _SKIN[person.pick(len(_SKIN), "skin").ravel()]
    colours[:, HAIR] = _HAIR[person.pick(len(_HAIR), "hair colour").ravel()]
    colours[:, DARK] = 24
    for material in (FRONT, FRONT_2):
        colours[:, material] = _CLOTH[shot.pick(len(_CLOTH), f"occluder colour {material}")]
    return _pack(np.clip(colours, 4, 250))


PANORAMA = (384, 1024)
PANORAMA_BOXES = 90


def _smooth_noise(height: int, width: int, cell: int, name: str, *keys: int) -> Ints:
    """Value noise 0..255: random numbers on a coarse grid, joined linearly, in integers. (height, width)"""
    y, x = np.arange(height)[:, None], np.arange(width)[None]
    rows, cols = np.arange(height // cell + 2)[:, None], np.arange(width // cell + 2)[None]
    grid = _pick(256, name, _state(rows, cols, *keys))
    fy, fx = y % cell, x % cell
    upper = grid[y // cell, x // cell] * (cell - fx) + grid[y // cell, x // cell + 1] * fx
    lower = grid[y // cell + 1, x // cell] * (cell - fx) + grid[y // cell + 1, x // cell + 1] * fx
    return np.asarray((upper * (cell - fy) + lower * fy) // (cell * cell), np.int64)


def _surfaces(n: int, name: str, *keys: int) -> Ints:
    """Background colours for n surfaces: mostly greyish, now and then a painted one. (n, 3)"""
    state = _state(np.arange(n), *keys)
    tint = np.stack([_pick(200, f"{name} {channel}", state) for channel in range(3)], axis=1) - 100
    strength = np.where(_pick(100, name + " painted", state) < 20, 60, 16)
    light = 40 + _pick(170, name + " light", state)
    return np.asarray(light[:, None] + tint * strength[:, None] // 100)


@lru_cache(maxsize=64)
def _panorama(seed: int, camid: int) -> Words:
    """What stands behind people at one camera: wall, floor, furniture, texture; packed 0x00BBGGRR. (384, 1024)"""
    height, width = PANORAMA
    boxes = _state(np.arange(PANORAMA_BOXES), seed, camid)
    horizon = height // 3 + int(_pick(height // 3, "horizon", _state(seed, camid))[0])
    scene = np.empty((height, width, 3), np.int64)
    scene[:horizon], scene[horizon:] = _surfaces(2, "ground", seed, camid)
    tops, lefts = _pick(height, "top", boxes), _pick(width, "left", boxes)
    talls, wides = 8 + _pick(120, "tall", boxes), 4 + _pick(90, "wide", boxes)
    paints = _surfaces(PANORAMA_BOXES, "box", seed, camid)
    for top, left, tall, wide, paint in zip(tops, lefts, talls, wides, paints, strict=True):
        scene[top : top + tall, left : left + wide] = paint
    scene += (_smooth_noise(height, width, 48, "mist", seed, camid) // 3 - 42)[..., None]
    scene += (_smooth_noise(height, width, 5, "grain", seed, camid) // 6 - 21)[..., None]
    return _pack(np.clip(scene, 0, 255))


def _pack(colours: Ints) -> Words:
    """RGB 0..255 in one word, 0x00BBGGRR. (..., 3) -> (...)"""
    words = colours.astype(np.uint32)
    return np.asarray(words[..., 0] | words[..., 1] << np.uint32(8) | words[..., 2] << np.uint32(16))


@dataclass(frozen=True)
class _Crop:
    """Where each pixel of the doubled output looks on the canvas: a detector's box is never quite right."""

    rows: Ints  # (n, 2 height)
    cols: Small  # (n, 2 height, 2 width)


def _crop(shot: _Shot) -> _Crop:
    settings = shot.settings
    height, width = 2 * settings.height, 2 * settings.width
    jitter, shift = settings.scale_jitter_percent, settings.shift_jitter_percent
    zoom = 1024 * (100 + shot.between(-jitter, jitter, "scale")) // 106
    wide = zoom * (100 + shot.between(-jitter // 2, jitter // 2, "aspect")) // 112
    up = shot.between(-shift, shift, "up") * ROWS // 100
    aside = shot.between(-shift, shift, "aside") * COLS // 100
    y = np.arange(height) * ROWS // height - ROWS // 2
    x = np.arange(width) * COLS // width - COLS // 2
    rows = (zoom[:, None] * y >> 10) + ROWS // 2 + up[:, None]
    lean = shot.between(-16, 16, "lean")[:, None] * (rows - 240) >> 8
    across = (wide[:, None] * x >> 10).astype(np.int16)
    cols = across[:, None, :] + (MIDDLE + aside[:, None] + lean).astype(np.int16)[:, :, None]
    return _Crop(rows, np.clip(cols, 0, COLS - 1))


def _look(layer: Bytes, crop: _Crop) -> Bytes:
    """The canvas through the crop; outside the canvas is background. (n, 2 height, 2 width)"""
    n = len(layer)
    rows = np.clip(crop.rows, 0, ROWS - 1) + np.arange(n)[:, None] * ROWS
    return np.asarray(layer.reshape(-1)[(rows * COLS)[:, :, None] + crop.cols])


def _occlude(material: Bytes, shade: Bytes, shot: _Shot) -> None:
    """Writes a post, a low wall or a passing box over some images, never over more than two fifths of the crop."""
    height, width = material.shape[1:]
    occluded = shot.pick(100, "occluded") < shot.settings.occlusion_percent
    kind, at, size = shot.pick(3, "occluder"), shot.pick(100, "occluder place"), shot.pick(100, "occluder size")
    for i in np.flatnonzero(occluded):
        box, stripe = _obstacle(int(kind[i]), int(at[i]), int(size[i]), height, width)
        material[i][box] = FRONT
        material[i][box][stripe] = FRONT_2
        shade[i][box] = FLAT


def _obstacle(kind: int, place: int, size: int, height: int, width: int) -> tuple[_Box, _Box]:
    """The box an occluder covers, and inside it where its second colour goes. place, size: 0..99"""
    if kind == 0:
        wide = width * (8 + size // 8) // 100
        left = place * (width - wide) // 100
        return (slice(None), slice(left, left + wide)), (slice(None), slice(0, wide // 3))
    if kind == 1:
        return (slice(height * (65 + size // 5) // 100, None), slice(None)), (slice(0, height // 40), slice(None))
    wide, tall = width * (20 + size // 5) // 100, height * (25 + place // 4) // 100
    left = 0 if place % 2 else width - wide
    return (slice(height - tall, None), slice(left, left + wide)), (slice(None, None, 8), slice(None))


def _behind(shot: _Shot) -> Words:
    """A window of the camera's panorama per image. (n, 2 height, 2 width)"""
    height, width = 2 * shot.settings.height, 2 * shot.settings.width
    tall, wide = PANORAMA
    y = np.arange(height) * ROWS // height
    x = np.arange(width) * COLS // width
    top = shot.pick(tall - ROWS, "window top")
    left = shot.pick(wide - COLS, "window left")
    out = np.empty((len(top), height, width), np.uint32)
    for i, camid in enumerate(shot.camids):
        scene = _panorama(shot.settings.seed, int(camid))
        out[i] = scene[(y + top[i])[:, None], x + left[i]]
    return out


def _halve(packed: Words) -> Words:
    """Mean of 2 x 2 pixels on four bytes at once: halving each byte first keeps them apart."""
    keep = np.uint32(0xFEFEFEFE)
    rows = ((packed[:, ::2] & keep) >> np.uint32(1)) + ((packed[:, 1::2] & keep) >> np.uint32(1))
    rows &= keep
    rows >>= np.uint32(1)
    return np.asarray(rows[:, :, ::2] + rows[:, :, 1::2])


@lru_cache(maxsize=1)
def _folds() -> Small:
    """Soft light and dark of cloth and uneven light, -10..10. (512, 512)"""
    fine = _smooth_noise(512, 512, 6, "folds")
    broad = _smooth_noise(512, 512, 40, "shadows")
    return ((fine - 128) // 16 + (broad - 128) // 10).astype(np.int16)


@lru_cache(maxsize=1)
def _grain() -> Small:
    """Sensor noise, roughly bell-shaped: the sum of four uniform bytes, about -100..100. (1024, 512)"""
    bits = _state(np.arange(1024 * 512))
    total = sum(((bits >> np.uint64(8 * k)) & np.uint64(255)).astype(np.int64) for k in range(4))
    return ((np.asarray(total) - 510) // 5).astype(np.int16).reshape(1024, 512)


def _windows(table: Small, shot: _Shot, name: str) -> Small:
    """A random window of a table per image. (n, height, width)"""
    height, width = shot.settings.height, shot.settings.width
    if table.shape[0] < 2 * height or table.shape[1] < 2 * width:
        table = np.tile(table, (-(-2 * height // table.shape[0]), -(-2 * width // table.shape[1])))
    top = shot.pick(table.shape[0] - height, name + " top")
    left = shot.pick(table.shape[1] - width, name + " left")
    return np.stack([table[t : t + height, s : s + width] for t, s in zip(top, left, strict=True)])


def _tone(shot: _Shot) -> Bytes:
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
        bend = 65 + shot.of_camera(60, "gamma") + (steady + passing) // 2
        lift = shot.of_camera(18, f"lift {channel}") + shot.pick(12, "haze")
        light = np.clip(x * gain[:, None] // 100, 0, 255)
        curve = 255 * 100 * light // np.maximum(1, 100 * light + bend[:, None] * (255 - light))
        curves.append(lift[:, None] + curve * (255 - lift[:, None]) // 255)
    return np.asarray(np.clip(np.stack(curves, axis=1), 0, 255).astype(np.uint8))


def _blurred(plane: Small, strength: Small) -> Small:
    """Towards the 3 x 3 binomial mean by strength 64ths, in place of a lens out of focus. plane: (n, height, width)"""
    padded = np.pad(plane, ((0, 0), (1, 1), (1, 1)), mode="edge")
    tall = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    mean = (tall[:, :, :-2] + 2 * tall[:, :, 1:-1] + tall[:, :, 2:]) >> 4
    return np.asarray(plane + ((mean - plane) * strength >> 6))


def _develop(packed: Words, shot: _Shot) -> Bytes:
    """Light, lens, curve and noise: packed pixels with shade in the top byte -> RGB. (n, height, width, 3)"""
    settings = shot.settings
    out = np.empty((*packed.shape, 3), np.uint8)
    shade = (packed >> np.uint32(24)).astype(np.int16) + _windows(_folds(), shot, "folds")
    curve = _tone(shot).reshape(len(packed), 3 * 256)
    row = (np.arange(len(packed)) * 3 * 256)[:, None, None]
    blur = (shot.of_camera(64, "focus") + shot.pick(32, "motion")) * settings.blur_percent // 100
    noise = (shot.of_camera(24, "sensor") + 4) * settings.noise_percent // 100
    grain = _windows(_grain(), shot, "grain") * noise.astype(np.int16)[:, None, None] >> 6
    for channel in range(3):
        plane = ((packed >> np.uint32(8 * channel)) & np.uint32(255)).astype(np.int16)
        plane = _blurred(np.minimum(plane * shade >> 6, 255), blur.astype(np.int16)[:, None, None])
        plane = curve.reshape(-1)[row + channel * 256 + plane] + grain
        out[..., channel] = np.clip(plane, 0, 255)
    return out


_KEYS = ("pids", "camids", "shots")
CHUNK = 32  # figures painted at once: their canvases stay in the second-level cache


def render(
    settings: PeopleSettings, pids: npt.ArrayLike, camids: npt.ArrayLike, shots: npt.ArrayLike
) -> npt.NDArray[np.uint8]:
    """Photograph person pids[i] by camera camids[i] for the shots[i]-th time. uint8 (n, height, width, 3)

    An image depends on the settings and its own three numbers only, not on the others in the call. Raises `DataError`
    where the arrays differ in length, a pid is below 1, a shot below 0 or a camid outside 1..cameras.
    """
    keys = [np.asarray(k, dtype=np.int64).reshape(-1) for k in (pids, camids, shots)]
    if len({len(k) for k in keys}) != 1:
        raise DataError(f"pids, camids and shots must be equally long, not {[len(k) for k in keys]}")
    for name, values, low, high in zip(_KEYS, keys, (1, 1, 0), (9999, settings.cameras, 2**31), strict=True):
        if ((values < low) | (values > high)).any():
            raise DataError(f"{name} must lie in {low}..{high}; got {values.min()}..{values.max()}")
    out = np.empty((len(keys[0]), settings.height, settings.width, 3), np.uint8)
    for start in range(0, len(out), CHUNK):
        part = slice(start, start + CHUNK)
        out[part] = _render_chunk(settings, *(k[part] for k in keys))
    return out


def _render_chunk(settings: PeopleSettings, pids: Ints, camids: Ints, shots: Ints) -> Bytes:
    person, shot = _Person.of(settings, pids), _Shot.of(settings, pids, camids, shots)
    canvas = _Figure(person, shot).paint()
    crop = _crop(shot)
    material, shade = _look(canvas.material, crop), _look(canvas.shade, crop)
    _occlude(material, shade, shot)
    palette = _palette(person, shot)
    colours = palette.reshape(-1)[(np.arange(len(pids)) * 32)[:, None, None] + material]
    np.copyto(colours, _behind(shot), where=material == BACKGROUND)
    return _develop(_halve(colours | shade.astype(np.uint32) << np.uint32(24)), shot)


def _labels(first: int, people: int, images: int, cameras: int, skip: int) -> tuple[Ints, Ints, Ints]:
    """pids, camids and shots: each person walks past the cameras in turn, starting at one of their own."""
    pids = np.repeat(np.arange(first, first + people), images)
    turn = pids + np.tile(np.arange(images), people) + skip
    return pids, 1 + turn % cameras, np.tile(np.arange(skip, skip + images), people)


def _split(settings: PeopleSettings, split: str) -> tuple[Ints, Ints, Ints]:
    test, queries = FIRST_TEST_PID, settings.queries_per_identity
    if split == "train":
        return _labels(1, settings.train_identities, settings.train_images_per_identity, settings.cameras, 0)
    if split == "query":
        return _labels(test, settings.test_identities, queries, settings.cameras, 0)
    gallery = settings.gallery_images_per_identity
    return _labels(test, settings.test_identities, gallery, settings.cameras, queries)


def _whole(settings: PeopleSettings, split: str) -> ImageSet:
    pids, camids, shots = _split(settings, split)
    return ImageSet(render(settings, pids, camids, shots), pids, camids)


def train_images(settings: PeopleSettings) -> ImageSet:
    """All training images, identity by identity."""
    return _whole(settings, "train")


def query_images(settings: PeopleSettings) -> ImageSet:
    """The queries; their people appear in no training image."""
    return _whole(settings, "query")


def gallery_images(settings: PeopleSettings) -> ImageSet:
    """The gallery: at least one image of each query's person from another camera."""
    return _whole(settings, "gallery")


def stream(settings: PeopleSettings, split: str, chunk: int = 256) -> Iterator[ImageSet]:
    """A split in pieces of `chunk` images, so that memory stays bounded. split: "train", "query" or "gallery"."""
    if split not in FOLDERS:
        raise DataError(f"split must be one of {sorted(FOLDERS)}, not {split!r}")
    if chunk < 1:
        raise DataError(f"chunk must be at least 1, not {chunk}")
    pids, camids, shots = _split(settings, split)
    for start in range(0, len(pids), chunk):
        part = slice(start, start + chunk)
        yield ImageSet(render(settings, pids[part], camids[part], shots[part]), pids[part], camids[part])


FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}


def write_market1501(folder: Path, settings: PeopleSettings, quality: int = 92) -> None:
    """Write the site as the three folders of Market-1501, JPEG files named PPPP_cXsY_FFFFFF_NN.jpg; needs Pillow.

    FFFFFF counts the images of a folder, so names sort like the arrays. Folders are made; files of these names are
    overwritten, others stay. JPEG is lossy and decoders differ: the arrays are the reference.
    """
    from PIL import Image  # here, because the serving install renders nothing to files and has no Pillow

    for split, name in FOLDERS.items():
        target = Path(folder) / name
        target.mkdir(parents=True, exist_ok=True)
        frames = count()
        for images in stream(settings, split):
            for pixels, pid, camid in zip(images.images, images.pids, images.camids, strict=True):
                path = target / f"{pid:04d}_c{camid}s1_{next(frames):06d}_00.jpg"
                Image.fromarray(pixels).save(path, quality=quality)
