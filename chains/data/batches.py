"""Batches for ReID training: P identities × K images, flipped, shifted and erased. numpy only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chains.data.images import ImageSet
from chains.errors import DataError

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class BatchRecipe:
    """identities × images_per_identity images a batch; `pad` pixels of shift; erase a rectangle with `erasing` odds."""

    identities: int = 16
    images_per_identity: int = 4
    pad: int = 4
    erasing: float = 0.0

    @property
    def size(self) -> int:
        return self.identities * self.images_per_identity


@dataclass(frozen=True, eq=False)
class Batch:
    """images: uint8 (n, H, W, 3); labels: int64 (n,), position of the identity in the sorted list of pids."""

    images: Pixels
    labels: NDArray[np.int64]


def batches(images: ImageSet, recipe: BatchRecipe, seed: int) -> Iterator[Batch]:
    """Endless PK batches, a function of the seed. Identities come in shuffled rounds, so that each is seen about as
    often; the rest of a round that fills no batch is dropped. An identity with fewer than K images repeats some. Raises
    `DataError` with fewer than P identities."""
    pids, labels = np.unique(images.pids, return_inverse=True)
    if len(pids) < recipe.identities:
        raise DataError(f"{len(pids)} identities cannot fill a batch of {recipe.identities}")
    members = [np.flatnonzero(labels == label) for label in range(len(pids))]
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(len(pids))
        for start in range(0, len(order) - recipe.identities + 1, recipe.identities):
            chosen = [
                _draw(members[label], recipe.images_per_identity, generator)
                for label in order[start : start + recipe.identities]
            ]
            indices = np.concatenate(chosen)
            yield Batch(augment(images.images[indices], recipe, generator), labels[indices])


def _draw(members: NDArray[np.int64], count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    return generator.choice(members, count, replace=len(members) < count)


def augment(images: Pixels, recipe: BatchRecipe, generator: np.random.Generator) -> Pixels:
    """Random flip, shift by pad and crop, and random erasing (Zhong et al., AAAI 2020) with grey; a new array."""
    count, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (recipe.pad, recipe.pad), (recipe.pad, recipe.pad), (0, 0)), mode="edge")
    flipped, erased = generator.random((2, count)) < np.array([[0.5], [recipe.erasing]])
    tops, lefts = generator.integers(0, 2 * recipe.pad + 1, (2, count))
    out = np.empty_like(images)
    for index in range(count):
        crop = padded[index, tops[index] : tops[index] + height, lefts[index] : lefts[index] + width]
        out[index] = np.flip(crop, axis=1) if flipped[index] else crop
        if erased[index]:
            _erase(out[index], generator)
    return out


def _erase(image: Pixels, generator: np.random.Generator) -> None:
    """Paint a grey rectangle of 2 % to 20 % of the area into `image` (H, W, 3), in place."""
    height, width, _ = image.shape
    area = generator.uniform(0.02, 0.2) * height * width
    ratio = generator.uniform(0.5, 2.0)
    tall = min(height, max(1, round((area * ratio) ** 0.5)))
    wide = min(width, max(1, round((area / ratio) ** 0.5)))
    top, left = generator.integers(0, height - tall + 1), generator.integers(0, width - wide + 1)
    image[top : top + tall, left : left + wide] = 127
