"""Your own images: one folder per identity, named as you like.

    anna/0.jpg  anna/1.jpg  ben/17.png …                    split by identity, see `labelled`
    train/anna/0.jpg  query/ben/17.png  gallery/ben/18.png  the split as it stands; train may be there alone

There are no camera ids, so evaluation leaves nothing out: an image of the same walk past the same camera counts as a
correct match. Give cameras in a table (`table`) if you know them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from chains.data.readers.dataset import SPLITS, DataSet, ReadOptions, Split
from chains.data.readers.labelled import Row, data_set
from chains.data.readers.listing import Listing
from chains.errors import DataError

# Folders of published layouts: where one is, something of that layout is missing, and it holds no identities.
NOT_PEOPLE = {"bounding_box_train", "bounding_box_test", "cam_a", "cam_b", "mask_train_v2", "mask_test_v2"}


def why_not_folder(root: Path) -> str | None:
    listing = Listing(root)
    folders = listing.folders()
    if strangers := sorted(NOT_PEOPLE & set(folders)):
        return f"{strangers[0]} belongs to another layout"
    if set(SPLITS) & set(folders):
        folders = [f"{split}/{name}" for split in _splits(listing) for name in listing.folders(split)]
    has_images = any(True for folder in folders for _ in listing.images(folder))
    return None if has_images else "no folder of images per identity"


def read_folder(root: Path, options: ReadOptions) -> DataSet:
    listing = Listing(root)
    return data_set(root.resolve().name, root, listing, list(_rows(listing)), options)


def _splits(listing: Listing) -> list[Split]:
    folders = listing.folders()
    return [split for split in SPLITS if split in folders]


def _rows(listing: Listing) -> Iterator[Row]:
    splits = _splits(listing)
    if not splits:
        yield from _people(listing, ".", None)
        return
    if strangers := sorted(set(listing.folders()) - set(splits)):
        raise DataError(
            f"{listing.root / strangers[0]}: beside {' and '.join(splits)} only folders named {', '.join(SPLITS)} "
            "are understood; move it there, or rename the others if they are identities"
        )
    _leave_out_strays(listing, ".")
    for split in splits:
        yield from _people(listing, split, split)


def _people(listing: Listing, folder: str, split: Split | None) -> Iterator[Row]:
    _leave_out_strays(listing, folder)
    for person in listing.folders(folder):
        for path in listing.images(f"{folder}/{person}"):
            yield Row(path, person, None, split)


def _leave_out_strays(listing: Listing, folder: str) -> None:
    for path in listing.images(folder, may_hold_folders=True):
        listing.leave_out("an image outside the folders of identities", path)
