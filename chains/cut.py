"""Cuts: which channels of the teacher each channel of a student stands for.

Channels of a group are kept in *leaf order*, so that every channel of every student stands for one contiguous run of
them. A cut is therefore a value of two lists of runs, and code that expands, counts or writes never asks how it came
about. Two families make cuts:

- `NestedTree` (`mode: nested`): every cut of a clustering tree. In leaf order, undoing one merge adds one boundary
  between neighbours, so a whole tree is the order in which the N - 1 boundaries appear. Cuts nest.
- `SharedClusters` (`mode: oskt`): n fixed clusters whose rows are repeated in proportion to their size
  (OSKT, ICCV 2025; `select_elements` in the authors' code).

Example, N = 6 channels, boundaries appearing in the order 4, 2, 5, 1, 3:

    cut(1)  0 1 2 3 4 5
    cut(2)  0 1 2 3 | 4 5
    cut(3)  0 1 | 2 3 | 4 5
    cut(6)  0 | 1 | 2 | 3 | 4 | 5
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from chains.errors import CutError

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Runs:
    """Contiguous runs `[starts[i], stops[i])` of stored channels, one per student channel; none is empty.

    starts, stops: int64 (m,). Raises `CutError` for an empty run or arrays that do not match.
    """

    starts: Indices
    stops: Indices

    def __post_init__(self) -> None:
        if self.starts.shape != self.stops.shape or self.starts.ndim != 1:
            raise CutError(f"starts {self.starts.shape} and stops {self.stops.shape} must be two lists of one length")
        if len(self.starts) == 0 or bool((self.stops <= self.starts).any()) or self.starts.min() < 0:
            raise CutError("every run holds at least one channel")

    @classmethod
    def between(cls, boundaries: Indices) -> Runs:
        """The runs between neighbouring `boundaries` (m + 1,), ascending."""
        return cls(boundaries[:-1], boundaries[1:])

    @classmethod
    def single(cls, positions: Indices) -> Runs:
        """Runs of one stored channel each, at `positions` (m,)."""
        return cls(positions, positions + 1)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, window: slice) -> Runs:
        if window.indices(len(self)) == (0, len(self), 1):
            return self  # with what it has computed already
        return Runs(self.starts[window], self.stops[window])

    @cached_property
    def sizes(self) -> Indices:
        """Channels in each run: int64 (m,)."""
        return self.stops - self.starts

    @cached_property
    def is_single(self) -> bool:
        """Every run is one channel: nothing is merged."""
        return bool((self.sizes == 1).all())

    @cached_property
    def is_plain(self) -> bool:
        """The runs are neighbours of one channel each, so that taking them is a slice."""
        return self.is_single and bool((np.diff(self.starts) == 1).all())

    @cached_property
    def longest_first(self) -> Indices:
        """The runs by descending size, so that those which still have a channel at some step come first: int64 (m,)."""
        return np.argsort(-self.sizes, kind="stable")

    @cached_property
    def rank(self) -> Indices:
        """Where each run stands in `longest_first`: int64 (m,)."""
        rank = np.empty_like(self.starts)
        rank[self.longest_first] = np.arange(len(self))
        return rank

    @cached_property
    def heads(self) -> Indices:
        """The first channel of every run, longest run first: int64 (m,)."""
        return self.starts[self.longest_first]

    @cached_property
    def tails(self) -> tuple[Indices, ...]:
        """For step 1, 2, …: channel number step of every run that has one, longest run first. Walking the steps visits
        every run left to right, and all of them together are as many additions as there are channels to add."""
        sizes = self.sizes[self.longest_first]
        steps = np.arange(1, sizes[0])
        counts = len(sizes) - np.searchsorted(sizes[::-1], steps, side="right")
        return tuple(self.heads[:count] + step for step, count in zip(steps.tolist(), counts.tolist(), strict=True))


@dataclass(frozen=True, eq=False)
class Cut:
    """One group at one student width m.

    parts: runs over the teacher's N channels in leaf order; a student channel's columns are their sum, its norm
        parameters their mean.
    rows: runs over the *stored* rows whose mean is the student's row: the parts themselves where rows are stored at
        teacher resolution, one row per cluster in `mode: oskt`.
    """

    parts: Runs
    rows: Runs

    def __len__(self) -> int:
        return len(self.parts)

    def part_of(self) -> Indices:
        """Teacher channel in leaf order -> the student channel that stands for it: int64 (N,)."""
        return np.repeat(np.arange(len(self.parts)), self.parts.sizes)


@dataclass(frozen=True, eq=False)
class NestedTree:
    """All cuts of one clustering tree, its leaves in order.

    order: int64 (N,): leaf position -> the teacher's own channel. splits: int64 (N - 1,): the boundary that appears
    when a cut grows from m to m + 1 parts, for m = 1 … N - 1. Raises `CutError` unless both are permutations.
    """

    order: Indices
    splits: Indices

    def __post_init__(self) -> None:
        _require_permutation("order", self.order, first=0)
        _require_permutation("splits", self.splits, first=1)
        if len(self.splits) != len(self.order) - 1:
            raise CutError(f"{len(self.order)} leaves have {len(self.order) - 1} boundaries, not {len(self.splits)}")

    @property
    def stored_rows(self) -> int:
        return len(self.order)

    @property
    def narrowest(self) -> int:
        return 1

    def cut(self, size: int) -> Cut:
        """The cut into `size` parts. Raises `CutError` unless 1 ≤ size ≤ N."""
        total = len(self.order)
        if not 1 <= size <= total:
            raise CutError(f"a tree of {total} channels cannot be cut into {size} parts")
        parts = Runs.between(np.concatenate(([0], np.sort(self.splits[: size - 1]), [total])))
        return Cut(parts, parts)


@dataclass(frozen=True, eq=False)
class SharedClusters:
    """The paper's clusters: leaves sorted by (cluster, teacher channel), one stored row per cluster.

    order: int64 (N,), as in `NestedTree`. sizes: int64 (n,): teacher channels in each cluster.
    """

    order: Indices
    sizes: Indices

    def __post_init__(self) -> None:
        _require_permutation("order", self.order, first=0)
        if self.sizes.ndim != 1 or len(self.sizes) == 0 or self.sizes.min() < 1 or self.sizes.sum() != len(self.order):
            raise CutError(
                f"cluster sizes must be a list of positive numbers that add up to the {len(self.order)} channels"
            )

    @property
    def stored_rows(self) -> int:
        return len(self.sizes)

    @property
    def narrowest(self) -> int:
        return len(self.sizes)

    def cut(self, size: int) -> Cut:
        """The cut into `size` student channels. Raises `CutError` unless n ≤ size ≤ N."""
        shares = share_out(self.sizes, size)
        parts = np.concatenate([_split_evenly(total, share) for total, share in zip(self.sizes, shares, strict=True)])
        boundaries = np.concatenate(([0], np.cumsum(parts)))
        return Cut(Runs.between(boundaries), Runs.single(np.repeat(np.arange(len(self.sizes)), shares)))


Partition = NestedTree | SharedClusters


def share_out(sizes: Sequence[int] | Indices, rows: int) -> Indices:
    """Student rows for each cluster: one each, then always one more where rows / size is smallest, ties to the first.

    sizes: (n,), teacher rows per cluster. Returns int64 (n,) that sums to `rows`; no cluster gets more than its size.
    Raises `CutError` unless n ≤ rows ≤ sum(sizes). Rule: `select_elements` of the OSKT authors' code.

    A cluster's ratio only grows, so giving one row after another is walking all ratios 1 / size … (size - 1) / size of
    all clusters in ascending order.

    >>> share_out([4, 2, 2], 4).tolist()
    [2, 1, 1]
    """
    teacher_rows = np.asarray(sizes, dtype=np.int64)
    if not len(teacher_rows) <= rows <= teacher_rows.sum():
        raise CutError(f"{len(teacher_rows)} clusters of {teacher_rows.sum()} rows cannot give {rows} student rows")
    clusters = np.repeat(np.arange(len(teacher_rows)), teacher_rows - 1)
    shares = np.concatenate([np.arange(1, size) for size in teacher_rows])
    given = np.argsort(shares / teacher_rows[clusters], kind="stable")[: rows - len(teacher_rows)]
    return 1 + np.bincount(clusters[given], minlength=len(teacher_rows))


def _split_evenly(total: int, parts: int) -> Indices:
    """Sizes of `parts` consecutive parts of `total` channels, earlier ones one larger when uneven."""
    small, larger = divmod(int(total), int(parts))
    return np.array([small + 1] * larger + [small] * (int(parts) - larger), dtype=np.int64)


def _require_permutation(name: str, values: Indices, first: int) -> None:
    last = first + values.size - 1
    if values.ndim != 1 or not np.array_equal(np.sort(values), np.arange(first, last + 1)):
        raise CutError(f"{name} must hold each of {first}..{last} once")
