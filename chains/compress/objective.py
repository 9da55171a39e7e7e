"""What a compression trains: the student's ReID loss, what it learns from its teacher, and the pruners' way to zero.

    L = CE + triplet + KL (T = 2) + 0.5 GAP + 1.0 ARKD(stages 3, 4)

with the authors' weights. Pruners are moved by plain SGD, as in the paper, where all else has the engine's Adam: which
groups of a LASSO vanish depends on how large their gradients are, and Adam makes all steps alike.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chains.compatible import Anchor, AnchorLoss
from chains.compress.losses import gap_distance, shrink_rate, soft_threshold
from chains.compress.selection import Budget
from chains.compress.units import Pruning
from chains.cut import Indices
from chains.data.batches import BatchRecipe
from chains.errors import DataError
from chains.losses import distillation_loss, reid_loss
from chains.model import ReIDModel
from chains.relations import RELATED, embedding_relation_loss, map_relation_loss
from chains.taps import Trace, traced
from chains.train import Objective, Trained, TrainRecipe, digest

DEAP_BATCH = BatchRecipe(16, 6, pad=10, erasing=0.5, erased_area=0.4, erased_aspect=1 / 0.3)


@dataclass(frozen=True)
class DeapRecipe:
    """How a network is compressed. `prune`: the training with pruners; `finetune`: the one of the absorbed network.

    shrink: by how much the norm of a pruner's group can fall in `prune`, from one; below about one nothing is pruned.
    pruner_lr: of the pruners' SGD where the schedule of `prune` is at its full rate; the paper's 0.01 with momentum 0.9
    takes steps as long as 0.1. distillation_weight, temperature: of the logits. gap_weight: of the distance of pooled
    block outputs, for a teacher of the student's width; arkd_weight: of ARKD on the maps of stages 3 and 4;
    embedding_weight: of ARKD on embeddings. Raises `DataError` for a negative weight.
    """

    prune: TrainRecipe
    finetune: TrainRecipe
    shrink: float = 3.0
    pruner_lr: float = 0.1
    distillation_weight: float = 1.0
    temperature: float = 2.0
    gap_weight: float = 0.5
    arkd_weight: float = 1.0
    embedding_weight: float = 0.0

    def __post_init__(self) -> None:
        weights = {name: value for name, value in vars(self).items() if isinstance(value, float)}
        if wrong := [name for name, value in weights.items() if not value >= 0]:
            raise DataError(f"{wrong[0]} is {weights[wrong[0]]}; a recipe of compression has no negative number")
        if not (self.temperature > 0 and self.shrink > 0 and self.pruner_lr > 0):
            raise DataError(
                f"temperature {self.temperature}, shrink {self.shrink} and pruner_lr {self.pruner_lr} must be above 0"
            )


@dataclass(frozen=True, eq=False)
class Tutor:
    """Whom a student learns from. trained: the teacher and its classifier, of the identities that are trained on.
    lift: teacher's embedding channel -> the student's that stands for it, int64 (D,); `None`: one to one."""

    trained: Trained
    lift: Indices | None = None


class Compression(Objective):
    """A student that learns from its teacher, with pruners that shrink (`Pruning`) or without (`ReIDModel`).

    compatible: an old embedding space to learn to meet; order: of the student's embedding, see `AnchorLoss`. budget:
    when pruners need not shrink any more.
    """

    def __init__(
        self,
        student: Pruning | ReIDModel,
        classifier: nn.Parameter,
        tutor: Tutor,
        recipe: DeapRecipe,
        compatible: Anchor | None = None,
        order: Indices | None = None,
        budget: Budget | None = None,
    ) -> None:
        super().__init__()
        self.student, self.classifier, self.recipe, self.lift = student, classifier, recipe, tutor.lift
        self.budget = budget
        require_tutor(self.network, len(classifier), tutor, recipe)
        self.anchoring = None if compatible is None else AnchorLoss(compatible, classifier.shape, order)
        # In tuples, so that the teacher is no submodule: it is neither trained nor checkpointed.
        self._teacher = (copy.deepcopy(tutor.trained.model).eval().requires_grad_(False),)
        self._logits = (tutor.trained.classifier.detach().clone(),)
        self.descent = recipe.pruner_lr / recipe.prune.lr if recipe.prune.lr else 0.0
        self.shrink = shrink_rate(recipe.prune, recipe.shrink) if isinstance(student, Pruning) else 0.0

    @property
    def network(self) -> ReIDModel:
        """The student itself; with pruners in its blocks while it has any."""
        return self.student.network if isinstance(self.student, Pruning) else self.student

    def forward(self, pixels: Tensor, labels: Tensor, step: int) -> dict[str, Tensor]:  # noqa: ARG002
        with self.autocast(pixels.device):
            seen = traced(self.network, lambda: self.network(pixels))
        embedding = seen.embedding.float()
        logits = embedding @ self.classifier.T
        losses = {"loss": reid_loss(seen.feature.float(), logits, labels)}
        losses |= self._learnt(seen, embedding, logits, self._taught(pixels))
        if self.anchoring is not None:
            losses["compatible"] = self.anchoring(embedding, labels)
        return losses

    def _learnt(self, seen: Trace, embedding: Tensor, logits: Tensor, taught: Trace) -> dict[str, Tensor]:
        """The losses against the teacher, those that weigh something."""
        recipe, teacher = self.recipe, taught.embedding.float()
        losses: dict[str, Tensor] = {}
        if recipe.distillation_weight:
            taught_logits = teacher @ self._logits[0].to(teacher.device).T
            distilled = distillation_loss(logits, taught_logits, recipe.temperature)
            losses["distillation"] = recipe.distillation_weight * distilled
        if recipe.gap_weight:
            losses["gap"] = recipe.gap_weight * gap_distance(seen.every_block(), taught.every_block())
        if recipe.arkd_weight:
            by_stage = [map_relation_loss(seen.output(stage), taught.output(stage)) for stage in RELATED]
            losses["arkd"] = recipe.arkd_weight * torch.stack(by_stage).sum()
        if recipe.embedding_weight:
            lifted = embedding if self.lift is None else embedding[:, torch.from_numpy(self.lift).to(embedding.device)]
            losses["embedding"] = recipe.embedding_weight * embedding_relation_loss(lifted, teacher)
        return losses

    @torch.no_grad()
    def _taught(self, pixels: Tensor) -> Trace:
        with self.autocast(pixels.device):
            teacher = self._teacher[0].to(pixels.device)
            return traced(teacher, lambda: teacher(pixels))

    def by_descent(self) -> list[nn.Parameter]:
        return [weight for _, weight, _ in self.student.pruners()] if isinstance(self.student, Pruning) else []

    @torch.no_grad()
    def after_step(self, rate: float) -> None:
        """The group LASSO's proximal step on every pruner, unless enough has vanished as it is."""
        if isinstance(self.student, Pruning) and not (self.budget and self.budget.rests(self.student.norms())):
            for _, weight, axis in self.student.pruners():
                weight.copy_(soft_threshold(weight.flatten(1), axis, rate * self.shrink).view_as(weight))

    def settings(self) -> Mapping[str, Any]:
        settings: dict[str, Any] = {
            "recipe": asdict(self.recipe),
            "teacher": digest({**self._teacher[0].state_dict(), "classifier": self._logits[0]}),
        }
        if self.budget is not None:
            settings["limits"] = self.budget.settings()
        if self.anchoring is not None:
            settings["compatible"] = self.anchoring.anchor.settings()
        return settings

    def trained(self) -> Trained:
        """The network as it is now, in eval mode; not a copy. With pruners in it, it is no plain ResNet."""
        return Trained(self.network.eval(), self.classifier.detach())


def require_tutor(student: ReIDModel, identities: int, tutor: Tutor, recipe: DeapRecipe) -> None:
    """Raises `DataError` where `tutor` cannot teach `student` what `recipe` asks for."""
    teacher, classifier = tutor.trained.model, tutor.trained.classifier
    if recipe.distillation_weight and len(classifier) != identities:
        raise DataError(
            f"a teacher of {len(classifier)} identities cannot teach {identities}; give its classifier for these images"
        )
    if recipe.gap_weight and (teacher.table.name, teacher.width) != (student.table.name, student.width):
        raise DataError(
            f"gap_weight compares block by block: the teacher is a {teacher.table.name} of {teacher.width}, the "
            f"student a {student.table.name} of {student.width}; set gap_weight = 0"
        )
    length = student.backbone.channels if tutor.lift is None else len(tutor.lift)
    if recipe.embedding_weight and length != teacher.backbone.channels:
        raise DataError(
            f"embedding_weight compares embeddings of {length} and {teacher.backbone.channels} numbers; set it to 0"
        )
