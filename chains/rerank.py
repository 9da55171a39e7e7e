"""k-reciprocal re-ranking (Zhong et al., CVPR 2017): who counts me among their nearest, as I count them, is nearer.

With x the L2-normalised embeddings of queries and gallery together, n of them, and d(p, g) = |x_p - x_g|² divided by
its largest value in row p:

    N(p, k)    p itself and the k nearest to it, ties in order
    R(p, k)    = {g in N(p, k) : p in N(g, k)}
    R*(p, k)   = R(p, k) and every R(c, k/2), c in R(p, k), of which at least 2/3 lies in R(p, k)
    V_p[g]     = exp(-d(p, g)) for g in R*(p, k1), else 0; divided by its sum
    V_p       <- mean of V_g over N(p, k2 - 1)
    d_J(p, g)  = 1 - Σ min(V_p, V_g) / Σ max(V_p, V_g)
    d*(p, g)   = (1 - λ) · d_J(p, g) + λ · d(p, g)

The division of a row by its largest distance and that of V by its sum are not in the paper but in its authors' code,
which published figures come from. k/2 is rounded half to even.

No (n, n) matrix is ever held: a row of d lives as long as its neighbours are looked for, and V is kept as lists of what
is not zero, at most k1 · (k1/2 + 2) + 1 of them in a row, and k2 times that after averaging. Time still grows with n².
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chains.errors import DataError
from chains.ranking import Block, Floats, Indices, Truth, block_spans, l2_normalised, require_embeddings

ENTRY_BYTES = 12  # of V: an int64 position and a float32 weight


@dataclass(frozen=True)
class Reranking:
    """Parameters of the paper. `max_bytes`: refuse a set whose V could take more than this. Raises `DataError` for
    neighbourhoods or a weight that make no sense."""

    k1: int = 20
    k2: int = 6
    weight: float = 0.3  # λ, of the original distance
    max_bytes: int = 4 * 2**30

    def __post_init__(self) -> None:
        if not 1 <= self.k2 <= self.k1 or not 0 <= self.weight <= 1:
            raise DataError(
                f"re-ranking needs 1 ≤ k2 ≤ k1 and a weight in 0..1; got k1 {self.k1}, k2 {self.k2}, {self.weight}"
            )

    @property
    def half(self) -> int:
        return round(self.k1 / 2)

    def bytes_needed(self, images: int) -> int:
        """At most, for V of so many images and its inverse, without embeddings and blocks; in practice far less."""
        most = min(images, self.k2 * ((self.k1 + 1) * (self.half + 2)))
        return images * (8 * (self.k1 + 1) + 2 * ENTRY_BYTES * most)


def reranked_blocks(queries: Floats, gallery: Floats, truth: Truth, how: Reranking) -> Iterator[Block]:
    """Negative re-ranked distances of queries (q, D) to the gallery (g, D), as `chains.ranking.rank_blocks` takes them.

    Raises `DataError` when the images are fewer than k1 + 1, or so many that V might not fit `how.max_bytes`; and as
    `chains.ranking.score_blocks`.
    """
    require_embeddings(queries, gallery, truth)
    images = len(queries) + len(gallery)
    if images <= how.k1:
        raise DataError(f"{images} images have no {how.k1} neighbours each; choose a smaller k1")
    if how.bytes_needed(images) > how.max_bytes:
        raise DataError(
            f"re-ranking {len(queries)} queries and {len(gallery)} gallery images may take "
            f"{how.bytes_needed(images):,} bytes, more than max_bytes {how.max_bytes:,}; raise it or lower k1 and k2"
        )
    embeddings = np.concatenate((l2_normalised(queries), l2_normalised(gallery)))
    nearest = _nearest(embeddings, how.k1 + 1)
    encoded = _averaged(_encoded(embeddings, nearest, how), nearest[:, : how.k2])
    return _distances(embeddings, encoded, len(queries), how)


@dataclass(frozen=True, eq=False)
class _Sparse:
    """Rows of a matrix by what is not zero in them: row i has `columns[starts[i]:starts[i + 1]]`, and as many
    `values`."""

    starts: Indices
    columns: Indices
    values: Floats

    def row(self, index: int) -> tuple[Indices, Floats]:
        span = slice(self.starts[index], self.starts[index + 1])
        return self.columns[span], self.values[span]

    def rows(self, indices: Indices) -> tuple[Indices, Indices, Floats]:
        """Of several rows one after another: how many entries each has, and all their columns and values."""
        lengths = self.starts[indices + 1] - self.starts[indices]
        shift = np.repeat(self.starts[indices] - np.cumsum(lengths) + lengths, lengths)
        entries = shift + np.arange(lengths.sum())
        return lengths, self.columns[entries], self.values[entries]

    def transposed(self, columns: int) -> _Sparse:
        order = np.argsort(self.columns, kind="stable")
        rows = np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))
        starts = np.searchsorted(self.columns[order], np.arange(columns + 1))
        return _Sparse(starts, rows[order], self.values[order])


def _stacked(rows: list[tuple[Indices, Floats]]) -> _Sparse:
    starts = np.concatenate(([0], np.cumsum([len(columns) for columns, _ in rows])))
    return _Sparse(starts, np.concatenate([c for c, _ in rows]), np.concatenate([v for _, v in rows]))


def _nearest(embeddings: Floats, count: int) -> Indices:
    """N of every image: itself, then the `count` - 1 nearest others, nearest first, ties in order: int64 (n, count)."""
    nearest = np.empty((len(embeddings), count), dtype=np.int64)
    for start, stop in block_spans(len(embeddings), len(embeddings)):
        distances = _squared(embeddings[start:stop], embeddings)
        distances[np.arange(stop - start), np.arange(start, stop)] = -1  # before its duplicates
        last = np.partition(distances, count - 1, axis=1)[:, count - 1]
        for image in range(start, stop):
            row = distances[image - start]
            near = np.flatnonzero(row <= last[image - start])
            nearest[image] = near[np.argsort(row[near], kind="stable")][:count]
    return nearest


def _squared(some: Floats, all_of_them: Floats) -> Floats:
    """Squared Euclidean distances of unit vectors, each row divided by its largest."""
    distances: Floats = np.maximum(2 - 2 * (some @ all_of_them.T), 0)
    distances /= np.maximum(distances.max(axis=1, keepdims=True), 1e-12)
    return distances


def _encoded(embeddings: Floats, nearest: Indices, how: Reranking) -> _Sparse:
    """V before averaging."""
    reciprocal = [_reciprocal(image, nearest) for image in range(len(nearest))]
    halves = [_reciprocal(image, nearest[:, : how.half + 1]) for image in range(len(nearest))]
    rows = []
    for start, stop in block_spans(len(embeddings), len(embeddings)):
        distances = _squared(embeddings[start:stop], embeddings)
        for image in range(start, stop):
            members = _expanded(reciprocal[image], halves)
            weights = np.exp(-distances[image - start, members])
            rows.append((members, (weights / weights.sum()).astype(np.float32)))
    return _stacked(rows)


def _reciprocal(image: int, nearest: Indices) -> Indices:
    """R: those of the image's nearest that have it among theirs."""
    mine = nearest[image]
    members: Indices = mine[(nearest[mine] == image).any(axis=1)]
    return members


