"""Refinement in both modes: from a teacher to a chain, and what is refused."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from chains.calibrate import BATCH, calibrate
from chains.chain import Chain, Mode
from chains.errors import DataError, WidthError
from chains.evaluate import embed
from chains.model import load_student, numpy_tensors
from chains.nested import NestedRecipe
from chains.refine import Refined, refine
from chains.train import Run
from chains.width import Width
from tests.chains.toys import INPUT, LADDER, RECIPE, a_teacher, flat_people

MODES: tuple[Mode, ...] = ("nested", "oskt")


def a_chain(refined: Refined) -> Chain:
    return Chain(
        name="toy", architecture="resnet18", mode=refined.mode, teacher=Width(4), ladder=LADDER, input=INPUT,
        embedding_space="toy", license="Apache-2.0", tensors=refined.tensors, partitions=refined.partitions,
    )  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_refinement_makes_a_chain_that_calibrates_and_embeds_at_every_width(mode: Mode) -> None:
    people = flat_people(identities=BATCH // 4)
    chain = calibrate(a_chain(refine(a_teacher(), LADDER, flat_people(), INPUT, RECIPE, 0, mode=mode)), people)
    for width in LADDER:
        embeddings = embed(load_student(chain, width), people.take(np.arange(8)), INPUT)
        assert embeddings.shape == (8, chain.table.group_sizes(width)["layer4"])
        assert np.isfinite(embeddings).all()


def test_nested_refinement_moves_every_tensor_and_not_the_teacher() -> None:
    teacher = a_teacher()
    before = numpy_tensors(teacher.model)
    refined = refine(teacher, LADDER, flat_people(), INPUT, RECIPE, 0)
    assert all(np.array_equal(before[name], values) for name, values in numpy_tensors(teacher.model).items())
    for name, axes in teacher.model.table.axes.items():
        moved = not np.array_equal(before[name][refined.partitions[axes.rows[0]].order], refined.tensors[name])
        assert moved or name == "neck.bias", name
    assert not refined.tensors["neck.bias"].any()


@pytest.mark.parametrize(("share", "leaves"), [(0, 1), (0.5, 8), (1, 16)])
def test_the_recipe_says_over_how_many_channels_trees_grow_and_the_embedding_s_covers_all(
    share: float, leaves: int
) -> None:
    nested = NestedRecipe(merged_share=share)
    refined = refine(a_teacher(), LADDER, flat_people(), INPUT, replace(RECIPE, steps=1), 0, nested=nested)
    assert refined.partitions["layer3"].leaves == leaves
    assert refined.partitions["layer4"].leaves == 32


def test_oskt_refinement_moves_rows_and_norms_and_not_the_teacher() -> None:
    teacher = a_teacher()
    before = numpy_tensors(teacher.model)
    still = refine(teacher, LADDER, flat_people(), INPUT, replace(RECIPE, lr=0.0), 0, mode="oskt")
    moved = refine(teacher, LADDER, flat_people(), INPUT, RECIPE, 0, mode="oskt")
    assert all(np.array_equal(before[name], values) for name, values in numpy_tensors(teacher.model).items())
    same = {name for name in still.tensors if np.array_equal(still.tensors[name], moved.tensors[name])}
    assert same == {"neck.bias"}
    assert not moved.tensors["neck.bias"].any()


@pytest.mark.parametrize("mode", MODES)
def test_refinement_is_a_function_of_the_seed(mode: Mode) -> None:
    first, again, other = (
        refine(a_teacher(), LADDER, flat_people(), INPUT, RECIPE, seed, mode=mode) for seed in (5, 5, 6)
    )
    assert all(np.array_equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
    assert not np.array_equal(first.tensors["conv1.weight"], other.tensors["conv1.weight"])


@pytest.mark.parametrize("mode", MODES)
def test_refinement_in_bfloat16_stays_close_to_float32(mode: Mode) -> None:
    plain, half = (
        refine(a_teacher(), LADDER, flat_people(), INPUT, replace(RECIPE, precision=precision), 5, mode=mode).tensors
        for precision in ("float32", "bfloat16")
    )
    assert all(np.isfinite(half[name]).all() and half[name].dtype == np.float32 for name in half)
    assert not np.array_equal(half["conv1.weight"], plain["conv1.weight"])
    assert np.abs(half["conv1.weight"] - plain["conv1.weight"]).max() < 0.02


@pytest.mark.parametrize("mode", MODES)
def test_a_chain_can_be_measured_while_it_is_refined(mode: Mode) -> None:
    seen: list[Refined] = []

    def validate(refined: Refined) -> Mapping[str, float]:
        a_chain(refined)  # raises where it is none
        seen.append(refined)
        return {"rungs": 3.0}

    run = Run(validate_steps=2)
    last = refine(a_teacher(), LADDER, flat_people(), INPUT, RECIPE, 0, run, mode=mode, validate=validate)
    assert len(seen) == 3  # before the first step, after two, at the end
    assert not np.array_equal(seen[0].tensors["conv1.weight"], seen[1].tensors["conv1.weight"])
    assert all(np.array_equal(seen[2].tensors[name], last.tensors[name]) for name in last.tensors)


@pytest.mark.parametrize("ladder", [(), LADDER[:2], LADDER[1:], (Width(1), *LADDER[:2])], ids=str)
def test_a_ladder_that_makes_no_sandwich_is_refused_before_training(ladder: tuple[Width, ...]) -> None:
    with pytest.raises(WidthError, match="three rungs that end at 4x2-4-8"):
        refine(a_teacher(), ladder, flat_people(), INPUT, RECIPE, 0)


@pytest.mark.parametrize("ladder", [(), LADDER[:2], LADDER[::-1]], ids=str)
def test_a_ladder_that_does_not_climb_to_the_teacher_is_refused(ladder: tuple[Width, ...]) -> None:
    with pytest.raises(WidthError, match="a ladder runs from the narrowest width up to the teacher's, 4x2-4-8"):
        refine(a_teacher(), ladder, flat_people(), INPUT, RECIPE, 0, mode="oskt")


@pytest.mark.parametrize("mode", MODES)
def test_images_of_other_identities_than_the_teacher_s_are_refused(mode: Mode) -> None:
    with pytest.raises(DataError, match="classifier knows 8 identities, the images have 9"):
        refine(a_teacher(), LADDER, flat_people(9), INPUT, RECIPE, 0, mode=mode)
