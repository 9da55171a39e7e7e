"""What the accuracy benchmarks share: the data set, the network, the recipe and the shape of a result row."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from chains.architectures import architecture
from chains.chain import InputSpec
from chains.cost import count_macs, count_params
from chains.data.batches import BatchRecipe
from chains.data.images import ImageSet
from chains.data.synthetic import PeopleSettings
from chains.ranking import Ranking
from chains.train import TrainRecipe
from chains.width import Width, even_ladder

RESULTS = Path(__file__).parent / "results"
ARCHITECTURE = "resnet18"
FULL, HALF, QUARTER = Width(16), Width(8), Width(4)
LADDER = even_ladder(QUARTER, FULL, 13)
PEOPLE = PeopleSettings()
DATASET = "synthetic people, default settings"
INPUT = InputSpec(PEOPLE.height, PEOPLE.width, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
COLUMNS = (
    *("method", "dataset", "seed", "width", "macs", "params", "map", "rank1"),
    *("trained_after", "images", "compute_macs", "command"),
)
CALIBRATION_IMAGES = 1024
BACKWARD_FACTOR = 3  # a training pass costs a forward and, as usual, two for its gradients


def recipe(steps: int) -> TrainRecipe:
    """The one training recipe of these benchmarks, for alone and refined networks alike."""
    return TrainRecipe(steps, lr=2e-3, precision="bfloat16", batch=BatchRecipe(16, 4))


def macs_of(width: Width) -> int:
    return count_macs(architecture(ARCHITECTURE), width, INPUT)


def alone_row(ranking: Ranking, width: Width, seed: int, images: int) -> dict[str, object]:
    """A result row of a network trained alone on `images` images."""
    return {
        "method": "alone",
        "dataset": DATASET,
        "seed": seed,
        "width": str(width),
        "macs": macs_of(width),
        "params": count_params(architecture(ARCHITECTURE), width),
        "map": round(ranking.map, 2),
        "rank1": round(ranking.rank(1), 2),
        "trained_after": False,
        "images": images,
        "compute_macs": BACKWARD_FACTOR * images * macs_of(width),
        "command": command(),
    }


def command() -> str:
    """The command line of this run, as a user would type it."""
    module = Path(sys.argv[0]).stem
    return " ".join(["python -m", f"benchmarks.{module}", *sys.argv[1:]])


def calibration_images(images: ImageSet, seed: int) -> ImageSet:
    """A fixed random choice of training images, of many identities and every camera."""
    return images.take(np.random.default_rng(seed).permutation(len(images))[:CALIBRATION_IMAGES])


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """A CSV of `rows`, whose first names the columns; none, no file."""
    if not rows:
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def update_table(
    path: Path,
    rows: Sequence[Mapping[str, object]],
    keys: Sequence[str],
    is_better: Callable[[Mapping[str, object], Mapping[str, str]], bool] = lambda new, old: True,  # noqa: ARG005
) -> None:
    """Put `rows` into a CSV in the place of rows that have the same `keys`, unless they are not better, or behind all
    others. A run of some tasks so keeps what others have left, on whatever machine."""
    old: dict[tuple[str, ...], dict[str, str]] = {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            old = {tuple(row[key] for key in keys): row for row in csv.DictReader(file)}
    new = {tuple(str(row[key]) for key in keys): row for row in rows}
    kept = {key: row for key, row in new.items() if key not in old or is_better(row, old[key])}
    write_table(path, list({**old, **kept}.values()))


def append_row(path: Path, row: Mapping[str, object]) -> None:
    """Add one row to a CSV, with a header if the file is new; a killed run keeps the rows it had."""
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)
    print({name: row[name] for name in ("method", "width", "seed", "map", "rank1", "images")}, flush=True)
