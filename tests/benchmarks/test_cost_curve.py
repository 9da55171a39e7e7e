"""The cost curve is the sum it says it is."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cost import LADDER, MODELS, Costs, crossover, curve, write
from benchmarks.setup import FULL, macs_of

DEAP = {"prune_images": 30, "finetune_images": 40, "pruner_macs": 2}
TOY = Costs(macs=(1, 4, 9), teacher_images=10, refine_images=20, downstream_images=100, calibration_images=2, **DEAP)
TEACHER = 3 * 10 * 9
PER_METHOD = {
    "scratch": 3 * 100 * (1 + 4 + 9 + 1),
    "kd": TEACHER + 3 * 100 * 15 + 4 * 100 * 9,
    "depgraph": TEACHER + 3 * 100 * 15 + 4 * 9,
    "weight selection": TEACHER + 3 * 100 * 15,
    "deap": TEACHER + 4 * 3 * 30 * (9 + 2) + 3 * 40 * 15 + 4 * (30 + 40) * 9,
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


def test_a_chain_gets_cheaper_where_its_refinement_is_paid_for() -> None:
    dear = replace(TOY, refine_images=100)  # 4200 once, and 2 an image-MAC
    deap = [dear.total("deap", count) for count in range(1, 5)]
    nested = [dear.total("nested", count) for count in range(1, 5)]
    assert nested[1] >= deap[1]
    assert nested[2] < deap[2]
    assert crossover(dear, "deap") == 3
    with pytest.raises(ValueError, match="not cheaper than slices"):
        crossover(dear, "slices")


def test_the_ladder_is_in_eighths_and_ends_at_the_teacher() -> None:
    assert [width.stem for width in LADDER] == [4, 6, 8, 10, 12, 14, 16]
    assert LADDER[-1] == FULL


def test_the_file_has_a_row_per_method_and_number_of_models(tmp_path: Path) -> None:
    costs = Costs([macs_of(width) for width in LADDER], 3000 * 64, 6000 * 64, 6000 * 64, 1024, **DEAP)
    write(tmp_path / "curve.csv", costs, MODELS)
    with (tmp_path / "curve.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == MODELS * len(costs.terms)
    assert list(rows[0]) == ["method", "models", "compute_macs", "command"]
    assert all(int(row["compute_macs"]) == costs.total(row["method"], int(row["models"])) for row in rows)
