"""What DEAP adds to the losses of ReID and distillation: the distance of pooled maps, and the group LASSO.

The LASSO is no term of the loss here. Its subgradient leaves small numbers where it means zeros, and has none at zero;
its proximal step, after each step of the optimiser, makes zeros that are zeros (our choice):

    w_g ← w_g · max(0, 1 - η λ / ‖w_g‖)

A group's norm starts at one and falls by at most η λ a step, so by S = Σ_t η_t λ in a run: the shrink budget. Below
about one nothing is ever pruned. S is what a recipe states, and λ follows from the length of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from chains.errors import DataError
from chains.train import TrainRecipe

Axis = Literal[0, 1]  # groups are rows (0) or columns (1)
SMALLEST_SQUARE = 1e-12


def gap_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Σ over blocks of the mean over the batch of ‖GAP(teacher) - GAP(student)‖₂; maps (batch, C, H, W), a pair per
    block with as many channels. The teacher gets no gradient."""
    pooled = [
        theirs.detach().float().mean(dim=(2, 3)) - ours.float().mean(dim=(2, 3))
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    lengths = [gap.square().sum(dim=1).clamp(min=SMALLEST_SQUARE).sqrt().mean() for gap in pooled]
    return torch.stack(lengths).sum()


def group_norms(weight: Tensor, axis: Axis) -> Tensor:
    """Euclidean norms of the rows or columns of a matrix (n, m)."""
    return weight.square().sum(dim=1 - axis).sqrt()


def soft_threshold(weight: Tensor, axis: Axis, threshold: float) -> Tensor:
    """Every row or column of `weight` (n, m) shortened by `threshold`, to zero where it was no longer than that."""
    norms = group_norms(weight, axis)
    factors = (1 - threshold / norms.clamp(min=SMALLEST_SQUARE)).clamp(min=0)
    return weight * factors.unsqueeze(1 - axis)


def group_lasso(weights: Sequence[tuple[Tensor, Axis]]) -> Tensor:
    """Σ of the norms of all groups: what the proximal steps push down, and what a run reports."""
    return torch.stack([group_norms(weight, axis).sum() for weight, axis in weights]).sum()


def shrink_rate(recipe: TrainRecipe, shrink: float) -> float:
    """By how much a group's norm falls per unit of the learning rate, so that it falls by `shrink` in a whole run of
    `recipe`. With a momentum μ this is λ / (1 - μ). Raises `DataError` where the rates are zero."""
    rates = sum(recipe.rate(step) for step in range(recipe.steps))
    if not rates > 0:
        raise DataError(f"a recipe with lr={recipe.lr} takes no steps, so nothing can be pruned by it")
    return shrink / rates
