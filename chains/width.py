"""Width: how wide a student is, and the ladder of widths a chain offers.

A ResNet's width is written by its stem and the multipliers of stages 2 to 4: `16x2-4-8` has 16 stem channels and stage
inner widths 16, 32, 64, 128; `16` alone means the usual 2-4-8. Notation after OSKT (ICCV 2025, Table 1).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

from chains.errors import WidthError

USUAL_MULTIPLIERS = (2, 4, 8)
MAX_STEM = 4096  # far above any ResNet; keeps a hostile header from asking for terabytes
MAX_MULTIPLIER = 64
_PATTERN = re.compile(r"(?P<stem>[1-9][0-9]{0,3})(x(?P<multipliers>[1-9][0-9]?-[1-9][0-9]?-[1-9][0-9]?))?")


@dataclass(frozen=True, order=True)
class Width:
    """The width of a ResNet: `stem` channels, and the factors on it at stages 2, 3 and 4.

    Widths order by stem, then multipliers, which is the order of cost wherever the multipliers are the same.
    Raises `WidthError` when a number is outside 1..4096 (stem) or 1..64 (multipliers).
    """

    stem: int
    multipliers: tuple[int, int, int] = USUAL_MULTIPLIERS

    def __post_init__(self) -> None:
        if not 1 <= self.stem <= MAX_STEM:
            raise WidthError(f"a stem of {self.stem} channels is outside 1..{MAX_STEM}")
        if not all(1 <= factor <= MAX_MULTIPLIER for factor in self.multipliers):
            raise WidthError(f"multipliers {self.multipliers} must be numbers in 1..{MAX_MULTIPLIER}")

    @classmethod
    def parse(cls, text: str) -> Width:
        """Read `16x2-4-8` or `16`. Raises `WidthError` for anything else. `Width.parse(str(width)) == width`."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise WidthError(f"'{text[:40]}' is no width: write the stem and multipliers as in '16x2-4-8', or '16'")
        if match["multipliers"] is None:
            return cls(int(match["stem"]))
        second, third, fourth = (int(factor) for factor in match["multipliers"].split("-"))
        return cls(int(match["stem"]), (second, third, fourth))

    def __str__(self) -> str:
        return f"{self.stem}x{'-'.join(str(factor) for factor in self.multipliers)}"

    def stage(self, index: int) -> int:
        """Inner channels of stage `index` + 1 (0 is the first stage, as wide as the stem)."""
        return self.stem * (1, *self.multipliers)[index]


def default_alignment(full: Width) -> int:
    """Channels to which stems snap: runtimes step up in latency just above multiples of eight, but a net whose stem is
    under 32 would lose most of its ladder to that."""
    return 8 if full.stem >= 32 else 1


def even_ladder(narrowest: Width, full: Width, count: int, alignment: int | None = None) -> tuple[Width, ...]:
    """`count` widths with the multipliers of `full`, stems evenly spaced from narrowest to full, narrow first.

    Stems between the two ends snap to multiples of `alignment` (default: see `default_alignment`).
    Raises `WidthError` when the ends are out of order, differ in multipliers, or snapping makes two rungs the same.
    """
    if narrowest >= full or narrowest.multipliers != full.multipliers:
        raise WidthError(
            f"a ladder runs from a narrower to a wider width of the same multipliers, not {narrowest}..{full}"
        )
    if count < 2:
        raise WidthError(f"a ladder has at least its two ends; {count} rungs were asked for")
    step = default_alignment(full) if alignment is None else alignment
    span = full.stem - narrowest.stem
    inner = (narrowest.stem + span * rung / (count - 1) for rung in range(1, count - 1))
    stems = [narrowest.stem, *(step * round(stem / step) for stem in inner), full.stem]
    if any(low >= high for low, high in pairwise(stems)):
        raise WidthError(f"{count} rungs from {narrowest} to {full} collide at steps of {step}; ask for fewer")
    return tuple(Width(stem, full.multipliers) for stem in stems)
