"""Batches: what is drawn, how it is changed, and that it comes in order and in time."""

import threading
from dataclasses import replace
from itertools import count

import numpy as np
import pytest

from chains.data.batches import BatchRecipe, Sampler, augment, batch_at, prefetch
from chains.data.images import ImageSet
from chains.errors import DataError

RECIPE = BatchRecipe(identities=4, images_per_identity=2)
PLAIN = BatchRecipe(identities=4, images_per_identity=2, pad=0, flip=0)


def numbered_people(each: tuple[int, ...] = (4,) * 8, height: int = 12, width: int = 6) -> ImageSet:
    """Image i is filled with the value i, so that pixels tell which image they are; pids are 100, 90, 80 ..."""
    pids = np.repeat(100 - 10 * np.arange(len(each)), each)
    values = np.arange(len(pids), dtype=np.uint8).reshape(-1, 1, 1, 1)
    return ImageSet(np.tile(values, (1, height, width, 3)), pids, np.ones(len(pids), np.int64))


def noise(n: int = 6, height: int = 16, width: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), np.uint8)


def changed(images: np.ndarray, seed: int = 0, **recipe: float) -> np.ndarray:
    """`images` augmented by nothing but what is named."""
    return augment(images, replace(PLAIN, **recipe), np.random.default_rng(seed))


def chosen(sampler: Sampler, index: int) -> np.ndarray:
    """Which images of `numbered_people` a batch holds, when nothing changes them."""
    return sampler.batch(index).images[:, 0, 0, 0].astype(int)


def test_batches_are_p_identities_of_k_images_and_a_function_of_the_seed() -> None:
    people = numbered_people()
    first, again, other = (batch_at(people, RECIPE, seed, 0) for seed in (1, 1, 2))
    assert sorted(np.unique(first.labels, return_counts=True)[1].tolist()) == [2, 2, 2, 2]
    assert np.array_equal(first.images, again.images)
    assert np.array_equal(first.labels, again.labels)
    assert not np.array_equal(first.images, other.images)


def test_a_batch_does_not_depend_on_the_batches_before_it() -> None:
    people = numbered_people()
    sampler = Sampler(people, RECIPE, seed=3)
    in_turn = [sampler.batch(index) for index in range(7)]
    for index in (6, 2):
        alone = batch_at(people, RECIPE, 3, index)
        assert np.array_equal(alone.images, in_turn[index].images)
        assert np.array_equal(alone.labels, in_turn[index].labels)


def test_a_label_is_the_position_of_the_pid_among_the_sorted_pids() -> None:
    people = numbered_people()
    sampler = Sampler(people, PLAIN, seed=0)
    pids = people.pids[chosen(sampler, 0)]
    assert np.array_equal(sampler.batch(0).labels, np.searchsorted(np.unique(people.pids), pids))


def test_every_identity_is_seen_once_a_round() -> None:
    sampler = Sampler(numbered_people(), RECIPE, seed=0)
    rounds = [[set(sampler.batch(start + i).labels.tolist()) for i in range(2)] for start in (0, 2, 4)]
    assert all(first | second == set(range(8)) for first, second in rounds)
    assert len({frozenset(first) for first, _ in rounds}) > 1, "each round has an order of its own"


def test_the_rest_of_a_round_that_fills_no_batch_is_dropped() -> None:
    sampler = Sampler(numbered_people((4,) * 11), RECIPE, seed=0)
    assert sampler.batches_per_round == 2
    assert all(len({*sampler.batch(i).labels, *sampler.batch(i + 1).labels}) == 8 for i in (0, 2, 4))


def test_images_repeat_only_where_an_identity_has_too_few() -> None:
    sampler = Sampler(numbered_people((1, 2, 3, 4)), replace(PLAIN, images_per_identity=3), seed=0)
    for index in range(5):
        batch = sampler.batch(index)
        different = {len(set(images)) for images in chosen(sampler, index)[batch.labels <= 1].reshape(2, 3)}
        assert different == {3}, "pids 70 and 80 have 4 and 3 images"
        assert len(set(chosen(sampler, index)[batch.labels == 3])) == 1


def test_too_few_identities_for_a_batch_are_refused() -> None:
    with pytest.raises(DataError, match="8 identities cannot fill a batch of 16"):
        Sampler(numbered_people(), BatchRecipe(), seed=0)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(DataError, match="a seed must be at least 0, not -3"):
        Sampler(numbered_people(), RECIPE, seed=-3)


@pytest.mark.parametrize(
    ("field", "value"),
    [("identities", 0), ("images_per_identity", 0), ("pad", -1), ("erasing", 1.5), ("flip", -0.1),
     ("colour_jitter", 2), ("erased_area", 0.01), ("erased_aspect", 0.5), ("erasing", float("nan"))],
)  # fmt: skip
def test_a_recipe_out_of_bounds_is_refused_and_the_field_is_named(field: str, value: float) -> None:
    with pytest.raises(DataError, match=field):
        BatchRecipe(**{field: value})


def test_augmentation_leaves_its_input_alone_and_keeps_its_kind() -> None:
    images = noise()
    before = images.copy()
    out = augment(images, BatchRecipe(erasing=1.0, colour_jitter=0.5), np.random.default_rng(0))
    assert np.array_equal(images, before)
    assert (out.shape, out.dtype) == (images.shape, np.uint8)


def test_with_everything_off_images_stay_as_they_are() -> None:
    assert np.array_equal(changed(noise()), noise())


def test_a_flip_mirrors_left_and_right() -> None:
    assert np.array_equal(changed(noise(), flip=1.0), noise()[:, :, ::-1])


