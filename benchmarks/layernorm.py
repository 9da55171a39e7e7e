"""Layer normalisation over merged channels: as a student has it, against one that counts a channel by its part's size.

A student's channel k stands for s_k of the teacher's N. The teacher's statistics of a token whose channels are alike
inside parts are those of the student's channels weighted by part sizes,

    mean = Σ s_k x_k / N        variance = Σ s_k (x_k - mean)² / N,

so that with them, and only with them, a narrow ViT computes what the teacher does wherever the teacher's rows are tied.
A plain layer normalisation, the only one that runtimes have as an operator, counts every part once.

Merging a teacher gives the same student as merging it after its rows have been tied inside the parts, as means are
already means. So what merging changes is two things, the tying and, with plain norms, the norms; here they are apart.

- function_error: 1 - cosine of the feature in front of the neck, student (lifted) against the tied teacher, mean over
  images: what the norms alone do. 0: the same function.
- map: of the student, without any training after the merge or, with `refinement_images`, of one refined with that norm
  in every narrower pass; the neck is calibrated. Unrefined, `weighted` is also the mAP of the tied teacher.

    python -m benchmarks.layernorm                 # trains a small teacher, writes benchmarks/results/layernorm.csv
    python -m benchmarks.layernorm --refine 1000   # and refines it twice, with either norm in every narrower pass

What it shows (one seed, 500 training identities, parts of up to 7 channels where the mean is 4): right after the merge
plain norms cost up to 5 points of mAP, 20.4 against 25.1 at w48. After a refinement of 1000 steps nothing is left of
that: 55.2, 56.8, 58.6 with plain norms, 55.6, 56.9, 58.9 with weighted ones, and the full width, where both norms are
the same, differs as much (59.9, 60.1). So students keep the plain norm, the one that runtimes have as an operator.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.backbones import BACKBONES, SITE, TITLE, recipe, splits
from benchmarks.setup import RESULTS, calibration_images, command, update_table
from chains.arch import Architecture
from chains.chain import Floats, cuts_of
from chains.cut import Cuts, NestedTree
from chains.data.images import ImageSet
from chains.evaluate import evaluate_model
from chains.expand import expand
from chains.model import ReIDModel, model_of, normalise, numpy_tensors
from chains.nested import NestedRecipe, Sandwich
from chains.train import Run, Trained, TrainRecipe, every, fit, train_alone
from chains.tree import grow_trees, in_leaf_order
from chains.width import Width

VIT = BACKBONES["vit_tiny"]
ARCHITECTURE, LADDER = VIT.architecture, VIT.ladder
IMAGES = 256  # for the function error
NORMS = ("plain", "weighted")


class WeightedLayerNorm(nn.Module):
    """Layer normalisation over (…, m) channels, of which channel k counts `shares[k]`; shares add up to one."""

    shares: Tensor

    def __init__(self, plain: nn.LayerNorm, sizes: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = plain.weight, plain.bias, plain.eps
        self.register_buffer("shares", torch.tensor(sizes / sizes.sum(), dtype=torch.float32, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - (x * self.shares).sum(dim=-1, keepdim=True)
        variance = (centred.square() * self.shares).sum(dim=-1, keepdim=True)
        return centred * (variance + self.eps).rsqrt() * self.weight + self.bias


def weighted(model: ReIDModel, cuts: Cuts) -> ReIDModel:
    """`model` itself, its layer normalisations now weighted by part sizes."""
    for name, module in list(model.backbone.named_modules()):
        if isinstance(module, nn.LayerNorm):
            sizes = cuts.of(model.table.norms[name]).parts.sizes
            model.backbone.set_submodule(name, WeightedLayerNorm(module, sizes))
    return model


def tied(table: Architecture, tensors: Mapping[str, Floats], cuts: Cuts) -> dict[str, Floats]:
    """`tensors` with every row, and every entry of a vector, in the place of it the mean over its part."""
    found = {}
    for name, axes in table.axes.items():
        cut = cuts.of(axes.rows)
        sums = np.add.reduceat(tensors[name], cut.parts.starts, axis=0)
        means = sums / cut.parts.sizes.reshape(-1, *(1,) * (sums.ndim - 1))
        found[name] = means[cut.part_of()].astype(np.float32)
    return found


def student(table: Architecture, tensors: Mapping[str, Floats], cuts: Cuts, width: Width, norm: str) -> ReIDModel:
    model = model_of(table.name, width, expand(tensors, table.axes, cuts))
    return weighted(model, cuts) if norm == "weighted" else model


@torch.inference_mode()
def feature(model: ReIDModel, people: ImageSet) -> Tensor:
    """In front of the neck: (images, channels)."""
    found: Tensor = model(normalise(people.images, SITE.input))[0]
    return found


@torch.inference_mode()
def calibrated(model: ReIDModel, people: ImageSet) -> ReIDModel:
    """`model` itself, with a neck that has the statistics of `people`."""
    found = feature(model, people)
    model.neck.running_mean, model.neck.running_var = found.mean(dim=0), found.var(dim=0)
    return model


def function_error(tied_teacher: ReIDModel, merged: ReIDModel, cuts: Cuts, people: ImageSet) -> float:
    part_of = torch.from_numpy(cuts.of(tied_teacher.table.embedding_channels).part_of())
    lifted = feature(merged, people)[:, part_of].double()
    cosines = nn.functional.cosine_similarity(lifted, feature(tied_teacher, people).double())
    return max(0.0, float((1 - cosines).mean()))


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    people, queries, gallery = splits()
    taught, run = recipe(VIT, VIT.teacher_steps), Run(report=every(100, print))
    teacher = train_alone(ARCHITECTURE, LADDER[-1], people, SITE.input, taught, options.seed, run)
    teacher_map = evaluate_model(teacher.model, queries, gallery, SITE.input).map
    common = {"architecture": ARCHITECTURE, "dataset": TITLE, "seed": options.seed}
    ran = {"teacher_map": round(teacher_map, 2), "images": taught.images, "command": command()}
    rows = []
    for norm in NORMS:
        for width in LADDER[:-1]:
            measured = measure(teacher, width, norm, calibration_images(people, options.seed), queries, gallery)
            rows.append({**common, "width": str(width), "norm": norm, "refinement_images": 0, **measured, **ran})
        if options.refine:
            plan = recipe(VIT, options.refine)
            maps = refined_maps(teacher, norm, plan, options.seed, people, queries, gallery)
            learnt = {"largest_part": "", "mean_part": "", "function_error": ""}
            rows += [
                {
                    **common,
                    "width": str(w),
                    "norm": norm,
                    "refinement_images": plan.images,
                    **learnt,
                    "map": found,
                    **ran,
                }
                for w, found in maps.items()
            ]
        print(*rows, sep="\n", flush=True)
    update_table(options.results, rows, ("architecture", "seed", "width", "norm", "refinement_images"))


class WeightedSandwich(Sandwich):
    """The nested chain's objective, whose students have weighted layer normalisations."""

    def __init__(self, teacher: Trained, seed: int) -> None:
        super().__init__(teacher, grow(teacher), LADDER, NestedRecipe(), seed)
        self.templates = {width: weighted(model, self.cuts[width]) for width, model in self.templates.items()}


