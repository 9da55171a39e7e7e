"""What the benchmark of the sister methods counts, and that its tables keep what other runs left."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import compare, methods
from benchmarks.setup import ARCHITECTURE, FULL
from chains.chain import InputSpec
from chains.compress.run import Compressed, from_teacher
from chains.cost import count_macs
from chains.model import ReIDModel
from chains.train import Trained

SITE = methods.SITE


def a_model() -> ReIDModel:
    return ReIDModel(ARCHITECTURE, FULL).eval()


def test_pruners_of_basic_blocks_cost_a_ninth_of_the_convolutions_they_stand_before() -> None:
    model = a_model()
    seen: list[int] = []
    for name, module in model.named_modules():
        if name.endswith("conv2"):
            module.register_forward_hook(lambda m, _, out: seen.append(m.weight.numel() * out.shape[2] * out.shape[3]))
    with torch.no_grad():
        model(torch.zeros(1, 3, SITE.input.height, SITE.input.width))
    assert methods.pruner_macs(a_model()) == sum(macs // 9 for macs in seen) > 0


def test_a_compression_costs_both_trainings_and_the_teacher_s_looks() -> None:
    model = a_model()
    start = from_teacher("teacher", Trained(model, torch.zeros(4, model.backbone.channels)))
    plan = methods.deap_recipe(2, 3)
    done = Compressed(start.tutor.trained, {}, {}, 0.0)
    full, batch = SITE.macs(FULL), compare.BATCH
    pruning = 2 * batch * (3 * (full + methods.pruner_macs(model)) + full)
    assert methods.deap_macs(start, done, plan) == pruning + 3 * batch * (3 * full + full)


def test_every_method_is_trained_on_as_many_images_after_its_provisioning() -> None:
    plan = methods.deap_recipe(methods.PRUNE_STEPS, methods.FINETUNE_STEPS)
    assert plan.prune.images + plan.finetune.images == compare.recipe(methods.AFTER_STEPS).images


def test_views_are_the_paper_s_at_the_scale_of_the_images() -> None:
    assert len(methods.VIEWS) == 6
    up = methods.VIEWS["up1"]
    assert (up.top, up.bottom, up.height, up.width) == (0, 1 / 2, 56, 56)
    spec = InputSpec(56, 56, SITE.input.mean, SITE.input.std)
    assert methods.macs_in_view(up) == count_macs(a_model().table, FULL, spec)


def test_every_task_has_a_name_and_a_table_of_its_own() -> None:
    named = [name for _, (name, *_) in methods.tasks([0, 1])]
    assert len(set(named)) == len(named)
    assert len({compare.result_path(name) for name in named}) == len(named)
    told = {name.split(":")[0] for name in named} - {"view", "refine"}
    assert told == {kind for table in methods.TABLES for kind in table.tasks}


def test_a_table_keeps_the_rows_of_tasks_that_did_not_run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "WORK", tmp_path / "work")
    compare.WORK.mkdir()
    columns = replace(methods.TABLES[0]).columns
    row = {**dict.fromkeys(columns, 1), "method": "deap", "seed": 0, "budget": "4x2-4-8", "map": 50.0}
    tasks = {name: task for _, task in methods.tasks([0, 1]) if (name := task[0]) in ("deap:0:8", "deap:1:8")}
    for seed, name in enumerate(tasks):
        compare.result_path(name).write_text(json.dumps([{**row, "seed": seed, "precisions": [0.5]}]))
    methods.write_tables([tasks["deap:0:8"]], tmp_path)
    methods.write_tables([tasks["deap:1:8"]], tmp_path)
    with (tmp_path / methods.COMPRESSION).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["command"]) for row in rows] == [
        ("0", 'python -m benchmarks.methods --only "deap:0:8"'),
        ("1", 'python -m benchmarks.methods --only "deap:1:8"'),
    ]
