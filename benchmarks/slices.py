"""US-Net's cut as a baseline: a student is the first channels of every group, most important first.

Everything else is the nested chain's own sandwich: the same passes, losses, classifier and schedule, so that what a
comparison shows is the cut. Slices: Yu and Huang, "Universally Slimmable Networks", ICCV 2019. Channels are ordered
once, by the L1 norm of their rows in the teacher, as in OFA's elastic width (Cai et al., ICLR 2020).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from chains.arch import Architecture
from chains.chain import Floats
from chains.cut import Cut, Indices, Runs
from chains.model import ReIDModel, model_of, numpy_tensors
from chains.nested import NestedRecipe, Sandwich
from chains.train import Trained
from chains.tree import group_rows
from chains.width import Width


@dataclass(frozen=True, eq=False)
class Slices:
    """All slices of a channel group. order: int64 (N,), the teacher's channels by falling importance."""

    order: Indices

    def cut(self, size: int) -> Cut:
        """The first `size` channels, each for itself."""
        first = Runs.single(np.arange(size))
        return Cut(first, first)


def by_importance(table: Architecture, tensors: Mapping[str, Floats]) -> dict[str, Slices]:
    """Slices for every channel group of a teacher whose tensors are in their own channel order."""
    rows = {group: group_rows(tensors, table.writers(group)) for group in table.groups}
    return {group: Slices(np.argsort(-np.abs(r).sum(axis=1), kind="stable")) for group, r in rows.items()}


class SliceSandwich(Sandwich):
    """The sandwich on slices: a student's embedding is the first coordinates of the teacher's."""

    def __init__(self, teacher: Trained, ladder: tuple[Width, ...], recipe: NestedRecipe, seed: int) -> None:
        slices = by_importance(teacher.model.table, numpy_tensors(teacher.model))
        super().__init__(teacher, slices, ladder, recipe, seed)  # type: ignore[arg-type]

    def cut_out(self, width: Width) -> dict[str, Tensor]:
        sizes = self.table.group_sizes(width)
        tensors = self.full.tensors()
        return {name: _sliced(tensors[name], sizes, axes.rows, axes.columns) for name, axes in self.table.axes.items()}

    def lift(self, width: Width, embedding: Tensor) -> Tensor:  # noqa: ARG002
        """Coordinates that a narrow student does not have are zero: then cosines compare the first coordinates."""
        return functional.pad(embedding, (0, self.classifier.shape[1] - embedding.shape[1]))

    @torch.no_grad()
    def model(self, width: Width) -> ReIDModel:
        """The student as a module of its own, without statistics yet."""
        tensors = {name: tensor.cpu().numpy().copy() for name, tensor in self.student(width).items()}
        return model_of(self.table.name, width, tensors)


def _sliced(tensor: Tensor, sizes: Mapping[str, int], rows: str, columns: str | None) -> Tensor:
    narrow = tensor[: sizes[rows]]
    return narrow if columns is None else narrow[:, : sizes[columns]]
