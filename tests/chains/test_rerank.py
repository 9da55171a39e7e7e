"""k-reciprocal re-ranking against the paper's equations, written with sets and dense matrices."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chains.errors import DataError
from chains.ranking import Truth, rank_blocks, score_blocks
from chains.rerank import Reranking, reranked_blocks


def labels(count: int) -> np.ndarray:
    return np.zeros(count, dtype=np.int64)


def unlabelled(queries: np.ndarray, gallery: np.ndarray) -> Truth:
    return Truth(labels(len(queries)), labels(len(queries)), labels(len(gallery)), labels(len(gallery)))


def reranked(queries: np.ndarray, gallery: np.ndarray, how: Reranking) -> np.ndarray:
    """Re-ranked distances (q, g)."""
    return -np.concatenate(
        [scores for _, scores in reranked_blocks(queries, gallery, unlabelled(queries, gallery), how)]
    )


def slow(queries: np.ndarray, gallery: np.ndarray, how: Reranking) -> np.ndarray:
    """Equations 1 to 12 of Zhong et al. (CVPR 2017) one image at a time, with the rows of d and V scaled as documented
    in `chains.rerank`."""
    images = np.concatenate((queries, gallery)).astype(np.float64)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    count = len(images)
    distance = ((images[:, None] - images[None]) ** 2).sum(axis=2)
    distance /= distance.max(axis=1, keepdims=True)

    def nearest(p: int, k: int) -> list[int]:
        others = sorted((i for i in range(count) if i != p), key=lambda i: (distance[p, i], i))
        return [p, *others[:k]]

    def reciprocal(p: int, k: int) -> set[int]:
        return {g for g in nearest(p, k) if p in nearest(g, k)}

    def extended(p: int) -> set[int]:
        base = reciprocal(p, how.k1)
        found = set(base)
        for candidate in base:
            half = reciprocal(candidate, round(how.k1 / 2))
            if len(base & half) >= 2 / 3 * len(half):
                found |= half
        return found

    encoded = np.zeros((count, count))
    for p in range(count):
        for g in extended(p):
            encoded[p, g] = np.exp(-distance[p, g])
        encoded[p] /= encoded[p].sum()
    averaged = np.stack([encoded[nearest(p, how.k2 - 1)].mean(axis=0) for p in range(count)])
    final = np.empty((len(queries), len(gallery)))
    for p in range(len(queries)):
        for g in range(len(gallery)):
            a, b = averaged[p], averaged[len(queries) + g]
            jaccard = 1 - np.minimum(a, b).sum() / np.maximum(a, b).sum()
            final[p, g] = (1 - how.weight) * jaccard + how.weight * distance[p, len(queries) + g]
    return final


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(4, 2, 0.3), (7, 3, 0.0), (6, 6, 0.5), (1, 1, 1.0), (20, 6, 0.3)]))
def test_distances_equal_the_paper_s_equations(seed: int, parameters: tuple[int, int, float]) -> None:
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((5, 6))
    queries, gallery = (centres[generator.integers(0, 5, n)] + 0.5 * generator.standard_normal((n, 6)) for n in (9, 24))
    how = Reranking(*parameters)
    np.testing.assert_allclose(reranked(queries, gallery, how), slow(queries, gallery, how), atol=1e-5)


def test_small_blocks_give_the_same_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    queries, gallery = generator.standard_normal((9, 6)), generator.standard_normal((24, 6))
    whole = reranked(queries, gallery, Reranking(k1=5, k2=2))
    monkeypatch.setattr("chains.ranking.BLOCK_BYTES", 4 * 33 * 4)
    np.testing.assert_allclose(reranked(queries, gallery, Reranking(k1=5, k2=2)), whole, atol=1e-6)


def test_more_duplicates_than_neighbours_stay_finite() -> None:
    queries, gallery = np.ones((2, 3)), np.concatenate((np.ones((20, 3)), np.eye(3)))
    assert np.isfinite(reranked(queries, gallery, Reranking(k1=4, k2=2))).all()


def clusters() -> tuple[np.ndarray, np.ndarray, Truth]:
    """Identities whose images scatter wider than their centres lie apart from some others'."""
    generator = np.random.default_rng(3)
    centres = generator.standard_normal((20, 8))
    query_pids, gallery_pids = np.arange(20), np.repeat(np.arange(20), 8)
    queries, gallery = (centres[p] + 0.9 * generator.standard_normal((len(p), 8)) for p in (query_pids, gallery_pids))
    return queries, gallery, Truth(query_pids, labels(20), gallery_pids, labels(160) + 1)


def test_re_ranking_raises_map_where_identities_form_clusters() -> None:
    queries, gallery, truth = clusters()
    plain = rank_blocks(score_blocks(queries, gallery, truth), truth)
    better = rank_blocks(reranked_blocks(queries, gallery, truth, Reranking(k1=8, k2=3)), truth)
    assert better.map > plain.map + 5


def test_a_weight_of_one_is_the_ranking_by_cosine() -> None:
    """λ = 1 leaves the original distance alone, which falls as the cosine rises."""
    queries, gallery, truth = clusters()
    plain = rank_blocks(score_blocks(queries, gallery, truth), truth)
    same = rank_blocks(reranked_blocks(queries, gallery, truth, Reranking(weight=1.0)), truth)
    np.testing.assert_allclose(same.average_precision, plain.average_precision)


def test_a_set_too_large_for_the_memory_limit_is_refused_before_anything_is_made() -> None:
    queries, gallery = np.ones((9, 6)), np.ones((24, 6))
    how = Reranking(k1=5, k2=2, max_bytes=20_000)
    needed = how.bytes_needed(33)
    with pytest.raises(DataError, match=f"9 queries and 24 gallery images may take {needed:,} bytes, .* 20,000; raise"):
        reranked(queries, gallery, how)


def test_the_default_limit_carries_market_1501_with_room() -> None:
    assert Reranking().bytes_needed(3368 + 15913) < Reranking().max_bytes / 4


def test_what_is_needed_is_never_more_than_said() -> None:
    """Everything alike is the worst case: every neighbourhood is full."""
    import tracemalloc

    queries, gallery = np.ones((40, 4), np.float32), np.ones((360, 4), np.float32)
    how = Reranking(k1=10, k2=4)
    tracemalloc.start()
    for _ in reranked_blocks(queries, gallery, unlabelled(queries, gallery), how):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    blocks = 6 * 4 * 400 * 400  # a block of distances and its copies
    assert peak < how.bytes_needed(400) + blocks + 1_000_000


def test_too_few_images_are_refused() -> None:
    with pytest.raises(DataError, match="5 images have no 20 neighbours"):
        reranked(np.ones((2, 3)), np.ones((3, 3)), Reranking())


@pytest.mark.parametrize("parameters", [{"k1": 0}, {"k2": 0}, {"k1": 3, "k2": 4}, {"weight": 1.1}], ids=str)
def test_parameters_without_sense_are_refused(parameters: dict[str, int]) -> None:
    with pytest.raises(DataError, match="1 ≤ k2 ≤ k1"):
        Reranking(**parameters)


def test_embeddings_that_are_not_finite_are_refused() -> None:
    with pytest.raises(DataError, match="query: embedding 0 holds NaN"):
        reranked(np.full((1, 3), np.nan), np.ones((30, 3)), Reranking())