def test_about_half_of_the_images_are_flipped() -> None:
    images = noise(400, 2, 2)
    flipped = (changed(images, flip=0.5) != images).any(axis=(1, 2, 3)).mean()
    assert flipped == pytest.approx(0.5, abs=0.1)


def test_a_shift_is_a_crop_of_the_image_padded_by_its_edge() -> None:
    images = noise(64)
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    shifts = set()
    for image, source in zip(changed(images, pad=2), padded, strict=True):
        fits = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if (image == source[top : top + 16, left : left + 8]).all()
        ]
        assert len(fits) == 1
        shifts.update(fits)
    assert {top for top, _ in shifts} == {left for _, left in shifts} == set(range(5))


def test_a_pad_wider_than_the_image_is_fine() -> None:
    assert changed(noise(8, 4, 3), pad=9).shape == (8, 4, 3, 3)


def test_erasing_paints_one_grey_rectangle_of_the_asked_size() -> None:
    images = np.zeros((200, 64, 32, 3), np.uint8)
    out = changed(images, erasing=1.0, erased_area=0.4, erased_aspect=3.33)
    shares = []
    for image in out:
        rows, columns = np.flatnonzero(image.any(axis=(1, 2))), np.flatnonzero(image.any(axis=(0, 2)))
        rectangle = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (rectangle == 127).all()
        shares.append(rectangle.size / image.size)
    assert 0.01 < min(shares) < 0.04
    assert 0.35 < max(shares) < 0.43


def test_only_some_images_are_erased() -> None:
    out = changed(np.zeros((400, 8, 8, 3), np.uint8), erasing=0.3)
    assert out.any(axis=(1, 2, 3)).mean() == pytest.approx(0.3, abs=0.08)


def literal_jitter(image: np.ndarray, brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """Saturation, contrast and brightness one after the other, in float64."""
    luma = np.array([0.299, 0.587, 0.114])
    x = image.astype(float)
    x = saturation * x + (1 - saturation) * (x @ luma)[..., None]
    x = contrast * x + (1 - contrast) * (x @ luma).mean()
    return np.clip(np.floor(brightness * x + 0.5), 0, 255)


def test_colour_jitter_is_saturation_contrast_and_brightness_by_random_factors() -> None:
    image = noise(1, 24, 12)
    factors = iter([[1.2, 0.7, 1.3]])

    class Fixed(np.random.Generator):
        def uniform(self, low: float = 0.0, high: float = 1.0, size: object = None) -> np.ndarray:
            assert (low, high, size) == (0.5, 1.5, 3)
            return np.array(next(factors))

    out = augment(image, replace(PLAIN, colour_jitter=0.5), Fixed(np.random.PCG64(0)))
    expected = literal_jitter(image[0], 1.2, 0.7, 1.3)
    assert np.abs(out[0] - expected).max() <= 1  # float32 may round the other way
    assert (out[0] == expected).mean() > 0.99


def test_colour_jitter_of_nearly_nothing_changes_nearly_nothing_and_a_strong_one_much() -> None:
    images = noise(4)
    faint, strong = (
        np.abs(changed(images, colour_jitter=s).astype(int) - images).mean(axis=(1, 2, 3)) for s in (1e-4, 0.8)
    )
    assert faint.max() < 0.1
    assert strong.mean() > 10
    assert len(set(strong.tolist())) == 4, "each image has factors of its own"


def test_grey_stays_grey_under_colour_jitter() -> None:
    images = np.repeat(noise(4)[..., :1], 3, axis=3)
    out = changed(images, colour_jitter=0.5).astype(int)
    assert np.abs(out - out[..., :1]).max() <= 1


def test_prefetched_batches_are_those_of_the_sampler_in_order() -> None:
    sampler = Sampler(numbered_people(), RECIPE, seed=0)
    indices = [5, 0, 3, 1, 9, 9, 2]
    for threads in (1, 3):
        got = list(prefetch(sampler, indices, threads, ahead=2))
        assert len(got) == len(indices)
        for batch, index in zip(got, indices, strict=True):
            assert np.array_equal(batch.images, sampler.batch(index).images)


class Watched(Sampler):
    """A sampler that counts, and breaks at one index."""

    def __init__(self, broken: int = -1) -> None:
        super().__init__(numbered_people(), RECIPE, seed=0)
        self.made: list[int] = []
        self.broken = broken

    def batch(self, index: int):
        if index == self.broken:
            raise DataError("people/0001.jpg is broken")
        self.made.append(index)
        return super().batch(index)


def test_what_a_batch_raises_is_raised_at_its_place() -> None:
    stream = prefetch(Watched(broken=2), range(5))
    assert [len(next(stream).labels) for _ in range(2)] == [8, 8]
    with pytest.raises(DataError, match=r"people/0001\.jpg is broken"):
        next(stream)


def own_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("widthwise-batches")]


def test_a_consumer_that_stops_early_leaves_no_thread_and_few_batches_behind() -> None:
    sampler = Watched()
    stream = prefetch(sampler, count(), threads=2, ahead=3)
    for _ in range(4):
        next(stream)
    assert own_threads()
    stream.close()
    assert not own_threads()
    assert len(sampler.made) <= 4 + 3
    assert next(stream, None) is None


def test_a_failure_leaves_no_thread_behind() -> None:
    with pytest.raises(DataError):
        list(prefetch(Watched(broken=1), count()))
    assert not own_threads()


def test_prefetching_nothing_ahead_is_refused_at_the_call() -> None:
    with pytest.raises(DataError, match="at least one thread and one batch ahead, not 1 and 0"):
        prefetch(Watched(), range(3), ahead=0)
