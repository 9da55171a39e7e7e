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
from benchmarks.setup import RESULTS, calibration_images, recipe, write_table
from benchmarks.slices import SliceSandwich
from chains.arch import NORM_EPSILON, Conv
from chains.calibrate import recalibrate
from chains.chain import Floats
from chains.cut import NestedTree
from chains.model import model_of, module_name, numpy_tensors
from chains.nested import NestedRecipe, Sandwich
from chains.train import Trained, fit
from chains.tree import group_rows, grow_trees, ward_tree

STEPS, SEED = 1000, 0
PLAIN = NestedRecipe(distillation=0, own_norms=False, cross_triplet_weight=0, similarity_weight=10, widths_between=1)
Trees = Mapping[str, NestedTree]


def on_rows(teacher: Trained) -> Trees:
    """Ward trees of the raw rows, as in the paper's clustering."""
    return grow_trees(teacher.model.table, numpy_tensors(teacher.model))


def on_scaled_rows(teacher: Trained) -> Trees:
    """Ward trees of rows scaled by their norm's γ / σ: what the next layer sees of them."""
    table, tensors, state = teacher.model.table, numpy_tensors(teacher.model), teacher.model.state_dict()
    scaled = dict(tensors)
    for conv in (node for node in table.nodes if isinstance(node, Conv)):
        deviation = np.sqrt(state[module_name(f"{conv.norm}.running_var")].numpy() + NORM_EPSILON)
        gain = tensors[f"{conv.norm}.weight"] / deviation
        scaled[f"{conv.name}.weight"] = tensors[f"{conv.name}.weight"] * gain.reshape(-1, 1, 1, 1)
    return {group: ward_tree(group_rows(scaled, table.writers(group))) for group in table.groups}


def balanced(teacher: Trained) -> Trees:
    """The Ward tree's leaf order, but always halving the longest run: parts of equal size."""
    return {group: NestedTree(tree.order, _halvings(len(tree.order))) for group, tree in on_rows(teacher).items()}


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
    """A variant: the losses and the trees. `trees` is `None` for slices."""

    recipe: NestedRecipe
    trees: Callable[[Trained], Trees] | None = on_rows


DISTILLED = replace(PLAIN, distillation=0.5)
CROSSED = replace(DISTILLED, cross_triplet_weight=1)
OWN = replace(DISTILLED, own_norms=True)
ALL = replace(CROSSED, own_norms=True)
IDEAS: Mapping[str, Idea] = {
    "merge": Idea(PLAIN),
    "slices": Idea(PLAIN, None),
    "merge, distilled": Idea(DISTILLED),
    "slices, distilled": Idea(DISTILLED, None),
    "merge, distilled, crossed": Idea(CROSSED),
    "slices, distilled, crossed": Idea(CROSSED, None),
    "merge, distilled, own norms": Idea(OWN),
    "merge, distilled, crossed, own norms": Idea(ALL),
    "merge, distilled, own norms, similarity 50": Idea(replace(OWN, similarity_weight=50)),
    "slices, distilled, crossed, own norms": Idea(ALL, None),
    # from here on: changes to "merge, distilled, crossed, own norms"
    "crossed twice as much": Idea(replace(ALL, cross_triplet_weight=2)),
    "no similarity loss": Idea(replace(ALL, similarity_weight=0)),
    "similarity 50": Idea(replace(ALL, similarity_weight=50)),
    "full width twice as much": Idea(replace(ALL, full_weight=2)),
    "slices, full width twice as much": Idea(replace(CROSSED, full_weight=2), None),
    "students learn no labels": Idea(replace(ALL, distillation=1)),
    "two widths between": Idea(replace(ALL, widths_between=2)),
    "trees of scaled rows": Idea(ALL, on_scaled_rows),
    "balanced trees": Idea(ALL, balanced),
    "random trees": Idea(ALL, at_random),
}


def sandwich(idea: Idea, teacher: Trained) -> Sandwich:
    if idea.trees is None:
        return SliceSandwich(teacher, LADDER, idea.recipe, SEED)
    return Sandwich(teacher, idea.trees(teacher), LADDER, idea.recipe, SEED)


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
    write_table(RESULTS / "study.csv", compare.results_of(finished, "benchmarks.study --only"))


if __name__ == "__main__":
    main()
