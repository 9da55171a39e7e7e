"""Refinement: from a teacher to the tensors and partitions of a weight chain, in either mode.

`nested` (the default) trains every width of a ladder at once; see `chains.nested`. `oskt` is the paper's; see
`chains.oskt`. Both start from the same teacher and end as a `Refined`, which a `Chain` is made of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from chains.chain import Chain, Floats, InputSpec, Mode
from chains.compatible import Anchor
from chains.cut import Partition, SharedClusters
from chains.data.images import Images
from chains.errors import DataError, WidthError
from chains.losses import PAPER_LOSS, LossRecipe
from chains.model import ReIDModel, numpy_tensors
from chains.nested import NestedRecipe, Sandwich
from chains.oskt import OneShot, cluster
from chains.train import Run, Trained, TrainRecipe, fit
from chains.tree import grow_trees
from chains.width import Width


@dataclass(frozen=True, eq=False)
class Refined:
    """What refinement leaves: the tensors of a chain (float32, leaf order), the partition of every channel group, and
    the norms of rungs that keep their own."""

    mode: Mode
    tensors: Mapping[str, Floats]
    partitions: Mapping[str, Partition]
    own_norms: Mapping[Width, Mapping[str, Floats]] = field(default_factory=dict)

    def chain(
        self,
        *,
        name: str,
        architecture: str,
        ladder: tuple[Width, ...],
        teacher: Width,
        input: InputSpec,
        license: str,
        provenance: Mapping[str, Any],
    ) -> Chain:
        """A chain of these tensors, in an embedding space of its own; not calibrated yet. Raises as `Chain` does."""
        return Chain(
            name=name,
            architecture=architecture,
            mode=self.mode,
            teacher=teacher,
            ladder=ladder,
            input=input,
            embedding_space=f"es-{fingerprint(self.tensors)}",
            license=license,
            tensors=self.tensors,
            partitions=self.partitions,
            own_norms={width: norms for width, norms in self.own_norms.items() if width in ladder},
            provenance=provenance,
        )


def refine(
    teacher: Trained,
    ladder: tuple[Width, ...],
    images: Images,
    input: InputSpec,
    recipe: TrainRecipe,
    seed: int,
    run: Run = Run(),  # noqa: B008 - frozen
    *,
    mode: Mode = "nested",
    validate: Callable[[Refined], Mapping[str, float]] | None = None,
    nested: NestedRecipe = NestedRecipe(),  # noqa: B008 - frozen
    oskt_loss: LossRecipe = PAPER_LOSS,
    compatible: Anchor | None = None,
    partitions: Mapping[str, Partition] | None = None,
) -> Refined:
    """Refine `teacher` into a chain with `ladder`, narrow to wide. Widths and batches are a function of the seed;
    `teacher` is left as it was.

    recipe: `chains.train.paper_recipe(images, "refine")` is the paper's schedule. validate: measures the chain as it is
    so far. nested, oskt_loss: for the mode of that name. compatible: an old embedding space that every width learns to
    meet; mode nested only, and best with a teacher that was trained into it. partitions: those of `clustered`, where
    they were made before; None: they are made now. Raises `WidthError` when the ladder does not end at the teacher's
    width or, nested, has no rung between its ends; `DataError` when the teacher's classifier is of other identities
    than `images`; `ChainMismatch` when the old space does not fit; and what `chains.train.fit` raises.
    """
    _require_same_identities(teacher, images)
    if partitions is None:
        partitions = partitions_of(teacher.model, ladder, mode, nested)
    objective = _objective(teacher, partitions, ladder, seed, mode, nested, oskt_loss, compatible)

    def refined() -> Refined:
        own_norms = objective.own_norms() if isinstance(objective, Sandwich) else {}
        return Refined(mode, objective.tensors(), objective.partitions, own_norms)

    fit(objective, images, input, recipe, seed, run, validate and (lambda: validate(refined())))
    return refined()


def clustered(teacher: Trained, ladder: tuple[Width, ...], mode: Mode, nested: NestedRecipe) -> Refined:
    """What refinement of `teacher` starts from: its tensors, and the partition of every channel group. A function of
    the teacher alone. Raises as `refine` does for a ladder it cannot climb."""
    partitions = partitions_of(teacher.model, ladder, mode, nested)
    start = _objective(teacher, partitions, ladder, 0, mode, replace(nested, own_norms=False), PAPER_LOSS, None)
    return Refined(mode, start.tensors(), start.partitions)


def partitions_of(
    teacher: ReIDModel, ladder: tuple[Width, ...], mode: Mode, nested: NestedRecipe
) -> Mapping[str, Partition]:
    """The partition of every channel group of `teacher`, by which all widths of `ladder` are cut."""
    tensors = numpy_tensors(teacher)
    if mode == "nested":
        return grow_trees(teacher.table, tensors, nested.merged_share)
    _require_ladder(ladder, teacher.width)
    return cluster(teacher.table, tensors, ladder[0])


def _objective(
    teacher: Trained,
    partitions: Mapping[str, Partition],
    ladder: tuple[Width, ...],
    seed: int,
    mode: Mode,
    nested: NestedRecipe,
    oskt_loss: LossRecipe,
    compatible: Anchor | None,
) -> Sandwich | OneShot:
    """What is trained. Raises as `refine`."""
    if mode == "nested":
        return Sandwich(teacher, partitions, ladder, nested, seed, compatible)
    if compatible is not None:
        raise DataError(f"mode 'oskt' is the paper's and knows no old space ('{compatible.chain}'); refine in 'nested'")
    _require_ladder(ladder, teacher.model.width)
    clusters = {group: each for group, each in partitions.items() if isinstance(each, SharedClusters)}
    return OneShot(teacher, clusters, ladder[0], seed, oskt_loss)


def fingerprint(tensors: Mapping[str, Floats]) -> str:
    """Id of an embedding space: new for every training, the same for every re-calibration. 16 hex digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()[:16]


def _require_same_identities(teacher: Trained, images: Images) -> None:
    identities = len(set(images.pids.tolist()))
    if len(teacher.classifier) != identities:
        raise DataError(
            f"the teacher's classifier knows {len(teacher.classifier)} identities, the images have {identities}; "
            "refine with the images the teacher was trained on"
        )


def _require_ladder(ladder: tuple[Width, ...], teacher: Width) -> None:
    if not ladder or ladder[-1] != teacher or list(ladder) != sorted(ladder):
        rungs = ", ".join(str(width) for width in ladder)
        raise WidthError(
            f"a ladder runs from the narrowest width up to the teacher's, {teacher}, not {rungs or 'none'}"
        )
