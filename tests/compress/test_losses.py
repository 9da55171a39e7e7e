"""ARKD, pooled maps and the group LASSO as pure functions."""

import math

import pytest
import torch
from torch import Tensor

from chains.compress.losses import gap_distance, group_lasso, group_norms, shrink_rate, soft_threshold
from chains.errors import DataError
from chains.relations import distances, embedding_relation_loss, map_relation_loss, relation_loss
from chains.train import TrainRecipe


def maps(batch: int = 4, channels: int = 3, height: int = 4, width: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


def literal_arkd(student: Tensor, teacher: Tensor) -> float:
    """The formula of the spec, pair by pair."""
    count = len(student)
    total = 0.0
    for i in range(count):
        for j in range(count):
            gap = float((teacher[i] - teacher[j]).norm()) - float((student[i] - teacher[j]).norm())
            total += gap**2 * (10 if i == j else 95 / (count - 1)) / count
    return total


def test_arkd_is_the_formula_pair_by_pair() -> None:
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    assert float(relation_loss(student, teacher)) == pytest.approx(literal_arkd(student, teacher), rel=1e-5)


def test_the_weight_of_other_images_is_the_authors_at_their_batch() -> None:
    teacher, shift = torch.eye(96), torch.zeros(96, 96)
    shift[:, 0] = 1.0
    gaps = (distances(teacher, teacher) - distances(teacher + shift, teacher)).square()
    own = gaps.diagonal().sum()
    expected = (10 * own + 1.0 * (gaps.sum() - own)) / 96
    assert float(relation_loss(teacher + shift, teacher)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("loss", [map_relation_loss, embedding_relation_loss])
def test_arkd_of_a_network_with_itself_is_zero(loss) -> None:  # type: ignore[no-untyped-def]
    values = maps()
    assert float(loss(values, values.clone())) == 0
    assert float(loss(maps(seed=1), values)) > 0.01


def test_arkd_has_a_finite_gradient_where_maps_are_zero() -> None:
    student = torch.zeros(4, 3, 4, 2, requires_grad=True)
    loss = map_relation_loss(student, torch.zeros(4, 5, 4, 2)) + map_relation_loss(student, maps())
    loss.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


def test_arkd_does_not_see_how_many_channels_say_the_same() -> None:
    student, teacher = maps(seed=1), maps(seed=2)
    repeated = student.repeat_interleave(3, dim=1)
    assert float(map_relation_loss(repeated, teacher)) == pytest.approx(float(map_relation_loss(student, teacher)))


@pytest.mark.parametrize(("student", "teacher"), [((8, 4), (4, 2)), ((4, 2), (8, 4)), ((6, 2), (3, 4))])
def test_arkd_takes_the_smaller_of_each_side_of_rectangular_maps(
    student: tuple[int, int], teacher: tuple[int, int]
) -> None:
    ours = torch.full((4, 2, *student), 2.0) * torch.arange(1, 5)[:, None, None, None]
    theirs = torch.full((4, 3, *teacher), 3.0) * torch.arange(1, 5)[:, None, None, None]
    assert float(map_relation_loss(ours, theirs)) == pytest.approx(0, abs=1e-9)
    mixed = map_relation_loss(maps(height=student[0], width=student[1]), maps(height=teacher[0], width=teacher[1]))
    assert math.isfinite(float(mixed))


def test_arkd_gives_the_teacher_no_gradient_and_takes_a_batch_of_one() -> None:
    teacher = maps(batch=1).requires_grad_(True)
    student = maps(batch=1, seed=3).requires_grad_(True)
    map_relation_loss(student, teacher).backward()  # type: ignore[no-untyped-call]
    assert teacher.grad is None
    assert student.grad is not None


def test_the_distance_of_pooled_maps_adds_up_blocks() -> None:
    zero, three_four = torch.zeros(2, 2, 3, 1), torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).expand(2, 2, 3, 1)
    assert float(gap_distance([zero, zero], [three_four, zero])) == pytest.approx(5, abs=1e-5)
    student = torch.zeros(2, 2, 3, 1, requires_grad=True)
    gap_distance([student], [torch.zeros(2, 2, 3, 1)]).backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


def test_the_soft_threshold_shortens_groups_and_ends_at_exact_zeros() -> None:
    weight = torch.tensor([[3.0, 0.0, 0.1], [4.0, 0.0, 0.0]])
    columns = soft_threshold(weight, 1, 1.0)
    assert group_norms(columns, 1).tolist() == [4.0, 0.0, 0.0]
    assert torch.allclose(columns[:, 0], weight[:, 0] * 0.8)
    rows = soft_threshold(weight, 0, 3.5)
    assert (rows[0] == 0).all()
    assert float(group_norms(rows, 0)[1]) == pytest.approx(0.5)
    assert float(group_lasso([(columns, 1), (rows, 0)])) == pytest.approx(4.5)


def test_a_run_takes_its_shrink_budget_from_a_group_that_nothing_holds() -> None:
    recipe = TrainRecipe(40, lr=0.02, warmup_steps=5)
    rate, weight = shrink_rate(recipe, 0.75), torch.eye(4)
    for step in range(recipe.steps):
        weight = soft_threshold(weight, 1, rate * recipe.rate(step))
    assert torch.allclose(weight, 0.25 * torch.eye(4), atol=1e-5)


def test_a_recipe_without_steps_prunes_nothing_and_says_so() -> None:
    with pytest.raises(DataError, match="takes no steps"):
        shrink_rate(TrainRecipe(3, lr=0.0), 3.0)
