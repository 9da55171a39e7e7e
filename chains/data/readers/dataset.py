"""What a reader returns, and what it can be asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

from chains.data.files import ImageFiles
from chains.errors import DataError

Split = Literal["train", "query", "gallery"]
SPLITS: tuple[Split, ...] = get_args(Split)
Boxes = Literal["detected", "labeled"]
Camera = Literal["a", "b"]


@dataclass(frozen=True)
class ReadOptions:
    """How to read a data set. All but `size` concern some layouts only.

    size: (height, width) of the crops. seed: of the split of VIPeR, and of folders and tables that state none.
    boxes: of CUHK03-NP. has_val_in_train: MSMT17's validation images are trained on too. query_camera: of VIPeR.
    queries_per_identity: of folders and tables that state no split.
    """

    size: tuple[int, int] = (256, 128)
    seed: int = 0
    boxes: Boxes = "detected"
    has_val_in_train: bool = False
    query_camera: Camera = "a"
    queries_per_identity: int = 1

    def __post_init__(self) -> None:
        if self.boxes not in get_args(Boxes):
            raise DataError(f"boxes of CUHK03-NP are 'detected' or 'labeled', not {self.boxes!r}")
        if self.query_camera not in get_args(Camera):
            raise DataError(f"the query camera of VIPeR is 'a' or 'b', not {self.query_camera!r}")
        if self.seed < 0:
            raise DataError(f"a seed must be at least 0, not {self.seed}")
        if self.queries_per_identity < 1:
            raise DataError(f"queries_per_identity must be at least 1, not {self.queries_per_identity}")


@dataclass(frozen=True, eq=False)
class DataSet:
    """Training images, queries and gallery of one data set.

    A pid stands for one person in all three. left_out: files below the root that are in none of them, by reason.
    notes: what a user should know about how it was read. people, cameras: where the layout names them by words, the
    name of pid i and camid i.
    """

    name: str
    root: Path
    train: ImageFiles
    query: ImageFiles
    gallery: ImageFiles
    left_out: Mapping[str, tuple[Path, ...]] = field(default_factory=lambda: MappingProxyType({}))
    notes: tuple[str, ...] = ()
    people: tuple[str, ...] = ()
    cameras: tuple[str, ...] = ()

    @property
    def splits(self) -> dict[Split, ImageFiles]:
        return {"train": self.train, "query": self.query, "gallery": self.gallery}
