"""Views: the rows of a person's image that one network sees. `chains.fuse.crops` cuts them out.   [no torch]"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from chains.errors import DataError

SIZES = range(16, 1025)  # pixels either way, as for every importer


@dataclass(frozen=True)
class View:
    """The rows from `top` to `bottom`, fractions of the image's height, as an image of `height` × `width` pixels.
    Raises `DataError` for rows outside the image and for sizes outside 16..1024."""

    top: float
    bottom: float
    height: int
    width: int

    def __post_init__(self) -> None:
        if not 0 <= self.top < self.bottom <= 1:
            raise DataError(f"a view runs from top to bottom within 0..1, not from {self.top:.4g} to {self.bottom:.4g}")
        if self.height not in SIZES or self.width not in SIZES:
            raise DataError(f"a view of {self.height} × {self.width} pixels is outside 16..1024 either way")


PAPER_VIEWS: Mapping[str, View] = {
    "holistic": View(0, 1, 256, 128),
    "up1": View(0, 1 / 2, 224, 224),
    "mid1": View(1 / 4, 3 / 4, 224, 224),
    "dn1": View(1 / 2, 1, 224, 224),
    "up2": View(0, 3 / 7, 224, 224),
    "mid2": View(2 / 7, 5 / 7, 224, 224),
    "dn2": View(4 / 7, 1, 224, 224),
}
"""The paper's: the whole image, stripes 1–2, 2–3 and 3–4 of four, stripes 1–3, 3–5 and 5–7 of seven."""


def whole(height: int, width: int) -> View:
    """The full view at a size."""
    return View(0, 1, height, width)
