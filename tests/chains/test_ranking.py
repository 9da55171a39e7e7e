"""Metrics against hand-worked examples and an independent slow implementation."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chains.data.images import UNKNOWN_CAMERA
from chains.errors import DataError
from chains.ranking import (
    Truth,
    average_precision,
    l2_normalised,
    match_ranks,
    rank_blocks,
    rank_gallery,
    score_blocks,
)


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
    assert average_precision(np.array([1, 3])) == pytest.approx((1 + 2 / 3) / 2)


def test_minp_by_hand() -> None:
    """Two matches, the last found at rank 4: half of what was looked through was right. A second query finds its one
    match first."""
    queries, gallery = unit(0, 180), unit(10, 20, 30, 40, 181)
    ranking = rank_gallery(queries, gallery, labels(1, 2), labels(9, 1, 9, 1, 2), labels(1, 1), labels(2, 2, 2, 2, 2))
    assert ranking.minp == pytest.approx(100 * (2 / 4 + 1) / 2)


def test_the_single_match_of_a_query_decides_everything() -> None:
    ranking = rank_gallery(unit(0), unit(10, 20, 30), labels(1), labels(9, 9, 1), labels(1), labels(2, 2, 2))
    assert (ranking.map, ranking.minp) == (pytest.approx(100 / 3), pytest.approx(100 / 3))
    assert [ranking.rank(k) for k in (1, 2, 3)] == [0.0, 0.0, 100.0]


def test_ties_rank_in_gallery_order() -> None:
    """Three images at the same angle: the match in the middle stands second."""
    ranking = rank_gallery(unit(0), unit(20, 20, 20), labels(1), labels(9, 1, 8), labels(1), labels(2, 2, 2))
    assert ranking.map == pytest.approx(50.0)


def test_an_image_of_unknown_camera_is_never_left_out() -> None:
    """The query's camera is unknown, then the gallery's, then both: the match counts each time."""
    for query, gallery in ((UNKNOWN_CAMERA, 3), (3, UNKNOWN_CAMERA), (UNKNOWN_CAMERA, UNKNOWN_CAMERA)):
        ranking = rank_gallery(unit(0), unit(10, 20), labels(1), labels(9, 1), labels(query), labels(3, gallery))
        assert (ranking.map, ranking.skipped) == (pytest.approx(50.0), 0)
    with pytest.raises(DataError, match="nothing can be measured"):
        rank_gallery(unit(0), unit(10, 20), labels(1), labels(9, 1), labels(3), labels(3, 3))


def test_distractors_count_as_wrong_and_junk_does_not_count() -> None:
    """By angle: junk, distractor, match. Junk (pid -1) is left out, the distractor (pid 0 of Market-1501) is not."""
    ranking = rank_gallery(unit(0), unit(10, 20, 30), labels(1), labels(-1, 0, 1), labels(1), labels(2, 2, 2))
    assert ranking.map == pytest.approx(50.0)


def test_a_query_that_is_junk_is_refused() -> None:
    with pytest.raises(DataError, match="query 1 has pid -1"):
        rank_gallery(unit(0, 1), unit(10), labels(1, -1), labels(1), labels(1, 1), labels(2))


Slow = list[tuple[float, int, float]]


def slow_ranking(queries: np.ndarray, gallery: np.ndarray, truth: Truth) -> Slow:
    """The definitions, one pair at a time: average precision, first match, inverse penalty of each query with one."""
    results = []
    for query, pid, camid in zip(queries, truth.query_pids, truth.query_camids, strict=True):
        scored = []
        for index in range(len(gallery)):
            same_camera = camid != -1 and truth.gallery_camids[index] == camid
            if truth.gallery_pids[index] == -1 or (truth.gallery_pids[index] == pid and same_camera):
                continue
            cosine = float(query @ gallery[index]) / (np.linalg.norm(query) * np.linalg.norm(gallery[index]))
            scored.append((-cosine, index, truth.gallery_pids[index] == pid))
        hits, sums, first, last = 0, 0.0, 0, 0
        for rank, (_, _, correct) in enumerate(sorted(scored), start=1):
            if correct:
                hits += 1
                sums += hits / rank
                first, last = first or rank, rank
        if hits:
            results.append((sums / hits, first - 1, hits / last))
    return results


def random_truth(generator: np.random.Generator, queries: int, gallery: int) -> Truth:
    """Few identities and cameras, so that every case occurs: distractors, junk, unknown cameras, no match, one."""
    return Truth(
        generator.integers(1, 7, queries),
        generator.integers(-1, 3, queries),
        generator.choice([-1, 0, 1, 2, 3, 4, 5], gallery),
        generator.integers(-1, 3, gallery),
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_every_figure_equals_the_slow_definition(seed: int) -> None:
    generator = np.random.default_rng(seed)
    queries, gallery = generator.standard_normal((17, 6)), generator.standard_normal((40, 6))
    truth = random_truth(generator, 17, 40)
    ranking = rank_blocks(score_blocks(queries, gallery, truth), truth)
    precisions, firsts, penalties = zip(*slow_ranking(queries, gallery, truth), strict=True)
    np.testing.assert_allclose(ranking.average_precision, precisions, atol=1e-12)
    np.testing.assert_array_equal(ranking.first_match, firsts)
    np.testing.assert_allclose(ranking.inverse_penalty, penalties, atol=1e-12)
    assert ranking.skipped == 17 - len(precisions)
    assert ranking.map == pytest.approx(100 * np.mean(precisions))
    assert ranking.minp == pytest.approx(100 * np.mean(penalties))
    for k in (1, 5, 10):
        assert ranking.rank(k) == pytest.approx(100 * np.mean(np.array(firsts) < k))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_ranks_are_those_of_the_full_stable_sort_ties_included(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 30))
    scores = np.array(data.draw(st.lists(st.integers(-3, 3), min_size=size, max_size=size)), dtype=np.float32)
    kinds = np.array(data.draw(st.lists(st.sampled_from("cow"), min_size=size, max_size=size)))  # correct, out, wrong
    kinds[data.draw(st.integers(0, size - 1))] = "c"
    order = np.argsort(-scores, kind="stable")
    kept = order[kinds[order] != "o"]
    expected = np.flatnonzero(kinds[kept] == "c") + 1
    before = scores.copy()
    found = match_ranks(scores, np.flatnonzero(kinds == "c"), np.flatnonzero(kinds == "o"))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(scores, before)


def test_the_size_of_a_block_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    queries, gallery = generator.standard_normal((23, 6)), generator.standard_normal((40, 6))
    truth = random_truth(generator, 23, 40)
    whole = rank_blocks(score_blocks(queries, gallery, truth), truth)
    monkeypatch.setattr("chains.ranking.BLOCK_BYTES", 4 * 40 * 5)
    blocks = list(score_blocks(queries, gallery, truth))
    assert [(first, len(scores)) for first, scores in blocks] == [(0, 5), (5, 5), (10, 5), (15, 5), (20, 3)]
    np.testing.assert_allclose(rank_blocks(blocks, truth).average_precision, whole.average_precision)


def test_memory_does_not_grow_with_queries_times_gallery() -> None:
    """4000 × 5000 scores are 80 MB; embeddings and one block of scores with its copies are a tenth of that."""
    generator = np.random.default_rng(0)
    queries, gallery = (generator.standard_normal((n, 8)).astype(np.float32) for n in (4000, 5000))
    truth = Truth(np.arange(4000) % 900, np.zeros(4000, np.int64), np.arange(5000) % 900, np.ones(5000, np.int64))
    tracemalloc.start()
    rank_blocks(score_blocks(queries, gallery, truth), truth)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 25e6


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
        (unit(0), unit(1)[:0], labels(1), labels(), "nothing can be measured"),
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
