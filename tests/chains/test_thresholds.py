"""Same-or-different cut-offs against hand-worked examples and a search over every cut-off there is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chains.chain import FALSE_ACCEPT_RATES, Threshold
from chains.ranking import Truth, rank_blocks, score_blocks
from chains.thresholds import PairCounts


def counted(cosines: np.ndarray, truth: Truth) -> PairCounts:
    """From cosines as they stand, in blocks of two queries."""
    counts = PairCounts(truth)
    blocks = [(start, cosines[start : start + 2].astype(np.float32)) for start in range(0, len(cosines), 2)]
    assert [first for first, _ in counts.watch(blocks)] == [first for first, _ in blocks]
    return counts


def one_query(*gallery_pids: int, camera: int = 1, gallery_cameras: int = 2) -> Truth:
    pids = np.array(gallery_pids, dtype=np.int64)
    return Truth(np.array([1]), np.array([camera]), pids, np.full(len(pids), gallery_cameras))


def test_a_hand_worked_cut_off() -> None:
    """100 impostors at 0.00 … 0.99 allow one at 1e-2: the cut-off lies just above the second best, 0.98, which would
    reach 0.98. Of four genuine pairs two reach it. 1e-3 would need 1000 impostors."""
    cosines = np.concatenate((np.arange(100) / 100, [0.9, 0.95, 0.985, 1.0]))[None]
    counts = counted(cosines, one_query(*[7] * 100, 1, 1, 1, 1))
    assert counts.threshold(1e-2) == Threshold(0.9801, 50.0)
    assert counts.threshold(1e-3) is None


def test_a_cut_off_accepts_what_equals_it() -> None:
    """0.5 is a float32. 99 impostors below it, one at 0.75: the cut-off is the next multiple above the others."""
    counts = counted(np.array([[0.4999] * 99 + [0.75] + [0.5]]), one_query(*[7] * 100, 1))
    threshold = counts.threshold(1e-2)
    assert threshold == Threshold(0.5, 100.0)


@pytest.mark.parametrize(("impostors", "is_known"), [(99, False), (100, True), (999, True)])
def test_fewer_impostors_than_the_rate_can_be_seen_in_give_no_cut_off(impostors: int, is_known: bool) -> None:
    counts = counted(np.zeros((1, impostors + 1)), one_query(*[7] * impostors, 1))
    assert (counts.threshold(1e-2) is not None) == is_known
    assert counts.threshold(1e-3) is None


def test_impostors_that_look_exactly_alike_leave_no_cut_off() -> None:
    assert counted(np.ones((1, 101)), one_query(*[7] * 100, 1)).threshold(1e-2) is None


def test_a_cosine_that_rounding_carried_past_one_counts_as_one() -> None:
    cosines = np.array([[0.1] * 99 + [np.nextafter(np.float32(1), np.float32(2))] * 2])
    assert counted(cosines, one_query(*[7] * 100, 1)).threshold(1e-2) == Threshold(0.1001, 100.0)


def test_impostors_of_the_query_s_own_camera_and_distractors_count() -> None:
    truth = one_query(*[0] * 50, *[7] * 50, 1, camera=2, gallery_cameras=2)
    truth.gallery_camids[-1] = 3
    assert counted(np.zeros((1, 101)), truth).impostor.sum() == 100


def test_own_images_of_the_same_camera_and_junk_are_in_no_pair() -> None:
    truth = Truth(np.array([1]), np.array([2]), np.array([1, 1, -1, 7]), np.array([2, 3, 3, 3]))
    counts = counted(np.array([[0.9, 0.8, 0.7, 0.6]]), truth)
    assert (counts.genuine.sum(), counts.impostor.sum()) == (1, 1)


def slow_threshold(cosines: np.ndarray, truth: Truth, rate: float) -> Threshold | None:
    """The definition: collect the pairs one at a time, then try the cut-offs from the lowest up."""
    genuine, impostor = [], []
    for q, pid in enumerate(truth.query_pids):
        for g, other in enumerate(truth.gallery_pids):
            known = truth.query_camids[q] != -1
            if other != -1 and other != pid:
                impostor.append(float(cosines[q, g]))
            elif other == pid and not (known and truth.query_camids[q] == truth.gallery_camids[g]):
                genuine.append(float(cosines[q, g]))
    if len(impostor) < 1 / rate or not genuine:
        return None
    impostors, genuines = np.array(impostor), np.array(genuine)
    for step in range(-10_000, 10_001):
        if np.mean(impostors >= step / 10_000) <= rate:
            return Threshold(step / 10_000, 100 * float(np.mean(genuines >= step / 10_000)))
    return None


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_cut_offs_equal_a_search_over_all_of_them(seed: int) -> None:
    generator = np.random.default_rng(seed)
    truth = Truth(
        generator.integers(1, 5, 30),
        generator.integers(-1, 3, 30),
        generator.choice([-1, 0, 1, 2, 3, 4], 50),
        generator.integers(-1, 3, 50),
    )
    cosines = generator.uniform(0.2, 0.6, (30, 50)).astype(np.float32)
    cosines[generator.random((30, 50)) < 0.3] = np.float32(generator.choice([0.25, 0.3, 0.5, 0.5999]))  # ties
    counts = counted(cosines, truth)
    for rate in FALSE_ACCEPT_RATES:
        found, expected = counts.threshold(rate), slow_threshold(cosines, truth, rate)
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            assert found.cosine == expected.cosine
            assert found.true_accept == pytest.approx(expected.true_accept)


def test_watching_a_ranking_changes_nothing() -> None:
    generator = np.random.default_rng(0)
    queries, gallery = generator.standard_normal((30, 4)), generator.standard_normal((50, 4))
    truth = Truth(np.arange(30) % 5, np.zeros(30, np.int64), np.arange(50) % 5, np.ones(50, np.int64))
    counts = PairCounts(truth)
    watched = rank_blocks(counts.watch(score_blocks(queries, gallery, truth)), truth)
    alone = rank_blocks(score_blocks(queries, gallery, truth), truth)
    np.testing.assert_array_equal(watched.average_precision, alone.average_precision)
    assert (counts.genuine.sum(), counts.impostor.sum()) == (300, 1200)
