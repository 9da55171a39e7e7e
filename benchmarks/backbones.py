"""Does width pay in every family? A teacher and a nested chain of one small network each, on synthetic people.

    python -m benchmarks.backbones osnet             # one of BACKBONES; a row per width in results/backbones.csv
    python -m benchmarks.backbones osnet --seed 1

Images, batches and evaluation are those of `benchmarks.compare`: 64×32, batches of 64, no training after expansion; but
500 training identities in place of 2000, so that short runs learn. The recipe is one for all families but for rate
and length: at the ResNets' 2e-3 the embeddings of these collapse (triplet loss at its margin). This
shows that every family refines and that its mAP rises with width, not how good a family can become.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare import HEIGHT, SITES, WIDTH, Site
from benchmarks.setup import BACKWARD_FACTOR, RESULTS, calibration_images, command, update_table
from chains.architectures import architecture
from chains.calibrate import calibrate
from chains.chain import Chain, Frontier, InputSpec
from chains.cost import count_macs, count_params
from chains.data.batches import BatchRecipe
from chains.data.images import ImageSet
from chains.data.synthetic import gallery_images, query_images, train_images
from chains.evaluate import evaluate_model, measure_frontier
from chains.refine import refine
from chains.train import Run, TrainRecipe, every, train_alone
from chains.width import Multipliers, Width

SITE = Site("default")
IDENTITIES = 500  # to train on
TITLE = f"{SITE.title}, {IDENTITIES} identities to train on"
TABLE = RESULTS / "backbones.csv"


@dataclass(frozen=True)
class Backbone:
    """A family at toy size: its stems, narrow to wide, the last one the teacher's; learning rate, and batches of 64
    images for the teacher and for the refinement."""

    architecture: str
    stems: tuple[int, ...]
    lr: float
    teacher_steps: int
    steps: int
    multipliers: Multipliers = ()

    @property
    def ladder(self) -> tuple[Width, ...]:
        return tuple(Width(stem, self.multipliers) for stem in self.stems)

    def macs(self, width: Width, input: InputSpec) -> int:
        return count_macs(architecture(self.architecture), width, input)


BACKBONES: Mapping[str, Backbone] = {
    "mobilenetv2": Backbone("mobilenetv2", (4, 8, 12, 16), lr=7e-4, teacher_steps=4000, steps=2500),
    "osnet": Backbone("osnet", (4, 8, 12, 16), lr=5e-4, teacher_steps=4000, steps=2500, multipliers=(4, 6, 8)),
    "vit_tiny": Backbone("vit_tiny", (24, 48, 72, 96), lr=1e-3, teacher_steps=1500, steps=1500),
}


def splits() -> tuple[ImageSet, ImageSet, ImageSet]:
    """Training images, queries and gallery."""
    site = replace(SITES[SITE.name], height=HEIGHT, width=WIDTH, train_identities=IDENTITIES)
    return train_images(site), query_images(site), gallery_images(site)


def recipe(backbone: Backbone, steps: int) -> TrainRecipe:
    return TrainRecipe(steps, lr=backbone.lr, batch=BatchRecipe(16, 4))


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    backbone = BACKBONES[options.backbone]
    people, queries, gallery = splits()
    run = Run(report=every(100, print))
    name, full = backbone.architecture, backbone.ladder[-1]
    teacher = train_alone(name, full, people, SITE.input, recipe(backbone, backbone.teacher_steps), options.seed, run)
    teacher_map = evaluate_model(teacher.model, queries, gallery, SITE.input).map
    print(f"teacher {name} {full}: mAP {teacher_map:.2f}", flush=True)
    plan = recipe(backbone, backbone.steps)
    refined = refine(teacher, backbone.ladder, people, SITE.input, plan, options.seed, run)
    chain = calibrate(
        refined.chain(
            name=options.backbone.replace("_", "-"),
            architecture=name,
            ladder=backbone.ladder,
            teacher=full,
            input=SITE.input,
            license="Apache-2.0",
            provenance={"command": command()},
        ),
        calibration_images(people, options.seed),
    )
    frontier = measure_frontier(chain, queries, gallery, TITLE, seed=0)
    rows = [row_of(backbone, chain, frontier, width, teacher_map, options.seed) for width in backbone.ladder]
    update_table(options.results, rows, ("architecture", "seed", "width"))
    for row in rows:
        print({key: row[key] for key in ("architecture", "seed", "width", "map", "rank1")}, flush=True)


def row_of(
    backbone: Backbone, chain: Chain, frontier: Frontier, width: Width, teacher_map: float, seed: int
) -> dict[str, Any]:
    """`compute_macs`: of the whole chain, teacher included. `query_in_full_map`: queries embedded at this width, the
    gallery at full width."""
    measured = frontier.of(width)
    assert measured is not None
    macs = {rung: backbone.macs(rung, chain.input) for rung in backbone.ladder}
    between = sum(macs[rung] for rung in backbone.ladder[1:-1]) / len(backbone.ladder[1:-1])
    sandwich = macs[backbone.ladder[-1]] + macs[backbone.ladder[0]] + between
    batch = recipe(backbone, 1).images
    spent = batch * (backbone.teacher_steps * macs[backbone.ladder[-1]] + backbone.steps * sandwich)
    return {
        "architecture": backbone.architecture,
        "dataset": TITLE,
        "seed": seed,
        "width": str(width),
        "macs": macs[width],
        "params": count_params(chain.table, width),
        "map": measured.map,
        "rank1": measured.rank1,
        "query_in_full_map": frontier.cross_map[backbone.ladder.index(width)][-1],
        "teacher_map": round(teacher_map, 2),
        "trained_after": False,
        "images": batch * backbone.steps,
        "compute_macs": round(BACKWARD_FACTOR * spent),
        "command": command(),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", choices=BACKBONES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=TABLE)
    return parser.parse_args()


if __name__ == "__main__":
    main()
