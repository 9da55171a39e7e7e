"""`widthwise fuse` as a user types it: partial teachers, a foreign model, the guard, and a chain of what comes out."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch import distributed

from chains.artifact import load
from chains.config import DataConfig
from chains.errors import DataError
from chains.export import load_trained, read_exported
from chains.fuse import run as fusing
from chains.fuse.answering import Confinement
from chains.fuse.config import (
    FusionConfig,
    InputConfig,
    PixelConfig,
    StudentConfig,
    difference,
    fusion_toml,
    only_input,
    parse_fusion,
    read_fusion,
)
from chains.fuse.objective import FusionLoss
from chains.fuse.run import run_fusion
from chains.fuse.viewed import train_partial
from chains.fuse.views import PAPER_VIEWS, View
from chains.runlog import read_events
from chains.sources import open_source
from chains.train import TrainRecipe, digest
from chains.width import Width
from tests.chains.fusions import a_file, a_graph
from tests.chains.toys import RECIPE, Command, flat_people

PAGES = Path(__file__).parents[2] / "docs"
TOY = """
name = "toy"
license = "Apache-2.0"
validation_identities = 6

[data]
root = "people"
height = 32
width = 16

[student]
architecture = "resnet18"
width = 4

[[inputs]]
file = "upper.safetensors"
view = { top = 0, bottom = "1/2", height = 16, width = 16 }

[[inputs]]
file = "lower.onnx"
view = { top = 0.5, bottom = 1.0, height = 24, width = 20 }
input = { mean = [0.5, 0.5, 0.5], std = [0.25, 0.25, 0.25] }

[train]
steps = 6
warmup_steps = 2
clip_norm = "none"
batch = { identities = 4, images_per_identity = 2 }

[output]
report_steps = 3
checkpoint_steps = 4
validate_steps = 3
"""
REFINEMENT = """
name = "fused"
license = "Apache-2.0"

[data]
root = "people"
height = 32
width = 16

[teacher]
architecture = "resnet18"
width = 4
source = "run"

[refinement]
ladder = [2, 3, 4]
train = { steps = 2, warmup_steps = 1, batch = { identities = 4, images_per_identity = 2 } }

