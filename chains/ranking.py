"""Retrieval metrics of ReID as pure functions: CMC, mAP and mINP under the single-query protocol.

Protocol (Zheng et al., ICCV 2015, "Market-1501"): for each query the gallery is ranked by cosine similarity; gallery
images of the same identity *and* camera as the query are left out, and so are junk images (pid -1). Distractors (pid 0
in Market-1501) are people whom no query looks for. An image of unknown camera is never of the same camera as another.

- CMC rank-k: share of queries whose first correct match is among the best k.
- mAP: mean over queries of average precision, the mean of the precision at each correct match (not the trapezoid of the
  original Matlab code).
- mINP: mean over queries of (number of correct matches) / (rank of the last one), what finding all of them costs (Ye et
  al., TPAMI 2021).

Queries without a correct match are left out, and counted. The surprise: nothing is sorted but what ranks above a
query's last correct match. Only the ranks of correct matches count, and those are numbers of better images. Scores are
made a block of queries at a time, so memory is that of the embeddings and one block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

from chains.data.images import UNKNOWN_CAMERA, Images
from chains.errors import DataError

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
Indices = NDArray[np.int64]
Block = tuple[int, Floats]  # position of the first query; scores (queries of the block, gallery), higher is better

JUNK_PID = -1  # gallery images that count neither as right nor as wrong
BLOCK_BYTES = 8 * 2**20  # of scores that are held at once


@dataclass(frozen=True, eq=False)
class Ranking:
    """Results per query with a correct match. average_precision: float64 (q,) in 0..1; first_match: int64 (q,), rank of
    the first correct match, 0 for the best; inverse_penalty: float64 (q,) in 0..1, correct matches over the rank of the
    last (1 for the best); skipped: queries without a correct match."""

    average_precision: NDArray[np.float64]
    first_match: Indices
    inverse_penalty: NDArray[np.float64]
    skipped: int

    @property
    def map(self) -> float:
        """Mean average precision in percent."""
        return 100 * float(self.average_precision.mean())

    @property
    def minp(self) -> float:
        """Mean inverse negative penalty in percent."""
        return 100 * float(self.inverse_penalty.mean())

    def rank(self, k: int) -> float:
        """CMC at rank k in percent: queries whose first correct match is among the best k."""
        return 100 * float((self.first_match < k).mean())

    def map_interval(self, seed: int = 0, resamples: int = 1000) -> tuple[float, float]:
        """95 % bootstrap interval of mAP in percent, queries resampled with replacement."""
        generator = np.random.default_rng(seed)
        count = len(self.average_precision)
        means = [self.average_precision[generator.integers(0, count, count)].mean() for _ in range(resamples)]
        low, high = np.percentile(means, [2.5, 97.5])
        return 100 * float(low), 100 * float(high)


@dataclass(frozen=True, eq=False)
class Truth:
    """Who is on which image: what a ranking or a decision is held against. All int64, (q,) or (g,). Raises `DataError`
    for a query that is junk."""

    query_pids: Labels
    query_camids: Labels
    gallery_pids: Labels
    gallery_camids: Labels

    def __post_init__(self) -> None:
        if (self.query_pids == JUNK_PID).any():
            query = int((self.query_pids == JUNK_PID).argmax())
            raise DataError(f"query {query} has pid {JUNK_PID}, which marks junk; leave it out of the queries")

    @classmethod
    def of(cls, queries: Images, gallery: Images) -> Self:
        return cls(queries.pids, queries.camids, gallery.pids, gallery.camids)

    def correct(self, query: int) -> Indices:
        """Gallery positions of the query's identity that it should find: seen by another camera, or an unknown one."""
        same = self._same_pid(query)
        return same[~self._is_same_camera(query, same)]

    def left_out(self, query: int) -> Indices:
        """Gallery positions that are neither right nor wrong: the identity seen by the same camera, and junk."""
        same = self._same_pid(query)
        return np.concatenate((same[self._is_same_camera(query, same)], self._junk))

    def _same_pid(self, query: int) -> Indices:
        start, stop = self._spans[:, query]
        return self._by_pid[start:stop]

    def _is_same_camera(self, query: int, same: Indices) -> NDArray[np.bool_]:
        camera = self.query_camids[query]
        is_same: NDArray[np.bool_] = (self.gallery_camids[same] == camera) & (camera != UNKNOWN_CAMERA)
        return is_same

    @cached_property
    def _by_pid(self) -> Indices:
        """Gallery positions by pid, then in order."""
        return np.argsort(self.gallery_pids, kind="stable")

    @cached_property
    def _spans(self) -> Indices:
        """(2, q): where each query's identity begins and ends in `_by_pid`."""
        pids = self.gallery_pids[self._by_pid]
        return np.stack([np.searchsorted(pids, self.query_pids, side) for side in ("left", "right")])

    @cached_property
    def _junk(self) -> Indices:
        return np.flatnonzero(self.gallery_pids == JUNK_PID)


