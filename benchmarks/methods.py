"""The sister methods on the teachers, images, batches and evaluation of `benchmarks.compare`.

    python -m benchmarks.methods                          # everything: three seeds, two processes
    python -m benchmarks.methods --only deap:0 fuse       # the tasks whose name starts so

A task is one training on one core that leaves a file under build/compare/; none runs twice. Teachers and nested chains
are that comparison's own, and are made first where they are missing. The tables are written from those files:

    compression.csv    one model for each of five budgets, the MACs of widths 4 to 12 of 16: a chain's student as it is
                       and finetuned, a wider student compressed by DEAP (for two budgets also into the chain's
                       embedding space), the teacher compressed by DEAP, and the teacher pruned by DepGraph and
                       finetuned. The smallest budget is below the teacher's floor
    headline.csv       DEAP on bottlenecks, a ResNet-50, to the paper's 26.8 % of the parameters and 28.0 % of the MACs
    fusion.csv         six partial teachers alone and together, one network fused from them, the same without

What is trained after its provisioning gets 2000 steps of 64 images, whichever method: DEAP's are 1500 with pruners and
500 without. `compute_macs` counts what one model costs with all that came before it, as `benchmarks.cost` does:
forward passes of images, times 3 where they are trained on, a teacher's where it is asked, and the pruners' too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks import compare
from benchmarks.baselines import depgraph
from benchmarks.compare import (
    BATCH,
    LADDER,
    TEACHER_STEPS,
    Rows,
    Site,
    Task,
    accuracy_row,
    before_downstream,
    embed_lifted,
    evaluate,
    images,
    load_teacher,
    rank,
    results_of,
)
from benchmarks.setup import ARCHITECTURE, BACKWARD_FACTOR, FULL, RESULTS, calibration_images, recipe, update_table
from chains.architectures import architecture
from chains.artifact import StoredChain, load
from chains.budget import Limits
from chains.calibrate import calibrate
from chains.chain import InputSpec
from chains.compatible import Anchor, anchor_in
from chains.compress.objective import DeapRecipe
from chains.compress.run import Compressed, Start, compress, from_student, from_teacher, terminal_chain
from chains.compress.units import Pruning
from chains.cost import count_macs, count_params
from chains.export import origin, save_trained
from chains.finetune import expanded
from chains.fuse.measure import measure
from chains.fuse.objective import FusionLoss, fuse
from chains.fuse.partials import Partial, open_partial
from chains.fuse.viewed import train_partial
from chains.fuse.views import PAPER_VIEWS, View
from chains.model import ReIDModel
from chains.ranking import Ranking
from chains.train import Distillation, Trained, TrainRecipe, train_alone
from chains.width import Width

SITE = Site("default")
BUDGETS = LADDER[:5]
REACHABLE = BUDGETS[1:]  # from the teacher: 17 % of its multiply-adds lie outside its inner widths
JOINED = BUDGETS[2::2]
ROOM = 1.9  # times the budget, that a student has at least before it is compressed
PRUNE_STEPS, FINETUNE_STEPS = 1500, 500
AFTER_STEPS = PRUNE_STEPS + FINETUNE_STEPS  # of everything that is trained after its provisioning
FINETUNE_LR = 6e-4  # behind the pruning; as far below the rate of the pruning as in the method's own schedule
COMPRESSION, HEADLINE, FUSION = "compression.csv", "headline.csv", "fusion.csv"
COMMAND = "benchmarks.methods --only"


# --- one model for one budget


def deap_recipe(prune_steps: int, finetune_steps: int) -> DeapRecipe:
    return DeapRecipe(recipe(prune_steps), replace(recipe(finetune_steps), lr=FINETUNE_LR))


def compress_teacher(seed: int, budget: Width) -> Rows:
    """The teacher of the comparison, by DEAP."""
    start = from_teacher("teacher", load_teacher(SITE, seed))
    return [deap_row("deap", seed, budget, start, before_downstream(SITE, "depgraph"))]


def compress_chain(seed: int, budget: Width) -> Rows:
    """The narrowest student of the comparison's chain that leaves room to prune, by DEAP: expand, then compress."""
    wide = [width for width in LADDER if SITE.macs(width) >= ROOM * SITE.macs(budget)]
    start = from_student(chain_of(seed), wide[0] if wide else FULL, images(SITE, "train"))
    return [deap_row("expanded, deap", seed, budget, start, before_downstream(SITE, "nested"))]


