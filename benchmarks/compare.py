"""Every way to provision a width, on the same teachers, images, recipe and evaluation.

    python -m benchmarks.compare                          # everything: three seeds, two processes
    python -m benchmarks.compare --only refine:nested     # the tasks whose name starts so

A task is one training on one core. It leaves a file under build/compare/, so that a killed comparison goes on where it
was and no task runs twice. The tables are written from those files:

    zero_training.csv      every width as it is served, not trained after provisioning; and each width trained alone
    cross_width.csv        mAP of queries of one width against a gallery of another, where methods share a space
    after_training.csv     the narrow width, trained downstream alike from every method's start
    alone_curve.csv        widths trained alone for longer: the honest price of one-shot
    comparison_means.csv   means over the seeds, with bootstrap intervals over queries
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.baselines import DISTILLED, STARTS
from benchmarks.setup import (
    ARCHITECTURE,
    BACKWARD_FACTOR,
    FULL,
    QUARTER,
    RESULTS,
    calibration_images,
    recipe,
    update_table,
)  # fmt: skip
from benchmarks.slices import PartialSandwich, leading_trees
from chains.architectures import architecture
from chains.artifact import load, save
from chains.calibrate import calibrate, recalibrate
from chains.chain import Chain, Floats, InputSpec
from chains.cost import count_macs, count_params
from chains.data.images import ImageSet
from chains.data.synthetic import STATION, PeopleSettings, gallery_images, query_images, train_images
from chains.evaluate import embed, evaluate_model
from chains.finetune import expanded
from chains.model import ReIDModel, load_student
from chains.nested import NestedRecipe
from chains.ranking import Ranking, rank_sets
from chains.refine import Refined, refine
from chains.train import Distillation, Trained, fit, train_alone
from chains.width import Width, even_ladder

LADDER = even_ladder(QUARTER, FULL, 7)  # ¼ to 1 in eighths
NARROW = LADDER[0]
SITES = {"default": PeopleSettings(), "station": STATION}
HEIGHT, WIDTH = 64, 32  # pixels, half of the renderer's: three seeds of everything have to fit into an afternoon
TEACHER_STEPS, REFINE_STEPS, DOWNSTREAM_STEPS = 2000, 2000, 1000
BATCH = recipe(1).images  # of a step
PLAIN = NestedRecipe(own_norms=False, merged_share=1)
SANDWICHES: Mapping[str, NestedRecipe] = {
    "nested": NestedRecipe(),
    "nested, no trees inside": NestedRecipe(merged_share=0),
    "nested, similarity 20": NestedRecipe(similarity_weight=20),
    "nested, ARKD of maps": NestedRecipe(arkd_maps_weight=1),
    "nested, ARKD of embeddings": NestedRecipe(arkd_embeddings_weight=1),
    "nested, ARKD of maps, a tenth": NestedRecipe(arkd_maps_weight=0.1),
    "nested, ARKD of embeddings, a tenth": NestedRecipe(arkd_embeddings_weight=0.1),
    "merge, own norms": NestedRecipe(merged_share=1),
    "merge": PLAIN,
    "slices": PLAIN,
}
DOWNSTREAM = ("scratch", "kd", "weight selection", "depgraph", "oskt", "nested")
WORK = Path("build/compare")

Embedded = Mapping[Width, tuple[Floats, Floats]]  # of queries and gallery, lifted into the common space
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Site:
    """One data set at this comparison's size."""

    name: str

    @property
    def title(self) -> str:
        return f"synthetic people, {self.name} settings at {HEIGHT}x{WIDTH}"

    @property
    def input(self) -> InputSpec:
        return InputSpec(HEIGHT, WIDTH, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def macs(self, width: Width) -> int:
        return count_macs(architecture(ARCHITECTURE), width, self.input)

    def path(self, what: str, seed: int) -> Path:
        return WORK / f"{self.name}-{seed}-{what}.safetensors"


@cache
def images(site: Site, split: str) -> ImageSet:
    """train, query or gallery; rendered once a process."""
    make = {"train": train_images, "query": query_images, "gallery": gallery_images}[split]
    return make(replace(SITES[site.name], height=HEIGHT, width=WIDTH))


# --- tasks: each trains one thing and returns the rows it gives, with the precisions that the intervals need


def train_teacher(site: Site, seed: int) -> Rows:
    plan = recipe(TEACHER_STEPS)
    teacher = train_alone(ARCHITECTURE, FULL, images(site, "train"), site.input, plan, seed)
    save_file({"classifier": teacher.classifier, **teacher.model.state_dict()}, site.path("teacher", seed))
    spent = BACKWARD_FACTOR * plan.images * site.macs(FULL)
    return [accuracy_row(site, "teacher", seed, FULL, evaluate(site, teacher.model), plan.images, spent)]


def load_teacher(site: Site, seed: int) -> Trained:
    state = load_file(site.path("teacher", seed))
    classifier = state.pop("classifier")
    model = ReIDModel(ARCHITECTURE, FULL)
    model.load_state_dict(state)
    return Trained(model.eval(), classifier)


def refine_and_measure(site: Site, seed: int, method: str) -> Rows:
    """A chain by one of the sandwiches or as the paper does, and every width of it as it would be served."""
    steps = refine_steps(site, method)
    # the paper's code clips no gradients, and its refining loss, a plain sum, would use up the whole norm
    plan = replace(recipe(steps), clip_norm=None) if method == "oskt" else recipe(steps)
    teacher, people = load_teacher(site, seed), images(site, "train")
    if method == "slices":
        embedded = refine_slices(site, teacher, steps, seed)
    else:
        mode = "oskt" if method == "oskt" else "nested"
        refined = refine(
            teacher, LADDER, people, site.input, plan, seed, mode=mode, nested=SANDWICHES.get(method, PLAIN)
        )
        chain = calibrate(new_chain(site, refined), calibration_images(people, seed))
        save(chain, site.path(method, seed))
        embedded = {width: embed_lifted(site, chain, width) for width in LADDER}
    spent = BACKWARD_FACTOR * BATCH * (TEACHER_STEPS * site.macs(FULL) + steps * step_macs(site, method))
    return [*own_rows(site, method, seed, embedded, BATCH * steps, spent), *cross_rows(site, method, seed, embedded)]


def refine_slices(site: Site, teacher: Trained, steps: int, seed: int) -> Embedded:
    people = images(site, "train")
    sandwich = PartialSandwich(teacher, leading_trees(teacher, 0, 0), LADDER, SANDWICHES["slices"], seed)
    fit(sandwich, people, site.input, recipe(steps), seed)
    embedded = {}
    for width in LADDER:
        student = sandwich.model(width)
        recalibrate(student, calibration_images(people, seed), site.input)
        queries, gallery = embeddings(site, student)
        embedded[width] = tuple(sandwich.lift(width, torch.from_numpy(e)).numpy() for e in (queries, gallery))
    return embedded


def refine_steps(site: Site, method: str) -> int:
    """As many steps as cost what the sandwich costs: the paper's step has one pass less."""
    return round(REFINE_STEPS * step_macs(site, "nested") / step_macs(site, method))


def step_macs(site: Site, method: str) -> float:
    """Forward multiply-adds of one image in a refinement step."""
    ends = site.macs(FULL) + site.macs(NARROW)
    between = sum(site.macs(width) for width in LADDER[1:-1]) / len(LADDER[1:-1])
    return ends if method == "oskt" else ends + NestedRecipe().widths_between * between


def train_width(site: Site, seed: int, width: Width, steps: int) -> Rows:
    """A width trained alone from scratch."""
    trained = train_alone(ARCHITECTURE, width, images(site, "train"), site.input, recipe(steps), seed)
    spent = BACKWARD_FACTOR * BATCH * steps * site.macs(width)
    return [accuracy_row(site, "alone", seed, width, evaluate(site, trained.model), BATCH * steps, spent)]


def train_downstream(site: Site, seed: int, method: str) -> Rows:
    """The narrow width from a method's start, trained like all others; a new classifier for each."""
    teacher = load_teacher(site, seed)
    if method in STARTS:
        start = STARTS[method](teacher, NARROW, seed)
    else:
        start = expanded(load(site.path(method, seed)).chain, NARROW)
    plan = recipe(DOWNSTREAM_STEPS)
    distillation = Distillation(teacher) if method in DISTILLED else None
    trained = train_alone(
        ARCHITECTURE, NARROW, images(site, "train"), site.input, plan, seed, start=start, distillation=distillation
    )
    spent = BACKWARD_FACTOR * plan.images * site.macs(NARROW) + before_downstream(site, method)
    row = accuracy_row(site, method, seed, NARROW, evaluate(site, trained.model), plan.images, spent)
    return [{**row, "trained_after": True}]


def before_downstream(site: Site, method: str) -> int:
    """Multiply-adds a method has spent before, or beside, its student's own training."""
    teacher = BACKWARD_FACTOR * BATCH * TEACHER_STEPS * site.macs(FULL)
    if method == "scratch":
        return 0
    if method in DISTILLED:
        return teacher + BATCH * DOWNSTREAM_STEPS * site.macs(FULL)
    if method in STARTS:
        return teacher
    return teacher + round(BACKWARD_FACTOR * BATCH * refine_steps(site, method) * step_macs(site, method))


# --- what is measured


def new_chain(site: Site, refined: Refined) -> Chain:
    return refined.chain(
        name="comparison",
        architecture=ARCHITECTURE,
        ladder=LADDER,
        teacher=FULL,
        input=site.input,
        license="Apache-2.0",
        provenance={"data": site.title},
    )


def evaluate(site: Site, model: ReIDModel) -> Ranking:
    return evaluate_model(model, images(site, "query"), images(site, "gallery"), site.input)


def embeddings(site: Site, model: ReIDModel) -> tuple[Floats, Floats]:
    return embed(model, images(site, "query"), site.input), embed(model, images(site, "gallery"), site.input)


def embed_lifted(site: Site, chain: Chain, width: Width) -> tuple[Floats, Floats]:
    lift = chain.lift(width)
    queries, gallery = embeddings(site, load_student(chain, width))
    return queries[:, lift], gallery[:, lift]


def rank(site: Site, queries: Floats, gallery: Floats) -> Ranking:
    return rank_sets(queries, gallery, images(site, "query"), images(site, "gallery"))


def own_rows(site: Site, method: str, seed: int, embedded: Embedded, seen: int, spent: float) -> Rows:
    """Each width in its own gallery."""
    return [accuracy_row(site, method, seed, width, rank(site, *embedded[width]), seen, spent) for width in embedded]


def accuracy_row(site: Site, method: str, seed: int, width: Width, ranking: Ranking, seen: int, spent: float) -> Any:
    low, high = ranking.map_interval()
    return {
        "method": method,
        "dataset": site.title,
        "seed": seed,
        "width": str(width),
        "macs": site.macs(width),
        "params": count_params(architecture(ARCHITECTURE), width),
        "map": round(ranking.map, 2),
        "map_low": round(low, 2),
        "map_high": round(high, 2),
        "rank1": round(ranking.rank(1), 2),
        "trained_after": False,
        "images": seen,
        "compute_macs": round(spent),
        "precisions": [round(value, 5) for value in ranking.average_precision.tolist()],
    }


def cross_rows(site: Site, method: str, seed: int, embedded: Embedded) -> Rows:
    """mAP of every width's queries against every width's gallery."""
    return [
        {
            "method": method,
            "dataset": site.title,
            "seed": seed,
            "query_width": str(q),
            "gallery_width": str(g),
            "map": round(rank(site, embedded[q][0], embedded[g][1]).map, 2),
        }
        for q in embedded
        for g in embedded
    ]


# --- running tasks

Task = tuple[str, Callable[..., Rows], tuple[Any, ...]]


def tasks(seeds: list[int]) -> Iterator[tuple[int, Task]]:
    """(stage, (name, function, arguments)): a stage needs what the one before leaves. Everything is done on the default
    site, on the second site the sandwiches alone."""
    site, second = Site("default"), Site("station")
    for seed in seeds:
        yield from _chains(site, seed, (*SANDWICHES, "oskt"))
        for width in LADDER:
            yield 1, (f"alone:{width.stem}:{seed}:{REFINE_STEPS}", train_width, (site, seed, width, REFINE_STEPS))
        for method in DOWNSTREAM:
            yield 2, (f"downstream:{method}:{seed}", train_downstream, (site, seed, method))
        yield from _chains(second, seed, SANDWICHES)
    for width, steps in curve(site):
        yield 3, (f"curve:{width.stem}:{steps}", train_width, (site, seeds[0], width, steps))


def _chains(site: Site, seed: int, methods: Iterable[str]) -> Iterator[tuple[int, Task]]:
    """A teacher, and what is refined from it."""
    yield 0, (f"teacher:{site.name}:{seed}", train_teacher, (site, seed))
    for method in methods:
        yield 1, (f"refine:{method}:{site.name}:{seed}", refine_and_measure, (site, seed, method))


def curve(site: Site) -> Iterator[tuple[Width, int]]:
    """How long widths are trained alone, besides as long as the refinement: three times that, and with the
    multiply-adds of the whole refinement, first seed only."""
    for width in (NARROW, LADDER[2], FULL):
        yield width, 3 * REFINE_STEPS
        yield width, round(REFINE_STEPS * step_macs(site, "nested") / site.macs(width))


def run(task: Task) -> str:
    name, function, arguments = task
    torch.set_num_threads(1)
    rows = function(*arguments)
    draft = result_path(name).with_suffix(".partial")
    draft.write_text(json.dumps(rows))
    draft.replace(result_path(name))
    shown = ", ".join(f"{row['width']} {row['map']}" for row in rows if "width" in row)
    return f"{name}: {shown}"


def result_path(name: str) -> Path:
    return WORK / f"{name.replace(':', '-').replace(' ', '_')}.json"


def run_all(everything: list[tuple[int, Task]], processes: int) -> None:
    """Stage by stage, `processes` tasks at a time; a task that is done already is left alone."""
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for stage in sorted({stage for stage, _ in everything}):
            waiting = [task for at, task in everything if at == stage and not result_path(task[0]).exists()]
            for done in as_completed([pool.submit(run, task) for task in waiting]):
                print(done.result(), flush=True)


# --- tables

ZERO, AFTER, ALONE = "zero_training.csv", "after_training.csv", "alone_curve.csv"
CROSS, MEANS = "cross_width.csv", "comparison_means.csv"
MEAN_OF = ("method", "dataset", "width", "trained_after", "images")
RESAMPLES = 1000


def write_tables(finished: list[Task]) -> None:
    """What these tasks gave takes the place of the rows it is a repetition of; the others stay as they are."""
    rows = results_of(finished, "benchmarks.compare --only")
    own = [row for row in rows if "width" in row]
    update_table(RESULTS / MEANS, list(means(own)), MEAN_OF, is_better=_is_over_as_many_seeds)
    for row in own:
        del row["precisions"]
    seen = BATCH * REFINE_STEPS
    crossing = [row for row in rows if "query_width" in row]
    served = [row for row in own if not row["trained_after"] and (row["method"] != "alone" or row["images"] == seen)]
    alone = [row for row in own if row["method"] == "alone" and row["seed"] == 0]
    update_table(RESULTS / CROSS, crossing, ("method", "dataset", "seed", "query_width", "gallery_width"))
    update_table(RESULTS / ZERO, served, ("method", "dataset", "seed", "width"))
    update_table(RESULTS / AFTER, [row for row in own if row["trained_after"]], ("method", "dataset", "seed", "width"))
    update_table(RESULTS / ALONE, alone, ("dataset", "width", "images"))


def _is_over_as_many_seeds(new: Mapping[str, Any], old: Mapping[str, str]) -> bool:
    return int(new["seeds"]) >= int(old["seeds"])


def results_of(finished: list[Task], command: str) -> Rows:
    """The rows of every task, each with the command that makes it again."""
    stored = {name: json.loads(result_path(name).read_text()) for name, *_ in finished}
    return [{**row, "command": f'python -m {command} "{name}"'} for name, rows in stored.items() for row in rows]


def means(rows: Rows) -> Iterator[dict[str, Any]]:
    """Mean mAP over the seeds of every method, data set, width and number of images, with a 95 % bootstrap interval:
    queries are resampled, the same for all seeds, because all rank the same queries."""
    for key in dict.fromkeys(tuple(row[name] for name in MEAN_OF) for row in rows):
        of_seeds = [row for row in rows if tuple(row[name] for name in MEAN_OF) == key]
        precisions = 100 * np.array([row["precisions"] for row in of_seeds]).mean(axis=0)  # (queries,)
        generator = np.random.default_rng(0)
        resampled = [
            precisions[generator.integers(0, len(precisions), len(precisions))].mean() for _ in range(RESAMPLES)
        ]
        low, high = np.percentile(resampled, [2.5, 97.5])
        figures = {"map": precisions.mean(), "map_low": low, "map_high": high}
        yield {
            **dict(zip(MEAN_OF, key, strict=True)),
            "seeds": len(of_seeds),
            **{name: round(float(value), 2) for name, value in figures.items()},
        }


def main() -> None:
    options = parse(__doc__)
    write_tables(finish(list(tasks(options.seeds)), options))


def finish(everything: list[tuple[int, Task]], options: argparse.Namespace) -> list[Task]:
    """Run what `options` choose; all that are done, in this run or before."""
    WORK.mkdir(parents=True, exist_ok=True)
    chosen = [(stage, task) for stage, task in everything if task[0].startswith(tuple(options.only))]
    run_all(chosen, options.processes)
    finished = [task for _, task in everything if result_path(task[0]).exists()]
    if len(finished) < len(everything):
        print(f"{len(finished)} of {len(everything)} tasks are done here; the tables keep their rows of the others")
    return finished


def parse(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[""], help="run only tasks whose names start so")
    return parser.parse_args()


if __name__ == "__main__":
    main()
