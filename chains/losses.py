"""Training losses of ReID, of distillation and of the chains. Training side: needs torch.

All of them want float32: an objective computes logits and losses outside autocast.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

LABEL_SMOOTHING = 0.1
TRIPLET_MARGIN = 0.3
CENTER_RATE = 0.5  # the centers' own learning rate, plain SGD (Luo et al., CVPRW 2019)


@dataclass(frozen=True)
class LossRecipe:
    """What is added to cross-entropy and triplet: a center loss of weight `center_weight`, and the triplet's
    `hard_factor`. Zero, the default, is without."""

    center_weight: float = 0.0
    hard_factor: float = 0.0


PAPER_LOSS = LossRecipe(center_weight=5e-4, hard_factor=0.2)
"""OSKT's, as in the authors' code (`config/configs.py`)."""


class ReIDLoss(nn.Module):
    """`reid_loss` of one head, with the center loss where the recipe asks for it.

    The centers, one per identity, are part of this module: they are trained and checkpointed with everything else.
    They start from a normal distribution, drawn from `generator`.
    """

    def __init__(self, pids: int, dim: int, recipe: LossRecipe, generator: torch.Generator) -> None:
        super().__init__()
        self.recipe = recipe
        self.centers = (
            nn.Parameter(torch.randn(pids, dim, generator=generator)) if recipe.center_weight > 0 else None
        )  # (pids, D)

    def forward(self, feature: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """A scalar. feature: (batch, D) in front of the neck; logits: (batch, pids); labels: int64 (batch,)."""
        loss = reid_loss(feature, logits, labels, self.recipe.hard_factor)
        if self.centers is None:
            return loss
        return loss + self.recipe.center_weight * center_loss(feature, self.centers, labels)


def reid_loss(
    feature: Tensor, logits: Tensor, labels: Tensor, hard_factor: float = 0.0, classification: float = 1.0
) -> Tensor:
    """Cross-entropy with label smoothing 0.1 on `logits` (batch, pids), weighted by `classification`, plus batch-hard
    triplet on `feature` (batch, D): the "bag of tricks" baseline (Luo et al., CVPRW 2019) without its center loss.
    labels: int64 (batch,), row of the classifier."""
    smoothed = functional.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)
    return classification * smoothed + batch_hard_triplet(feature, labels, hard_factor=hard_factor)


def batch_hard_triplet(
    feature: Tensor, labels: Tensor, margin: float = TRIPLET_MARGIN, hard_factor: float = 0.0
) -> Tensor:
    """Mean over anchors of max(0, margin + (1 + h) farthest positive - (1 - h) nearest negative), Euclidean on
    `feature` (batch, D) (Hermans et al., 2017, eq. 5; h is the hard factor of the OSKT authors' code). A batch of one
    identity has no negatives, which are then infinitely far, and gives zero."""
    same = labels[:, None] == labels[None, :]
    distances = _distances(feature)
    farthest_positive = distances.masked_fill(~same, 0).amax(dim=1)
    nearest_negative = distances.masked_fill(same, torch.inf).amin(dim=1)
    return functional.relu(margin + (1 + hard_factor) * farthest_positive - (1 - hard_factor) * nearest_negative).mean()


def _distances(feature: Tensor) -> Tensor:
    """Euclidean distances (batch, batch). Squares are clamped before the root, whose gradient at zero is infinite."""
    squares = feature.square().sum(dim=1)
    return (squares[:, None] + squares[None, :] - 2 * feature @ feature.T).clamp(min=1e-12).sqrt()


def center_loss(feature: Tensor, centers: Tensor, labels: Tensor) -> Tensor:
    """Mean squared distance of `feature` (batch, D) to the center of its identity; centers (pids, D) (Wen et al., ECCV
    2016; without their factor ½ and mean over each identity, as in "bag of tricks" and OSKT)."""
    return (feature - centers[labels]).square().sum(dim=1).clamp(1e-12, 1e12).mean()


def similarity_loss(lifted: Tensor, full: Tensor) -> Tensor:
    """How far a student's queries rank the full-width gallery differently from the full width itself.

    Mean over pairs of (q·g - g·g)², with q the L2-normalised lifted student embeddings (batch, D) and g those of the
    full width, without gradient: the asymmetric relation of DEAP's ARKD, on embeddings (methods/oskt.md §4)."""
    gallery = functional.normalize(full.detach(), dim=1)
    queries = functional.normalize(lifted, dim=1)
    return (queries @ gallery.T - gallery @ gallery.T).square().mean()


def cross_width_triplet(lifted: Tensor, full: Tensor, labels: Tensor, margin: float = TRIPLET_MARGIN) -> Tensor:
    """Batch-hard triplet of a student's queries in the full width's gallery, on cosines: mean over queries of max(0,
    margin + nearest negative - farthest positive), of `lifted` and `full` (batch, D). Both sides learn: the full width
    has to stay searchable from narrow cameras. A batch of one identity gives zero."""
    same = labels[:, None] == labels[None, :]
    cosines = functional.normalize(lifted, dim=1) @ functional.normalize(full, dim=1).T
    farthest_positive = cosines.masked_fill(~same, torch.inf).amin(dim=1)
    nearest_negative = cosines.masked_fill(same, -torch.inf).amax(dim=1)
    return functional.relu(margin + nearest_negative - farthest_positive).mean()


def backward_compatible_loss(embedding: Tensor, centroids: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Cross-entropy of `scale` times the cosines of `embedding` (batch, D) with the frozen `centroids` (pids, D) of an
    old embedding space (Shen et al., CVPR 2020: the influence loss, with a cosine classifier because galleries are
    searched by cosine). The centroids get no gradient. labels: int64 (batch,), row of the centroids."""
    frozen = functional.normalize(centroids.detach(), dim=1)
    return functional.cross_entropy(scale * functional.normalize(embedding, dim=1) @ frozen.T, labels)


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T² KL(teacher ‖ student) of the logits (batch, pids) softened by temperature T, mean over the batch (Hinton et
    al., 2015). The teacher gets no gradient."""
    student = functional.log_softmax(logits / temperature, dim=1)
    teacher = functional.log_softmax(teacher_logits.detach() / temperature, dim=1)
    return temperature**2 * functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
