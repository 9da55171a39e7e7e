"""A labelled set of person crops held in memory: what every reader and renderer hands to training and evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from chains.errors import DataError


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Crops with the identity and the camera of each.

    images: uint8 (n, height, width, 3), RGB; pids: int64 (n,); camids: int64 (n,).
    Raises `DataError` where the arrays do not belong together; the message names the one to mend.
    """

    images: npt.NDArray[np.uint8]
    pids: npt.NDArray[np.int64]
    camids: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.shape[3] != 3 or self.images.dtype != np.uint8:
            raise DataError(
                "images must be uint8 of shape (n, height, width, 3); "
                f"got {self.images.dtype} of shape {self.images.shape}"
            )
        for name in ("pids", "camids"):
            self._check_labels(name, getattr(self, name))

    def _check_labels(self, name: str, labels: npt.NDArray[np.int64]) -> None:
        if labels.dtype != np.int64 or labels.shape != (len(self.images),):
            raise DataError(
                f"{name} must be int64 of shape ({len(self.images)},), one per image; "
                f"got {labels.dtype} of shape {labels.shape}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: npt.ArrayLike) -> ImageSet:
        """The images at these positions, in this order (a copy); -1 is the last. Raises `DataError` for a position
        outside the set.
        """
        chosen = np.asarray(indices, dtype=np.int64).reshape(-1)
        outside = (chosen < -len(self)) | (chosen >= len(self))
        if outside.any():
            raise DataError(f"position {chosen[outside][0]} is outside a set of {len(self)} images")
        return ImageSet(self.images[chosen], self.pids[chosen], self.camids[chosen])
