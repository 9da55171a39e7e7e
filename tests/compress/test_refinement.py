"""ARKD as a loss of refinement, on feature maps and on embeddings: off unless asked for, its formula when it is on."""

from dataclasses import asdict, replace

import pytest
import torch

from chains.errors import ArchitectureError, WidthError
from chains.model import ReIDModel, numpy_tensors
from chains.nested import NestedRecipe, Sandwich
from chains.relations import embedding_relation_loss, map_relation_loss
from chains.train import Trained, fit
from chains.tree import grow_trees
from chains.width import Width, even_ladder
from tests.chains.toys import INPUT, LADDER, RECIPE, a_teacher, flat_people

IMAGES = torch.randn(8, 3, INPUT.height, INPUT.width, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(4).repeat(2)
RELATING = NestedRecipe(arkd_maps_weight=2.0)
RELATING_EMBEDDINGS = NestedRecipe(arkd_embeddings_weight=3.0)


def a_sandwich(recipe: NestedRecipe) -> Sandwich:
    teacher = a_teacher()
    return Sandwich(teacher, grow_trees(teacher.model.table, numpy_tensors(teacher.model)), LADDER, recipe, 0)


def test_a_student_s_loss_has_the_relation_of_its_maps_to_the_full_width_s() -> None:
    plain, relating = a_sandwich(NestedRecipe()), a_sandwich(RELATING)
    full, student = relating.run(LADDER[-1], IMAGES), relating.run(LADDER[0], IMAGES)
    assert [maps.shape[1] for maps in student.maps] == [8, 16]
    expected = sum(map_relation_loss(*maps) for maps in zip(student.maps, full.maps, strict=True))
    without = plain.student_loss(plain.run(LADDER[0], IMAGES), plain.run(LADDER[-1], IMAGES), LABELS)
    torch.testing.assert_close(relating.student_loss(student, full, LABELS) - without, 2.0 * expected)


def test_a_student_s_loss_has_the_relation_of_its_embeddings_to_the_full_width_s() -> None:
    plain, relating = a_sandwich(NestedRecipe()), a_sandwich(RELATING_EMBEDDINGS)
    full, student = relating.run(LADDER[-1], IMAGES), relating.run(LADDER[0], IMAGES)
    expected = embedding_relation_loss(student.lifted, full.lifted)
    assert expected > 0.01
    without = plain.student_loss(plain.run(LADDER[0], IMAGES), plain.run(LADDER[-1], IMAGES), LABELS)
    torch.testing.assert_close(relating.student_loss(student, full, LABELS) - without, 3.0 * expected)


def test_the_maps_are_those_that_the_stages_hand_on() -> None:
    sandwich = a_sandwich(RELATING)
    seen = sandwich.run(LADDER[0], IMAGES)
    torch.testing.assert_close(seen.maps[-1].mean(dim=(2, 3)), seen.feature)


def test_a_refinement_with_the_relation_trains_the_narrow_width_s_maps() -> None:
    relations = []
    for weight in (0.0, 30.0):
        sandwich = a_sandwich(NestedRecipe(arkd_maps_weight=weight))
        fit(sandwich, flat_people(), INPUT, replace(RECIPE, steps=25), 0)
        sandwich.recipe = RELATING
        with torch.no_grad():
            student, full = sandwich.run(LADDER[0], IMAGES), sandwich.run(LADDER[-1], IMAGES)
            relations.append(float(sandwich.relation_losses(student, full)))
    assert relations[1] < 0.8 * relations[0]


def test_without_it_a_run_describes_itself_as_it_always_did() -> None:
    """Checkpoints of runs from before there was this loss are still theirs."""
    usual = a_sandwich(NestedRecipe()).settings()["recipe"]
    assert not {"arkd_maps_weight", "arkd_embeddings_weight"} & usual.keys()
    for recipe, name in ((RELATING, "arkd_maps_weight"), (RELATING_EMBEDDINGS, "arkd_embeddings_weight")):
        assert a_sandwich(recipe).settings()["recipe"] == {**usual, name: asdict(recipe)[name]}


def test_a_network_without_stages_and_a_negative_weight_are_refused() -> None:
    model = ReIDModel("mobilenetv2", Width(16, ()))
    teacher = Trained(model, torch.zeros(8, model.backbone.channels))
    ladder = even_ladder(Width(8, ()), Width(16, ()), 3, alignment=1)
    trees = grow_trees(model.table, numpy_tensors(model))
    with pytest.raises(ArchitectureError, match="mobilenetv2 is none; set it to 0"):
        Sandwich(teacher, trees, ladder, RELATING, 0)
    for name in ("arkd_maps_weight", "arkd_embeddings_weight"):
        with pytest.raises(WidthError, match=f"{name} -1"):
            NestedRecipe(**{name: -1.0})
