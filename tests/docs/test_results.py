"""The committed result tables keep what the issues and the docs promise of them."""

import csv
from itertools import groupby
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def rows(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def map_by_width(name: str) -> dict[str, list[float]]:
    table = sorted(rows(name), key=lambda row: row["width"])
    return {
        width: [float(row["map"]) for row in group] for width, group in groupby(table, key=lambda row: row["width"])
    }


def test_width_pays_on_synthetic_people_when_each_width_is_trained_alone() -> None:
    table = map_by_width("capacity.csv")
    assert all(len(seeds) == 3 for seeds in table.values())
    quarter, half, full = (mean(table[width]) for width in ("4x2-4-8", "8x2-4-8", "16x2-4-8"))
    assert full >= half + 3 >= quarter + 8


def test_the_narrowest_student_is_not_below_the_same_net_trained_alone_on_as_many_images() -> None:
    student = next(row for row in rows("demo_chain.csv") if row["width"] == "4x2-4-8")
    alone = [row for row in rows("demo_chain_alone.csv") if int(row["images"]) >= int(student["images"])]
    assert alone
    assert all(row["width"] == student["width"] and row["seed"] == student["seed"] for row in alone)
    assert float(student["map"]) >= max(float(row["map"]) for row in alone)


@pytest.mark.parametrize("name", ["capacity.csv", "capacity_long.csv", "demo_chain.csv", "demo_chain_alone.csv"])
def test_every_figure_of_an_accuracy_table_stands_in_the_docs(name: str) -> None:
    pages = " ".join(page.read_text() for page in (ROOT / "docs" / "explanation").glob("*.md"))
    for row in rows(name):
        assert f"{float(row['map']):.1f}" in pages, row


def test_loading_keeps_up_with_training_and_the_docs_say_by_how_much() -> None:
    table = rows("loading.csv")
    page = (ROOT / "docs" / "reference" / "datasets.md").read_text()
    batches = [row for row in table if row["what"] == "batch"]
    assert len(batches) == 2
    for row in batches:
        quickest = max(
            float(other["images_per_s"])
            for other in table
            if other["what"] == "train" and other["height"] == row["height"]
        )
        assert float(row["images_per_s"]) >= 2 * quickest
        size = f"{row['height']}×{row['width']}"
        assert f"| {size} | {row['images_per_s']} | {quickest} (" in page
        assert f"| {row['over_training']} |" in page
