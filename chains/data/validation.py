"""Is this data set what its owner thinks it is? Counts, broken files, and what would make accuracy figures wrong.

Every file is read once. An *error* makes figures worthless or stops training: an identity or an image in both training
and test, a file that cannot be decoded, queries of which none can be answered. A *warning* is worth a look.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from chains.data.files import ImageFiles, Inspection, inspect
from chains.data.images import UNKNOWN_CAMERA, Images, Labels
from chains.data.readers.dataset import DataSet
from chains.errors import DataError

LISTED = 20  # broken files named in a report; all are counted
PIECE = 1024  # files handed to the threads at once

Progress = Callable[[int, int], None]
"""Called with the files done and the files in all."""


@dataclass(frozen=True)
class SplitCounts:
    """single_image_identities: people with one image; unknown_camera: images whose camera is not known."""

    images: int
    identities: int
    cameras: int
    single_image_identities: int
    unknown_camera: int


@dataclass(frozen=True)
class Extreme:
    """The smallest or largest image of a data set by its number of pixels, as it lies on disk."""

    path: str
    height: int
    width: int


@dataclass(frozen=True)
class Report:
    """What `validate` found. broken_files names at most `LISTED` of them; left_out counts files by reason."""

    name: str
    root: str
    is_decoded: bool
    splits: dict[str, SplitCounts]
    broken: int
    broken_files: tuple[str, ...]
    left_out: dict[str, int]
    leaked_identities: int
    unmatched_queries: int
    same_in_train_and_test: int
    same_in_query_and_gallery: int
    smallest: Extreme | None
    largest: Extreme | None
    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def is_usable(self) -> bool:
        """Whether there is no error."""
        return not self.errors

    def json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def table(self) -> str:
        """For people; plain text."""
        columns = ("images", "identities", "cameras", "one image", "no camera")
        lines = [f"{self.name}   {self.root}", "", f"{'':8}" + "".join(f"{column:>12}" for column in columns)]
        for split, counts in self.splits.items():
            lines.append(f"{split:8}" + "".join(f"{count:12,}" for count in asdict(counts).values()))
        for what, extreme in (("smallest", self.smallest), ("largest", self.largest)):
            if extreme is not None:
                lines.append(f"{what}: {extreme.height} x {extreme.width} (height x width), {extreme.path}")
        lines += [f"left out: {count:,} ({reason})" for reason, count in self.left_out.items()]
        for what, messages in (("note", self.notes), ("warning", self.warnings), ("ERROR", self.errors)):
            lines += [f"{what}: {message}" for message in messages]
        lines += [f"  {message}" for message in self.broken_files]
        checked = "every image decoded" if self.is_decoded else "headers read, pixels not decoded"
        lines.append(f"{checked}; {'usable' if self.is_usable else 'not usable as it is'}")
        return "\n".join(lines).encode("utf-8", "replace").decode()  # a file name may hold any bytes


def validate(dataset: DataSet, decode: bool = True, threads: int = 2, progress: Progress | None = None) -> Report:
    """Read every file of `dataset`; with `decode` also decode it at full size, about a millisecond for a crop."""
    paths = list(dict.fromkeys(path for images in dataset.splits.values() for path in images.paths))
    found: dict[Path, Inspection] = {}
    broken: list[str] = []
    for done, (path, result) in enumerate(_inspected(paths, decode, threads), start=1):
        if isinstance(result, Inspection):
            found[path] = result
        else:
            broken.append(str(result))
        if progress is not None:
            progress(done, len(paths))
    leaked = np.intersect1d(dataset.train.pids, np.concatenate([dataset.query.pids, dataset.gallery.pids]))
    unmatched = unmatched_queries(dataset.query, dataset.gallery)
    in_both = _same_files((dataset.train,), (dataset.query, dataset.gallery), found)
    searched_for = _same_files((dataset.query,), (dataset.gallery,), found)
    left_out = {reason: len(files) for reason, files in dataset.left_out.items()}
    by_area = sorted(found, key=lambda path: found[path].height * found[path].width)
    return Report(
        name=dataset.name,
        root=str(dataset.root),
        is_decoded=decode,
        splits={split: _counts(images) for split, images in dataset.splits.items()},
        broken=len(broken),
        broken_files=tuple(broken[:LISTED]),
        left_out=left_out,
        leaked_identities=len(leaked),
        unmatched_queries=len(unmatched),
        same_in_train_and_test=len(in_both),
        same_in_query_and_gallery=len(searched_for),
        smallest=_extreme(by_area[0], found) if by_area else None,
        largest=_extreme(by_area[-1], found) if by_area else None,
        errors=tuple(_errors(dataset, leaked, unmatched, in_both, len(broken))),
        warnings=tuple(_warnings(dataset, unmatched, searched_for)),
        notes=dataset.notes,
    )


def unmatched_queries(query: Images, gallery: Images) -> Labels:
    """Positions of the queries without a correct match: no gallery image of the same identity, or only ones of the same
    known camera, which evaluation leaves out. int64 (m,)."""
    of_person = Counter(gallery.pids.tolist())
    by_camera = Counter(zip(gallery.pids.tolist(), gallery.camids.tolist(), strict=True))
    answers = [
        of_person[pid] - (by_camera[pid, camid] if camid != UNKNOWN_CAMERA else 0)
        for pid, camid in zip(query.pids.tolist(), query.camids.tolist(), strict=True)
    ]
    return np.flatnonzero(np.array(answers, np.int64) == 0)


def _inspected(paths: Sequence[Path], decode: bool, threads: int) -> Iterator[tuple[Path, Inspection | DataError]]:
    """Each file and what it is, or why it is broken, in order."""

    def look(path: Path) -> Inspection | DataError:
        try:
            return inspect(path, decode)
        except DataError as error:
            return error

    with ThreadPoolExecutor(threads, thread_name_prefix="widthwise-validate") as pool:
        for start in range(0, len(paths), PIECE):
            piece = paths[start : start + PIECE]
            yield from zip(piece, pool.map(look, piece), strict=True)


def _counts(images: Images) -> SplitCounts:
    of_person = Counter(images.pids.tolist())
    known = images.camids[images.camids != UNKNOWN_CAMERA]
    return SplitCounts(
        images=len(images),
        identities=len(of_person),
        cameras=len(np.unique(known)),
        single_image_identities=sum(count == 1 for count in of_person.values()),
        unknown_camera=len(images) - len(known),
    )


def _same_files(
    ones: Sequence[ImageFiles], others: Sequence[ImageFiles], found: dict[Path, Inspection]
) -> list[tuple[Path, Path]]:
    """Pairs of files of the same bytes, one from each side: one pair for each content that both have."""
    first, second = (
        {found[path].digest: path for images in side for path in images.paths if path in found}
        for side in (ones, others)
    )
    return sorted((first[digest], second[digest]) for digest in first.keys() & second.keys())


def _extreme(path: Path, found: dict[Path, Inspection]) -> Extreme:
    return Extreme(str(path), found[path].height, found[path].width)


def _errors(
    dataset: DataSet, leaked: Labels, unmatched: Labels, in_both: list[tuple[Path, Path]], broken: int
) -> Iterator[str]:
    if len(leaked):
        pid = int(leaked[0])
        name = dataset.people[pid] if dataset.people else str(pid)
        yield (
            f"{len(leaked)} identities are in training and test; the first is {name}: "
            f"{_first_of(pid, dataset.train)} and {_first_of(pid, dataset.query, dataset.gallery)}"
        )
    if in_both:
        yield f"{len(in_both)} images are in training and test; the first is {in_both[0][0]}, also {in_both[0][1]}"
    if len(dataset.query) and len(unmatched) == len(dataset.query):
        yield "no query has a gallery image of the same identity from another camera; nothing can be measured"
    if broken:
        yield f"{broken} files cannot be decoded; mend or remove them:"


def _warnings(dataset: DataSet, unmatched: Labels, searched_for: list[tuple[Path, Path]]) -> Iterator[str]:
    if len(unmatched):
        yield (
            f"{len(unmatched)} of {len(dataset.query)} queries have no correct match from another camera and are not "
            f"scored; the first is {dataset.query.paths[unmatched[0]]}"
        )
    if searched_for:
        query, gallery = searched_for[0]
        yield f"{len(searched_for)} queries lie in the gallery as the same file; the first is {query}, also {gallery}"
    for split, images in dataset.splits.items():
        if not len(images):
            yield f"no {split} images"


def _first_of(pid: int, *sets: ImageFiles) -> Path:
    paths = (path for images in sets for path, other in zip(images.paths, images.pids, strict=True) if other == pid)
    return next(paths)