def compress_into_space(seed: int, budget: Width) -> Rows:
    """The full width of that chain, by DEAP and trained to stay in the chain's embedding space; how much its queries
    find in its own gallery, and in one of the chain's full width."""
    stored, people = chain_of(seed), images(SITE, "train")
    start = from_student(stored, FULL, people)
    anchor = anchor_in(stored, people, start.student.backbone.channels)
    done, spent = deap(seed, budget, start, before_downstream(SITE, "nested"), anchor)
    chain = terminal_chain(
        done.trained.model, SITE.input, name="joined", license="Apache-2.0", provenance={}, order=start.order
    )
    queries, own = embed_lifted(SITE, calibrate(chain, calibration_images(people, seed)), FULL)
    _, shared = embed_lifted(SITE, stored.chain, FULL)
    found = {"expanded, deap in the chain's space": own, "the same, in the chain's gallery": shared}
    return [
        compressed_row(method, seed, budget, rank(SITE, queries, gallery), done, spent)
        for method, gallery in found.items()
    ]


def deap_row(method: str, seed: int, budget: Width, start: Start, before: int) -> dict[str, Any]:
    done, spent = deap(seed, budget, start, before)
    return compressed_row(method, seed, budget, evaluate(SITE, done.trained.model), done, spent)


def deap(
    seed: int, budget: Width, start: Start, before: int, compatible: Anchor | None = None
) -> tuple[Compressed, int]:
    """What comes of `start`, and what that costs on top of `before`."""
    plan = deap_recipe(PRUNE_STEPS, FINETUNE_STEPS)
    if start.student.width != start.tutor.trained.model.width:
        plan = replace(plan, gap_weight=0)  # their maps have other channels
    people = images(SITE, "train")
    settling = calibration_images(people, seed)
    limits = Limits(max_macs=SITE.macs(budget))
    done = compress(start, people, SITE.input, plan, limits, seed, settling=settling, compatible=compatible)
    return done, before + deap_macs(start, done, plan)


def compressed_row(
    method: str, seed: int, budget: Width, ranking: Ranking, done: Compressed, spent: int
) -> dict[str, Any]:
    row = accuracy_row(SITE, method, seed, budget, ranking, BATCH * AFTER_STEPS, spent)
    return {**row, **size_of(done.trained.model), "budget": str(budget), "trained_after": True}


def deap_macs(start: Start, done: Compressed, plan: DeapRecipe) -> int:
    """What a compression costs: both trainings, and the teacher's look at every image of them."""
    teacher, student = macs_of(start.tutor.trained.model), macs_of(start.student)
    pruning = BACKWARD_FACTOR * (student + pruner_macs(start.student)) + teacher
    finetuning = BACKWARD_FACTOR * macs_of(done.trained.model) + teacher
    return plan.prune.images * pruning + plan.finetune.images * finetuning


@torch.no_grad()
def pruner_macs(model: ReIDModel) -> int:
    """Of one image through all 1×1 pruners that a compression puts into `model`."""
    pruning, total = Pruning(model).eval(), 0

    def count(module: torch.nn.Module, _: object, answer: torch.Tensor) -> None:
        nonlocal total
        weight = module.get_parameter("weight")
        total += weight.numel() * answer.shape[2] * answer.shape[3]

    for name, module in pruning.network.named_modules():
        if name.endswith(".pruner"):
            module.register_forward_hook(count)
    pruning.network(torch.zeros(1, 3, SITE.input.height, SITE.input.width))
    return total


def expand_only(seed: int, budget: Width) -> Rows:
    """The student of the comparison's chain, as it is served: in the common space."""
    ranking = rank(SITE, *embed_lifted(SITE, chain_of(seed).chain, budget))
    row = accuracy_row(SITE, "expanded", seed, budget, ranking, 0, before_downstream(SITE, "nested"))
    return [{**row, "budget": str(budget)}]


def expand_and_finetune(seed: int, budget: Width) -> Rows:
    """That student trained on, by labels, as the job `finetune` does."""
    start = expanded(chain_of(seed).chain, budget)
    return [finetuned_row("expanded, finetuned", seed, budget, start, None, before_downstream(SITE, "nested"))]


def prune_and_finetune(seed: int, budget: Width) -> Rows:
    """The teacher pruned by torch-pruning in one step, then trained by labels and by the teacher's logits."""
    teacher = load_teacher(SITE, seed)
    before = before_downstream(SITE, "depgraph") + BATCH * AFTER_STEPS * SITE.macs(FULL)
    return [finetuned_row("depgraph, finetuned", seed, budget, depgraph(teacher, budget), teacher, before)]


