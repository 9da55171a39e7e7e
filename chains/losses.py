"""Training losses of ReID and of the nested chain. Training side: needs torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LABEL_SMOOTHING = 0.1
TRIPLET_MARGIN = 0.3


def reid_loss(feature: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with label smoothing 0.1 on `logits` (batch, pids), plus batch-hard triplet on `feature` (batch,
    D): the "bag of tricks" baseline (Luo et al., CVPRW 2019) without its center loss. labels: int64 (batch,), row of
    the classifier."""
    return functional.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING) + batch_hard_triplet(
        feature, labels
    )


def batch_hard_triplet(feature: Tensor, labels: Tensor, margin: float = TRIPLET_MARGIN) -> Tensor:
    """Mean over anchors of max(0, margin + farthest positive - nearest negative), Euclidean on `feature` (batch, D)
    (Hermans et al., 2017, eq. 5). A batch of one identity has no negatives and gives zero."""
    same = labels[:, None] == labels[None, :]
    if bool(same.all()):
        return feature.sum() * 0
    distances = _distances(feature)
    farthest_positive = distances.masked_fill(~same, 0).amax(dim=1)
    nearest_negative = distances.masked_fill(same, torch.inf).amin(dim=1)
    return functional.relu(margin + farthest_positive - nearest_negative).mean()


def _distances(feature: Tensor) -> Tensor:
    """Euclidean distances (batch, batch). Squares are clamped before the root, whose gradient at zero is infinite."""
    squares = feature.square().sum(dim=1)
    return (squares[:, None] + squares[None, :] - 2 * feature @ feature.T).clamp(min=1e-12).sqrt()


def similarity_loss(lifted: Tensor, full: Tensor) -> Tensor:
    """How far a student's queries rank the full-width gallery differently from the full width itself.

    Mean over pairs of (q·g - g·g)², with q the L2-normalised lifted student embeddings (batch, D) and g those of the
    full width, without gradient: the asymmetric relation of DEAP's ARKD, on embeddings (methods/oskt.md §4)."""
    gallery = functional.normalize(full.detach(), dim=1)
    queries = functional.normalize(lifted, dim=1)
    return (queries @ gallery.T - gallery @ gallery.T).square().mean()
