from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chains.budget import (
    COST_OF_LIMIT,
    Candidate,
    Contender,
    Declined,
    Excess,
    Limits,
    choose,
    exceeded,
    widest_that_fits,
)
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


# A chain, and terminal chains beside it


def a_chain(*accuracies: float) -> Contender:
    """Students of stem 4 and up, of 1,600 MACs and up, with intervals too short to matter."""
    ladder = [candidate(stem, accuracy, interval=0.0) for stem, accuracy in enumerate(accuracies, start=4)]
    return Contender("asked", "space", tuple(ladder))


def terminal(name: str, stem: int, accuracy: float | None) -> Contender:
    return Contender(name, "space", (candidate(stem, accuracy),))


STUDENTS = a_chain(50.0, 60.0, 70.0)  # at 1,600, 2,500 and 3,600 MACs


@pytest.mark.parametrize(
    ("max_macs", "terminals", "chosen"),
    [
        (3600, [], "asked"),
        (3600, [terminal("t", 4, 70.1)], "t"),
        (3600, [terminal("t", 4, 70.0)], "asked"),  # no better
        (3600, [terminal("t", 7, 90.0)], "asked"),  # does not fit
        (2500, [terminal("t", 5, 60.1)], "t"),  # better than what fits here
        (3600, [terminal("t", 5, 60.1)], "asked"),
        (3600, [terminal("t", 4, None)], "asked"),  # nobody knows
        (3600, [terminal("a", 4, 80.0), terminal("b", 5, 81.0)], "b"),
        (2400, [terminal("a", 4, 80.0), terminal("b", 5, 81.0)], "a"),
        (3600, [terminal("a", 5, 80.0), terminal("b", 4, 80.0)], "b"),  # fewer MACs
        (3600, [terminal("b", 4, 80.0), terminal("a", 4, 80.0)], "a"),  # by name
        (900, [terminal("t", 3, 1.0)], "t"),  # no student fits
        (900, [terminal("t", 3, None)], "t"),
        (900, [terminal("a", 3, None), terminal("b", 3, 0.0)], "b"),
    ],
)
def test_a_terminal_chain_is_taken_where_it_fits_and_measures_more(
    max_macs: int, terminals: list[Contender], chosen: str
) -> None:
    choice = choose(Limits(max_macs=max_macs), STUDENTS, terminals)
    assert choice.chain == chosen
    assert choice.model.costs.macs <= max_macs
    assert [declined.chain for declined in choice.declined] == [t.chain for t in terminals if t.chain != chosen]
    if chosen != "asked":
        assert choice.terminal is not None
        assert choice.model == choice.terminal.candidates[0]


def test_a_student_that_nobody_measured_stays() -> None:
    unknown = Contender("asked", "space", (candidate(4),))
    assert choose(Limits(max_macs=3600), unknown, [terminal("t", 4, 90.0)]).chain == "asked"


def test_every_terminal_chain_that_was_not_taken_has_a_reason() -> None:
    foreign = Declined("foreign", "other", 99.0, "other-embedding-space")
    terminals = [terminal("large", 9, 99.0), terminal("low", 4, 10.0), terminal("new", 4, None)]
    choice = choose(Limits(max_macs=2700, max_params=10**6), STUDENTS, terminals, [foreign])
    assert choice.student == STUDENTS.candidates[1]
    assert choice.declined == (
        foreign,
        Declined("large", "space", 99.0, "does-not-fit", Excess(3.0, "max_macs", 2700, 8100)),
        Declined("low", "space", 10.0, "not-better"),
        Declined("new", "space", None, "not-better"),
    )


@pytest.mark.parametrize(
    ("terminals", "smallest", "words"),
    [
        ([terminal("t", 3, 1.0)], 900, "no student of, or terminal chain offered with, chain 'asked' fits"),
        ([terminal("t", 5, 1.0)], 1600, "no student of, or terminal chain offered with, chain 'asked' fits"),
        ([], 1600, "no student of chain 'asked' fits"),
    ],
)
def test_where_nothing_fits_the_closest_of_all_that_take_part_is_named(
    terminals: list[Contender], smallest: int, words: str
) -> None:
    with pytest.raises(BudgetTooSmall, match=words) as caught:
        choose(Limits(max_macs=800), STUDENTS, terminals)
    assert (caught.value.chain, caught.value.smallest_available) == ("asked", smallest)


TERMINALS = st.lists(st.tuples(st.integers(4, 16), st.floats(0, 100)), max_size=4).map(
    lambda drawn: [terminal(f"t{number}", *one) for number, one in enumerate(drawn)]
)


def measured(model: Candidate) -> float:
    assert model.accuracy is not None
    return model.accuracy.map


@given(ACCURACIES, TERMINALS, st.integers(1600, 30_000))
def test_nothing_that_was_chosen_is_worse_than_the_student_or_a_terminal_chain_that_fits(
    accuracies: list[tuple[float, float]], terminals: list[Contender], max_macs: int
) -> None:
    limits = Limits(max_macs=max_macs)
    ladder = [candidate(stem, *accuracy) for stem, accuracy in zip(range(4, 17), accuracies, strict=True)]
    choice = choose(limits, Contender("asked", "space", tuple(ladder)), terminals)
    assert choice.student == widest_that_fits(limits, ladder, "asked")
    fitting = [choice.student, *(t.model for t in terminals if not exceeded(limits, t.model.costs))]
    assert measured(choice.model) == max(measured(model) for model in fitting)
    assert choice.model in fitting


@given(
    st.lists(st.floats(0, 100), min_size=13, max_size=13).map(sorted),
    TERMINALS,
    st.integers(1600, 30_000),
    st.integers(0, 10_000),
)
def test_where_wider_measures_more_a_larger_limit_never_gives_a_lower_map(
    accuracies: list[float], terminals: list[Contender], small: int, more: int
) -> None:
    """Elsewhere it may, by as much as an interval is wide: see `widest_that_fits`."""
    tight, roomy = (
        choose(Limits(max_macs=allowed), a_chain(*accuracies), terminals).model for allowed in (small, small + more)
    )
    assert measured(roomy) >= measured(tight)
