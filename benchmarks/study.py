"""Which cut and which losses make width pay? One change at a time, on two sites, same teacher, steps and evaluation.

    python -m benchmarks.study --processes 2

Runs are short (1000 steps of 64 images) and of one seed: a difference below a point says nothing. Like those of the
comparison they are kept under build/compare/ and written to benchmarks/results/study.csv; `comparison_means.csv` then
judges what was chosen, longer and on three seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

import numpy as np
import torch

from benchmarks import compare
from benchmarks.compare import LADDER, SITES, WORK, Rows, Site, images
from benchmarks.setup import RESULTS, calibration_images, recipe, update_table
from benchmarks.slices import PartialSandwich, leading_trees
from chains.arch import NORM_EPSILON
from chains.calibrate import recalibrate
from chains.chain import Floats
from chains.cut import NestedTree
from chains.model import model_of, module_name, numpy_tensors
from chains.nested import NestedRecipe
from chains.nodes import Conv
from chains.train import Trained, fit
from chains.tree import group_rows, ward_tree

STEPS, SEED = 1000, 0
PLAIN = NestedRecipe(distillation=0, own_norms=False, cross_triplet_weight=0, similarity_weight=10, widths_between=1)
Trees = Mapping[str, NestedTree]
Grow = Callable[[Trained], Trees]


def over(share: float, embedding_share: float) -> Grow:
    """Ward trees of the raw rows, as in the paper's clustering, over a share of every group's channels and a share of
    the embedding's: 1 merges, 0 slices, in between narrow students merge what wider ones take as it is."""
    return lambda teacher: leading_trees(teacher, share, embedding_share)


MERGED, SLICED, NESTED = over(1, 1), over(0, 0), over(0, 1)


def on_scaled_rows(teacher: Trained) -> Trees:
    """Ward trees of rows scaled by their norm's γ / σ: what the next layer sees of them."""
    table, tensors, state = teacher.model.table, numpy_tensors(teacher.model), teacher.model.state_dict()
    scaled = dict(tensors)
    for conv in (node for node in table.nodes if isinstance(node, Conv)):
        deviation = np.sqrt(state[module_name(f"{conv.norm}.running_var")].numpy() + NORM_EPSILON)
        gain = tensors[f"{conv.norm}.weight"] / deviation
        scaled[f"{conv.name}.weight"] = tensors[f"{conv.name}.weight"] * gain.reshape(-1, 1, 1, 1)
    return {group: ward_tree(group_rows(table, scaled, group)) for group in table.groups}


def balanced(teacher: Trained) -> Trees:
    """The Ward tree's leaf order, but always halving the longest run: parts of equal size."""
    return {group: NestedTree(tree.order, _halvings(len(tree.order))) for group, tree in MERGED(teacher).items()}


