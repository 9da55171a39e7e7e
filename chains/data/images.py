"""Labelled person crops: what readers and renderers hand to training, calibration and evaluation.

`Images` is the port. `ImageSet` holds the pixels in memory; `chains.data.files.ImageFiles` decodes them when asked, so
that a set larger than memory can be trained on. Nobody who takes `Images` needs to know which it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from chains.errors import DataError

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

UNKNOWN_CAMERA = -1
"""camid of an image whose camera is not known: evaluation never leaves such an image out as "same camera"."""


class Images(Protocol):
    """Crops of one size with the identity and the camera of each."""

    @property
    def pids(self) -> Labels:
        """int64 (n,)."""

    @property
    def camids(self) -> Labels:
        """int64 (n,); `UNKNOWN_CAMERA` where it is not known."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of every crop."""

    def __len__(self) -> int: ...

    def pixels(self, indices: npt.ArrayLike) -> Pixels:
        """RGB of these positions, in this order: uint8 (len(indices), height, width, 3), the caller's to change."""

    def take(self, indices: npt.ArrayLike) -> Self:
        """The images at these positions, in this order, as the same kind of set."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Crops in memory.

    images: uint8 (n, height, width, 3), RGB; pids: int64 (n,); camids: int64 (n,).
    Raises `DataError` where the arrays do not belong together; the message names the one to mend.
    """

    images: Pixels
    pids: Labels
    camids: Labels

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.shape[3] != 3 or self.images.dtype != np.uint8:
            raise DataError(
                "images must be uint8 of shape (n, height, width, 3); "
                f"got {self.images.dtype} of shape {self.images.shape}"
            )
        for name in ("pids", "camids"):
            check_labels(name, getattr(self, name), len(self.images))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> tuple[int, int]:
        return self.images.shape[1], self.images.shape[2]

    def pixels(self, indices: npt.ArrayLike) -> Pixels:
        """A copy of the crops at these positions; -1 is the last. Raises `DataError` for a position outside the set."""
        return self.images[positions(indices, len(self))]

    def take(self, indices: npt.ArrayLike) -> ImageSet:
        """The images at these positions, in this order (a copy); -1 is the last. Raises `DataError` for a position
        outside the set.
        """
        chosen = positions(indices, len(self))
        return ImageSet(self.images[chosen], self.pids[chosen], self.camids[chosen])


def load(images: Images) -> ImageSet:
    """All of `images` in memory: height × width × 3 bytes each, so for sets that fit."""
    return ImageSet(images.pixels(np.arange(len(images))), images.pids.copy(), images.camids.copy())


def chunks(images: Images, size: int) -> Iterator[Pixels]:
    """All crops in order, `size` at a time: uint8 (up to size, height, width, 3). Memory stays bounded."""
    for start in range(0, len(images), size):
        yield images.pixels(np.arange(start, min(start + size, len(images))))


def positions(indices: npt.ArrayLike, count: int) -> Labels:
    """`indices` as int64 (n,). Raises `DataError` for one that is outside a set of `count` images."""
    chosen = np.asarray(indices, dtype=np.int64).reshape(-1)
    outside = (chosen < -count) | (chosen >= count)
    if outside.any():
        raise DataError(f"position {chosen[outside][0]} is outside a set of {count} images")
    return chosen


def check_labels(name: str, labels: Labels, count: int) -> None:
    """Raises `DataError` unless `labels` are int64 (count,)."""
    if labels.dtype != np.int64 or labels.shape != (count,):
        raise DataError(
            f"{name} must be int64 of shape ({count},), one per image; got {labels.dtype} of shape {labels.shape}"
        )
