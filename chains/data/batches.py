"""Batches for ReID training: P identities × K images, flipped, shifted, recoloured and erased. numpy only.

The one surprise: there is no state. Batch `index` is a function of (images, recipe, seed, index), so a run that was
killed goes on at any index, and several processes share out the indices among them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from chains.data.images import Images, Labels, Pixels
from chains.errors import DataError

ROUNDS, BATCHES = 0, 1  # what a stream of random numbers is for: default_rng([seed, ROUNDS or BATCHES, number])
GREY = 127
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as in every colour jitter of the field
SMALLEST_ERASED = 0.02  # of the area (Zhong et al., AAAI 2020)


@dataclass(frozen=True)
class BatchRecipe:
    """identities × images_per_identity images a batch, and how each is changed.

    pad: pixels of shift. flip, erasing: odds of an image. colour_jitter: brightness, contrast and saturation are each
    scaled by a factor within 1 ± colour_jitter. An erased rectangle takes up to `erased_area` of the image, its height
    over width lies within 1 / erased_aspect … erased_aspect (0.4 and 3.33 in the paper of random erasing).
    """

    identities: int = 16
    images_per_identity: int = 4
    pad: int = 4
    erasing: float = 0.0
    colour_jitter: float = 0.0
    flip: float = 0.5
    erased_area: float = 0.2
    erased_aspect: float = 2.0

    def __post_init__(self) -> None:
        bounds = {
            "identities": (1, np.inf),
            "images_per_identity": (1, np.inf),
            "pad": (0, np.inf),
            "erasing": (0, 1),
            "colour_jitter": (0, 1),
            "flip": (0, 1),
            "erased_area": (SMALLEST_ERASED, 1),
            "erased_aspect": (1, np.inf),
        }
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise DataError(f"{name} of a batch must be within {low} and {high}, not {getattr(self, name)}")

    @property
    def size(self) -> int:
        return self.identities * self.images_per_identity


@dataclass(frozen=True, eq=False)
class Batch:
    """images: uint8 (n, H, W, 3); labels: int64 (n,), position of the identity in the sorted list of pids."""

    images: Pixels
    labels: Labels


class Sampler:
    """PK batches of `images`, each a function of the seed and its index (from 0).

    Identities come in shuffled rounds, so that each is seen about as often; the rest of a round that fills no batch is
    dropped. An identity with fewer than K images repeats some. Raises `DataError` with fewer than P identities.
    Nothing is changed after construction: threads may share a sampler.
    """

    def __init__(self, images: Images, recipe: BatchRecipe, seed: int) -> None:
        pids, labels, counts = np.unique(images.pids, return_inverse=True, return_counts=True)
        if len(pids) < recipe.identities:
            raise DataError(f"{len(pids)} identities cannot fill a batch of {recipe.identities}")
        if seed < 0:
            raise DataError(f"a seed must be at least 0, not {seed}")
        self.images, self.recipe, self.seed = images, recipe, seed
        self.batches_per_round = len(pids) // recipe.identities
        self._labels: Labels = labels.astype(np.int64)
        self._members = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])

    def batch(self, index: int) -> Batch:
        generator = np.random.default_rng([self.seed, BATCHES, index])
        chosen = self._choose(index, generator)
        return Batch(augment(self.images.pixels(chosen), self.recipe, generator), self._labels[chosen])

    def _choose(self, index: int, generator: np.random.Generator) -> Labels:
        """Positions of the images of a batch, identity by identity."""
        round_number, place = divmod(index, self.batches_per_round)
        order = np.random.default_rng([self.seed, ROUNDS, round_number]).permutation(len(self._members))
        identities = order[place * self.recipe.identities :][: self.recipe.identities]
        draws = [_draw(self._members[label], self.recipe.images_per_identity, generator) for label in identities]
        return np.concatenate(draws)


def batch_at(images: Images, recipe: BatchRecipe, seed: int, index: int) -> Batch:
    """One batch. For many of the same images keep a `Sampler`: it sorts the identities once."""
    return Sampler(images, recipe, seed).batch(index)


def prefetch(
    sampler: Sampler, indices: Iterable[int], threads: int = 1, ahead: int = 4
) -> Generator[Batch, None, None]:
    """The batches of `indices`, in their order, made by background threads while the caller works on earlier ones.

    At most `ahead` batches wait (plus those in the caller's hands). What a batch raises is raised here, at its place.
    Closing the generator, or dropping it, ends the threads; `indices` may be endless.
    """
    if threads < 1 or ahead < 1:
        raise DataError(f"prefetching takes at least one thread and one batch ahead, not {threads} and {ahead}")
    return _prefetched(sampler, indices, threads, ahead)


def _prefetched(sampler: Sampler, indices: Iterable[int], threads: int, ahead: int) -> Generator[Batch, None, None]:
    waiting: deque[Future[Batch]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="widthwise-batches")
    try:
        for index in indices:
            waiting.append(pool.submit(sampler.batch, index))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _draw(members: Labels, count: int, generator: np.random.Generator) -> Labels:
    return generator.choice(members, count, replace=len(members) < count)


def augment(images: Pixels, recipe: BatchRecipe, generator: np.random.Generator) -> Pixels:
    """Random flip, shift by pad and crop, colour jitter, and random erasing (Zhong et al., AAAI 2020) with grey.

    uint8 (n, H, W, 3) to a new array of the same kind. Erasing comes last, so that its grey is always the same.
    """
    count, _, width, _ = images.shape
    flipped, erased = generator.random((2, count)) < np.array([[recipe.flip], [recipe.erasing]])
    shifts = generator.integers(-recipe.pad, recipe.pad + 1, (count, 2))
    backwards = np.arange(width)[::-1]
    out = np.empty_like(images)
    for image, source, flip, (down, right) in zip(out, images, flipped, shifts.tolist(), strict=True):
        _shift(image, source.take(backwards, axis=1) if flip else source, down, right)
    if recipe.colour_jitter > 0:
        for image in out:
            _jitter(image, recipe.colour_jitter, generator)
    for index in np.flatnonzero(erased):
        _erase(out[index], recipe, generator)
    return out


def _shift(out: Pixels, image: Pixels, down: int, right: int) -> None:
    """Write `image` (H, W, 3), moved by so many pixels, into `out`; its border pixels fill what is left free.

    The same as a crop of the image padded by its edge, in slices: several times as fast.
    """
    height, width, _ = image.shape
    down, right = max(1 - height, min(down, height - 1)), max(1 - width, min(right, width - 1))
    top, bottom = max(0, down), min(height, height + down)
    left, end = max(0, right), min(width, width + right)
    out[top:bottom, left:end] = image[top - down : bottom - down, left - right : end - right]
    out[:top, left:end] = out[top, left:end]
    out[bottom:, left:end] = out[bottom - 1, left:end]
    out[:, :left] = out[:, left, None]
    out[:, end:] = out[:, end - 1, None]


def _jitter(image: Pixels, strength: float, generator: np.random.Generator) -> None:
    """Recolour `image` (H, W, 3), in place: brightness, contrast and saturation each by a factor of its own.

    With grey g of a pixel x, m the mean of g over the image, brightness b, contrast c and saturation s:
    x' = b (c (s x + (1 - s) g) + (1 - c) m) = b c s · x + b c (1 - s) · g + b (1 - c) m, rounded and clipped once.
    """
    brightness, contrast, saturation = generator.uniform(1 - strength, 1 + strength, 3).astype(np.float32)
    colour = image.astype(np.float32)
    grey = colour @ LUMA
    offset = brightness * (1 - contrast) * grey.mean() + np.float32(0.5)
    grey *= brightness * contrast * (1 - saturation)
    grey += offset
    colour *= brightness * contrast * saturation
    colour += grey[..., None]
    image[:] = np.clip(colour, 0, 255, out=colour)


def _erase(image: Pixels, recipe: BatchRecipe, generator: np.random.Generator) -> None:
    """Paint a grey rectangle into `image` (H, W, 3), in place."""
    height, width, _ = image.shape
    area = generator.uniform(SMALLEST_ERASED, recipe.erased_area) * height * width
    ratio = generator.uniform(1 / recipe.erased_aspect, recipe.erased_aspect)
    tall = min(height, max(1, round((area * ratio) ** 0.5)))
    wide = min(width, max(1, round((area / ratio) ** 0.5)))
    top, left = generator.integers(0, height - tall + 1), generator.integers(0, width - wide + 1)
    image[top : top + tall, left : left + wide] = GREY
