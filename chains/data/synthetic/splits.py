"""Training, query and gallery images of a site: in memory, in pieces, or as files.

The one surprise: the camera of an image is not drawn. Each person walks past the cameras in turn, which is what makes
sure that every query has an answer at another camera.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np

from chains.data.images import ImageSet
from chains.data.synthetic.arrays import Ints
from chains.data.synthetic.renderer import render
from chains.data.synthetic.settings import FIRST_TEST_PID, PeopleSettings
from chains.errors import DataError

FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}  # as in Market-1501


def _labels(settings: PeopleSettings, split: str) -> tuple[Ints, Ints, Ints]:
    """pids, camids and shots of a split; a person starts at a camera of their own and takes them in turn.

    The gallery goes on where the queries of the same people end, so no image is in both.
    """
    first_pid, people, first_shot, images = {
        "train": (1, settings.train_identities, 0, settings.train_images_per_identity),
        "query": (FIRST_TEST_PID, settings.test_identities, 0, settings.queries_per_identity),
        "gallery": (
            FIRST_TEST_PID,
            settings.test_identities,
            settings.queries_per_identity,
            settings.gallery_images_per_identity,
        ),
    }[split]
    pids = np.repeat(np.arange(first_pid, first_pid + people), images)
    shots = np.tile(np.arange(first_shot, first_shot + images), people)
    return pids, 1 + (pids + shots) % settings.cameras, shots


def _whole(settings: PeopleSettings, split: str) -> ImageSet:
    pids, camids, shots = _labels(settings, split)
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
    pids, camids, shots = _labels(settings, split)
    for start in range(0, len(pids), chunk):
        part = slice(start, start + chunk)
        yield ImageSet(render(settings, pids[part], camids[part], shots[part]), pids[part], camids[part])


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