def grow(teacher: Trained) -> dict[str, NestedTree]:
    return grow_trees(teacher.model.table, numpy_tensors(teacher.model), NestedRecipe().merged_share)


def refined_maps(
    teacher: Trained, norm: str, plan: TrainRecipe, seed: int, people: ImageSet, queries: ImageSet, gallery: ImageSet
) -> dict[Width, float]:
    """mAP of every width, own embeddings, after a refinement in which students have this kind of norm."""
    plain = Sandwich(teacher, grow(teacher), LADDER, NestedRecipe(), seed)
    sandwich = WeightedSandwich(teacher, seed) if norm == "weighted" else plain
    fit(sandwich, people, SITE.input, plan, seed, Run(report=every(100, print)))
    maps = {}
    for width in LADDER:
        tensors = {name: tensor.detach().numpy().copy() for name, tensor in sandwich.student(width).items()}
        model = model_of(ARCHITECTURE, width, tensors)
        made = weighted(model, sandwich.cuts[width]) if norm == "weighted" else model
        found = evaluate_model(calibrated(made, calibration_images(people, seed)), queries, gallery, SITE.input)
        maps[width] = round(found.map, 2)
    return maps


def measure(
    teacher: Trained, width: Width, norm: str, people: ImageSet, queries: ImageSet, gallery: ImageSet
) -> dict[str, float]:
    """The figures of one width with one kind of norm."""
    table = teacher.model.table
    tensors = numpy_tensors(teacher.model)
    trees = grow_trees(table, tensors)
    leaves = in_leaf_order(table, tensors, {group: tree.order for group, tree in trees.items()})
    cuts = cuts_of(table, trees, width)
    made = student(table, leaves, cuts, width, norm)
    tied_teacher = model_of(table.name, teacher.model.width, tied(table, leaves, cuts))
    sizes = cuts.of(table.embedding_channels).parts.sizes
    error = function_error(tied_teacher, made, cuts, people.take(np.arange(IMAGES)))
    return {
        "largest_part": int(sizes.max()),
        "mean_part": round(float(sizes.mean()), 2),
        "function_error": float(f"{error:.2g}"),
        "map": round(evaluate_model(calibrated(made, people), queries, gallery, SITE.input).map, 2),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refine", type=int, default=0, help="batches of 64 images for each refinement; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS / "layernorm.csv")
    return parser.parse_args()


if __name__ == "__main__":
    main()