[evaluation]
calibration_images = 256
validation_identities = 0
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of people who differ in their lower half alone, and networks of somebody: one of the upper half,
    which cannot tell them apart, a graph of the lower half with one number per image, which can hardly, and one of the
    whole image, which can. So the fusion of the first two beats both, and a student that has learnt nothing loses to
    the third."""
    folder = tmp_path_factory.mktemp("site")
    people = flat_people(identities=80, each=8)
    people.images[:, :16] = 100
    for index, (image, pid) in enumerate(zip(people.images, people.pids, strict=True)):
        (folder / "people" / f"p{pid:02}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "people" / f"p{pid:02}" / f"{index}.png")
    train = open_source(DataConfig(root=folder / "people", height=32, width=16)).train
    trained, spec = train_partial("resnet18", Width(3), train, View(0, 0.5, 16, 16), RECIPE, 1)
    a_file(folder / "upper.safetensors", trained, spec)
    a_graph(folder / "lower.onnx", height=24, width=20, dim=1, has_map=True)
    a_graph(folder / "foreign.onnx", height=48, width=24)
    (folder / "toy.toml").write_text(TOY)
    run_fusion(read_fusion(folder / "toy.toml"), folder / "run", resume=False, keep_worse=False, say=print)
    return folder


def report_in(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- a run


def test_a_fusion_leaves_its_teacher_and_what_everything_measures(site: Path) -> None:
    assert {path.name for path in (site / "run").iterdir()} == {
        *("config.toml", "metrics.jsonl", "tensorboard", "checkpoint-fuse.safetensors"),
        *("teacher.safetensors", "report.json", "curves.png"),
    }
    report = report_in(site / "run")
    assert report["made_by"] == "widthwise fuse"
    assert [one["file"] for one in report["inputs"]] == ["upper.safetensors", "lower.onnx"]
    assert [one["map_shape"] for one in report["inputs"]] == [[24, 1, 1], [5, 6, 5]]
    assert report["ensemble"]["embedding_dim"] == 24 + 1
    assert report["teacher"]["map"] > max(one["map"] for one in report["inputs"]) + 10
    assert (report["is_worse"], report["is_kept"], report["notes"]) == (False, True, [])


def test_the_report_names_the_inputs_and_the_teacher_by_their_digests(site: Path) -> None:
    report = report_in(site / "run")
    assert [one["sha256"] for one in report["inputs"]] == [
        sha256(site / name) for name in ("upper.safetensors", "lower.onnx")
    ]
    assert report["teacher"]["sha256"] == sha256(site / "run" / "teacher.safetensors")
    assert str(site) not in (site / "run" / "report.json").read_text()


def test_the_teacher_is_an_ordinary_network_without_heads(site: Path) -> None:
    exported = read_exported(site / "run" / "teacher.safetensors")
    assert (exported.origin.kind, exported.origin.architecture, exported.origin.width) == (
        "teacher",
        "resnet18",
        "4x2-4-8",
    )
    assert exported.origin.license == "Apache-2.0"
    assert exported.classifier is not None
    assert exported.classifier.shape == (40, 32)


def test_the_log_has_both_losses(site: Path) -> None:
    losses = [event["losses"] for event in read_events(site / "run") if "losses" in event]
    assert len(losses) == 2
    assert all(set(of_one) == {"loss", "map", "retrieval"} for of_one in losses)


def test_the_command_prints_everybody_s_accuracy_and_the_digest(site: Path, widthwise: Command, tmp_path: Path) -> None:
    done = widthwise("fuse", site / "toy.toml", "--out", tmp_path / "run", "--steps", 6)
    assert done.status == 0, done.err
    digest_line = f"{tmp_path / 'run' / 'teacher.safetensors'}: sha256 {sha256(site / 'run' / 'teacher.safetensors')}"
    assert done.out.rstrip().endswith(digest_line), "the same configuration gives the same teacher"
    for words in ("upper.safetensors", "rows 0 to 0.5", "all inputs, joined", "fused teacher"):
        assert words in done.out
    assert "fuse: step 6/6" in done.err


def test_a_fused_teacher_is_refined_into_a_chain(site: Path, widthwise: Command) -> None:
    (site / "refine.toml").write_text(REFINEMENT)
    done = widthwise("refine", site / "refine.toml", "--out", site / "chain")
    assert done.status == 0, done.err
    chain = load(site / "chain" / "chain.safetensors").chain
    assert [str(width) for width in chain.ladder] == ["2x2-4-8", "3x2-4-8", "4x2-4-8"]
    report = report_in(site / "run")
    assert chain.provenance["teacher_map"] == report["teacher"]["map"]
    assert chain.provenance["teacher"]["source"] == report["teacher"]["sha256"], "from the chain to the fusion's inputs"


# --- one foreign network


def only_student(site: Path) -> Path:
    """The configuration without inputs: they come from the command line."""
    path = site / "student.toml"
    path.write_text(re.sub(r"\[\[inputs\]\].*(?=\[train\])", "", TOY, flags=re.DOTALL))
    return path


def test_a_foreign_network_becomes_a_chainable_teacher(site: Path, widthwise: Command, tmp_path: Path) -> None:
    """K = 1, the whole image, nothing but a file."""
    weak = a_graph(tmp_path / "weak.onnx", height=48, width=24, dim=1)
    done = widthwise("fuse", only_student(site), "--teacher", weak, "--out", tmp_path / "run")
    assert done.status == 0, done.err
    (only,) = report_in(tmp_path / "run")["inputs"]
    assert only["view"] == {"top": 0, "bottom": 1, "height": 48, "width": 24}
    assert "ImageNet's were taken" in done.err
    assert "weak.onnx shows no feature map" in done.err
    assert load_trained(tmp_path / "run" / "teacher.safetensors").classifier.shape == (40, 32)
    again = widthwise("fuse", only_student(site), "--teacher", weak, "--out", tmp_path / "run", "--resume")
    assert (again.status, "is complete" in again.err) == (0, True)


def test_a_teacher_that_is_worse_than_its_input_is_not_kept_unless_asked(
    site: Path, widthwise: Command, tmp_path: Path
) -> None:
    line = ("fuse", only_student(site), "--teacher", site / "foreign.onnx", "--out", tmp_path / "run", "--steps", 1)
    done = widthwise(*line)
    assert done.status == 2
    assert re.search(r"^widthwise: .*worse than its best input: mAP .* foreign\.onnx alone has", done.err, re.MULTILINE)
    assert "fused teacher" in done.out
    report = report_in(tmp_path / "run")
    assert (report["is_worse"], report["is_kept"], report["teacher"]["sha256"]) == (True, False, None)
    assert not (tmp_path / "run" / "teacher.safetensors").exists()

    assert widthwise(*line, "--resume").status == 2

    kept = widthwise(*line, "--resume", "--keep-worse")
    assert kept.status == 0
    assert "worse than its best input" in kept.out
    assert "step 1/1: loss" not in kept.err, "nothing is trained again"
    report = report_in(tmp_path / "run")
    assert (report["is_worse"], report["is_kept"]) == (True, True)
    assert report["teacher"]["sha256"] == sha256(tmp_path / "run" / "teacher.safetensors")


# --- resuming, and what is refused


def test_a_fusion_that_was_killed_goes_on_and_ends_with_the_same_teacher(site: Path, tmp_path: Path) -> None:
    config = read_fusion(site / "toy.toml")

    def kill(line: str) -> None:
        if "step 6/6: loss" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_fusion(config, tmp_path / "run", resume=False, keep_worse=False, say=kill)
    assert not (tmp_path / "run" / "report.json").exists()
    lines: list[str] = []
    run_fusion(config, tmp_path / "run", resume=True, keep_worse=False, say=lines.append)
    assert any("step 4/6" in line for line in lines), "it goes on at the checkpoint"
    ended, whole = (load_trained(folder / "run" / "teacher.safetensors") for folder in (tmp_path, site))
    assert digest(ended.model.state_dict()) == digest(whole.model.state_dict())
    steps = [event["step"] for event in read_events(tmp_path / "run") if "losses" in event]
    assert steps == [3, 6]


def test_a_run_that_goes_on_elsewhere_with_its_graphs_in_other_processes_ends_with_the_same_teacher(
    site: Path, tmp_path: Path
) -> None:
    """Nothing is where it was, but the run directory comes along."""
    config = read_fusion(site / "toy.toml")

    def kill(line: str) -> None:
        if "step 6/6: loss" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_fusion(config, tmp_path / "run", resume=False, keep_worse=False, say=kill)
    there, run = tmp_path / "there", tmp_path / "there" / "job" / "run"
    shutil.copytree(site / "people", there / "people")
    shutil.copytree(tmp_path / "run", run)
    for name in ("upper.safetensors", "lower.onnx", "toy.toml"):
        shutil.copy(site / name, there / name)
    lines: list[str] = []
    report = run_fusion(
        read_fusion(there / "toy.toml"),
        run,
        resume=True,
        keep_worse=False,
        say=lines.append,
        moved=True,
        confinement=Confinement((), os.environ),
    )
    assert any("step 4/6" in line for line in lines), "it goes on at the checkpoint"
    assert report is not None
    assert report["inputs"] == report_in(site / "run")["inputs"]
    ended, whole = (load_trained(folder / "teacher.safetensors") for folder in (run, site / "run"))
    assert digest(ended.model.state_dict()) == digest(whole.model.state_dict())


def test_the_group_of_processes_has_ended_when_everybody_is_measured(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others would wait in it, and they do not wait for ever. A group of one, as torchrun starts it."""
    given = {"TORCHELASTIC_RUN_ID": "a", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    for name, value in {**given, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    stood: list[bool] = []
    for name in ("fuse", "measure"):
        monkeypatch.setattr(fusing, name, noting(getattr(fusing, name), stood))
    run_fusion(read_fusion(site / "toy.toml"), tmp_path / "run", resume=False, keep_worse=True, say=print, steps=1)
    assert stood == [True, False]


def noting(work: Callable[..., Any], stood: list[bool]) -> Callable[..., Any]:
    """`work`, with a note of whether there is a group when it begins."""

    def noted(*given: Any, **named: Any) -> Any:
        stood.append(distributed.is_initialized())
        return work(*given, **named)

    return noted


def test_a_taken_folder_is_refused(site: Path, widthwise: Command, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    for options, words in (((), "is not empty"), (("--resume",), "holds no config.toml")):
        done = widthwise("fuse", site / "toy.toml", "--out", tmp_path / "taken", *options)
        assert (done.status, words in done.err) == (2, True)
    other = widthwise("fuse", site / "toy.toml", "--out", site / "run", "--resume", "--seed", 7)
    assert (other.status, "holds another run: seed is 0, not 7" in other.err) == (2, True)


def test_a_wrong_declared_size_ends_with_one_line_before_anything_is_written(
    site: Path, widthwise: Command, tmp_path: Path
) -> None:
    path = site / "wrong.toml"
    path.write_text(TOY.replace("height = 24, width = 20", "height = 32, width = 32"))
    done = widthwise("fuse", path, "--out", tmp_path / "run")
    assert done.status == 2
    assert re.fullmatch(r"widthwise: input '.*lower\.onnx' is for images of 24 × 20 .* says 32 × 32\n", done.err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name = "toy"', 'name = "A toy"', "name"),
        ("width = 4", 'width = "w4"', "student.width: w4 is no width of resnet18"),
        ('"resnet18"', '"resnet19"', "student.architecture: no architecture 'resnet19'"),
        ("[student]\narchitecture", "[student]\nsource = 'x'\narchitecture", "student.source"),
        ('bottom = "1/2"', 'bottom = "1/0"', "inputs.0.view: '1/0' is no fraction"),
        ("bottom = 1.0", "bottom = 0.4", "from 0.5 to 0.4"),
        ("std = [0.25, 0.25, 0.25]", "std = [0.25, 0.25]", "inputs.1.input.std"),
        ("std = [0.25, 0.25, 0.25]", "std = [0.25, 0.25, 0.0]", r"must be above 0"),
        ("[output]", "[loss]\nmap = -1\n[output]", "map=-1"),
        ("steps = 6", "steps = 0", "at least one step"),
        ("[data]", "[data", "is no TOML"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in TOY
    (tmp_path / "toy.toml").write_text(TOY.replace(old, new, 1))
    with pytest.raises(DataError, match=r"toy\.toml") as raised:
        read_fusion(tmp_path / "toy.toml")
    assert words in str(raised.value)


def test_a_transformer_s_size_is_held_against_the_data() -> None:
    content = {
        "name": "a",
        "license": "MIT",
        "data": {"kind": "synthetic"},
        "student": {"architecture": "vit_small"},
        "inputs": [{"file": "a.onnx"}],
    }
    with pytest.raises(DataError, match=r"256 × 128 .* these are 128 × 64"):
        parse_fusion(content, "it", Path())


def test_a_configuration_says_the_same_wherever_it_is_written(site: Path, tmp_path: Path) -> None:
    config = read_fusion(site / "toy.toml")
    assert config.inputs[0].file == Path(os.path.normpath(site / "upper.safetensors"))
    assert config.inputs[0].view == View(0, 0.5, 16, 16)
    assert config.train is not None
    assert config.train.clip_norm is None
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "config.toml").write_text(fusion_toml(config, tmp_path / "deep"))
    assert str(site) not in (tmp_path / "deep" / "config.toml").read_text()
    assert difference(read_fusion(tmp_path / "deep" / "config.toml"), config) is None


def test_a_student_that_shows_no_map_is_said_to_learn_from_retrieval_features_alone(site: Path, tmp_path: Path) -> None:
    path = site / "osnet.toml"
    path.write_text(TOY.replace('"resnet18"', '"osnet"').replace("steps = 6", "steps = 1"))
    lines: list[str] = []
    report = run_fusion(read_fusion(path), tmp_path / "run", resume=False, keep_worse=True, say=lines.append)
    said = "osnet pools by itself and shows no feature map: it learns from retrieval features alone"
    assert said in lines
    assert report is not None
    assert report["notes"] == [said]


def test_without_a_recipe_the_usual_schedule_is_taken_and_written_down(site: Path, tmp_path: Path) -> None:
    path = site / "usual.toml"
    path.write_text(re.sub(r"\[train\].*(?=\[output\])", "", TOY, flags=re.DOTALL))
    run_fusion(read_fusion(path), tmp_path / "run", resume=False, keep_worse=True, say=print, steps=1)
    train = read_fusion(tmp_path / "run" / "config.toml").train
    assert isinstance(train, TrainRecipe)
    assert (train.steps, train.lr, train.schedule, train.batch.identities) == (1, 3.5e-4, "steps", 16)


# --- documentation


def rows(page: str, heading: str) -> set[str]:
    """The names in the first column of the tables under a heading."""
    text = (PAGES / page).read_text().partition(f"\n{heading}\n")[2]
    section = re.split(r"^#", text, maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line.split("|")[1] for line in section.splitlines() if line.startswith("| ")]
    return {name for line in lines for name in re.findall(r"`([^`]+)`", line)}


@pytest.mark.parametrize(
    ("heading", "expected"),
    [
        ("# The configuration of a fusion", set(FusionConfig.model_fields) - {"data", "output", "student", "inputs"}),
        ("## student", set(StudentConfig.model_fields)),
        ("## inputs", {*InputConfig.model_fields, *PixelConfig.model_fields, *(f.name for f in fields(View))}),
        ("## losses of a fusion", {field.name for field in fields(FusionLoss)}),
    ],
)
def test_every_field_of_a_fusion_is_in_the_reference(heading: str, expected: set[str]) -> None:
    assert rows("reference/cli.md", heading) == expected


def test_the_page_on_fusion_lists_the_paper_s_views() -> None:
    assert rows("explanation/fusion.md", "## Views") == set(PAPER_VIEWS)


def test_the_configurations_of_the_how_to_can_be_read(tmp_path: Path) -> None:
    page = (PAGES / "how-to" / "fuse-teachers.md").read_text()
    blocks = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    foreign, parts = [block for block in blocks if "[student]" in block]
    (tmp_path / "foreign.toml").write_text(foreign)
    (tmp_path / "parts.toml").write_text(parts)
    (only,) = read_fusion(tmp_path / "foreign.toml", {"inputs": only_input(tmp_path / "foreign.onnx")}).inputs
    assert (only.file, only.view, only.pixels) == (tmp_path / "foreign.onnx", None, None)
    assert [one.view and one.view.height for one in read_fusion(tmp_path / "parts.toml").inputs] == [64, 96, None]


def test_the_python_of_the_how_to_runs(tmp_path: Path) -> None:
    page = (PAGES / "how-to" / "fuse-teachers.md").read_text()
    (script,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    ran = subprocess.run(
        [sys.executable, "-c", "import torch; torch.set_num_threads(1)\n" + script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PAGES.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "2 True"
    assert (tmp_path / "teacher.safetensors").exists()
