"""The sandwich: its passes, its losses and its widths."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional

from chains.errors import WidthError
from chains.expand import expand
from chains.losses import batch_hard_triplet, cross_width_triplet, distillation_loss, reid_loss, similarity_loss
from chains.model import ReIDModel, model_of, numpy_tensors
from chains.nested import NestedRecipe, Sandwich
from chains.train import Run, Trained, fit
from chains.tree import grow_trees
from chains.width import Width, even_ladder
from tests.chains.toys import INPUT, LADDER, RECIPE, a_teacher, flat_people

IMAGES = torch.randn(8, 3, 32, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(4).repeat(2)
LONG_LADDER = even_ladder(Width(2), Width(8), 7)


def a_sandwich(recipe: NestedRecipe | None = None, teacher: Trained | None = None) -> Sandwich:
    teacher = teacher or a_teacher()
    return Sandwich(
        teacher, grow_trees(teacher.model.table, numpy_tensors(teacher.model)), LADDER, recipe or NestedRecipe(), 0
    )


def test_before_any_step_a_pass_at_full_width_is_the_teacher() -> None:
    teacher = a_teacher()
    sandwich = a_sandwich(teacher=teacher)
    full = sandwich.run(Width(4), IMAGES)
    expected_feature, expected = teacher.model.train()(IMAGES)
    order = torch.from_numpy(sandwich.partitions["layer4"].order)
    torch.testing.assert_close(full.feature, expected_feature[:, order], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(full.lifted, expected[:, order], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(full.logits, expected @ teacher.classifier.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("width", LADDER)
def test_one_classifier_at_teacher_resolution_serves_every_width(width: Width) -> None:
    sandwich = a_sandwich()
    student = sandwich.run(width, IMAGES)
    assert student.feature.shape[1] == sandwich.table.group_sizes(width)["layer4"]
    torch.testing.assert_close(student.logits, student.lifted @ sandwich.classifier.T, atol=1e-5, rtol=1e-4)


def test_a_pass_is_the_student_that_expansion_makes() -> None:
    sandwich = a_sandwich()
    width = LADDER[0]
    tensors = {name: tensor.detach().numpy() for name, tensor in sandwich.student(width).items()}
    _, expected = model_of("resnet18", width, tensors).train()(IMAGES)
    torch.testing.assert_close(sandwich.run(width, IMAGES).embedding, expected, atol=1e-5, rtol=1e-5)


def test_the_losses_of_a_step_by_their_definition() -> None:
    """A student's cross-entropy goes by a quarter to the full width's logits."""
    sandwich = a_sandwich(
        NestedRecipe(2.0, similarity_weight=3.0, cross_triplet_weight=0.5, distillation=0.25, hard_factor=0.2)
    )
    losses = sandwich(IMAGES, LABELS, 0)
    full, narrow, between = (sandwich.run(width, IMAGES) for width in (LADDER[2], LADDER[0], LADDER[1]))
    assert losses["full"].item() == pytest.approx(2 * reid_loss(full.feature, full.logits, LABELS, 0.2).item())
    for name, student in (("narrowest", narrow), ("between", between)):
        expected = (
            0.75 * functional.cross_entropy(student.logits, LABELS, label_smoothing=0.1)
            + 0.25 * distillation_loss(student.logits, full.logits, temperature=1)
            + batch_hard_triplet(student.feature, LABELS, hard_factor=0.2)
            + 3 * similarity_loss(student.lifted, full.lifted)
            + 0.5 * cross_width_triplet(student.lifted, full.lifted, LABELS)
        )
        assert losses[name].item() == pytest.approx(expected.item())


def test_every_trained_tensor_gets_a_gradient_and_the_neck_s_bias_none() -> None:
    sandwich = a_sandwich()
    sum(sandwich(IMAGES, LABELS, 0).values()).backward()
    without = [name for name, parameter in sandwich.named_parameters() if parameter.grad is None]
    assert without == ["full.neck.bias"]


def test_random_widths_are_a_function_of_seed_and_step() -> None:
    teacher = Trained(ReIDModel("resnet18", Width(8)), torch.zeros(8, 64))
    trees = grow_trees(teacher.model.table, numpy_tensors(teacher.model))
    sandwiches = [Sandwich(teacher, trees, LONG_LADDER, NestedRecipe(widths_between=2), seed) for seed in (1, 1, 2)]
    drawn = [[sandwich.widths_between(step) for step in range(20)] for sandwich in sandwiches]
    assert drawn[0] == drawn[1] != drawn[2]
    assert {width for widths in drawn[0] for width in widths} == set(LONG_LADDER[1:-1])
    assert all(len(set(widths)) == 2 for widths in drawn[0])


def test_a_sandwich_without_widths_between_trains_its_two_ends() -> None:
    assert a_sandwich(NestedRecipe(widths_between=0))(IMAGES, LABELS, 0).keys() == {"full", "narrowest"}


def test_more_widths_between_than_the_ladder_has_are_refused() -> None:
    with pytest.raises(WidthError, match="2 widths between cannot be drawn from a ladder of 3"):
        a_sandwich(NestedRecipe(widths_between=2))


def test_losses_see_float32_also_where_the_network_runs_in_bfloat16() -> None:
    sandwich = a_sandwich()
    sandwich.precision = "bfloat16"
    student = sandwich.run(LADDER[0], IMAGES)
    assert student.feature.dtype == student.lifted.dtype == student.logits.dtype == torch.float32
    torch.testing.assert_close(student.logits, student.lifted @ sandwich.classifier.T, atol=1e-5, rtol=1e-4)


def test_a_step_moves_the_norms_of_the_rungs_it_trains_and_of_no_other() -> None:
    teacher = Trained(ReIDModel("resnet18", Width(8)), torch.randn(8, 64) * 1e-3)
    trees = grow_trees(teacher.model.table, numpy_tensors(teacher.model))
    sandwich = Sandwich(teacher, trees, LONG_LADDER, NestedRecipe(), 3)
    people, recipe = flat_people(), replace(RECIPE, steps=2)
    snapshots: list[dict[str, torch.Tensor]] = [{name: t.clone() for name, t in sandwich.state_dict().items()}]
    run = Run(report=lambda _: snapshots.append({name: t.clone() for name, t in sandwich.state_dict().items()}))
    fit(sandwich, people, INPUT, recipe, 0, run)
    for step, (before, after) in enumerate(pairwise(snapshots)):
        offsets = (name for name in after if name.startswith("offsets."))
        moved = {
            name.removeprefix("offsets.").partition("/")[0]
            for name in offsets
            if not torch.equal(before[name], after[name])
        }
        assert moved == {str(width) for width in (LONG_LADDER[0], *sandwich.widths_between(step))}
    assert sandwich.widths_between(0) != sandwich.widths_between(1)


def test_norms_of_its_own_start_as_the_merged_ones_and_the_full_width_has_none() -> None:
    sandwich = a_sandwich()
    own = sandwich.own_norms()
    assert own.keys() == set(LADDER[:-1])
    for width, norms in own.items():
        merged = expand(sandwich.full.tensors(), sandwich.table.axes, sandwich.cuts[width])
        assert norms.keys() == {name for name in merged if merged[name].ndim == 1}
        assert all(np.array_equal(values, merged[name].detach().numpy()) for name, values in norms.items())
    assert a_sandwich(NestedRecipe(own_norms=False)).own_norms() == {}


def test_a_share_outside_zero_to_one_is_refused() -> None:
    with pytest.raises(WidthError, match=r"distillation 1\.5 is a share"):
        NestedRecipe(distillation=1.5)
