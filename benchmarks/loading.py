"""Do decoding and augmentation keep up with training? Rates of one core, by processor time, all in the same run.

    python -m benchmarks.loading            # writes benchmarks/results/loading.csv; exits 1 when the bar is missed

- `decode`: JPEG crops of a size on disk (quality 92, synthetic people) to the training size; files in the page cache.
- `augment`: one change alone, on crops in memory: flip, shift, erasing, colour jitter.
- `batch`: whole 16 x 4 batches of crops on disk, decoded and changed in every way: what `prefetch` makes.
- `train`: forward and backward of a network with the ReID loss, in float32 and in bfloat16, batches in memory.

over_training: a loading rate over that of the quickest training at the same size. With one core for loading and one for
training, 1 would be enough; its inverse is what loading adds to the processor time of training. The bar is 2 for
`batch`.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.setup import command
from benchmarks.synthetic import device
from chains.chain import InputSpec
from chains.data.batches import BatchRecipe, Sampler, augment
from chains.data.files import ImageFiles
from chains.data.images import Pixels
from chains.data.readers import ReadOptions, read
from chains.data.synthetic import PeopleSettings, write_market1501
from chains.losses import reid_loss
from chains.model import ReIDModel, normalise
from chains.width import Width

RESULTS = Path(__file__).parent / "results" / "loading.csv"
BAR = 2.0
BATCH = BatchRecipe(erasing=0.5, colour_jitter=0.2)
PLAIN = BatchRecipe(pad=0, flip=0)
CHANGES = {
    "flip": replace(PLAIN, flip=0.5),
    "shift": replace(PLAIN, pad=10),
    "erasing": replace(PLAIN, erasing=0.5),
    "colour jitter": replace(PLAIN, colour_jitter=0.2),
    "all": replace(BATCH, pad=10),
}


@dataclass(frozen=True)
class Setting:
    """A network at its usual input size, and the size its crops have on disk."""

    height: int
    width: int
    architecture: str
    stem: Width
    train_batch: int


SETTINGS = (
    Setting(128, 64, "resnet18", Width(16), 64),
    Setting(256, 128, "resnet50", Width(64), 16),
)


@dataclass(frozen=True)
class Rate:
    what: str
    detail: str
    height: int
    width: int
    images_per_s: float


def rate(run: Callable[[], int], repeats: int = 5) -> float:
    """Images per second of processor time; `run` returns how many images it did. Median after one warm-up."""
    run()
    rates = []
    for _ in range(repeats):
        begin = time.process_time()
        done = run()
        rates.append(done / (time.process_time() - begin))
    return median(rates)


def crops_on_disk(folder: Path, height: int, width: int, size: tuple[int, int]) -> ImageFiles:
    """128 JPEG crops of 16 synthetic people, height x width on disk, to be resized to `size`."""
    people = replace(PeopleSettings(), height=height, width=width, train_identities=16, test_identities=1)
    write_market1501(folder, people)
    return read("market1501", folder, ReadOptions(size=size)).train


def loading_rates(setting: Setting, folder: Path) -> Iterator[Rate]:
    size = (setting.height, setting.width)
    for height, width in ((128, 64), (256, 128), (512, 256)):
        crops = crops_on_disk(folder / f"{height} to {size[0]}", height, width, size)
        decoded = rate(lambda crops=crops: len(crops.pixels(np.arange(len(crops)))))  # type: ignore[misc]
        yield Rate("decode", f"JPEG {height}x{width}", *size, decoded)
        if (height, width) == size:
            yield from _augmenting(crops.pixels(np.arange(64)), size)
            sampler = Sampler(crops, BATCH, seed=0)
            whole = rate(lambda sampler=sampler: len(sampler.batch(0).labels))  # type: ignore[misc]
            yield Rate("batch", f"JPEG {height}x{width}, all changes", *size, whole)


def _augmenting(pixels: Pixels, size: tuple[int, int]) -> Iterator[Rate]:
    for name, recipe in CHANGES.items():
        generator = np.random.default_rng(0)
        yield Rate("augment", name, *size, rate(lambda r=recipe, g=generator: len(augment(pixels, r, g))))  # type: ignore[misc]


def training_rates(setting: Setting) -> Iterator[Rate]:
    for precision in (torch.float32, torch.bfloat16):
        name = f"{setting.architecture} {setting.stem}, {str(precision).removeprefix('torch.')}"
        yield Rate("train", name, setting.height, setting.width, rate(_training(setting, precision), repeats=3))


def _training(setting: Setting, precision: torch.dtype) -> Callable[[], int]:
    """Forward and backward of one batch; no optimiser, which costs the same whatever the images."""
    torch.manual_seed(0)
    model = ReIDModel(setting.architecture, setting.stem).train().to(memory_format=torch.channels_last)
    classifier = torch.nn.Linear(model.backbone.channels, 751, bias=False)
    images = np.random.default_rng(0).integers(
        0, 256, (setting.train_batch, setting.height, setting.width, 3), np.uint8
    )
    labels = torch.arange(setting.train_batch) // 4
    spec = InputSpec(setting.height, setting.width, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))

    def step() -> int:
        pixels = normalise(images, spec).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
            feature, embedding = model(pixels)
        reid_loss(feature.float(), classifier(embedding.float()), labels).backward()
        model.zero_grad()
        return setting.train_batch

    return step


def table(rates: list[Rate]) -> list[dict[str, Any]]:
    """Rows of the CSV; over_training is empty for training itself."""
    quickest = {
        size: max(r.images_per_s for r in rates if r.what == "train" and (r.height, r.width) == size)
        for size in {(r.height, r.width) for r in rates}
    }
    where = {
        "device": f"{device()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "pillow", "torch")},
        "date": datetime.now(UTC).date().isoformat(),
        "command": command(),
    }
    return [
        {
            "what": r.what,
            "detail": r.detail,
            "height": r.height,
            "width": r.width,
            "images_per_s": round(r.images_per_s, 1),
            "over_training": "" if r.what == "train" else round(r.images_per_s / quickest[r.height, r.width], 1),
            **where,
        }
        for r in rates
    ]


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    rates: list[Rate] = []
    for setting in SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            rates += [*loading_rates(setting, Path(folder)), *training_rates(setting)]
    rows = table(rates)
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print({name: row[name] for name in ("what", "detail", "height", "images_per_s", "over_training")})
    return int(any(row["what"] == "batch" and row["over_training"] < BAR for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
