"""Retrieval metrics of ReID as pure functions: CMC and mAP under the single-query protocol.

Protocol (Zheng et al., ICCV 2015, "Market-1501"): for each query the gallery is ranked by cosine similarity; gallery
images of the same identity *and* camera as the query are left out. mAP is the mean over queries of average precision,
the mean of the precision at each correct match (not the trapezoid of the original Matlab code). Queries without a
correct match are left out, and counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chains.data.images import ImageSet
from chains.errors import DataError

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
BLOCK = 256  # queries ranked at once: bounds memory to BLOCK × gallery


@dataclass(frozen=True, eq=False)
class Ranking:
    """Per-query results. average_precision: float64 (q,) in 0..1; first_match: int64 (q,), rank of the first correct
    match, 0 for the best; skipped: queries without a correct match."""

    average_precision: NDArray[np.float64]
    first_match: NDArray[np.int64]
    skipped: int

    @property
    def map(self) -> float:
        """Mean average precision in percent."""
        return 100 * float(self.average_precision.mean())

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


def l2_normalised(embeddings: Floats) -> Floats:
    """Rows scaled to length one; a zero row stays zero."""
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    scaled: Floats = embeddings / np.maximum(lengths, 1e-12)
    return scaled


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
    when sizes differ, an embedding is not finite, or no query has a correct match.
    """
    _check("query", queries, query_pids, query_camids)
    _check("gallery", gallery, gallery_pids, gallery_camids)
    if queries.shape[1] != gallery.shape[1]:
        raise DataError(f"query embeddings have {queries.shape[1]} dimensions, gallery embeddings {gallery.shape[1]}")
    queries, gallery = l2_normalised(queries), l2_normalised(gallery)
    precisions, firsts = [], []
    for start in range(0, len(queries), BLOCK):
        block = slice(start, start + BLOCK)
        order = np.argsort(-(queries[block] @ gallery.T), axis=1, kind="stable")
        for ranked, pid, camid in zip(order, query_pids[block], query_camids[block], strict=True):
            same_pid, same_camid = gallery_pids[ranked] == pid, gallery_camids[ranked] == camid
            matches = same_pid[~(same_pid & same_camid)]
            if matches.any():
                precisions.append(average_precision(matches))
                firsts.append(int(matches.argmax()))
    if not precisions:
        raise DataError(
            "no query has a gallery image of the same identity from another camera; nothing can be measured"
        )
    return Ranking(np.array(precisions), np.array(firsts), len(queries) - len(precisions))


def rank_sets(queries: Floats, gallery: Floats, query_set: ImageSet, gallery_set: ImageSet) -> Ranking:
    """`rank_gallery` for embeddings of two image sets, whose identities and cameras it takes."""
    return rank_gallery(queries, gallery, query_set.pids, gallery_set.pids, query_set.camids, gallery_set.camids)


def average_precision(matches: NDArray[np.bool_]) -> float:
    """Mean of the precision at each correct match of one ranking.

    >>> average_precision(np.array([True, False, True]))
    0.8333333333333333
    """
    ranks = np.flatnonzero(matches) + 1
    return float((np.arange(1, len(ranks) + 1) / ranks).mean())


def _check(what: str, embeddings: Floats, pids: Labels, camids: Labels) -> None:
    if not len(embeddings) == len(pids) == len(camids):
        raise DataError(
            f"{what}: {len(embeddings)} embeddings, {len(pids)} pids and {len(camids)} camids must be as many"
        )
    if not np.isfinite(embeddings).all():
        row = int(np.flatnonzero(~np.isfinite(embeddings).all(axis=1))[0])
        raise DataError(f"{what}: embedding {row} holds NaN or infinity")