def _halvings(count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    runs, splits = [(0, count)], []
    while runs:
        runs.sort(key=lambda run: (run[0] - run[1], run[0]))
        start, stop = runs.pop(0)
        if stop - start > 1:
            middle = (start + stop) // 2
            splits.append(middle)
            runs += [(start, middle), (middle, stop)]
    return np.array(splits, dtype=np.int64)


def at_random(teacher: Trained) -> Trees:
    """Trees of random rows: does it matter which channels are merged?"""
    generator = np.random.default_rng(0)
    sizes = teacher.model.table.group_sizes(teacher.model.width)
    return {group: ward_tree(generator.normal(size=(size, 16))) for group, size in sizes.items()}


@dataclass(frozen=True)
class Idea:
    """A variant: the losses and the trees."""

    recipe: NestedRecipe
    trees: Grow


DISTILLED = replace(PLAIN, distillation=0.5)
CROSSED = replace(DISTILLED, cross_triplet_weight=1)
OWN = replace(DISTILLED, own_norms=True)
ALL = replace(CROSSED, own_norms=True)
IDEAS: Mapping[str, Idea] = {
    "merge": Idea(PLAIN, MERGED),
    "slices": Idea(PLAIN, SLICED),
    "merge, distilled": Idea(DISTILLED, MERGED),
    "slices, distilled": Idea(DISTILLED, SLICED),
    "merge, distilled, crossed": Idea(CROSSED, MERGED),
    "slices, distilled, crossed": Idea(CROSSED, SLICED),
    "merge, distilled, own norms": Idea(OWN, MERGED),
    "merge, distilled, crossed, own norms": Idea(ALL, MERGED),
    "merge, distilled, own norms, similarity 50": Idea(replace(OWN, similarity_weight=50), MERGED),
    "slices, distilled, crossed, own norms": Idea(ALL, SLICED),
    # changes to "merge, distilled, crossed, own norms"
    "full width twice as much": Idea(replace(ALL, full_weight=2), MERGED),
    "trees of scaled rows": Idea(ALL, on_scaled_rows),
    "balanced trees": Idea(ALL, balanced),
    "random trees": Idea(ALL, at_random),
    # other cuts, with the losses of "merge, distilled, crossed, own norms"
    "slices, merged embedding": Idea(ALL, NESTED),
    "merge, sliced embedding": Idea(ALL, over(1, 0)),
    "tree over a half": Idea(ALL, over(0.5, 0.5)),
    "tree over a half, merged embedding": Idea(ALL, over(0.5, 1)),
    "tree over three eighths, merged embedding": Idea(ALL, over(0.375, 1)),
    "tree over three quarters, merged embedding": Idea(ALL, over(0.75, 1)),
    "slices, tree over a half of the embedding": Idea(ALL, over(0, 0.5)),
    # changes to "slices, merged embedding"
    "crossed twice as much": Idea(replace(ALL, cross_triplet_weight=2), NESTED),
    "similarity 20": Idea(replace(ALL, similarity_weight=20), NESTED),
    "no similarity loss": Idea(replace(ALL, similarity_weight=0), NESTED),
    "students learn no labels": Idea(replace(ALL, distillation=1), NESTED),
    "two widths between": Idea(replace(ALL, widths_between=2), NESTED),
    "no own norms": Idea(CROSSED, NESTED),
}


def sandwich(idea: Idea, teacher: Trained) -> PartialSandwich:
    return PartialSandwich(teacher, idea.trees(teacher), LADDER, idea.recipe, SEED)


def measure(site: Site, name: str) -> Rows:
    """Refine with one idea and measure every pair of widths: one row."""
    teacher, people = compare.load_teacher(site, SEED), images(site, "train")
    objective = sandwich(IDEAS[name], teacher)
    fit(objective, people, site.input, recipe(STEPS), SEED)
    embedded: dict[Any, tuple[Floats, Floats]] = {}
    for width in LADDER:
        tensors = {n: tensor.detach().numpy().copy() for n, tensor in objective.student(width).items()}
        student = model_of(teacher.model.table.name, width, tensors)
        recalibrate(student, calibration_images(people, SEED), site.input)
        queries, gallery = (torch.from_numpy(e) for e in compare.embeddings(site, student))
        embedded[width] = (objective.lift(width, queries).numpy(), objective.lift(width, gallery).numpy())
    return [
        {
            "idea": name,
            "dataset": site.title,
            "seed": SEED,
            "images": recipe(STEPS).images,
            **figures(site, name, embedded),
        }
    ]


def figures(site: Site, name: str, embedded: compare.Embedded) -> dict[str, float]:
    """mAP of every width, their mean, narrow queries in the full gallery, and the mean over pairs of unlike widths."""
    crossing: Rows = compare.cross_rows(site, name, SEED, embedded)
    maps = {(row["query_width"], row["gallery_width"]): float(row["map"]) for row in crossing}
    own = {f"map_{width.stem}": maps[str(width), str(width)] for width in LADDER}
    unlike = [value for (query, gallery), value in maps.items() if query != gallery]
    return {
        **own,
        "map_mean": round(mean(own.values()), 2),
        "map_narrow_to_full": maps[str(LADDER[0]), str(LADDER[-1])],
        "map_unlike_mean": round(mean(unlike), 2),
    }


def name_of(idea: str, site: str) -> str:
    return f"{idea} on {site}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--only", nargs="+", default=[""], help='ideas whose names start so, as "merge, distilled on station"'
    )
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    teachers = [(0, task) for _, task in compare.tasks([SEED]) if task[0].startswith("teacher")]
    ideas: dict[str, compare.Task] = {
        name_of(idea, site): (name_of(idea, site), measure, (Site(site), idea)) for idea in IDEAS for site in SITES
    }
    chosen = [(1, task) for name, task in ideas.items() if name.startswith(tuple(options.only))]
    compare.run_all([*teachers, *chosen], options.processes)
    finished = [task for task in ideas.values() if compare.result_path(task[0]).exists()]
    rows = compare.results_of(finished, "benchmarks.study --only")
    update_table(RESULTS / "study.csv", rows, ("idea", "dataset", "seed"))


if __name__ == "__main__":
    main()
