"""The nested chain's objective: the sandwich of widths on one set of teacher-resolution tensors.

Every step trains the tensors at full width, at the narrowest and at random widths in between. Each pass has the ReID
loss, with *one* classifier at teacher resolution whose columns are summed like any other layer's. A narrower pass also
learns from the full width of the same step: its logits, and how its gallery ranks (methods/oskt.md §4). The sandwich
and its distillation in place are those of US-Net (Yu and Huang, ICCV 2019); here a width is a cut of each channel
group, so its student is made by the very `expand` that serves it.

The one surprise: norms are not only merged. Every narrower rung of the ladder adds offsets of its own to the merged
normalisation weights and biases, as switchable batch norm keeps them apart (Yu et al., "Slimmable Neural Networks",
ICLR 2019). Statistics are per width anyway, and both are folded into the convolution in front: they cost a student
nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from chains.arch import Architecture
from chains.architectures.resnet import settings
from chains.chain import AFFINE, Floats, cuts_of
from chains.compatible import Anchor, AnchorLoss
from chains.cut import Cut, Cuts, Partition, joined_order
from chains.errors import ArchitectureError, WidthError
from chains.expand import expand, sum_runs
from chains.losses import cross_width_triplet, distillation_loss, reid_loss, similarity_loss
from chains.model import ReIDModel, model_of, module_name, numpy_tensors
from chains.relations import RELATED, embedding_relation_loss, map_relation_loss
from chains.taps import traced
from chains.train import Objective, Trained
from chains.tree import in_leaf_order
from chains.width import Width

LATER = ("arkd_maps_weight", "arkd_embeddings_weight")  # weights that recipes of older runs do not have


@dataclass(frozen=True)
class NestedRecipe:
    """What the sandwich weighs.

    full_weight: of the full width's loss; a narrower pass has weight 1. similarity_weight: of a student's similarity
    loss against the full width. cross_triplet_weight: of the triplet of its queries in the full width's gallery.
    distillation: the share, 0 to 1, of a student's classification loss that comes from the full width's logits, at
    temperature 1, instead of the labels. own_norms: every narrower rung learns offsets to the merged norms.
    widths_between: how many random widths a step trains besides its two ends. hard_factor: of every pass's triplet
    loss. merged_share: the share, 0 to 1, of each group's channels that its tree covers, see `chains.tree.grow_trees`.
    arkd_maps_weight: of DEAP's ARKD of a student's maps of stages 3 and 4 against the full width's; for ResNets.
    arkd_embeddings_weight: of ARKD of a student's lifted embeddings against the full width's; for every network.
    Raises `WidthError` outside these bounds.
    """

    full_weight: float = 1.0
    similarity_weight: float = 10.0
    cross_triplet_weight: float = 1.0
    distillation: float = 0.5
    own_norms: bool = True
    widths_between: int = 1
    hard_factor: float = 0.0
    merged_share: float = 0.375
    arkd_maps_weight: float = 0.0
    arkd_embeddings_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.distillation <= 1:
            raise WidthError(f"distillation {self.distillation} is a share of the classification loss, 0 to 1")
        if not 0 <= self.merged_share <= 1:
            raise WidthError(f"merged_share {self.merged_share} is a share of the channels, 0 to 1")
        for name in LATER:
            if not getattr(self, name) >= 0:
                raise WidthError(f"{name} {getattr(self, name)} is the weight of a loss, 0 or more")


@dataclass(frozen=True, eq=False)
class Pass:
    """What one student makes of a batch, all float32: `feature` (batch, m) in front of the neck; `embedding` (batch, m)
    behind it; `lifted` (batch, N), the embedding at teacher resolution in leaf order; `logits` (batch, pids); `maps`
    (batch, C, H, W), the outputs of the stages of `RELATED` where the recipe relates them."""

    feature: Tensor
    embedding: Tensor
    lifted: Tensor
    logits: Tensor
    maps: tuple[Tensor, ...] = ()


class Sandwich(Objective):
    """The tensors of a chain under refinement, and the passes through its students.

    Runs on any family of partitions. A student uses batch statistics in every pass; running statistics are neither kept
    nor needed, calibration measures them afterwards.
    """

    def __init__(
        self,
        teacher: Trained,
        partitions: Mapping[str, Partition],
        ladder: tuple[Width, ...],
        recipe: NestedRecipe,
        seed: int,
        compatible: Anchor | None = None,
    ) -> None:
        super().__init__()
        require_sandwich(ladder, teacher.model.width, recipe)
        if recipe.arkd_maps_weight:
            require_stages(teacher.model.table.name)
        self.table: Architecture = teacher.model.table
        self.partitions, self.ladder, self.recipe, self.seed = partitions, ladder, recipe, seed
        self.full = in_leaf_order_model(teacher.model, partitions)
        order = joined_order([partitions[group].order for group in self.table.embedding_channels])
        self.classifier = nn.Parameter(teacher.classifier[:, torch.from_numpy(order)].clone())
        self.anchoring = None if compatible is None else AnchorLoss(compatible, self.classifier.shape, order)
        # In a plain dict, so that they are no submodules: they hold no weights.
        self.templates = {width: template(self.table.name, width) for width in ladder}
        self.cuts = {width: cuts_of(self.table, partitions, width) for width in ladder}
        self.offsets = nn.ParameterDict(self._no_offsets() if recipe.own_norms else {})

    def forward(self, pixels: Tensor, labels: Tensor, step: int) -> dict[str, Tensor]:
        """The loss of each pass by its place in the sandwich; those of all widths between are added up."""
        full = self.run(self.ladder[-1], pixels)
        losses = {"full": self.full_loss(full, labels) + self._every_offset()}
        losses["narrowest"] = self.student_loss(self.run(self.ladder[0], pixels), full, labels)
        between = [self.student_loss(self.run(w, pixels), full, labels) for w in self.widths_between(step)]
        if between:
            losses["between"] = torch.stack(between).sum()
        return losses

    def widths_between(self, step: int) -> tuple[Width, ...]:
        """The random widths of `step`, a function of the seed and the step: the same in every process."""
        generator = np.random.default_rng([self.seed, 1, step])
        chosen = generator.choice(len(self.ladder) - 2, self.recipe.widths_between, replace=False)
        return tuple(self.ladder[1 + int(index)] for index in chosen)

    def idle(self, step: int) -> list[nn.Parameter]:
        """The offsets of the rungs that this step leaves out."""
        in_use = {str(width) for width in (self.ladder[0], *self.widths_between(step))}
        return [offset for key, offset in self.offsets.items() if key.partition("/")[0] not in in_use]

    def full_loss(self, full: Pass, labels: Tensor) -> Tensor:
        return self.recipe.full_weight * (self.reid(full, labels) + self.compatible_loss(full, labels))

    def student_loss(self, student: Pass, full: Pass, labels: Tensor) -> Tensor:
        """What a narrower width learns from the labels, and what from the full width."""
        share = self.recipe.distillation
        labelled = self.reid(student, labels, 1 - share)
        distilled = distillation_loss(student.logits, full.logits, temperature=1)
        similarity = similarity_loss(student.lifted, full.lifted)
        crossing = cross_width_triplet(student.lifted, full.lifted, labels)
        return (
            labelled
            + share * distilled
            + self.recipe.similarity_weight * similarity
            + self.recipe.cross_triplet_weight * crossing
            + self.compatible_loss(student, labels)
            + self.relation_losses(student, full)
        )

    def relation_losses(self, student: Pass, full: Pass) -> Tensor | float:
        """How otherwise a narrower width relates the images of a batch than the full width, by maps and embeddings."""
        total: Tensor | float = 0.0
        for maps in zip(student.maps, full.maps, strict=True):
            total = total + self.recipe.arkd_maps_weight * map_relation_loss(*maps)
        if weight := self.recipe.arkd_embeddings_weight:
            total = total + weight * embedding_relation_loss(student.lifted, full.lifted)
        return total

    def compatible_loss(self, student: Pass, labels: Tensor) -> Tensor | float:
        """How far the lifted embeddings of one pass are from an old space, where the chain shall meet one."""
        return 0.0 if self.anchoring is None else self.anchoring(student.lifted, labels)

    def reid(self, student: Pass, labels: Tensor, classification: float = 1.0) -> Tensor:
        """The ReID loss of one pass; `classification`: the weight of its cross-entropy."""
        return reid_loss(student.feature, student.logits, labels, self.recipe.hard_factor, classification)

    def run(self, width: Width, pixels: Tensor) -> Pass:
        """One pass through the student of `width`."""
        student = {module_name(name): tensor for name, tensor in self.student(width).items()}
        template = self.templates[width]
        maps: tuple[Tensor, ...] = ()
        with self.autocast(pixels.device):
            if self.recipe.arkd_maps_weight:
                seen = traced(template, lambda: functional_call(template, student, (pixels,)))
                feature, embedding = seen.feature, seen.embedding
                maps = tuple(seen.output(stage) for stage in RELATED)
            else:
                feature, embedding = functional_call(template, student, (pixels,))
        embedding = embedding.float()
        return Pass(feature.float(), embedding, self.lift(width, embedding), self.logits(width, embedding), maps)

    def student(self, width: Width) -> dict[str, Tensor]:
        """The tensors of the student, with gradients into this objective's."""
        merged = self.cut_out(width)
        own = {name: merged[name] + self.offsets[_key(width, name)] for name in self._own(width)}
        return {**merged, **own}

    def cut_out(self, width: Width) -> dict[str, Tensor]:
        """The student's tensors as the cut makes them, before its own norms."""
        return expand(self.full.tensors(), self.table.axes, self.cuts[width])

    def lift(self, width: Width, embedding: Tensor) -> Tensor:
        """Student embedding (batch, m) → (batch, N) at teacher resolution, in leaf order."""
        return embedding[:, torch.from_numpy(self._embedding_cut(width).part_of()).to(embedding.device)]

    def logits(self, width: Width, embedding: Tensor) -> Tensor:
        """(batch, pids): the classifier's columns are summed over parts, as every layer's that reads the embedding."""
        return embedding @ sum_runs(self.classifier, self._embedding_cut(width).parts, axis=1).T

    def _embedding_cut(self, width: Width) -> Cut:
        return self.cuts[width].of(self.table.embedding_channels)

    def settings(self) -> Mapping[str, Any]:
        settings: dict[str, Any] = {
            "recipe": recipe_values(self.recipe),
            "ladder": [str(width) for width in self.ladder],
            "cuts": digest_of_cuts(self.cuts),
        }
        if self.anchoring is not None:
            settings["compatible"] = self.anchoring.anchor.settings()
        return settings

    def tensors(self) -> dict[str, Floats]:
        """The chain's tensors as they are now: float32, leaf order, copies."""
        return numpy_tensors(self.full)

    @torch.no_grad()
    def own_norms(self) -> dict[Width, dict[str, Floats]]:
        """Norm weights and biases of the rungs that keep their own: float32 (channels,), copies."""
        names = [f"{norm}.{kind}" for norm in self.table.norms for kind in AFFINE]
        rungs = self.ladder[:-1] if self.offsets else ()
        students = {width: self.student(width) for width in rungs}
        return {width: {n: student[n].cpu().numpy().copy() for n in names} for width, student in students.items()}

    def _no_offsets(self) -> dict[str, nn.Parameter]:
        """Offsets to the merged norms of every rung below the teacher, all zero. The neck's bias stays zero."""
        names = [f"{norm}.{kind}" for norm in self.table.norms for kind in AFFINE if (norm, kind) != ("neck", "bias")]
        shapes = {width: self.table.tensor_shapes(width) for width in self.ladder[:-1]}
        return {_key(w, name): nn.Parameter(torch.zeros(shapes[w][name])) for w in shapes for name in names}

    def _own(self, width: Width) -> Iterator[str]:
        """The tensors of which `width` has offsets."""
        return (name for name in self.table.axes if _key(width, name) in self.offsets)

    def _every_offset(self) -> Tensor | float:
        """Zero: a parameter that a step does not use must still take part in it, or processes would wait for it."""
        return 0 * torch.stack([offset.sum() for offset in self.offsets.values()]).sum() if self.offsets else 0.0


