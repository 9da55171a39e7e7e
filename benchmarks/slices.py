"""Cuts whose embedding leaves channels out: US-Net's as a baseline, and others that the study tries.

Everything else is the nested chain's own sandwich: the same passes, losses, classifier and schedule, so that what a
comparison shows is the cut. US-Net's slices (Yu and Huang, "Universally Slimmable Networks", ICCV 2019) are the first
channels of every group. Channels are ordered once, by the L1 norm of their rows in the teacher, as in OFA's elastic
width (Cai et al., ICLR 2020).
"""

from __future__ import annotations

import torch
from torch import Tensor

from chains.cut import NestedTree
from chains.model import ReIDModel, model_of, numpy_tensors
from chains.nested import Sandwich
from chains.train import Trained
from chains.tree import group_rows, grow_trees, leading_tree
from chains.width import Width


def leading_trees(teacher: Trained, share: float, embedding_share: float) -> dict[str, NestedTree]:
    """For every channel group the Ward tree over this share of its channels, the most important; 0, 0 is US-Net's."""
    table, tensors = teacher.model.table, numpy_tensors(teacher.model)
    (group,) = table.embedding_channels
    rows = group_rows(table, tensors, group)
    embedding = leading_tree(rows, max(1, round(embedding_share * len(rows))))
    return grow_trees(table, tensors, share) | {group: embedding}


class PartialSandwich(Sandwich):
    """The sandwich where a student's embedding may stand for some of the teacher's channels only."""

    def lift(self, width: Width, embedding: Tensor) -> Tensor:
        """Coordinates that a narrow student does not have are zero: then cosines compare the others."""
        part_of = torch.from_numpy(self._embedding_cut(width).part_of()).to(embedding.device)
        return embedding[:, part_of.clamp(min=0)] * (part_of >= 0)

    @torch.no_grad()
    def model(self, width: Width) -> ReIDModel:
        """The student as a module of its own, without statistics yet."""
        tensors = {name: tensor.cpu().numpy().copy() for name, tensor in self.student(width).items()}
        return model_of(self.table.name, width, tensors)
