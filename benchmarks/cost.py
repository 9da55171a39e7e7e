"""The cost curve: multiply-adds to provision K = 1 … 50 models, per method, from step counts alone. Nothing is trained.

    python -m benchmarks.cost        # writes benchmarks/results/cost_curve.csv

K models take the widths of the ladder in turn, ¼, ⅜, … 1, ¼ and so on, and nothing is shared between two of them: each
is trained, or calibrated, for itself. Where two devices have width and site in common every method may share. Units are
MACs of one image times images; a training pass of an image costs `BACKWARD_FACTOR` = 3 forward passes of it. With

    T = 3 · teacher_images · full                      the teacher
    D(w) = 3 · downstream_images · macs(w)             a training of width w

and sums over the K widths w, the methods cost

    scratch           Σ D(w)
    kd                T + Σ (D(w) + downstream_images · full)            the teacher looks at every batch, too
    depgraph          T + Σ (D(w) + full)                                one image draws the graph
    weight selection  T + Σ D(w)
    oskt              T + R + Σ D(w)
    deap              T + Σ (3 · prune_images · (full + pruners) + 3 · finetune_images · macs(w)
                             + (prune_images + finetune_images) · full)
    nested, slices    T + R + Σ calibration_images · macs(w)

    R = 3 · refine_images · (full + narrowest + between)

where `between` is the mean over the rungs between the ends of the ladder, of which the sandwich draws one a step. The
paper's refinement has one pass less and gets as many multiply-adds, so more images, in `benchmarks.compare`. DEAP is
that of `benchmarks.methods`: a run for each model, with pruners and then without, in which the teacher looks at every
batch; `pruners` are the multiply-adds of an image in them.
Losses, optimiser, augmentation, Ward clustering and expansion are not counted; none is a pass over the images.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from statistics import mean

from benchmarks.compare import BATCH, DOWNSTREAM_STEPS, LADDER, REFINE_STEPS, TEACHER_STEPS, Site
from benchmarks.methods import FINETUNE_STEPS, PRUNE_STEPS, pruner_macs
from benchmarks.setup import ARCHITECTURE, BACKWARD_FACTOR, CALIBRATION_IMAGES, FULL, RESULTS, command
from chains.model import ReIDModel

MODELS = 50
OUT = RESULTS / "cost_curve.csv"
COLUMNS = ("method", "models", "compute_macs", "command")


@dataclass(frozen=True)
class Costs:
    """What the methods cost. macs: of one image at every rung of the ladder, narrow to wide, ending at the teacher.
    pruner_macs: of one image in DEAP's pruners. The other fields count training images with repeats, and calibration
    images per width."""

    macs: Sequence[int]
    teacher_images: int
    refine_images: int
    downstream_images: int
    calibration_images: int
    prune_images: int
    finetune_images: int
    pruner_macs: int

    @property
    def full(self) -> int:
        return self.macs[-1]

    @property
    def teacher(self) -> int:
        return BACKWARD_FACTOR * self.teacher_images * self.full

    @property
    def chain(self) -> int:
        sandwich = self.full + self.macs[0] + mean(self.macs[1:-1])
        return self.teacher + round(BACKWARD_FACTOR * self.refine_images * sandwich)

    def of_models(self, models: int) -> int:
        """MACs of one image through every one of `models` students."""
        return sum(islice(cycle(self.macs), models))

    @cached_property
    def terms(self) -> Mapping[str, tuple[int, int, int]]:
        """Method -> what is paid once, what per image-MAC of its students, what per model."""
        training, finetuning = (BACKWARD_FACTOR * seen for seen in (self.downstream_images, self.finetune_images))
        pruning = BACKWARD_FACTOR * self.prune_images * (self.full + self.pruner_macs)
        taught = (self.prune_images + self.finetune_images) * self.full
        return {
            "scratch": (0, training, 0),
            "kd": (self.teacher, training, self.downstream_images * self.full),
            "depgraph": (self.teacher, training, self.full),
            "weight selection": (self.teacher, training, 0),
            "deap": (self.teacher, finetuning, pruning + taught),
            "oskt": (self.chain, training, 0),
            "nested": (self.chain, self.calibration_images, 0),
            "slices": (self.chain, self.calibration_images, 0),
        }

    def total(self, method: str, models: int) -> int:
        """MACs to provision `models` models with `method`."""
        once, per_mac, per_model = self.terms[method]
        return once + per_mac * self.of_models(models) + per_model * models


def curve(costs: Costs, models: int) -> Iterator[tuple[str, int, int]]:
    """(method, number of models, MACs) for 1 … `models` of every method."""
    for method in costs.terms:
        for count in range(1, models + 1):
            yield method, count, costs.total(method, count)


def crossover(costs: Costs, method: str) -> int:
    """The smallest number of models from which on a nested chain costs less than `method`."""
    cheaper = [count for count in range(1, MODELS + 1) if costs.total("nested", count) < costs.total(method, count)]
    if not cheaper:
        raise ValueError(f"a chain is not cheaper than {method} with up to {MODELS} models")
    return cheaper[0]


def main() -> None:
    options = parse()
    batch = options.batch
    costs = Costs(
        macs=[Site("default").macs(width) for width in LADDER],
        teacher_images=batch * options.teacher_steps,
        refine_images=batch * options.refine_steps,
        downstream_images=batch * options.downstream_steps,
        calibration_images=options.calibration_images,
        prune_images=batch * options.prune_steps,
        finetune_images=batch * options.finetune_steps,
        pruner_macs=pruner_macs(ReIDModel(ARCHITECTURE, FULL)),
    )
    write(options.out, costs, options.models)
    for method in costs.terms:
        figures = ", ".join(f"{count}: {costs.total(method, count):.3g}" for count in (1, 10, options.models))
        print(f"{method:17}{figures} MACs")
    print(f"a nested chain costs less than DEAP from {crossover(costs, 'deap')} models on")


def write(path: Path, costs: Costs, models: int) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(COLUMNS)
        rows.writerows((*row, command()) for row in curve(costs, models))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher-steps", type=int, default=TEACHER_STEPS)
    parser.add_argument("--refine-steps", type=int, default=REFINE_STEPS)
    parser.add_argument("--downstream-steps", type=int, default=DOWNSTREAM_STEPS)
    parser.add_argument("--prune-steps", type=int, default=PRUNE_STEPS, help="of DEAP, with pruners")
    parser.add_argument("--finetune-steps", type=int, default=FINETUNE_STEPS, help="of DEAP, without")
    parser.add_argument("--batch", type=int, default=BATCH, help="images of a step")
    parser.add_argument("--calibration-images", type=int, default=CALIBRATION_IMAGES, help="for every width")
    parser.add_argument("--models", type=int, default=MODELS)
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args()


if __name__ == "__main__":
    main()
