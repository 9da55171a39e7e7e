"""Market-1501 (Zheng et al., ICCV 2015) and CUHK03-NP (Zhong et al., CVPR 2017), which is published in its layout.

    bounding_box_train/  query/  bounding_box_test/      0002_c1s1_000451_03.jpg    pid 2, camera 1

pid -1 is junk, boxes that hold no whole person: left out. pid 0 are distractors: in the gallery, where nobody looks for
them. CUHK03-NP holds two such folders, `detected` (boxes of a detector) and `labeled` (boxes drawn by hand).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from chains.data.files import ImageFiles
from chains.data.readers.dataset import SPLITS, Boxes, DataSet, ReadOptions, Split
from chains.data.readers.listing import Listing, missing
from chains.errors import DataError

NAME = re.compile(r"(-?[0-9]{1,9})_c([0-9]{1,9})(?:s[0-9]+)?_")
FOLDERS: dict[Split, str] = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
JUNK, DISTRACTOR = -1, 0


JUNK_REASON = "junk, pid -1"
NAME_REASON = "the name does not begin like 0002_c1s1_"


def why_not_market1501(root: Path) -> str | None:
    return missing(root, FOLDERS.values())


def why_not_cuhk03(root: Path) -> str | None:
    found = [boxes for boxes in get_args(Boxes) if (root / boxes).is_dir()]
    return None if found else "no folder detected or labeled"


def read_market1501(root: Path, options: ReadOptions) -> DataSet:
    return _read("Market-1501", root, options)


def read_cuhk03(root: Path, options: ReadOptions) -> DataSet:
    return _read(f"CUHK03-NP, {options.boxes} boxes", root / options.boxes, options)


def _read(name: str, root: Path, options: ReadOptions) -> DataSet:
    listing = Listing(root)
    if lacking := missing(root, FOLDERS.values()):
        raise DataError(f"{root}: {lacking}, so this is not {name} as it is published")
    train, query, gallery = (_images(listing, split, options) for split in SPLITS)
    return DataSet(name, root, train, query, gallery, listing.reasons())


def _images(listing: Listing, split: Split, options: ReadOptions) -> ImageFiles:
    paths, pids, camids = [], [], []
    for path in listing.images(FOLDERS[split]):
        name = NAME.match(path.name)
        if name is None:
            listing.leave_out(NAME_REASON, path)
            continue
        pid, camid = int(name[1]), int(name[2])
        if pid == JUNK:
            listing.leave_out(JUNK_REASON, path)
            continue
        if pid < JUNK or (pid == DISTRACTOR and split != "gallery"):
            raise DataError(f"{path}: pid {pid} in {split}; people are numbered from 1, and 0 is for the gallery alone")
        paths.append(path)
        pids.append(pid)
        camids.append(camid)
    if not paths:
        raise DataError(f"{listing.root / FOLDERS[split]}: no image with a name like 0002_c1s1_000451_03.jpg")
    return ImageFiles.of(paths, pids, camids, options.size)
