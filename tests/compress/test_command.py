"""`widthwise compress` at toy size: what it writes, how it goes on, what it refuses."""

import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import chains.compress.folder
import chains.compress.run
from app.cli import main
from chains.artifact import load, save
from chains.budget import Limits, exceeded
from chains.compatible import rival_width
from chains.compress.folder import Asked, compress_run, read_task
from chains.config import DataConfig, RecipeFile, parse_config
from chains.cost import count_macs
from chains.downstream import Downstream, finetune_run
from chains.errors import ChainMismatch, DataError
from chains.export import load_trained, numpy_state, origin, read_exported, save_trained
from chains.onnxfile import plan
from chains.pipeline import run_refinement
from chains.sources import open_source
from chains.testing import pico_chain
from chains.train import train_alone
from chains.verify import verify
from chains.width import Width
from tests.chains.toys import INPUT, RECIPE

SMALL = DataConfig.model_validate(
    {"kind": "synthetic", "height": 32, "width": 16, "people": {"train_identities": 40, "test_identities": 8}}
)
TOML = """
[data]
kind = "synthetic"
height = 32
width = 16

[data.people]
train_identities = 40
test_identities = 8
"""
BATCH = "batch = { identities = 4, images_per_identity = 2 }"
SCHEDULE = f"warmup_steps = 1\n{BATCH}\n"
QUICK = f"shrink = 0.5\n[prune]\nsteps = 4\n{SCHEDULE}[finetune]\nsteps = 3\n{SCHEDULE}"
FILES = {
    *("compression.toml", "metrics.jsonl", "tensorboard", "start.safetensors", "checkpoint-prune.safetensors"),
    *("pruned.safetensors", "checkpoint-finetune.safetensors", "student.safetensors"),
    *("chain.safetensors", "report.json", "curves.png"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher's file, a chain, images and a recipe."""
    folder = tmp_path_factory.mktemp("toy")
    source = open_source(SMALL)
    teacher = train_alone("resnet18", Width(4), source.train, INPUT, RECIPE, 0)
    save_trained(teacher, origin("teacher", teacher.model, INPUT, "CC0-1.0"), folder / "teacher.safetensors")
    save(pico_chain(stem=4, narrowest=2, rungs=3, height=32, width=16), folder / "chain.safetensors")
    (folder / "people.toml").write_text(TOML)
    (folder / "quick.toml").write_text(QUICK)
    return folder


def asked(folder: Path, source: str = "teacher.safetensors", **fields: object) -> Asked:
    return Asked(folder / source, SMALL, recipe=folder / "quick.toml", **fields)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def done(folder: Path) -> Path:
    """The run directory of a compression of the teacher to 60 % of its MACs and a file of some size."""
    macs = count_macs(load_trained(folder / "teacher.safetensors").model.table, Width(4), INPUT)
    limits = Limits(max_macs=macs * 6 // 10, max_artifact_bytes=200_000)
    compress_run(asked(folder, limits=limits), folder / "run", resume=False, say=print)
    return folder / "run"


def test_a_compression_leaves_a_terminal_chain_within_the_limits(done: Path, folder: Path) -> None:
    assert {path.name for path in done.iterdir()} == FILES
    stored = load(done / "chain.safetensors")
    chain, report = stored.chain, json.loads((done / "report.json").read_text())
    assert chain.sizes is not None
    assert report["digest"] == stored.digest
    costs = plan(stored, Width(4)).costs
    assert report["costs"]["macs"] == costs.macs
    assert exceeded(Limits(**report["limits"]), costs) == []
    assert {group: chain.sizes[group] for group in report["pruned_to"]} == report["pruned_to"]
    assert report["teacher"] == report["before"]
    assert (chain.name, chain.license) == ("teacher-deap", "CC0-1.0")
    assert chain.frontier is not None
    assert chain.frontier.trained_after_expansion
    assert chain.provenance["made_by"] == "widthwise compress"
    assert chain.provenance["limits"] == report["limits"]
    assert str(folder) not in json.dumps(dict(chain.provenance)) + (done / "metrics.jsonl").read_text()


def test_the_terminal_chain_can_be_published(done: Path) -> None:
    """The check before publishing: finite, measured, and onnxruntime answers as torch does."""
    stored = load(done / "chain.safetensors")
    people = open_source(SMALL).query
    assert verify(stored, people.take(np.arange(4))).largest_difference[Width(4)] < 1e-4


def test_the_student_of_a_compression_is_trained_on(done: Path) -> None:
    exported = read_exported(done / "student.safetensors")
    stored = load(done / "chain.safetensors")
    assert exported.origin.sizes == stored.chain.sizes
    weights = numpy_state(exported.model)
    assert all(np.array_equal(weights[name], values) for name, values in stored.chain.tensors.items())
    assert exported.classifier is not None


def test_a_finished_compression_asked_for_again_gives_the_same_chain(done: Path, folder: Path) -> None:
    before = (done / "chain.safetensors").read_bytes()
    limits = Limits(**json.loads((done / "report.json").read_text())["limits"])
    compress_run(asked(folder, limits=limits), done, resume=True, say=print)
    assert (done / "chain.safetensors").read_bytes() == before
    with pytest.raises(DataError, match="asked for otherwise"):
        compress_run(asked(folder), done, resume=True, say=print)
    with pytest.raises(DataError, match="is not empty"):
        compress_run(asked(folder, limits=limits), done, resume=False, say=print)


def test_a_terminal_chain_is_finetuned_on_other_images(done: Path, tmp_path: Path) -> None:
    stored = load(done / "chain.safetensors")
    task = Downstream(stored, Width(4), open_source(SMALL), RECIPE, 0, "cpu")
    assert finetune_run(task, tmp_path / "finetuned", resume=False, say=print) is not None
    assert load(tmp_path / "finetuned" / "chain.safetensors").chain.sizes == stored.chain.sizes
    assert read_exported(tmp_path / "finetuned" / "student.safetensors").origin.sizes == stored.chain.sizes


@pytest.mark.parametrize("field", ["source", "start"])
def test_no_chain_is_made_of_a_terminal_network(done: Path, tmp_path: Path, field: str) -> None:
    train = RecipeFile(train=RECIPE).model_dump(mode="json")["train"]
    teacher = {"architecture": "resnet18", "width": "4", field: str(done / "student.safetensors")}
    content = {
        "name": "toy",
        "license": "CC0-1.0",
        "data": SMALL.model_dump(mode="json", exclude_none=True),
        "teacher": teacher if field == "source" else {**teacher, "train": train},
        "refinement": {"narrowest": "2", "rungs": 3, "train": train},
    }
    config = parse_config(content, "toy", tmp_path)
    with pytest.raises(ChainMismatch, match="compressed network whose layers have sizes of their own"):
        run_refinement(config, tmp_path / "run", resume=False, say=print)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["widthwise", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    code = ended.value.code
    return code if isinstance(code, int) else int(code is not None)


def test_the_command_compresses_a_student_of_a_chain(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--data", folder / "people.toml", "--recipe", folder / "quick.toml")
    full = count_macs(load(folder / "chain.safetensors").chain.table, Width(2), INPUT)
    options = ("--width", 2, "--max-macs", full * 9 // 10, "--steps", 2, "--name", "tiny", "--out", tmp_path / "run")
    recipe = folder / "quick.toml"
    recipe.write_text(QUICK.replace("shrink = 0.5", "shrink = 0.5\ngap_weight = 0.0"))
    assert run(monkeypatch, "compress", folder / "chain.safetensors", *data, *options) == 0
    recipe.write_text(QUICK)
    printed = capsys.readouterr().out
    stored = load(tmp_path / "run" / "chain.safetensors")
    assert f"{full * 9 // 10:,}" in printed
    assert stored.digest in printed
    assert (stored.chain.name, stored.chain.ladder) == ("tiny", (Width(2),))
    assert stored.chain.provenance["source"]["chain"] == "pico"
    assert tomllib.loads((tmp_path / "run" / "compression.toml").read_text())["recipe"]["prune"]["steps"] == 2
    model = tmp_path / "tiny.onnx"
    assert run(monkeypatch, "export", tmp_path / "run" / "chain.safetensors", "--width", "2", "--out", model) == 0
    assert onnxruntime.InferenceSession(model).get_outputs()[0].shape == ["batch", 16]
    assert run(monkeypatch, "inspect", tmp_path / "run" / "chain.safetensors") == 0


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        (("teacher.safetensors", "--width", "2"), "--width has nothing to choose from"),
        (("chain.safetensors", "--start", "teacher.safetensors"), "--start is for a teacher's file"),
        (("teacher.safetensors", "--max-macs", "1000"), "no compression of 'teacher' fits"),
        (("chain.safetensors", "--width", "3", "--compatible-with", "chain.safetensors"), "embeds into 32 numbers"),
        (("teacher.safetensors", "--name", "My Chain"), "write it as in 'my-chain'"),
        (("people.toml",), "people.toml"),
    ],
)
def test_what_makes_no_sense_ends_with_one_line(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    refusal: str,
) -> None:
    monkeypatch.chdir(folder)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(QUICK.replace("shrink = 0.5", "shrink = 0.5\ngap_weight = 0.0"))
    options = ("--data", "people.toml", "--out", tmp_path / "run", "--recipe", recipe)
    assert run(monkeypatch, "compress", *arguments, *options) == 2
    error = capsys.readouterr().err.strip()
    assert refusal in error
    assert "\n" not in error
    assert not (tmp_path / "run").exists(), "the folder is free for another attempt"


def test_a_mistake_in_a_recipe_names_the_file_and_the_field(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    for text, named in (("shrnk = 3", "shrnk"), ("shrink = 0", "shrink"), ("[prune]\nsteps = 0", "steps")):
        recipe.write_text(text)
        with pytest.raises(DataError, match=rf"recipe\.toml: .*{named}"):
            read_task(Asked(folder / "teacher.safetensors", SMALL, recipe=recipe))


def test_what_a_recipe_leaves_out_is_the_usual_one(folder: Path) -> None:
    task = read_task(Asked(folder / "teacher.safetensors", SMALL, steps=7))
    assert task.recipe.prune.steps == 7
    assert task.recipe.finetune.batch.images_per_identity == 6
    assert task.recipe.gap_weight == 0.5
    narrow = read_task(Asked(folder / "chain.safetensors", SMALL, width="2"))
    assert narrow.recipe.gap_weight == 0, "its teacher's maps have other channels"


def test_a_student_may_begin_with_other_weights_than_its_teacher_s(folder: Path, tmp_path: Path) -> None:
    source = open_source(SMALL)
    begun = train_alone("resnet18", Width(4), source.train, INPUT, RECIPE, 5)
    save_trained(begun, origin("teacher", begun.model, INPUT, "CC0-1.0"), tmp_path / "start.safetensors")
    task = read_task(asked(folder, start=tmp_path / "start.safetensors"))
    assert task.start.student is not task.start.tutor.trained.model
    other = train_alone("resnet18", Width(3), source.train, INPUT, RECIPE, 5)
    save_trained(other, origin("teacher", other.model, INPUT, "CC0-1.0"), tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="the start is a resnet18 of 3x2-4-8"):
        read_task(asked(folder, start=tmp_path / "other.safetensors"))


def test_a_name_may_be_any_that_a_chain_can_have(folder: Path) -> None:
    assert read_task(asked(folder, name="door-")).name == "door-"
    with pytest.raises(DataError, match="--name is '-door'; write it as in 'door'"):
        read_task(asked(folder, name="-door"))


def test_the_full_width_is_trained_into_its_chain_s_space_and_measured(folder: Path, tmp_path: Path) -> None:
    question = asked(folder, "chain.safetensors", compatible_with=folder / "chain.safetensors")
    report = compress_run(question, tmp_path / "run", resume=False, say=print)
    assert report is not None
    record, chain = report["compatible_with"], load(tmp_path / "run" / "chain.safetensors").chain
    old = load(folder / "chain.safetensors").chain
    assert (chain.embedding_space == old.embedding_space) == record["is_met"]
    assert record["old_width"] == str(rival_width(old, report["costs"]["macs"]))
    assert np.array_equal(chain.lift(Width(4)), old.lift(Width(4)))


def test_a_run_goes_on_where_its_classifier_would_come_out_otherwise(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Centroids and statistics are sums of floats: another kind of processor rounds them otherwise."""
    question = asked(folder, "chain.safetensors")
    whole = compress_run(question, tmp_path / "whole", resume=False, say=print)
    stopped = tmp_path / "stopped"
    monkeypatch.setattr(chains.compress.folder, "_finish", interrupted)
    with pytest.raises(Interrupted):
        compress_run(question, stopped, resume=False, say=print)
    monkeypatch.undo()
    for module, name in ((chains.compress.run, "centroid_classifier"), (chains.compress.run, "settled")):
        monkeypatch.setattr(module, name, rounded_otherwise(getattr(module, name)))
    resumed = compress_run(question, stopped, resume=True, say=print)
    assert whole is not None
    assert resumed is not None
    assert resumed["digest"] == whole["digest"]


class Interrupted(Exception):
    """The process ends here."""


def interrupted(*_: object) -> None:
    raise Interrupted


def rounded_otherwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as on a machine whose sums differ in the last bit."""

    def elsewhere(*arguments: Any) -> Any:
        found = function(*arguments)
        with torch.no_grad():
            for tensor in found.parameters() if isinstance(found, torch.nn.Module) else [found]:
                tensor.mul_(1 + 2**-20)
        return found

    return elsewhere