def finetuned_row(
    method: str, seed: int, budget: Width, start: ReIDModel, tutor: Trained | None, before: int
) -> dict[str, Any]:
    plan = recipe(AFTER_STEPS)
    distillation = None if tutor is None else Distillation(tutor)
    people = images(SITE, "train")
    trained = train_alone(ARCHITECTURE, budget, people, SITE.input, plan, seed, start=start, distillation=distillation)
    spent = before + BACKWARD_FACTOR * plan.images * SITE.macs(budget)
    row = accuracy_row(SITE, method, seed, budget, evaluate(SITE, trained.model), plan.images, spent)
    return {**row, "budget": str(budget), "trained_after": True}


def chain_of(seed: int) -> StoredChain:
    return load(SITE.path("nested", seed))


def macs_of(model: ReIDModel) -> int:
    return count_macs(model.table, model.width, SITE.input)


def size_of(model: ReIDModel) -> dict[str, int]:
    return {"macs": macs_of(model), "params": count_params(model.table, model.width)}


# --- the paper's headline, on bottlenecks

BOTTLENECKS = "resnet50"
HEADLINE_TEACHER_STEPS, HEADLINE_PRUNE_STEPS, HEADLINE_FINETUNE_STEPS = 4000, 3000, 1000
KEPT_PARAMS, KEPT_MACS = 1 - 0.7324, 1 - 0.7198  # of ResNet-101 on VeRi-776, in the paper


def train_large_teacher(seed: int) -> Rows:
    plan = recipe(HEADLINE_TEACHER_STEPS)
    teacher = train_alone(BOTTLENECKS, FULL, images(SITE, "train"), SITE.input, plan, seed)
    save_file({"classifier": teacher.classifier, **teacher.model.state_dict()}, SITE.path(BOTTLENECKS, seed))
    spent = BACKWARD_FACTOR * plan.images * macs_of(teacher.model)
    return [headline_row("teacher", seed, teacher.model, plan.images, spent, trained_after=False)]


def compress_large_teacher(seed: int) -> Rows:
    state = load_file(SITE.path(BOTTLENECKS, seed))
    classifier = state.pop("classifier")
    model = ReIDModel(BOTTLENECKS, FULL)
    model.load_state_dict(state)
    start = from_teacher("teacher", Trained(model.eval(), classifier))
    size = size_of(model)
    limits = Limits(max_macs=int(KEPT_MACS * size["macs"]), max_params=int(KEPT_PARAMS * size["params"]))
    plan = deap_recipe(HEADLINE_PRUNE_STEPS, HEADLINE_FINETUNE_STEPS)
    people = images(SITE, "train")
    done = compress(start, people, SITE.input, plan, limits, seed, settling=calibration_images(people, seed))
    before = BACKWARD_FACTOR * BATCH * HEADLINE_TEACHER_STEPS * size["macs"]
    seen = plan.prune.images + plan.finetune.images
    spent = before + deap_macs(start, done, plan)
    return [headline_row("deap", seed, done.trained.model, seen, spent, trained_after=True)]


def headline_row(
    method: str, seed: int, model: ReIDModel, seen: int, spent: int, *, trained_after: bool
) -> dict[str, Any]:
    row = accuracy_row(SITE, method, seed, FULL, evaluate(SITE, model), seen, spent)
    return {**row, **size_of(model), "architecture": BOTTLENECKS, "trained_after": trained_after}


# --- one teacher from several

