"""Makes the demo chain that ships with the package: trains a teacher, refines, calibrates, measures, saves.

python -m benchmarks.demo_chain --teacher-steps 1500 --steps 5000 --seed 0
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.setup import (
    ARCHITECTURE,
    BACKWARD_FACTOR,
    CALIBRATION_IMAGES,
    DATASET,
    FULL,
    INPUT,
    LADDER,
    PEOPLE,
    RESULTS,
    append_row,
    calibration_images,
    command,
    macs_of,
    recipe,
)  # fmt: skip
from chains.artifact import save
from chains.calibrate import calibrate
from chains.chain import Chain, Frontier
from chains.cost import count_params
from chains.data.synthetic import gallery_images, query_images, train_images
from chains.evaluate import evaluate_model, measure_frontier
from chains.nested import NestedRecipe, recipe_values
from chains.refine import Refined, refine
from chains.train import Run, every, train_alone

NAME = "synthetic-r18"
TARGET = Path(__file__).parents[1] / "chains" / "demo" / f"{NAME}.safetensors"


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    images, queries, gallery = train_images(PEOPLE), query_images(PEOPLE), gallery_images(PEOPLE)
    run = Run(report=every(250, print))
    teacher = train_alone(ARCHITECTURE, FULL, images, INPUT, recipe(options.teacher_steps), options.seed, run)
    ranking = evaluate_model(teacher.model, queries, gallery, INPUT)
    print(f"teacher: mAP {ranking.map:.2f}, Rank-1 {ranking.rank(1):.2f}", flush=True)
    refined = refine(teacher, LADDER, images, INPUT, recipe(options.steps), options.seed, run)
    chain = calibrate(new_chain(refined, ranking.map, options), calibration_images(images, options.seed))
    frontier = measure_frontier(chain, queries, gallery, f"{DATASET}, test identities", seed=0)
    chain = replace(chain, frontier=frontier)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    stored = save(chain, options.out)
    print(f"{options.out.name}: {stored.size_bytes:,} bytes, sha256 {stored.digest}", flush=True)
    write_rows(chain, frontier, options)


def new_chain(refined: Refined, teacher_map: float, options: argparse.Namespace) -> Chain:
    return refined.chain(
        name=NAME,
        architecture=ARCHITECTURE,
        ladder=LADDER,
        teacher=FULL,
        input=INPUT,
        license="Apache-2.0",
        provenance=provenance(teacher_map, options),
    )


def provenance(teacher_map: float, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "command": command(),
        "data": DATASET,
        "seed": options.seed,
        "teacher_images": recipe(options.teacher_steps).images,
        "teacher_map": round(teacher_map, 2),
        "refinement": {"mode": "nested", "nested": recipe_values(NestedRecipe())},
        "refinement_images": recipe(options.steps).images,
        "calibration_images": CALIBRATION_IMAGES,
    }


def write_rows(chain: Chain, frontier: Frontier, options: argparse.Namespace) -> None:
    """A row per width: no training after expansion; `compute_macs` is that of the whole chain, teacher included."""
    between = sum(macs_of(width) for width in LADDER[1:-1]) / len(LADDER[1:-1])
    sandwich = macs_of(LADDER[-1]) + macs_of(LADDER[0]) + between
    images = recipe(options.steps).images
    compute = BACKWARD_FACTOR * (recipe(options.teacher_steps).images * macs_of(FULL) + images * sandwich)
    options.results.unlink(missing_ok=True)
    for measured in frontier.widths:
        row = {
            "method": "nested chain",
            "dataset": DATASET,
            "seed": options.seed,
            "width": str(measured.width),
            "macs": macs_of(measured.width),
            "params": count_params(chain.table, measured.width),
            "map": measured.map,
            "rank1": measured.rank1,
            "trained_after": False,
            "images": images,
            "compute_macs": round(compute),
            "command": command(),
        }
        append_row(options.results, row)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher-steps", type=int, required=True, help="batches of 64 images for the teacher")
    parser.add_argument("--steps", type=int, required=True, help="batches of 64 images for the refinement")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=TARGET)
    parser.add_argument("--results", type=Path, default=RESULTS / "demo_chain.csv")
    return parser.parse_args()


if __name__ == "__main__":
    main()
