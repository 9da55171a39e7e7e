"""ARKD: how a student's images lie among the teacher's, as a loss. Training side: needs torch.

Asymmetric relation knowledge distillation (Xie et al., "Distillation embedded absorbable pruning", Pattern Recognition
152, 2024). Each image of a batch is a point, of the teacher t_i or of the student s_i, on the unit sphere:

    D^tt_ij = ‖t_i - t_j‖      D^st_ij = ‖s_i - t_j‖      a student's query in the teacher's gallery
    L = 10/B Σ_i (D^tt_ii - D^st_ii)² + β/B Σ_{i≠j} (D^tt_ij - D^st_ij)²

Points are made of feature maps by their energy over the channels, so that a student may have fewer of them, or of
embeddings of one length. The authors' β is 1 at their batch of 96; the sum grows with B, so at other batches it is
95 / (B - 1) here, which is our choice. The teacher gets no gradient. All of it is float32.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

RELATED = ("layer3", "layer4")  # the stages of a ResNet whose maps the authors relate
OWN_WEIGHT = 10.0  # of an image against itself
OTHER_WEIGHT = 95.0  # of an image against all others of its batch together, in units of their mean
SMALLEST_SQUARE = 1e-12  # the gradient of a root at zero is infinite


def relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """ARKD of the points `student` and `teacher`, (batch, n) each: a scalar, zero where they are the same."""
    gallery, count = teacher.detach(), len(teacher)
    squares = (distances(gallery, gallery) - distances(student, gallery)).square()
    own = squares.diagonal().sum()
    others = OTHER_WEIGHT / max(1, count - 1)
    return (OWN_WEIGHT * own + others * (squares.sum() - own)) / count


def distances(rows: Tensor, columns: Tensor) -> Tensor:
    """Euclidean distances (n, m) of `rows` (n, d) to `columns` (m, d), from differences: those of a point to itself are
    the smallest there is, not rounding."""
    squares = (rows.float()[:, None] - columns.float()[None]).square().sum(dim=2)
    return squares.clamp(min=SMALLEST_SQUARE).sqrt()


def map_relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """ARKD of feature maps (batch, C, H, W); channels and sizes of the two may differ. The larger map is averaged down
    to the smaller, side by side, so that rectangles stay what they are."""
    height, width = (min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True))
    ours, theirs = (functional.adaptive_avg_pool2d(energy(maps), (height, width)) for maps in (student, teacher))
    return relation_loss(_points(ours), _points(theirs))


def energy(maps: Tensor) -> Tensor:
    """Where a map responds: the mean over channels of its squares, (batch, C, H, W) → (batch, 1, H, W)."""
    return maps.float().square().mean(dim=1, keepdim=True)


def embedding_relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """ARKD of embeddings (batch, D) of one length, each scaled to length one."""
    return relation_loss(_points(student), _points(teacher))


def _points(values: Tensor) -> Tensor:
    """One unit vector per image; a zero one where all is zero."""
    flat = values.float().flatten(1)
    lengths = flat.square().sum(dim=1, keepdim=True).clamp(min=SMALLEST_SQUARE).sqrt()
    return flat / lengths
