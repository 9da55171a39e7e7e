"""Does width pay on the synthetic people? The same network at three widths, each trained alone, several seeds.

python -m benchmarks.capacity --steps 3750 --seeds 0 1 2
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.setup import ARCHITECTURE, FULL, HALF, INPUT, PEOPLE, QUARTER, RESULTS, alone_row, append_row, recipe
from chains.data.synthetic import gallery_images, query_images, train_images
from chains.evaluate import evaluate_model
from chains.train import Run, every, train_alone
from chains.width import Width


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    images, queries, gallery = train_images(PEOPLE), query_images(PEOPLE), gallery_images(PEOPLE)
    plan = recipe(options.steps)
    for seed in options.seeds:
        for width in options.widths:
            trained = train_alone(ARCHITECTURE, width, images, INPUT, plan, seed, Run(report=every(500, print)))
            ranking = evaluate_model(trained.model, queries, gallery, INPUT)
            append_row(options.out, alone_row(ranking, width, seed, plan.images))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, required=True, help="batches of 64 images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--widths", type=Width.parse, nargs="+", default=[QUARTER, HALF, FULL])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "capacity.csv")
    return parser.parse_args()


if __name__ == "__main__":
    main()
