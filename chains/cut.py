"""Cuts: which channels of the teacher each channel of a student stands for.

Channels of a group are kept in *leaf order*, so that every channel of every student stands for one contiguous run of
them. A cut is therefore a value of two lists of runs, and code that expands, counts or writes never asks how it came
about. Two families make cuts:

- `NestedTree` (`mode: nested`): every cut of a clustering tree. In leaf order, undoing one merge adds one boundary
  between neighbours, so a whole tree is the order in which the N - 1 boundaries appear. Cuts nest. A tree may cover the
  first P < N channels only; then a cut wider than P takes channels as they are, one after another (US-Net's slices),
  and a narrower one leaves those behind P out.
- `SharedClusters` (`mode: oskt`): n fixed clusters whose rows are repeated in proportion to their size
  (OSKT, ICCV 2025; `select_elements` in the authors' code).

Example, N = 6 channels, boundaries appearing in the order 4, 2, 5, 1, 3:

    cut(1)  0 1 2 3 4 5
    cut(2)  0 1 2 3 | 4 5
    cut(3)  0 1 | 2 3 | 4 5
    cut(6)  0 | 1 | 2 | 3 | 4 | 5

and with a tree over the first P = 3 of them, boundaries appearing in the order 2, 1:

    cut(1)  0 1 2
    cut(2)  0 1 | 2
    cut(4)  0 | 1 | 2 | 3
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from chains.errors import CutError

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Runs:
    """Contiguous runs `[starts[i], stops[i])` of `of` stored channels, one per student channel; none is empty.

    starts, stops: int64 (m,). Raises `CutError` for an empty run, arrays that do not match, or a run beyond `of`.
    """

    starts: Indices
    stops: Indices
    of: int

    def __post_init__(self) -> None:
        if self.starts.shape != self.stops.shape or self.starts.ndim != 1:
            raise CutError(f"starts {self.starts.shape} and stops {self.stops.shape} must be two lists of one length")
        if len(self.starts) == 0 or bool((self.stops <= self.starts).any()) or self.starts.min() < 0:
            raise CutError("every run holds at least one channel")
        if self.stops.max() > self.of:
            raise CutError(f"a run ends at channel {self.stops.max()} of {self.of}")

    @classmethod
    def between(cls, boundaries: Indices, of: int | None = None) -> Runs:
        """The runs between neighbouring `boundaries` (m + 1,), ascending; by default they reach the last channel."""
        return cls(boundaries[:-1], boundaries[1:], int(boundaries[-1]) if of is None else of)

    @classmethod
    def single(cls, positions: Indices, of: int) -> Runs:
        """Runs of one stored channel each, at `positions` (m,)."""
        return cls(positions, positions + 1, of)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, window: slice) -> Runs:
        if window.indices(len(self)) == (0, len(self), 1):
            return self  # with what it has computed already
        return Runs(self.starts[window], self.stops[window], self.of)

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
    def is_gapless(self) -> bool:
        """Every run starts where the one before it stops."""
        return bool((self.starts[1:] == self.stops[:-1]).all())

    @cached_property
    def covered(self) -> Indices:
        """The stored channels that are in a run, run by run: int64 (sum of sizes,)."""
        steps = np.arange(self.sizes.sum()) - np.repeat(np.cumsum(self.sizes) - self.sizes, self.sizes)
        covered: Indices = np.repeat(self.starts, self.sizes) + steps
        return covered

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
        parameters their mean. Channels in no run are left out.
    rows: runs over the *stored* rows whose mean is the student's row: the parts themselves where rows are stored at
        teacher resolution, one row per cluster in `mode: oskt`.
    """

    parts: Runs
    rows: Runs

    def __len__(self) -> int:
        return len(self.parts)

    def part_of(self) -> Indices:
        """Teacher channel in leaf order -> the student channel that stands for it, or -1: int64 (N,)."""
        part_of = np.full(self.parts.of, -1, dtype=np.int64)
        part_of[self.parts.covered] = np.repeat(np.arange(len(self.parts)), self.parts.sizes)
        return part_of


class Cuts(Mapping[str, Cut]):
    """The cut of every channel group at one student width, and of axes that consist of several groups."""

    def __init__(self, groups: Mapping[str, Cut]) -> None:
        self._groups = dict(groups)
        self._joined: dict[tuple[str, ...], Cut] = {}

    def __getitem__(self, group: str) -> Cut:
        return self._groups[group]

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def of(self, channels: tuple[str, ...]) -> Cut:
        """The cut of an axis whose channels are those of `channels`, one group after another."""
        if len(channels) == 1:
            return self._groups[channels[0]]
        if channels not in self._joined:
            cuts = [self._groups[group] for group in channels]
            parts = _joined([cut.parts for cut in cuts])
            shared = all(cut.rows is cut.parts for cut in cuts)
            self._joined[channels] = Cut(parts, parts if shared else _joined([cut.rows for cut in cuts]))
        return self._joined[channels]


def _joined(runs: Sequence[Runs]) -> Runs:
    """One list after another, each behind all stored channels of those before it."""
    offsets = np.concatenate(([0], np.cumsum([each.of for each in runs])))
    starts, stops = (
        np.concatenate([side + offset for side, offset in zip(sides, offsets, strict=False)])
        for sides in ([each.starts for each in runs], [each.stops for each in runs])
    )
    return Runs(starts, stops, int(offsets[-1]))


@dataclass(frozen=True, eq=False)
class NestedTree:
    """All cuts of one clustering tree over the first P of N channels, its leaves in order; the rest stand alone.

    order: int64 (N,): leaf position -> the teacher's own channel. splits: int64 (P - 1,), 1 ≤ P ≤ N: the boundary that
    appears when a cut grows from m to m + 1 parts, for m = 1 … P - 1. Raises `CutError` unless both are permutations.
    """

    order: Indices
    splits: Indices

    def __post_init__(self) -> None:
        _require_permutation("order", self.order, first=0)
        _require_permutation("splits", self.splits, first=1)
        if len(self.splits) >= len(self.order):
            raise CutError(
                f"{len(self.order)} leaves have at most {len(self.order) - 1} boundaries, not {len(self.splits)}"
            )

    @property
    def stored_rows(self) -> int:
        return len(self.order)

    @property
    def narrowest(self) -> int:
        return 1

    @property
    def leaves(self) -> int:
        """P: how many channels the tree covers."""
        return len(self.splits) + 1

    @property
    def is_whole(self) -> bool:
        """Every channel is in the tree, so that every cut stands for all of them."""
        return self.leaves == len(self.order)

    def cut(self, size: int) -> Cut:
        """The cut into `size` parts. Raises `CutError` unless 1 ≤ size ≤ N."""
        total = len(self.order)
        if not 1 <= size <= total:
            raise CutError(f"a tree of {total} channels cannot be cut into {size} parts")
        inside = np.sort(self.splits[: size - 1])
        behind = np.arange(self.leaves, max(self.leaves, size))  # boundaries of the channels that stand alone
        parts = Runs.between(np.concatenate(([0], inside, behind, [max(self.leaves, size)])), total)
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
        rows = Runs.single(np.repeat(np.arange(len(self.sizes)), shares), len(self.sizes))
        return Cut(Runs.between(boundaries), rows)


Partition = NestedTree | SharedClusters


def joined_order(orders: Sequence[Indices]) -> Indices:
    """Leaf position -> the teacher's own channel, of an axis whose groups have these orders: int64 (N,)."""
    starts = np.cumsum([0, *map(len, orders)])
    return np.concatenate([order + start for order, start in zip(orders, starts, strict=False)])


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
