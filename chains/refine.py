"""Refinement: from a teacher to a nested chain, by the sandwich.

Every step trains the teacher-resolution tensors at full width, at the narrowest and at one random width in between.
Each pass has the ReID loss, with *one* classifier at teacher resolution whose columns are summed like any other
layer's; each narrower pass also has the similarity loss against the full width (methods/oskt.md §4). The sandwich is
that of US-Net (Yu and Huang, ICCV 2019); here a width is a cut of a Ward tree, so its student is made by the very
`expand` that serves it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from chains.arch import Architecture
from chains.chain import InputSpec
from chains.cut import Cut, NestedTree
from chains.data.images import ImageSet
from chains.errors import WidthError
from chains.expand import expand, sum_runs
from chains.losses import reid_loss, similarity_loss
from chains.model import ReIDModel, module_name, numpy_tensors
from chains.train import Report, Trained, TrainRecipe, autocast, fit
from chains.tree import grow_trees, in_leaf_order
from chains.width import Width

SIMILARITY_WEIGHT = 10.0


@dataclass(frozen=True, eq=False)
class Refined:
    """What refinement leaves: tensors (float32, leaf order) and the tree of every channel group."""

    tensors: dict[str, NDArray[np.float32]]
    trees: dict[str, NestedTree]


class Sandwich:
    """The trainable tensors of a chain under refinement, and the passes through its students."""

    def __init__(self, teacher: Trained, trees: Mapping[str, NestedTree], ladder: tuple[Width, ...]) -> None:
        self.table: Architecture = teacher.model.table
        self.trees, self.ladder = trees, ladder
        orders = {group: tree.order for group, tree in trees.items()}
        leaves = in_leaf_order(self.table, numpy_tensors(teacher.model), orders)
        self.tensors = {name: nn.Parameter(torch.from_numpy(values)) for name, values in leaves.items()}
        self.tensors["neck.bias"].requires_grad_(False)
        columns = torch.from_numpy(orders[self.table.embedding_group])
        self.classifier = nn.Parameter(teacher.classifier[:, columns].clone())
        self.modules = {width: ReIDModel(self.table.name, width).train() for width in ladder}
        self.cuts = {width: self._cuts(width) for width in ladder}

    def trainable(self) -> list[Tensor]:
        return [*(tensor for tensor in self.tensors.values() if tensor.requires_grad), self.classifier]

    def forward(self, width: Width, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Feature (batch, m), lifted embedding (batch, N) in leaf order, and logits (batch, pids) of one student."""
        cuts = self.cuts[width]
        student = expand(self.tensors, self.table.axes, cuts)
        state = {module_name(name): tensor for name, tensor in student.items()}
        feature, embedding = functional_call(self.modules[width], state, (images,))
        cut = cuts[self.table.embedding_group]
        logits = embedding.float() @ sum_runs(self.classifier, cut.parts, axis=1).T
        return feature.float(), embedding.float()[:, torch.from_numpy(cut.part_of())], logits

    def _cuts(self, width: Width) -> dict[str, Cut]:
        return {group: self.trees[group].cut(size) for group, size in self.table.group_sizes(width).items()}


def refine(
    teacher: Trained,
    ladder: tuple[Width, ...],
    images: ImageSet,
    input: InputSpec,
    recipe: TrainRecipe,
    seed: int,
    report: Report | None = None,
) -> Refined:
    """Refine `teacher` into the tensors of a nested chain with `ladder` (narrow to wide, its last rung the teacher's
    width). Widths and batches are a function of the seed; `teacher` is left as it was. Raises `WidthError` when the
    ladder has no rung between its ends or does not end at the teacher."""
    if len(ladder) < 3 or ladder[-1] != teacher.model.width:
        rungs = ", ".join(str(width) for width in ladder)
        raise WidthError(
            f"a sandwich needs at least three rungs that end at {teacher.model.width}, not {rungs or 'none'}"
        )
    trees = grow_trees(teacher.model.table, numpy_tensors(teacher.model))
    sandwich = Sandwich(teacher, trees, ladder)
    widths = np.random.default_rng([seed, 1])

    def backward(pixels: Tensor, labels: Tensor) -> dict[str, float]:
        full, narrowest = ladder[-1], ladder[0]
        between = ladder[int(widths.integers(1, len(ladder) - 1))]
        losses, gallery = {}, None
        for name, width in (("full", full), ("narrowest", narrowest), ("between", between)):
            with autocast(recipe):
                feature, lifted, logits = sandwich.forward(width, pixels)
            loss = reid_loss(feature, logits, labels)
            if gallery is None:
                gallery = lifted.detach()
            else:
                loss = loss + SIMILARITY_WEIGHT * similarity_loss(lifted, gallery)
            loss.backward()  # type: ignore[no-untyped-call]
            losses[name] = float(loss.detach())
        return losses

    fit(sandwich.trainable(), backward, images, input, recipe, seed, report)
    return Refined({name: t.detach().contiguous().numpy().copy() for name, t in sandwich.tensors.items()}, trees)
