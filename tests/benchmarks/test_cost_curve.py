"""The cost curve is the sum it says it is."""

import csv
from pathlib import Path

import pytest

from benchmarks.cost import LADDER, MODELS, Costs, curve, write
from benchmarks.setup import FULL, macs_of

TOY = Costs(macs=(1, 4, 9), teacher_images=10, refine_images=20, downstream_images=100, calibration_images=2)
TEACHER = 3 * 10 * 9
PER_METHOD = {
    "scratch": 3 * 100 * (1 + 4 + 9 + 1),
    "kd": TEACHER + 3 * 100 * 15 + 4 * 100 * 9,
    "depgraph": TEACHER + 3 * 100 * 15 + 4 * 9,
    "weight selection": TEACHER + 3 * 100 * 15,
    "oskt": TEACHER + 3 * 20 * (9 + 1 + 4) + 3 * 100 * 15,
    "nested": TEACHER + 3 * 20 * (9 + 1 + 4) + 2 * 15,
    "slices": TEACHER + 3 * 20 * (9 + 1 + 4) + 2 * 15,
}


@pytest.mark.parametrize("method", PER_METHOD)
def test_four_models_cost_what_the_formula_says_and_the_fourth_is_narrow_again(method: str) -> None:
    assert TOY.total(method, 4) == PER_METHOD[method]


def test_every_method_is_in_the_curve_and_every_model_costs_something() -> None:
    rows = list(curve(TOY, 5))
    assert {method for method, _, _ in rows} == set(PER_METHOD) == set(TOY.terms)
    for method in PER_METHOD:
        costs = [macs for name, _, macs in rows if name == method]
        assert len(costs) == 5
        assert costs == sorted(set(costs))


def test_the_ladder_is_in_eighths_and_ends_at_the_teacher() -> None:
    assert [width.stem for width in LADDER] == [4, 6, 8, 10, 12, 14, 16]
    assert LADDER[-1] == FULL


def test_the_file_has_a_row_per_method_and_number_of_models(tmp_path: Path) -> None:
    costs = Costs([macs_of(width) for width in LADDER], 3000 * 64, 6000 * 64, 6000 * 64, 1024)
    write(tmp_path / "curve.csv", costs, MODELS)
    with (tmp_path / "curve.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == MODELS * len(costs.terms)
    assert list(rows[0]) == ["method", "models", "compute_macs", "command"]
    assert all(int(row["compute_macs"]) == costs.total(row["method"], int(row["models"])) for row in rows)