SCALE = 4  # the images of this comparison are a quarter of the paper's, and so are the views
VIEWS: Mapping[str, View] = {
    name: replace(view, height=view.height // SCALE, width=view.width // SCALE)
    for name, view in PAPER_VIEWS.items()
    if name != "holistic"
}
LOSSES: Mapping[str, FusionLoss] = {
    "fused": FusionLoss(grid=None),
    "fused, maps only": FusionLoss(retrieval=0, grid=None),
    "fused, features only": FusionLoss(map=0),
}


def train_view(seed: int, name: str) -> Rows:
    """A partial teacher: as a teacher of the comparison, but for what it sees."""
    trained, spec = train_partial(ARCHITECTURE, FULL, images(SITE, "train"), VIEWS[name], recipe(TEACHER_STEPS), seed)
    save_trained(trained, origin("teacher", trained.model, spec, "Apache-2.0"), SITE.path(name, seed))
    return []  # it is measured with the others


def fuse_views(seed: int, method: str) -> Rows:
    """One network of all partial teachers; by the whole loss, also what these are worth alone and together."""
    partials = [open_partial(SITE.path(name, seed), view) for name, view in VIEWS.items()]
    plan, people = recipe(TEACHER_STEPS), images(SITE, "train")
    fused = fuse(ARCHITECTURE, FULL, partials, people, SITE.input, plan, seed, loss=LOSSES[method])
    training = BACKWARD_FACTOR * plan.images * SITE.macs(FULL)
    asked = [macs_in_view(view) for view in VIEWS.values()]
    spent = training + (BACKWARD_FACTOR + 1) * plan.images * sum(asked)
    rows = [fusion_row(method, seed, evaluate(SITE, fused.model), SITE.macs(FULL), plan.images, spent)]
    if method == "fused":
        rows += partial_rows(seed, fused, partials, asked, plan)
    return rows


def partial_rows(seed: int, fused: Trained, partials: list[Partial], asked: list[int], plan: TrainRecipe) -> Rows:
    measured = measure(fused.model, partials, images(SITE, "query"), images(SITE, "gallery"), SITE.input)
    rows = [
        fusion_row(name, seed, ranking, macs, plan.images, BACKWARD_FACTOR * plan.images * macs)
        for name, ranking, macs in zip(VIEWS, measured.inputs, asked, strict=True)
    ]
    together = fusion_row("ensemble", seed, measured.ensemble, sum(asked), plan.images, 0)
    return [*rows, {**together, "compute_macs": sum(row["compute_macs"] for row in rows)}]


def fusion_row(method: str, seed: int, ranking: Ranking, macs: int, seen: int, spent: int) -> dict[str, Any]:
    """macs: of one image at inference."""
    return {**accuracy_row(SITE, method, seed, FULL, ranking, seen, spent), "macs": macs}


def macs_in_view(view: View) -> int:
    seen = InputSpec(view.height, view.width, SITE.input.mean, SITE.input.std)
    return count_macs(architecture(ARCHITECTURE), FULL, seen)


# --- running and writing


@dataclass(frozen=True)
class Table:
    """A CSV: which tasks give its rows, by the first part of their names, and what tells its rows apart."""

    name: str
    tasks: tuple[str, ...]
    columns: tuple[str, ...]
    keys: tuple[str, ...] = ("method", "seed")


_FIGURES = ("map", "map_low", "map_high", "rank1")
_ORIGIN = ("images", "compute_macs", "command")
TABLES = (
    Table(
        COMPRESSION,
        ("expanded", "finetune", "deap", "deap-chain", "deap-joined", "depgraph"),
        ("method", "dataset", "seed", "budget", "macs", "params", *_FIGURES, "trained_after", *_ORIGIN),
        ("method", "seed", "budget"),
    ),
    Table(
        HEADLINE,
        ("headline-teacher", "headline-deap"),
        ("method", "dataset", "seed", "architecture", "macs", "params", *_FIGURES, "trained_after", *_ORIGIN),
    ),
    Table(FUSION, ("teacher", "fuse"), ("method", "dataset", "seed", "macs", *_FIGURES, *_ORIGIN)),
)


def tasks(seeds: list[int]) -> Iterator[tuple[int, Task]]:
    """(stage, task): those of the comparison that are built on come one stage before."""
    for stage, task in compare.tasks(seeds):
        if task[0].startswith(("teacher:default", "refine:nested:default")):
            yield stage, task
    for seed in seeds:
        for name in VIEWS:
            yield 0, (f"view:{seed}:{name}", train_view, (seed, name))
        yield 0, (f"headline-teacher:{seed}", train_large_teacher, (seed,))
        yield 1, (f"headline-deap:{seed}", compress_large_teacher, (seed,))
        for method in LOSSES:
            yield 1, (f"fuse:{seed}:{method}", fuse_views, (seed, method))
        for budget in BUDGETS:
            if budget in REACHABLE:
                yield 1, (f"deap:{seed}:{budget.stem}", compress_teacher, (seed, budget))
            yield 1, (f"depgraph:{seed}:{budget.stem}", prune_and_finetune, (seed, budget))
            yield 2, (f"expanded:{seed}:{budget.stem}", expand_only, (seed, budget))
            yield 2, (f"finetune:{seed}:{budget.stem}", expand_and_finetune, (seed, budget))
            yield 2, (f"deap-chain:{seed}:{budget.stem}", compress_chain, (seed, budget))
            if budget in JOINED:
                yield 2, (f"deap-joined:{seed}:{budget.stem}", compress_into_space, (seed, budget))


def write_tables(finished: list[Task], folder: Path = RESULTS) -> None:
    """What these tasks gave takes the place of the rows it is a repetition of; the others stay as they are."""
    for table in TABLES:
        mine = [task for task in finished if task[0].split(":")[0] in table.tasks]
        rows = [{name: row[name] for name in table.columns} for row in results_of(mine, COMMAND)]
        update_table(folder / table.name, rows, table.keys)


def main() -> None:
    options = compare.parse(__doc__)
    write_tables(compare.finish(list(tasks(options.seeds)), options))


if __name__ == "__main__":
    main()
