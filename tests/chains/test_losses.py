"""Losses by hand."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from chains.losses import (
    PAPER_LOSS,
    LossRecipe,
    ReIDLoss,
    batch_hard_triplet,
    center_loss,
    cross_width_triplet,
    distillation_loss,
    reid_loss,
    similarity_loss,
)

POINTS = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
PAIRS = torch.tensor([0, 0, 1, 1])


def test_triplet_loss_by_hand() -> None:
    """Points 0, 1 of one identity and 3, 7 of another: hardest positives 1, 1, 4, 4; hardest negatives 3, 2, 2, 6."""
    assert batch_hard_triplet(POINTS, PAIRS, margin=0.3).item() == pytest.approx((0 + 0 + 2.3 + 0) / 4, abs=1e-5)


def test_the_hard_factor_moves_positives_away_and_negatives_near() -> None:
    """Positives 1.2, 1.2, 4.8, 4.8; negatives 2.4, 1.6, 1.6, 4.8; margin 0.3: nothing, nothing, 3.5, 0.3."""
    loss = batch_hard_triplet(POINTS, PAIRS, margin=0.3, hard_factor=0.2)
    assert loss.item() == pytest.approx((0 + 0 + 3.5 + 0.3) / 4, abs=1e-5)


def test_triplet_gradient_is_finite_for_equal_features() -> None:
    feature = torch.ones(4, 3, requires_grad=True)
    batch_hard_triplet(feature, PAIRS).backward()
    assert feature.grad is not None
    assert bool(torch.isfinite(feature.grad).all())


def test_triplet_of_one_identity_is_zero_and_moves_nothing() -> None:
    feature = torch.randn(4, 3, requires_grad=True)
    loss = batch_hard_triplet(feature, torch.zeros(4, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert feature.grad is not None
    assert not feature.grad.any()


def test_similarity_loss_of_the_full_width_with_itself_is_zero_and_trains_only_the_student() -> None:
    full = torch.randn(6, 5, requires_grad=True)
    assert similarity_loss(full, full).item() == pytest.approx(0, abs=1e-12)
    student = torch.randn(6, 5, requires_grad=True)
    similarity_loss(student, full).backward()
    assert full.grad is None
    assert student.grad is not None


def test_similarity_loss_by_hand() -> None:
    """The student's queries meet the full width's gallery, not each other: a quarter turn of both keeps all angles
    between queries, yet every query now lies at a right angle to its own gallery image."""
    full, turned = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    assert similarity_loss(turned, full).item() == pytest.approx((1 + 1 + 1 + 1) / 4)


def test_reid_loss_is_smoothed_cross_entropy_plus_triplet() -> None:
    feature, logits, labels = torch.tensor([[0.0], [3.0]]), torch.tensor([[4.0, 0.0], [0.0, 4.0]]), torch.arange(2)
    log_of_sum = np.log(np.exp(4) + 1)
    smoothed = 0.95 * (log_of_sum - 4) + 0.05 * log_of_sum  # 0.1 spread over both identities
    assert reid_loss(feature, logits, labels).item() == pytest.approx(smoothed, abs=1e-5)  # the triplet is 0


def test_center_loss_by_hand() -> None:
    centers = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    feature = torch.tensor([[3.0, 4.0], [1.0, 2.0]])
    assert center_loss(feature, centers, torch.tensor([0, 1])).item() == pytest.approx((25 + 1) / 2)


def test_a_reid_loss_has_centers_only_where_they_weigh_something() -> None:
    generator = torch.Generator().manual_seed(0)
    assert ReIDLoss(3, 2, LossRecipe(), generator).centers is None
    loss = ReIDLoss(3, 2, PAPER_LOSS, generator)
    assert loss.centers is not None
    feature, logits, labels = torch.randn(6, 2), torch.randn(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])
    expected = reid_loss(feature, logits, labels, 0.2) + 5e-4 * center_loss(feature, loss.centers, labels)
    assert loss(feature, logits, labels).item() == pytest.approx(expected.item())


def test_distillation_loss_is_zero_for_the_teacher_s_own_logits_and_teaches_only_the_student() -> None:
    teacher = torch.randn(4, 5, requires_grad=True)
    assert distillation_loss(teacher.detach(), teacher, 4.0).item() == pytest.approx(0, abs=1e-6)
    student = torch.randn(4, 5, requires_grad=True)
    distillation_loss(student, teacher, 4.0).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_distillation_loss_by_hand() -> None:
    """The textbook sum, T² Σ p log(p / q), mean over the batch."""
    student, teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[4.0, 0.0], [0.0, 0.0]])
    p, q = functional.softmax(teacher / 4, dim=1), functional.softmax(student / 4, dim=1)
    by_hand = 16 * (p * (p / q).log()).sum() / 2
    assert distillation_loss(student, teacher, 4.0).item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_cross_width_triplet_by_hand() -> None:
    """Students and gallery of two identities; the second student's best wrong match lies as near as its own."""
    students = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    gallery = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    loss = cross_width_triplet(students, gallery, torch.tensor([0, 1]), margin=0.3)
    assert loss.item() == pytest.approx((0.0 + 0.3) / 2)  # 0.3 + 0 - 1 < 0, and 0.3 + √½ - √½


def test_cross_width_triplet_moves_both_widths_and_a_batch_of_one_identity_gives_zero() -> None:
    student, full = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    cross_width_triplet(student, full, torch.tensor([0, 0, 1, 1, 2, 2])).backward()
    assert student.grad is not None
    assert full.grad is not None
    assert cross_width_triplet(student, full, torch.zeros(6, dtype=torch.int64)).item() == 0
