"""Width: how wide a student is, and the ladder of widths a chain offers.

A width is one number and, for networks of four stages, the multipliers of stages 2 to 4: `16x2-4-8` is a ResNet with 16
stem channels and stage inner widths 16, 32, 64, 128. Networks whose every group is a fixed share of one number are
written by it alone: `w168` is a ViT with embeddings of 168. Where the family is known, a lone `16` has its usual
multipliers. Notation after OSKT (ICCV 2025, Table 1); the `w` keeps the two kinds apart, in file names too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from math import lcm

from chains.errors import WidthError

Multipliers = tuple[int, ...]
USUAL_MULTIPLIERS: Multipliers = (2, 4, 8)  # of ResNets
MAX_STEM = 4096  # far above any ResNet or ViT; keeps a hostile header from asking for terabytes
MAX_MULTIPLIER = 64
_PATTERN = re.compile(
    r"w(?P<only>[1-9][0-9]{0,3})|(?P<stem>[1-9][0-9]{0,3})(x(?P<multipliers>[1-9][0-9]?-[1-9][0-9]?-[1-9][0-9]?))?"
)


@dataclass(frozen=True, order=True)
class Width:
    """`stem` channels, and the factors on it at stages 2, 3 and 4; no factors where every group follows the stem.

    Widths order by stem, then multipliers, which is the order of cost wherever the multipliers are the same.
    Raises `WidthError` when a number is outside 1..4096 (stem) or 1..64 (multipliers).
    """

    stem: int
    multipliers: Multipliers = USUAL_MULTIPLIERS

    def __post_init__(self) -> None:
        if not 1 <= self.stem <= MAX_STEM:
            raise WidthError(f"a stem of {self.stem} channels is outside 1..{MAX_STEM}")
        if len(self.multipliers) not in (0, 3) or not all(1 <= factor <= MAX_MULTIPLIER for factor in self.multipliers):
            raise WidthError(f"multipliers {self.multipliers} must be three numbers in 1..{MAX_MULTIPLIER}, or none")

    @classmethod
    def parse(cls, text: str, multipliers: Multipliers = USUAL_MULTIPLIERS) -> Width:
        """Read `16x2-4-8`, `w168`, or `16` with the given multipliers. Raises `WidthError` for anything else.
        `Width.parse(str(width)) == width`."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise WidthError(
                f"'{text[:40]}' is no width: write the stem and multipliers as in '16x2-4-8', or '16', or 'w168'"
            )
        if match["only"] is not None:
            return cls(int(match["only"]), ())
        if match["multipliers"] is None:
            return cls(int(match["stem"]), multipliers)
        return cls(int(match["stem"]), tuple(int(factor) for factor in match["multipliers"].split("-")))

    def __str__(self) -> str:
        if not self.multipliers:
            return f"w{self.stem}"
        return f"{self.stem}x{'-'.join(str(factor) for factor in self.multipliers)}"

    def stage(self, index: int) -> int:
        """Inner channels of stage `index` + 1 (0 is the first stage, as wide as the stem). Raises `IndexError` for a
        later one in a width without multipliers."""
        return self.stem * (1, *self.multipliers)[index]


def default_alignment(full: Width) -> int:
    """Channels to which stems snap: runtimes step up in latency just above multiples of eight, but a net whose stem is
    under 32 would lose most of its ladder to that."""
    return 8 if full.stem >= 32 else 1


def default_narrowest(full: Width, step: int = 1) -> Width:
    """A quarter of `full`, down to a multiple of `step`, and never below one step."""
    return Width(max(step, full.stem // 4 // step * step), full.multipliers)


def even_ladder(
    narrowest: Width, full: Width, count: int, alignment: int | None = None, step: int = 1
) -> tuple[Width, ...]:
    """`count` widths with the multipliers of `full`, stems evenly spaced from narrowest to full, narrow first.

    Stems between the two ends snap to multiples of `alignment` (default: see `default_alignment`) and of `step`, those
    at which every group of the network has whole channels (`Architecture.step`): a ViT-S of 6 heads at steps of 24.
    Raises `WidthError` when the ends are out of order, differ in multipliers or are no multiple of `step`, or when
    snapping makes two rungs the same.
    """
    for end in (narrowest, full):
        _require_whole(end, step)
    if narrowest >= full or narrowest.multipliers != full.multipliers:
        raise WidthError(
            f"a ladder runs from a narrower to a wider width of the same multipliers, not {narrowest}..{full}"
        )
    if count < 2:
        raise WidthError(f"a ladder has at least its two ends; {count} rungs were asked for")
    snap = lcm(step, default_alignment(full) if alignment is None else alignment)
    span = full.stem - narrowest.stem
    inner = (narrowest.stem + span * rung / (count - 1) for rung in range(1, count - 1))
    stems = [narrowest.stem, *(snap * round(stem / snap) for stem in inner), full.stem]
    if any(low >= high for low, high in pairwise(stems)):
        raise WidthError(f"{count} rungs from {narrowest} to {full} collide at steps of {snap}; ask for fewer")
    return tuple(Width(stem, full.multipliers) for stem in stems)


def _require_whole(width: Width, step: int) -> None:
    if width.stem % step:
        nearest = Width(max(step, step * round(width.stem / step)), width.multipliers)
        raise WidthError(
            f"{width} cannot be on a ladder of this network: its widths are multiples of {step}, and {width.stem} is "
            f"none; the nearest is {nearest}"
        )