def _expanded(members: Indices, halves: list[Indices]) -> Indices:
    """R*, ascending."""
    known = set(members.tolist())
    close = [halves[member] for member in members]
    joining = [half for half in close if 3 * len(known.intersection(half.tolist())) >= 2 * len(half)]
    return np.unique(np.concatenate((members, *joining)))


def _averaged(encoded: _Sparse, neighbours: Indices) -> _Sparse:
    """Local query expansion: row p becomes the mean over the rows of `neighbours[p]`."""
    rows = []
    for group in neighbours:
        _, columns, values = encoded.rows(group)
        kept, place = np.unique(columns, return_inverse=True)
        rows.append((kept, (np.bincount(place, values) / len(group)).astype(np.float32)))
    return _stacked(rows)


def _distances(embeddings: Floats, encoded: _Sparse, queries: int, how: Reranking) -> Iterator[Block]:
    holders = encoded.transposed(len(embeddings))
    sums = np.add.reduceat(encoded.values, encoded.starts[:-1])
    for start, stop in block_spans(queries, len(embeddings)):
        original = _squared(embeddings[start:stop], embeddings)[:, queries:]
        overlap = np.stack([_overlap(*encoded.row(query), holders, len(embeddings)) for query in range(start, stop)])
        union = sums[start:stop, None] + sums - overlap  # Σ max = Σ a + Σ b - Σ min
        jaccard = (1 - overlap / union)[:, queries:]
        yield start, -((1 - how.weight) * jaccard + how.weight * original).astype(np.float32)


def _overlap(columns: Indices, values: Floats, holders: _Sparse, images: int) -> NDArray[np.float64]:
    """Σ min(V_p, V_g) for one p and every g: float64 (images,)."""
    lengths, rows, theirs = holders.rows(columns)
    smaller: NDArray[np.float64] = np.minimum(np.repeat(values, lengths), theirs).astype(np.float64)
    return np.bincount(rows, smaller, minlength=images).astype(np.float64, copy=False)
