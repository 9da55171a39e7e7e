"""MSMT17 (Wei et al., CVPR 2018), first version and the second with blurred faces.

    train/ or mask_train_v2/    0000/0000_000_01_0303morning_0008_0.jpg    camera 01: the third number of the name
    test/  or mask_test_v2/
    list_train.txt  list_val.txt  list_query.txt  list_gallery.txt    lines of "0000/0000_000_01_….jpg 0": file and pid

The one surprise: the lists number training people from 0 and test people from 0 again. A pid stands for one person
here, so test people are numbered on behind the last training person.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from chains.data.files import ImageFiles
from chains.data.readers.dataset import DataSet, ReadOptions
from chains.data.readers.listing import Listing, missing
from chains.errors import DataError

VERSIONS = {"MSMT17 V1": ("train", "test"), "MSMT17 V2": ("mask_train_v2", "mask_test_v2")}
LISTS = ("list_train.txt", "list_val.txt", "list_query.txt", "list_gallery.txt")
NAME = re.compile(r"[0-9]+_[0-9]+_([0-9]{1,9})_")
LINE = re.compile(r"(.+) ([0-9]{1,9})")


@dataclass(frozen=True)
class _Line:
    path: Path
    pid: int
    camid: int


def why_not_msmt17(root: Path) -> str | None:
    if lacking := missing(root, files=LISTS):
        return lacking
    if all(missing(root, folders) for folders in VERSIONS.values()):
        return "neither folders train and test nor mask_train_v2 and mask_test_v2"
    return None


def read_msmt17(root: Path, options: ReadOptions) -> DataSet:
    """Without `has_val_in_train` the images of list_val.txt, of training people, are left out: 30,248 remain to train
    on, as in torchreid's default."""
    listing = Listing(root)
    if lacking := why_not_msmt17(root):
        raise DataError(f"{root}: {lacking}, so this is not MSMT17 as it is published")
    version = next(name for name, folders in VERSIONS.items() if not missing(root, folders))
    train_folder, test_folder = VERSIONS[version]
    train, val = (_lines(listing, name, train_folder) for name in LISTS[:2])
    query, gallery = (_lines(listing, name, test_folder) for name in LISTS[2:])
    first_test_pid = 1 + max(line.pid for line in train + val)
    if not options.has_val_in_train:
        listing.left_out["validation images, not trained on"].extend(line.path for line in val)
    return DataSet(
        version,
        root,
        _images(train + val if options.has_val_in_train else train, 0, options),
        _images(query, first_test_pid, options),
        _images(gallery, first_test_pid, options),
        listing.reasons(),
        (f"test people are numbered from {first_test_pid}: the lists begin at 0 again",),
    )


def _lines(listing: Listing, list_name: str, folder: str) -> list[_Line]:
    lines = []
    for number, text in enumerate(listing.text(list_name).splitlines(), start=1):
        if not text.strip():
            continue
        where = f"{listing.root / list_name}, line {number}"
        parts = LINE.fullmatch(text.strip())
        name = NAME.match(parts[1].rpartition("/")[2]) if parts else None
        if parts is None or name is None:
            raise DataError(f"{where}: {text.strip()!r} is not like '0000/0000_000_01_0303morning_0008_0.jpg 0'")
        lines.append(_Line(listing.file(f"{folder}/{parts[1]}", where), int(parts[2]), int(name[1])))
    if not lines:
        raise DataError(f"{listing.root / list_name}: the list is empty")
    return lines


def _images(lines: list[_Line], first_pid: int, options: ReadOptions) -> ImageFiles:
    pids = [first_pid + line.pid for line in lines]
    return ImageFiles.of([line.path for line in lines], pids, [line.camid for line in lines], options.size)
