"""The pages on compression keep their word."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from chains.architectures import architecture
from chains.chain import InputSpec
from chains.compress.blocks import prunable
from chains.compress.objective import DeapRecipe
from chains.cost import count_macs, count_params
from chains.width import Width

DOCS = Path(__file__).parents[2] / "docs"
REID = InputSpec(256, 128, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
FLOORS = re.findall(
    r"^\| ResNet-(\d+), `(\d+)` \| ([\d.]+) M \| ([\d.]+) M \| ([\d.]+) \| ([\d.]+) \|$",
    (DOCS / "explanation" / "compression.md").read_text(),
    re.MULTILINE,
)


def test_every_field_of_a_recipe_is_in_its_table() -> None:
    section = (DOCS / "reference" / "cli.md").read_text().partition("## The recipe of a compression\n")[2]
    table = [row.split("|")[1] for row in section.partition("\n## ")[0].splitlines() if row.startswith("| ")]
    named = {name for cell in table for name in re.findall(r"`([^`]+)`", cell)}
    assert named == {field.name for field in fields(DeapRecipe)}


@pytest.mark.parametrize("row", FLOORS, ids=lambda row: f"resnet{row[0]}-{row[1]}")
def test_the_floors_are_those_of_the_tables(row: tuple[str, ...]) -> None:
    depth, stem, *stated = row
    table, width = architecture(f"resnet{depth}"), Width(int(stem))
    floor = table.fixed(table.group_sizes(width) | dict.fromkeys(prunable(table), 1))
    counted = [f"{count_params(of, width) / 1e6:.2f}" for of in (table, floor)]
    counted += [f"{count_macs(of, width, REID) / 1e9:.3f}" for of in (table, floor)]
    assert stated == counted


def test_the_floors_of_five_networks_are_stated() -> None:
    assert len(FLOORS) == 5


def test_the_authors_headline_is_a_keep_ratio_of_a_third_inside_the_blocks() -> None:
    """VeRi-776, ResNet-101 at 256 × 256: 73.24 % of the parameters and 71.98 % of the operations go. That a uniform
    ratio gives both says that the inner widths are what they count."""
    table, width, square = architecture("resnet101"), Width(64), InputSpec(256, 256, REID.mean, REID.std)
    full = table.group_sizes(width)
    kept = table.fixed(full | {group: round(0.335 * full[group]) for group in prunable(table)})
    assert 1 - count_params(kept, width) / count_params(table, width) == pytest.approx(0.7324, abs=0.002)
    assert 1 - count_macs(kept, width, square) / count_macs(table, width, square) == pytest.approx(0.7198, abs=0.003)