def recipe_values(recipe: NestedRecipe) -> dict[str, Any]:
    """`recipe` as JSON values, without what came later and says nothing: older runs that go on are still the same."""
    return without_later(asdict(recipe))


def without_later(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe without those of `LATER` that are zero."""
    return {name: value for name, value in values.items() if value or name not in LATER}


def require_stages(architecture_name: str) -> None:
    """Raises `ArchitectureError` for a network without the stages whose maps ARKD relates."""
    try:
        settings(architecture_name)
    except ArchitectureError as error:
        raise ArchitectureError(
            f"arkd_maps_weight relates maps of stages 3 and 4 of ResNets, and {architecture_name} is none; set it to 0"
        ) from error


def _key(width: Width, name: str) -> str:
    """The offset of tensor `name` at `width`, as a key of a `ParameterDict`, which refuses dots."""
    return f"{width}/{name}".replace(".", "/")


def template(architecture_name: str, width: Width) -> ReIDModel:
    """A network without weights for `functional_call`: batch norm uses the batch's statistics and keeps none."""
    with torch.device("meta"):
        return without_statistics(ReIDModel(architecture_name, width)).train()


def without_statistics(model: ReIDModel) -> ReIDModel:
    """`model` itself, whose batch norms from now on know no running statistics."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return model


def in_leaf_order_model(teacher: ReIDModel, partitions: Mapping[str, Partition]) -> ReIDModel:
    """A trainable copy of `teacher` with its channels in the leaf order of `partitions`, without statistics."""
    orders = {group: partition.order for group, partition in partitions.items()}
    leaves = in_leaf_order(teacher.table, numpy_tensors(teacher), orders)
    return without_statistics(model_of(teacher.table.name, teacher.width, leaves)).train()


def digest_of_cuts(cuts: Mapping[Width, Cuts]) -> str:
    """An id of the cuts of a whole ladder."""
    total = hashlib.sha256()
    for groups in cuts.values():
        for cut in groups.values():
            for runs in (cut.parts, cut.rows):
                total.update(runs.starts.tobytes() + runs.stops.tobytes())
    return total.hexdigest()[:16]


def require_sandwich(ladder: tuple[Width, ...], teacher: Width, recipe: NestedRecipe) -> None:
    """Raises `WidthError` unless `recipe` can train the widths of `ladder`, narrow to wide, under `teacher`."""
    if len(ladder) < 3 or ladder[-1] != teacher:
        rungs = ", ".join(str(width) for width in ladder)
        raise WidthError(f"a sandwich needs at least three rungs that end at {teacher}, not {rungs or 'none'}")
    if not 0 <= recipe.widths_between <= len(ladder) - 2:
        raise WidthError(
            f"{recipe.widths_between} widths between cannot be drawn from a ladder of {len(ladder)}: "
            f"it has {len(ladder) - 2} between its ends"
        )
