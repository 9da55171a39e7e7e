"""Rows of (file, person, camera, split) become a data set; the split where none is stated.

The split: identities are shuffled by the seed and half of them, rounded down, are trained on. Of every other identity
the first images are queries and the rest is the gallery. An identity with a single image cannot be queried: its image
is in the gallery and nobody looks for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from chains.data.files import ImageFiles
from chains.data.images import UNKNOWN_CAMERA
from chains.data.readers.dataset import SPLITS, DataSet, ReadOptions, Split
from chains.data.readers.listing import Listing
from chains.errors import DataError


@dataclass(frozen=True)
class Row:
    """One image. person and camera are names; no camera: not known; no split: to be decided."""

    path: Path
    person: str
    camera: str | None = None
    split: Split | None = None


def data_set(name: str, root: Path, listing: Listing, rows: Sequence[Row], options: ReadOptions) -> DataSet:
    """People and cameras are numbered in the order of their sorted names. root: the folder or table that the rows come
    from, for messages. Raises `DataError` when there is no image, when only one of query and gallery is there, or when
    a single identity should be split."""
    if not rows:
        raise DataError(f"{root}: no image found")
    notes: list[str] = []
    if all(row.split is None for row in rows):
        rows, notes = split_by_identity(root, rows, options)
    people = sorted({row.person for row in rows})
    cameras = sorted({row.camera for row in rows if row.camera is not None})
    if not cameras:
        notes.append("no camera ids: evaluation leaves out no gallery image as taken by the query's own camera")
    pid_of, camid_of = ({key: number for number, key in enumerate(names)} for names in (people, cameras))

    def of(split: Split) -> ImageFiles:
        chosen = [row for row in rows if row.split == split]
        camids = [UNKNOWN_CAMERA if row.camera is None else camid_of[row.camera] for row in chosen]
        pids = [pid_of[row.person] for row in chosen]
        return ImageFiles.of([row.path for row in chosen], pids, camids, options.size)

    train, query, gallery = (of(split) for split in SPLITS)
    if bool(len(query)) != bool(len(gallery)):
        missing = "gallery" if len(query) else "query"
        raise DataError(f"{root}: there are images to evaluate on, but none in {missing}")
    return DataSet(name, root, train, query, gallery, listing.reasons(), tuple(notes), tuple(people), tuple(cameras))


def split_by_identity(root: Path, rows: Sequence[Row], options: ReadOptions) -> tuple[list[Row], list[str]]:
    """`rows` with a split each, and what to tell the user about it."""
    people = sorted({row.person for row in rows})
    if len(people) < 2:
        raise DataError(f"{root}: 1 identity cannot be split into training and test; at least two are needed")
    shuffled = np.random.default_rng(options.seed).permutation(len(people))
    trained = {people[number] for number in shuffled[: len(people) // 2]}
    images_of, seen = Counter(row.person for row in rows), Counter[str]()
    decided = []
    for row in rows:
        is_query = seen[row.person] < min(options.queries_per_identity, images_of[row.person] - 1)
        split: Split = "train" if row.person in trained else "query" if is_query else "gallery"
        decided.append(replace(row, split=split))
        seen[row.person] += 1
    alone = sum(images_of[person] == 1 for person in people if person not in trained)
    notes = [f"split by identity with seed {options.seed}: {len(trained)} of {len(people)} identities to train"]
    if alone:
        notes.append(f"{alone} test identities have one image and cannot be queried; it is in the gallery")
    return decided, notes
