"""Metrics against hand-worked examples and an independent slow implementation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chains.errors import DataError
from chains.ranking import average_precision, l2_normalised, rank_gallery


def unit(*degrees: float) -> np.ndarray:
    """Vectors in the plane at these angles; cosine falls as the angle grows."""
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def labels(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_a_hand_worked_ranking() -> None:
    """Query pid 1, cam 1 at 0°. Gallery by angle: pid 2, pid 1 (cam 2), pid 1 (cam 1: left out), pid 3, pid 1 (cam 3).
    What remains is wrong, right, wrong, right: AP = (1/2 + 2/4) / 2, first match at rank 2."""
    ranking = rank_gallery(
        unit(0), unit(10, 20, 30, 40, 50), labels(1), labels(2, 1, 1, 3, 1), labels(1), labels(1, 2, 1, 1, 3)
    )
    assert ranking.map == pytest.approx(50.0)
    assert (ranking.rank(1), ranking.rank(2)) == (0.0, 100.0)


def test_a_perfect_ranking_is_a_hundred() -> None:
    ranking = rank_gallery(unit(0, 90), unit(1, 91, 2), labels(1, 2), labels(1, 2, 1), labels(1, 1), labels(2, 2, 3))
    assert (ranking.map, ranking.rank(1), ranking.skipped) == (100.0, 100.0, 0)


def test_queries_without_a_match_elsewhere_are_left_out_and_counted() -> None:
    ranking = rank_gallery(unit(0, 0), unit(1, 2), labels(1, 9), labels(1, 2), labels(1, 1), labels(2, 2))
    assert (len(ranking.average_precision), ranking.skipped) == (1, 1)


def test_average_precision_by_hand() -> None:
    assert average_precision(np.array([True, False, True])) == pytest.approx((1 + 2 / 3) / 2)


def slow_map(
    queries: np.ndarray, gallery: np.ndarray, qp: np.ndarray, gp: np.ndarray, qc: np.ndarray, gc: np.ndarray
) -> float:
    """The definition, one pair at a time."""
    precisions = []
    for query, pid, camid in zip(queries, qp, qc, strict=True):
        scored = []
        for index in range(len(gallery)):
            if gp[index] == pid and gc[index] == camid:
                continue
            cosine = float(query @ gallery[index]) / (np.linalg.norm(query) * np.linalg.norm(gallery[index]))
            scored.append((-cosine, index, gp[index] == pid))
        hits, sums = 0, 0.0
        for rank, (_, _, correct) in enumerate(sorted(scored), start=1):
            if correct:
                hits += 1
                sums += hits / rank
        if hits:
            precisions.append(sums / hits)
    return 100 * float(np.mean(precisions))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_map_equals_the_slow_definition(seed: int) -> None:
    generator = np.random.default_rng(seed)
    queries, gallery = generator.standard_normal((17, 6)), generator.standard_normal((40, 6))
    qp, gp = generator.integers(0, 5, 17), generator.integers(0, 5, 40)
    qc, gc = generator.integers(0, 3, 17), generator.integers(0, 3, 40)
    ranking = rank_gallery(queries, gallery, qp, gp, qc, gc)
    assert ranking.map == pytest.approx(slow_map(queries, gallery, qp, gp, qc, gc), abs=1e-9)


def test_the_interval_holds_the_mean_and_narrows_with_more_queries() -> None:
    def interval(copies: int) -> tuple[float, float, float]:
        generator = np.random.default_rng(0)
        queries, gallery = generator.standard_normal((20 * copies, 4)), generator.standard_normal((60, 4))
        pids = np.arange(20 * copies) % 20
        ranking = rank_gallery(
            queries, gallery, pids, np.arange(60) % 20, np.zeros_like(pids), np.ones(60, dtype=np.int64)
        )
        return (*ranking.map_interval(seed=1), ranking.map)

    low, high, mean = interval(1)
    assert low < mean < high
    narrow_low, narrow_high, _ = interval(16)
    assert narrow_high - narrow_low < (high - low) / 2


def test_lengths_do_not_matter() -> None:
    vectors = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    np.testing.assert_allclose(l2_normalised(vectors * 7), l2_normalised(vectors), rtol=1e-6)


@pytest.mark.parametrize(
    ("queries", "gallery", "qp", "gp", "reason"),
    [
        (unit(0), unit(1), labels(1, 2), labels(1), "1 embeddings, 2 pids"),
        (unit(0), np.ones((1, 3), np.float32), labels(1), labels(1), "2 dimensions, gallery embeddings 3"),
        (unit(0) * np.nan, unit(1), labels(1), labels(1), "query: embedding 0 holds NaN"),
        (unit(0), unit(1), labels(1), labels(2), "nothing can be measured"),
    ],
)
def test_unusable_input_is_refused(
    queries: np.ndarray, gallery: np.ndarray, qp: np.ndarray, gp: np.ndarray, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        rank_gallery(queries, gallery, qp, gp, np.zeros(len(queries), np.int64), np.ones(len(gallery), np.int64))
