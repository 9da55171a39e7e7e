import pytest
from hypothesis import given
from hypothesis import strategies as st

from chains.errors import WidthError
from chains.width import Width, default_narrowest, even_ladder

MULTIPLIERS = st.tuples(*[st.integers(1, 64)] * 3) | st.just(())
WIDTHS = st.builds(Width, st.integers(1, 4096), MULTIPLIERS)


@given(WIDTHS)
def test_a_width_reads_back_as_it_was_written(width: Width) -> None:
    assert Width.parse(str(width)) == width


@given(WIDTHS, MULTIPLIERS)
def test_a_width_in_full_is_the_same_in_every_family(width: Width, multipliers: tuple[int, ...]) -> None:
    assert Width.parse(str(width), multipliers) == width


@given(st.integers(1, 4096), MULTIPLIERS)
def test_a_lone_number_has_the_multipliers_of_its_family(stem: int, multipliers: tuple[int, ...]) -> None:
    assert Width.parse(str(stem), multipliers) == Width(stem, multipliers)


def test_a_lone_number_of_no_family_is_a_resnet_s() -> None:
    assert Width.parse("16") == Width.parse("16x2-4-8")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "016",
        "-4",
        "16x",
        "16x2-4",
        "16x2-4-8-16",
        "16x0-4-8",
        "vit:168",
        "w0",
        "w16x2-4-8",
        "16 ",
        "9999999",
        "１６",
    ],
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
    ("narrowest", "full", "step", "stems"),
    [
        (Width(4), Width(16), 2, [4, 6, 8, 10, 12, 14, 16]),  # halves of IBN-a
        (Width(96, ()), Width(384, ()), 6, [96, 144, 192, 240, 288, 336, 384]),  # heads of ViT-S, steps of 24
        (Width(120, ()), Width(384, ()), 6, [120, 168, 216, 240, 288, 336, 384]),
        (Width(264, ()), Width(768, ()), 12, [264, 336, 432, 528, 600, 672, 768]),  # of ViT-B, steps of 24 too
    ],
)
def test_inner_rungs_snap_to_the_network_s_steps_too(
    narrowest: Width, full: Width, step: int, stems: list[int]
) -> None:
    assert [width.stem for width in even_ladder(narrowest, full, 7, step=step)] == stems


@given(st.integers(1, 12), st.integers(1, 200), MULTIPLIERS)
def test_the_default_narrowest_is_a_quarter_in_whole_steps(step: int, steps: int, multipliers: tuple[int, ...]) -> None:
    full = Width(step * steps, multipliers)
    narrowest = default_narrowest(full, step)
    assert narrowest.multipliers == multipliers
    assert narrowest.stem % step == 0
    assert narrowest.stem == step or full.stem / 4 - step < narrowest.stem <= full.stem / 4


@pytest.mark.parametrize(
    ("narrowest", "full", "step", "reason"),
    [
        (Width(5), Width(16), 2, "5x2-4-8 cannot be .* multiples of 2, and 5 is none; the nearest is 4x2-4-8"),
        (Width(2, ()), Width(48, ()), 6, "multiples of 6, and 2 is none; the nearest is w6"),
        (Width(96, ()), Width(380, ()), 6, "multiples of 6, and 380 is none; the nearest is w378"),
        (Width(96, ()), Width(192, ()), 6, "7 rungs from w96 to w192 collide at steps of 24; ask for fewer"),
    ],
)
def test_a_ladder_of_broken_channels_is_refused(narrowest: Width, full: Width, step: int, reason: str) -> None:
    with pytest.raises(WidthError, match=reason):
        even_ladder(narrowest, full, 7, step=step)


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
