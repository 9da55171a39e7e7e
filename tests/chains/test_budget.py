from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chains.budget import COST_OF_LIMIT, Candidate, Limits, exceeded, widest_that_fits
from chains.chain import WidthAccuracy
from chains.cost import Costs
from chains.errors import BudgetTooSmall, LimitsError
from chains.width import Width


def candidate(stem: int, accuracy: float | None = None, interval: float = 1.0) -> Candidate:
    width = Width(stem)
    costs = Costs(
        macs=100 * stem**2, params=10 * stem**2, peak_activation_bytes=1000 * stem, artifact_bytes=50 * stem**2
    )
    if accuracy is None:
        return Candidate(width, costs)
    return Candidate(width, costs, WidthAccuracy(width, accuracy, (accuracy - interval, accuracy + interval), 0, 0, 0))


LADDER = [candidate(stem) for stem in range(4, 17)]


@pytest.mark.parametrize("limit", COST_OF_LIMIT)
def test_each_limit_alone_picks_the_widest_within_it(limit: str) -> None:
    cost = COST_OF_LIMIT[limit]
    for wanted in LADDER:
        exactly = Limits(**{limit: getattr(wanted.costs, cost)})
        assert widest_that_fits(exactly, LADDER, "c").width == wanted.width
        just_below = Limits(**{limit: getattr(wanted.costs, cost) - 1})
        if wanted is not LADDER[0]:
            assert widest_that_fits(just_below, LADDER, "c").width.stem == wanted.width.stem - 1


def test_all_limits_hold_at_once() -> None:
    chosen = widest_that_fits(Limits(max_macs=100 * 12**2, max_artifact_bytes=50 * 9**2), LADDER, "c")
    assert chosen.width == Width(9)


def test_what_does_not_fit_names_the_binding_limit_and_the_least_there_is() -> None:
    with pytest.raises(BudgetTooSmall) as caught:
        widest_that_fits(Limits(max_macs=1500, max_params=10), LADDER, "demo")
    assert (caught.value.limit, caught.value.requested, caught.value.smallest_available) == ("max_params", 10, 160)
    assert "chain 'demo'" in str(caught.value)
    assert "160" in str(caught.value)


ACCURACIES = st.lists(st.tuples(st.floats(0, 100), st.floats(0, 5)), min_size=13, max_size=13)


@given(ACCURACIES, st.integers(1600, 30_000), st.integers(0, 10_000))
def test_a_larger_limit_never_gives_a_narrower_model(
    accuracies: list[tuple[float, float]], small: int, more: int
) -> None:
    ladder = [candidate(stem, *accuracy) for stem, accuracy in zip(range(4, 17), accuracies, strict=True)]
    narrow = widest_that_fits(Limits(max_macs=small), ladder, "c")
    assert widest_that_fits(Limits(max_macs=small + more), ladder, "c").width >= narrow.width


def test_a_wider_width_that_measures_clearly_worse_is_passed_over() -> None:
    ladder = [candidate(4, 60.0), candidate(5, 66.0), candidate(6, 62.0), candidate(7, 65.5)]
    assert widest_that_fits(Limits(max_macs=100 * 6**2), ladder, "c").width == Width(5)
    assert widest_that_fits(Limits(max_macs=100 * 7**2), ladder, "c").width == Width(7)


def test_an_interval_above_its_own_measurement_still_leaves_a_model() -> None:
    odd = replace(candidate(4), accuracy=WidthAccuracy(Width(4), 50.0, (60.0, 70.0), 0, 0, 0))
    assert widest_that_fits(Limits(max_macs=10**6), [odd], "c").width == Width(4)


def test_limits_that_only_exclude_each_other_name_one_that_is_really_broken() -> None:
    """Each limit alone leaves a width; both together leave none."""
    few_macs = Candidate(Width(4), Costs(macs=10, params=90, peak_activation_bytes=1, artifact_bytes=1))
    few_params = Candidate(Width(5), Costs(macs=100, params=20, peak_activation_bytes=1, artifact_bytes=1))
    with pytest.raises(BudgetTooSmall) as caught:
        widest_that_fits(Limits(max_macs=50, max_params=50), [few_macs, few_params], "c")
    assert (caught.value.limit, caught.value.smallest_available) == ("max_params", 90)


def test_equal_macs_are_settled_by_width() -> None:
    twins = [candidate(4), replace(candidate(5), costs=candidate(4).costs)]
    assert widest_that_fits(Limits(max_macs=10**6), twins, "c").width == Width(5)


@pytest.mark.parametrize("value", [0, -1])
def test_a_limit_that_is_not_positive_is_refused(value: int) -> None:
    with pytest.raises(LimitsError, match=f"max_macs is {value}"):
        Limits(max_macs=value)


def test_no_limit_at_all_is_refused() -> None:
    with pytest.raises(LimitsError, match="at least one limit"):
        Limits()


def test_exceeded_limits_are_named() -> None:
    assert exceeded(Limits(max_macs=1, max_params=10**9), LADDER[0].costs) == ["max_macs"]
