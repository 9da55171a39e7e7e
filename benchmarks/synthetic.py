"""How fast the synthetic people render, and what says nothing about people reaches on them.

python -m benchmarks.synthetic                  the table
python -m benchmarks.synthetic --contact-sheet  the picture in docs/explanation/synthetic-people.md

Two baselines bound the data set from below: random embeddings (chance) and colour histograms (what clothing colour
alone gives away). `benchmarks.capacity` measures networks.
"""

from __future__ import annotations

import argparse
import csv
import platform
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np

from chains.data.images import ImageSet
from chains.data.synthetic import FIRST_TEST_PID, STATION, PeopleSettings, gallery_images, query_images, render
from chains.ranking import Floats, rank_sets

OUT = Path(__file__).parent / "results" / "synthetic.csv"
SHEET = Path(__file__).parents[1] / "docs" / "images" / "synthetic-people.png"
SHEET_ROWS = 8
SITES = {"default": PeopleSettings(), "station": STATION}
STRIPES, BINS = 6, 8


def random_embeddings(images: ImageSet, seed: int) -> Floats:
    """Chance. (n, 128)"""
    return np.random.default_rng(seed).standard_normal((len(images), 128)).astype(np.float32)


def colour_histograms(images: ImageSet) -> Floats:
    """What clothing colour gives away to someone who tries: the middle half of the crop, its mean colour made grey
    ("grey world"), joint RGB histograms with 8 bins a channel of six horizontal stripes, square-rooted. (n, 6 * 512)
    """
    width = images.images.shape[2]
    middle = images.images[:, :, width // 4 : width - width // 4].astype(np.float32)
    grey = np.clip(100 * middle / middle.mean(axis=(1, 2), keepdims=True), 0, 255).astype(np.int64)
    bins = grey * BINS // 256 @ np.array([BINS * BINS, BINS, 1])
    stripes = np.array_split(bins.reshape(len(bins), images.images.shape[1], -1), STRIPES, axis=1)
    counts = [np.stack([np.bincount(s.ravel(), minlength=BINS**3) for s in stripe]) for stripe in stripes]
    return np.sqrt(np.concatenate(counts, axis=1)).astype(np.float32)


def images_per_second(settings: PeopleSettings, images: int = 2048) -> float:
    """Rendering rate of one core, by processor time, tables already built."""
    pids, camids = np.arange(images) % 1000 + 1, np.arange(images) % settings.cameras + 1
    render(settings, pids[:64], camids[:64], np.zeros(64))
    start = time.process_time()
    render(settings, pids, camids, np.arange(images))
    return images / (time.process_time() - start)


def rows() -> Iterator[tuple[str, str, float, str]]:
    """(site, what, value, unit)"""
    for site, settings in SITES.items():
        query, gallery = query_images(settings), gallery_images(settings)
        yield site, "rendering", round(images_per_second(settings)), "images/s on one core"
        chance = rank_sets(random_embeddings(query, 0), random_embeddings(gallery, 1), query, gallery)
        yield site, "random embeddings", round(chance.map, 2), "mAP %"
        yield site, "random embeddings", round(chance.rank(1), 2), "Rank-1 %"
        colour = rank_sets(colour_histograms(query), colour_histograms(gallery), query, gallery)
        yield site, "colour histograms", round(colour.map, 2), "mAP %"
        yield site, "colour histograms", round(colour.rank(1), 2), "Rank-1 %"


def device() -> str:
    """The processor's model name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def contact_sheet() -> None:
    """One family of look-alikes, then strangers; a column per camera. Test people, so that no one trains on them."""
    from PIL import Image

    settings = SITES["default"]
    strangers = FIRST_TEST_PID + settings.family_size * np.arange(1, SHEET_ROWS - settings.family_size + 1)
    people = np.concatenate([FIRST_TEST_PID + np.arange(settings.family_size), strangers])
    cameras = np.arange(1, settings.cameras + 1)
    pids, camids = np.repeat(people, 2 * len(cameras)), np.tile(cameras, 2 * len(people))
    shots = np.tile(np.repeat([0, 1], len(cameras)), len(people))
    pixels = render(settings, pids, camids, shots).reshape(SHEET_ROWS, -1, settings.height, settings.width, 3)
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in pixels])
    Image.fromarray(sheet).quantize(112, dither=Image.Dither.NONE).save(SHEET, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contact-sheet", action="store_true")
    if parser.parse_args().contact_sheet:
        contact_sheet()
    else:
        table()


def table() -> None:
    where = (device(), f"numpy {np.__version__}", f"python {platform.python_version()}", date.today().isoformat())  # noqa: DTZ011
    with OUT.open("w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(("site", "what", "value", "unit", "device", "numpy", "python", "date"))
        for row in rows():
            print(*row)
            lines.writerow((*row, *where))


if __name__ == "__main__":
    main()
