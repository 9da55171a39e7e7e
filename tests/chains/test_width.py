import pytest
from hypothesis import given
from hypothesis import strategies as st

from chains.errors import WidthError
from chains.width import Width, even_ladder

WIDTHS = st.builds(Width, st.integers(1, 4096), st.tuples(*[st.integers(1, 64)] * 3))


@given(WIDTHS)
def test_a_width_reads_back_as_it_was_written(width: Width) -> None:
    assert Width.parse(str(width)) == width


def test_a_lone_stem_has_the_usual_multipliers() -> None:
    assert Width.parse("16") == Width.parse("16x2-4-8")


@pytest.mark.parametrize(
    "text", ["", "0", "016", "-4", "16x", "16x2-4", "16x2-4-8-16", "16x0-4-8", "vit:168", "16 ", "9999999", "１６"]
)
def test_what_is_no_width_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(WidthError, match="16x2-4-8"):
        Width.parse(text)


def test_stages_multiply_the_stem() -> None:
    assert [Width(16, (2, 3, 4)).stage(index) for index in range(4)] == [16, 32, 48, 64]


def test_a_ladder_is_evenly_spaced_and_ends_at_the_teacher() -> None:
    ladder = even_ladder(Width(4), Width(16), 13)
    assert [width.stem for width in ladder] == list(range(4, 17))


def test_from_stem_32_up_inner_rungs_snap_to_eight() -> None:
    stems = [width.stem for width in even_ladder(Width(16), Width(64), 6)]
    assert stems == [16, 24, 32, 48, 56, 64]
    assert all(stem % 8 == 0 for stem in stems)


@pytest.mark.parametrize(
    ("narrowest", "full", "count", "reason"),
    [
        (Width(16), Width(4), 4, "narrower to a wider"),
        (Width(4), Width(4), 4, "narrower to a wider"),
        (Width(4, (2, 3, 4)), Width(16), 4, "same multipliers"),
        (Width(4), Width(16), 1, "two ends"),
        (Width(4), Width(8), 9, "collide"),
        (Width(8), Width(64), 40, "collide"),
    ],
)
def test_a_ladder_that_cannot_be_is_refused(narrowest: Width, full: Width, count: int, reason: str) -> None:
    with pytest.raises(WidthError, match=reason):
        even_ladder(narrowest, full, count)