def rank_gallery(
    queries: Floats,
    gallery: Floats,
    query_pids: Labels,
    gallery_pids: Labels,
    query_camids: Labels,
    gallery_camids: Labels,
) -> Ranking:
    """Rank the gallery for each query by cosine similarity and score the ranking.

    queries (q, D), gallery (g, D), identities and cameras (q,) and (g,). Ties rank in gallery order. Raises `DataError`
    when sizes differ, an embedding is not finite, a query is junk, or no query has a correct match.
    """
    truth = Truth(query_pids, query_camids, gallery_pids, gallery_camids)
    return rank_blocks(score_blocks(queries, gallery, truth), truth)


def rank_sets(queries: Floats, gallery: Floats, query_set: Images, gallery_set: Images) -> Ranking:
    """`rank_gallery` for embeddings of two image sets, whose identities and cameras it takes."""
    truth = Truth.of(query_set, gallery_set)
    return rank_blocks(score_blocks(queries, gallery, truth), truth)


def score_blocks(queries: Floats, gallery: Floats, truth: Truth) -> Iterator[Block]:
    """Cosines of all queries (q, D) with the whole gallery (g, D), `BLOCK_BYTES` at a time. Raises `DataError` when
    sizes differ or an embedding is not finite."""
    require_embeddings(queries, gallery, truth)
    queries, gallery = l2_normalised(queries), l2_normalised(gallery)
    for start, stop in block_spans(len(queries), len(gallery)):
        yield start, queries[start:stop] @ gallery.T


def block_spans(queries: int, gallery: int) -> Iterator[tuple[int, int]]:
    """Spans of queries whose float32 scores fill at most `BLOCK_BYTES`; at least one query each."""
    rows = max(1, BLOCK_BYTES // (4 * max(1, gallery)))
    return ((start, min(start + rows, queries)) for start in range(0, queries, rows))


def rank_blocks(blocks: Iterable[Block], truth: Truth) -> Ranking:
    """Score the ranking of each query by its row of scores. Raises `DataError` when no query has a correct match."""
    ranks = [
        match_ranks(row, correct, truth.left_out(query))
        for first, scores in blocks
        for query, row in enumerate(scores, first)
        if len(correct := truth.correct(query))
    ]
    if not ranks:
        raise DataError(
            "no query has a gallery image of the same identity from another camera; nothing can be measured"
        )
    return Ranking(
        average_precision=np.array([average_precision(found) for found in ranks]),
        first_match=np.array([found[0] - 1 for found in ranks]),
        inverse_penalty=np.array([len(found) / found[-1] for found in ranks]),
        skipped=len(truth.query_pids) - len(ranks),
    )


def match_ranks(scores: Floats, correct: Indices, left_out: Indices) -> Indices:
    """Ranks of the `correct` gallery positions, ascending, 1 for the best, were the gallery sorted by falling `scores`
    (g,) with ties in gallery order and without `left_out`.

    >>> match_ranks(np.array([0.9, 0.5, 0.7, 0.5]), correct=np.array([2, 3]), left_out=np.array([0]))
    array([1, 3])
    """
    scores = scores.copy()
    scores[left_out] = -np.inf
    found = scores[correct]
    best = np.sort(scores[scores >= found.min()])  # the rest cannot move a correct match
    not_above, below = np.searchsorted(best, found, "right"), np.searchsorted(best, found, "left")
    ranks = 1 + len(best) - not_above
    for tied in np.flatnonzero(not_above - below > 1):
        ranks[tied] += np.count_nonzero(scores[: correct[tied]] == found[tied])
    return np.sort(ranks)


def average_precision(ranks: Indices) -> float:
    """Mean of the precision at each correct match of one ranking; `ranks` of the matches, ascending, 1 for the best.

    >>> average_precision(np.array([1, 3]))
    0.8333333333333333
    """
    return float((np.arange(1, len(ranks) + 1) / ranks).mean())


def l2_normalised(embeddings: Floats) -> Floats:
    """Rows scaled to length one; a zero row stays zero."""
    lengths = np.sqrt(np.einsum("nd,nd->n", embeddings, embeddings))[:, None]  # no second copy, as a norm would make
    scaled: Floats = embeddings / np.maximum(lengths, 1e-12)
    return scaled


def require_embeddings(queries: Floats, gallery: Floats, truth: Truth) -> None:
    """Raises `DataError` unless queries (q, D) and gallery (g, D) are finite and belong to the images of `truth`."""
    _check("query", queries, truth.query_pids, truth.query_camids)
    _check("gallery", gallery, truth.gallery_pids, truth.gallery_camids)
    if queries.shape[1] != gallery.shape[1]:
        raise DataError(f"query embeddings have {queries.shape[1]} dimensions, gallery embeddings {gallery.shape[1]}")


def _check(what: str, embeddings: Floats, pids: Labels, camids: Labels) -> None:
    if not len(embeddings) == len(pids) == len(camids):
        raise DataError(
            f"{what}: {len(embeddings)} embeddings, {len(pids)} pids and {len(camids)} camids must be as many"
        )
    if not np.isfinite(embeddings).all():
        row = int(np.flatnonzero(~np.isfinite(embeddings).all(axis=1))[0])
        raise DataError(f"{what}: embedding {row} holds NaN or infinity")
