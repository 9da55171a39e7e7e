"""The research commands at toy size, as a user types them: what they write, what they say, and how they fail."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from chains.artifact import load, save
from chains.config import read_config
from chains.data.images import ImageSet
from chains.data.synthetic import PeopleSettings, write_market1501
from chains.describe import describe
from chains.errors import DataError
from chains.export import load_trained, read_exported
from chains.pipeline import require_answers, run_refinement
from chains.refine import fingerprint
from chains.runlog import read_events
from chains.sources import Source
from chains.testing import contract_chain, pico_chain

ROOT = Path(__file__).parents[2]
TOY = """
name = "toy"
license = "Apache-2.0"

[data]
kind = "synthetic"
height = 32
width = 16

[data.people]
train_identities = 40
test_identities = 12

[teacher]
architecture = "resnet18"
width = "4"

[teacher.train]
steps = 12
warmup_steps = 2
batch = { identities = 4, images_per_identity = 2 }

[refinement]
narrowest = "2"
rungs = 3

[refinement.train]
steps = 12
warmup_steps = 2
batch = { identities = 4, images_per_identity = 2 }

[evaluation]
calibration_images = 256
validation_identities = 6

[output]
report_steps = 3
checkpoint_steps = 5
validate_steps = 6
"""
FILES = {
    *("config.toml", "metrics.jsonl", "teacher.safetensors", "chain.safetensors", "report.json"),
    *("checkpoint-teacher.safetensors", "checkpoint-refinement.safetensors", "tensorboard"),
    *("frontier.png", "cross_width.png", "curves.png"),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with toy.toml and its finished run in `run`."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy.toml").write_text(TOY)
    run_refinement(read_config(folder / "toy.toml"), folder / "run", resume=False, say=print)
    return folder


def process(folder: Path, *arguments: str, start: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run a command line in a process of its own, with one thread."""
    return subprocess.run(
        [sys.executable, *start, "-m", "app.cli", *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_a_run_leaves_everything_that_came_of_it(toy: Path) -> None:
    assert {path.name for path in (toy / "run").iterdir()} == FILES
    stored = load(toy / "run" / "chain.safetensors")
    report = json.loads((toy / "run" / "report.json").read_text())
    assert report["digest"] == stored.digest
    assert stored.chain.frontier is not None
    assert [row["map"] for row in report["widths"]] == [measured.map for measured in stored.chain.frontier.widths]
    assert stored.chain.embedding_space == f"es-{fingerprint(stored.chain.tensors)}"
    assert str(toy) not in (toy / "run" / "metrics.jsonl").read_text() + json.dumps(dict(stored.chain.provenance))


def test_the_log_tells_losses_and_validation_of_every_stage(toy: Path) -> None:
    events = read_events(toy / "run")
    trained = {stage: [e["step"] for e in events if e["stage"] == stage and "losses" in e] for stage in STAGES}
    assert trained == {"teacher": [3, 6, 9, 12], "refinement": [3, 6, 9, 12]}
    validated = {stage: [e["step"] for e in events if e["stage"] == stage and "validation" in e] for stage in STAGES}
    assert validated == {"teacher": [0, 6, 12], "refinement": [0, 6, 12]}
    assert all(e["eta_s"] >= 0 and e["images_per_s"] > 0 and e["lr"] > 0 for e in events if "losses" in e)
    assert events[-1]["stage"] == "frontier"


STAGES = ("teacher", "refinement")


def test_the_resolved_configuration_reproduces_the_run(toy: Path, tmp_path: Path, widthwise) -> None:
    done = widthwise("refine", toy / "run" / "config.toml", "--out", tmp_path / "again")
    assert done.status == 0, done.err
    assert load(tmp_path / "again" / "chain.safetensors").digest == load(toy / "run" / "chain.safetensors").digest


def test_a_run_killed_in_every_stage_goes_on_and_ends_with_the_same_chain(toy: Path, tmp_path: Path, widthwise) -> None:
    """SIGKILL once a stage has logged a step beyond its first checkpoint."""
    out, command = tmp_path / "run", [sys.executable, "-m", "app.cli", "refine", "toy.toml", "--resume", "--out"]
    for stage in STAGES:
        with subprocess.Popen([*command, str(out)], cwd=toy, env=environment(), stderr=subprocess.DEVNULL) as running:
            while not has_reached(out, stage, 6):
                assert running.poll() is None, "the run ended before it could be killed"
                time.sleep(0.005)
            running.send_signal(signal.SIGKILL)
    assert not (out / "report.json").exists()
    done = widthwise("refine", toy / "toy.toml", "--out", out, "--resume")
    assert done.status == 0, done.err
    assert load(out / "chain.safetensors").digest == load(toy / "run" / "chain.safetensors").digest
    steps, uninterrupted = (
        [(e["stage"], e["step"]) for e in read_events(folder) if "losses" in e] for folder in (out, toy / "run")
    )
    assert steps == uninterrupted


def has_reached(folder: Path, stage: str, step: int) -> bool:
    if not (folder / "metrics.jsonl").exists() or not (folder / f"checkpoint-{stage}.safetensors").exists():
        return False
    return any(event["stage"] == stage and event.get("step", 0) >= step for event in read_events(folder))


def test_a_complete_run_is_left_alone(toy: Path, widthwise) -> None:
    before = (toy / "run" / "metrics.jsonl").read_bytes()
    done = widthwise("refine", toy / "toy.toml", "--out", toy / "run", "--resume")
    assert done.status == 0
    assert "is complete" in done.err
    assert (toy / "run" / "metrics.jsonl").read_bytes() == before


def test_a_directory_that_is_taken_is_not_written_to(toy: Path, tmp_path: Path, widthwise) -> None:
    done = widthwise("refine", toy / "toy.toml", "--out", toy / "run")
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "is not empty; go on with what it holds by --resume" in done.err
    (tmp_path / "notes.txt").write_text("mine")
    done = widthwise("refine", toy / "toy.toml", "--out", tmp_path, "--resume")
    assert done.status == 2
    assert "no run to resume" in done.err


def test_another_run_s_directory_is_not_resumed(toy: Path, widthwise) -> None:
    done = widthwise("refine", toy / "toy.toml", "--out", toy / "run", "--resume", "--seed", 5)
    assert done.status == 2
    assert "holds another run: seed: 0, not 5" in done.err


def test_a_teacher_is_taken_from_another_run(toy: Path, tmp_path: Path, widthwise) -> None:
    section = TOY[TOY.index("[teacher]") : TOY.index("[refinement]")]
    taken = f'[teacher]\narchitecture = "resnet18"\nwidth = "4"\nsource = "{toy / "run"}"\n\n'
    (tmp_path / "taken.toml").write_text(TOY.replace(section, taken))
    done = widthwise("refine", tmp_path / "taken.toml", "--out", tmp_path / "run", "--steps", 3)
    assert done.status == 0, done.err
    assert "teacher:" not in done.err
    one, other = (load_trained(folder / "run" / "teacher.safetensors") for folder in (toy, tmp_path))
    assert torch.equal(one.classifier, other.classifier)
    (tmp_path / "wide.toml").write_text(TOY.replace(section, taken.replace('"4"', '"8"')))
    done = widthwise("refine", tmp_path / "wide.toml", "--out", tmp_path / "wide")
    assert done.status == 2
    assert "of width 4x2-4-8 for 32 × 16 images; the configuration says resnet18, 8x2-4-8" in done.err


def test_the_paper_s_mode_runs_too(tmp_path: Path, widthwise) -> None:
    (tmp_path / "oskt.toml").write_text(TOY.replace('narrowest = "2"', 'mode = "oskt"\nnarrowest = "2"'))
    done = widthwise("refine", tmp_path / "oskt.toml", "--out", tmp_path / "run", "--steps", 3)
    assert done.status == 0, done.err
    assert load(tmp_path / "run" / "chain.safetensors").chain.mode == "oskt"


@pytest.mark.parametrize(("mode", "architecture"), [("nested", "vit_tiny"), ("oskt", "vit_tiny_dw")])
def test_a_vit_is_refined_by_the_same_words(tmp_path: Path, widthwise, mode: str, architecture: str) -> None:
    """In the paper's mode it has the paper's projection, also where the run goes on from its own files."""
    vit = TOY.replace("height = 32\nwidth = 16", "height = 64\nwidth = 32")
    vit = vit.replace('"resnet18"\nwidth = "4"', '"vit_tiny"\nwidth = "96"')
    (tmp_path / "vit.toml").write_text(vit.replace('narrowest = "2"', f'mode = "{mode}"\nnarrowest = "24"'))
    done = widthwise("refine", tmp_path / "vit.toml", "--out", tmp_path / "run", "--steps", 3)
    assert done.status == 0, done.err
    chain = load(tmp_path / "run" / "chain.safetensors").chain
    assert (chain.mode, chain.architecture, str(chain.ladder[0])) == (mode, architecture, "w24")
    assert read_exported(tmp_path / "run" / "teacher.safetensors").origin.architecture == "vit_tiny"
    again = widthwise("refine", tmp_path / "vit.toml", "--out", tmp_path / "run", "--steps", 3, "--resume")
    assert again.status == 0, again.err
    assert load(tmp_path / "run" / "chain.safetensors").chain.embedding_space == chain.embedding_space


def test_a_new_chain_is_trained_to_be_compatible_with_an_old_one(toy: Path, tmp_path: Path, widthwise) -> None:
    old, options = toy / "run" / "chain.safetensors", ("--seed", 5, "--steps", 3)
    done = widthwise("refine", toy / "toy.toml", "--out", tmp_path / "run", *options, "--compatible-with", old)
    assert done.status == 0, done.err
    stored, report = (
        load(tmp_path / "run" / "chain.safetensors"),
        json.loads((tmp_path / "run/report.json").read_text()),
    )
    record = stored.chain.provenance["compatible_with"]
    assert report["compatible_with"] == record
    assert record["chain_digest"] == load(old).digest
    spaces = {True: load(old).chain.embedding_space, False: f"es-{fingerprint(stored.chain.tensors)}"}
    assert stored.chain.embedding_space == report["embedding_space"] == spaces[record["is_met"]]
    frontiers = {name: found.chain.frontier for name, found in (("old_map", load(old)), ("new_map", stored))}
    assert all(frontier and frontier.widths[-1].map == record[name] for name, frontier in frontiers.items())
    row = next(line for line in done.out.splitlines() if line.strip().startswith("new chain  "))
    assert row.split()[2:] == [f"{record[name]:.1f}" for name in ("old_gallery_new_query_map", "new_map")]
    assert str(tmp_path) not in json.dumps(dict(stored.chain.provenance))
    assert "compatible" in read_events(tmp_path / "run")[1]["losses"]
    again = widthwise("refine", tmp_path / "run" / "config.toml", "--out", tmp_path / "again")
    assert again.status == 0, again.err
    assert load(tmp_path / "again" / "chain.safetensors").digest == stored.digest


def test_an_old_chain_that_cannot_be_met_is_refused_before_anything_is_written(
    toy: Path, tmp_path: Path, widthwise
) -> None:
    old = tmp_path / "old.safetensors"
    save(pico_chain(), old)
    done = widthwise("refine", toy / "toy.toml", "--out", tmp_path / "run", "--compatible-with", old)
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "'pico' embeds into 64 numbers, the new teacher into 32" in done.err
    assert not (tmp_path / "run").exists()


def test_several_processes_make_one_run(tmp_path: Path) -> None:
    """Two processes share the micro-batches of each step; the first one alone reports and writes."""
    shared_out = TOY.replace("steps = 12\nwarmup_steps = 2", "steps = 3\nwarmup_steps = 1\nmicro_batches = 2")
    (tmp_path / "toy.toml").write_text(shared_out)
    start = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = process(tmp_path, "refine", "toy.toml", "--out", "run", start=start)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("chain.safetensors: sha256") == 1
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    assert [event["step"] for event in read_events(tmp_path / "run") if "losses" in event] == [3, 3]


def test_calibrate_measures_statistics_on_other_images(toy: Path, tmp_path: Path, widthwise) -> None:
    out, chain = tmp_path / "calibrated.safetensors", toy / "run" / "chain.safetensors"
    done = widthwise("calibrate", chain, "--data", toy / "toy.toml", "--out", out, "--images", 300, "--seed", 1)
    assert done.status == 0, done.err
    old, new = load(chain).chain, load(out).chain
    assert new.embedding_space == old.embedding_space
    assert new.frontier is None
    width = old.ladder[0]
    assert not np.array_equal(old.statistics[width]["bn1.running_mean"], new.statistics[width]["bn1.running_mean"])


def test_evaluate_prints_what_the_chain_s_own_frontier_says(toy: Path, tmp_path: Path, widthwise) -> None:
    chain, out = toy / "run" / "chain.safetensors", tmp_path / "measured.safetensors"
    done = widthwise("evaluate", chain, "--data", toy / "toy.toml", "--plots", tmp_path / "plots", "--write", out)
    assert done.status == 0, done.err
    frontier = load(chain).chain.frontier
    assert frontier is not None
    for measured in frontier.widths:
        line = next(row for row in done.out.splitlines() if row.split()[0:1] == [str(measured.width)])
        assert f"{measured.map:.1f}" in line
    assert "query \\ gallery" in done.out
    assert "false-accept rate 1e-2" in done.out
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"frontier.png", "cross_width.png"}
    assert load(out).chain.frontier == frontier


def test_evaluate_gives_json_of_the_widths_that_are_asked_for(toy: Path, widthwise) -> None:
    chain = toy / "run" / "chain.safetensors"
    command = ("evaluate", chain, "--data", toy / "toy.toml", "--json", "--width", "4", "--width", "2x2-4-8")
    report, whole = (json.loads(widthwise(*arguments).out) for arguments in (command, command[:5]))
    assert [row["width"] for row in report["widths"]] == ["2x2-4-8", "4x2-4-8"]
    assert report["widths"] == [whole["widths"][0], whole["widths"][2]]
    assert report["cross_map"][0][1] == whole["cross_map"][0][2]


def test_evaluate_can_re_rank_and_the_protocol_says_so(toy: Path, widthwise) -> None:
    chain = toy / "run" / "chain.safetensors"
    plain = ("evaluate", chain, "--data", toy / "toy.toml", "--json", "--width", "4")
    report, reranked = (json.loads(widthwise(*arguments).out) for arguments in (plain, (*plain, "--rerank")))
    assert "k-reciprocal" in reranked["protocol"]
    assert "k-reciprocal" not in report["protocol"]
    assert report["widths"] != reranked["widths"]


@pytest.mark.parametrize("preprocess", ["none", "in-graph"])
def test_an_exported_onnx_file_measures_as_its_width(toy: Path, tmp_path: Path, widthwise, preprocess: str) -> None:
    chain, out = toy / "run" / "chain.safetensors", tmp_path / "model.onnx"
    done = widthwise("export", chain, "--width", "3", "--out", out, "--preprocess", preprocess)
    assert done.status == 0, done.err
    figures = json.loads(widthwise("evaluate", out, "--data", toy / "toy.toml", "--json").out)
    frontier = load(chain).chain.frontier
    assert frontier is not None
    assert figures["map"] == pytest.approx(frontier.widths[1].map, abs=0.3)


def test_export_to_safetensors_gives_a_network_to_train_on(toy: Path, tmp_path: Path, widthwise) -> None:
    chain, out = toy / "run" / "chain.safetensors", tmp_path / "student.safetensors"
    done = widthwise("export", chain, "--width", "2", "--format", "safetensors", "--out", out)
    assert done.status == 0, done.err
    assert read_exported(out).origin.chain_digest == load(chain).digest
    again = widthwise("export", chain, "--width", "2", "--format", "safetensors", "--out", out)
    assert again.status == 2
    assert "exists already" in again.err


@pytest.mark.parametrize(
    ("name", "written", "width"),
    [
        ("osnet", "8", "8x4-6-8"),
        ("vit_tiny", "24", "w24"),
        ("vit_tiny", "w24", "w24"),
        ("resnet18", "4", "4x2-4-8"),
    ],
)
def test_a_lone_number_is_a_width_of_the_chain_s_family(
    tmp_path: Path, widthwise, name: str, written: str, width: str
) -> None:
    chain = contract_chain(name)
    save(chain, tmp_path / "chain.safetensors")
    done = widthwise("export", tmp_path / "chain.safetensors", "--width", written, "--out", tmp_path / "model.onnx")
    assert done.status == 0, done.err
    assert f"{chain.name} at {width}" in done.out
    assert describe(tmp_path / "model.onnx")["metadata"]["widthwise.width"] == width


def test_a_width_of_another_family_is_refused_with_an_example(tmp_path: Path, widthwise) -> None:
    save(contract_chain("vit_tiny"), tmp_path / "chain.safetensors")
    done = widthwise("export", tmp_path / "chain.safetensors", "--width", "4x2-4-8", "--out", tmp_path / "model.onnx")
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "4x2-4-8 is no width of vit_tiny; write it as in 'w16'" in done.err


def test_finetune_trains_one_width_and_can_go_on(toy: Path, tmp_path: Path, widthwise) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("steps = 8\nwarmup_steps = 2\nbatch = { identities = 4, images_per_identity = 2 }\n")
    chain, out = toy / "run" / "chain.safetensors", tmp_path / "tuned"
    command = ("finetune", chain, "--width", "3", "--data", toy / "toy.toml", "--out", out, "--recipe", recipe)
    done = widthwise(*command, "--lr", 0.01)
    assert done.status == 0, done.err
    tuned = load(out / "chain.safetensors")
    assert tuned.chain.frontier is not None
    assert tuned.chain.frontier.trained_after_expansion
    assert tuned.chain.embedding_space != load(chain).chain.embedding_space
    assert [str(width) for width in tuned.chain.ladder] == ["3x2-4-8"]
    assert len(load_trained(out / "student.safetensors").classifier) == 40
    assert widthwise(*command).status == 2
    (out / "report.json").unlink()
    other = widthwise(*command, "--lr", 0, "--resume")
    assert (other.status, "recipe.lr is 0.01 there and 0.0 here" in other.err) == (2, True)
    resumed = widthwise(*command, "--lr", 0.01, "--resume")
    assert resumed.status == 0, resumed.err
    assert load(out / "chain.safetensors").digest == tuned.digest
    model = tmp_path / "model.onnx"
    assert widthwise("export", out / "chain.safetensors", "--width", "3", "--out", model).status == 0
    figures = json.loads(widthwise("evaluate", model, "--data", toy / "toy.toml", "--json").out)
    assert figures["map"] == pytest.approx(tuned.chain.frontier.widths[0].map, abs=0.3)


def test_a_finetuned_student_starts_another_training(toy: Path, tmp_path: Path, widthwise) -> None:
    text = TOY.replace('width = "4"\n', f'width = "4"\nstart = "{toy / "run" / "teacher.safetensors"}"\n')
    (tmp_path / "started.toml").write_text(text)
    done = widthwise("refine", tmp_path / "started.toml", "--out", tmp_path / "run", "--steps", 3)
    assert done.status == 0, done.err
    teachers = [load_trained(folder / "run" / "teacher.safetensors").model for folder in (toy, tmp_path)]
    assert not torch.equal(teachers[0].backbone.conv1.weight, teachers[1].backbone.conv1.weight)


def test_compare_sets_frontiers_side_by_side(toy: Path, tmp_path: Path, widthwise) -> None:
    chain, other = toy / "run" / "chain.safetensors", tmp_path / "other.safetensors"
    save(replace(load(chain).chain, name="other"), other)
    done = widthwise("compare", chain, other, "--data", toy / "toy.toml", "--out", tmp_path / "compared")
    assert done.status == 0, done.err
    rows = list(csv.DictReader(io.StringIO((tmp_path / "compared" / "compare.csv").read_text())))
    assert [row["chain"] for row in rows] == ["toy"] * 3 + ["other"] * 3
    assert [row["map"] for row in rows[:3]] == [row["map"] for row in rows[3:]]
    assert (tmp_path / "compared" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    cells = re.findall(r"^ *(?:toy|other) +([\d.]+) +([\d.]+)$", done.out, re.MULTILINE)
    assert np.array(cells, float) == pytest.approx(float(rows[2]["map"]), abs=0.1)  # one chain under two names
    assert len(cells) == 2


def test_chains_of_one_name_are_told_apart_by_their_files(toy: Path, tmp_path: Path, widthwise) -> None:
    chain, copy = toy / "run" / "chain.safetensors", tmp_path / "chain.safetensors"
    copy.write_bytes(chain.read_bytes())
    done = widthwise("compare", chain, copy, "--data", toy / "toy.toml")
    assert done.status == 0, done.err
    assert all(sum(row.lstrip().startswith(str(path)) for row in done.out.splitlines()) == 4 for path in (chain, copy))


def test_chains_of_other_lengths_are_compared_without_crossing(toy: Path, tmp_path: Path, widthwise) -> None:
    other = tmp_path / "wide.safetensors"
    save(pico_chain(stem=8, name="wide"), other)
    done = widthwise("compare", toy / "run" / "chain.safetensors", other, "--data", toy / "toy.toml")
    assert done.status == 0, done.err
    assert "wide" in done.out
    assert "queries of the row's chain" not in done.out


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    people = replace(PeopleSettings(), train_identities=40, test_identities=6, height=32, width=16)
    folder = tmp_path_factory.mktemp("photographs")
    write_market1501(folder, people)
    return folder


def test_validate_counts_and_finds_what_is_broken(photographs: Path, tmp_path: Path, widthwise) -> None:
    done = widthwise("validate", "--data", photographs)
    assert (done.status, done.err) == (0, "")
    assert "usable" in done.out
    counted = json.loads(widthwise("validate", "--data", f"market1501:{photographs}", "--json", "--no-decode").out)
    assert counted["splits"]["train"]["identities"] == 40
    broken = photographs / "query" / "5001_c1s1_999999_00.jpg"
    broken.write_bytes(b"not a picture")
    done = widthwise("validate", "--data", photographs)
    broken.unlink()
    assert done.status == 2
    assert broken.name in done.out


def test_a_run_reads_photographs_from_disk(photographs: Path, tmp_path: Path, widthwise) -> None:
    section = TOY[TOY.index("[data]") : TOY.index("[teacher]")]
    data = f'[data]\nroot = "{photographs}"\nheight = 32\nwidth = 16\n\n'
    (tmp_path / "photos.toml").write_text(TOY.replace(section, data))
    done = widthwise("refine", tmp_path / "photos.toml", "--out", tmp_path / "run", "--steps", 3)
    assert done.status == 0, done.err
    assert 'kind = "market1501"' in (tmp_path / "run" / "config.toml").read_text()
    done = widthwise("evaluate", tmp_path / "run" / "chain.safetensors", "--data", photographs)
    assert "Market-1501: 12 queries, 48 gallery images" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "{chain}", "--data", "nowhere"), "nowhere: there is no such file or folder"),
        (("evaluate", "{chain}", "--data", "msmt17:nowhere"), "nowhere"),
        (("evaluate", "{config}", "--data", "synthetic"), "toy.toml: "),
        (("evaluate", "{chain}", "--data", "{config}", "--width", "9"), "width 9x2-4-8"),
        (("evaluate", "{chain}", "--data", "{config}", "--width", "2", "--write", "x"), "--write or --width"),
        (("export", "{chain}", "--width", "wide", "--out", "x"), "'wide' is no width"),
        (("export", "{chain}", "--width", "2", "--out", "x", "--format", "tar"), "no format is called 'tar'"),
        (("export", "{chain}", "--width", "2", "--out", "x", "--opset", "3"), "opset 3 is not one of"),
        (
            ("export", "{chain}", "--width", "2", "--out", "x", "--opset", "17", "--format", "safetensors"),
            "--opset is for --format onnx",
        ),
        (("finetune", "{chain}", "--width", "9", "--data", "{config}", "--out", "x"), "width 9x2-4-8"),
        (
            ("finetune", "{chain}", "--width", "2", "--data", "{config}", "--out", "x", "--recipe", "{config}"),
            "toy.toml: steps: Field required",
        ),
        (("refine", "{config}", "--out", "x", "--device", "abacus"), "--device: Input should be 'cpu' or 'cuda'"),
        (("evaluate", "{onnx}", "--data", "{config}", "--write", "x"), "--write is for chains"),
        (("evaluate", "{onnx}", "--data", "{config}", "--width", "2"), "--width is for chains"),
        (("evaluate", "{chain}", "--data", "{config}", "--device", "abacus"), "'cpu' or 'cuda', not 'abacus'"),
        (("compare", "{chain}", "--data", "{config}", "--device", "abacus"), "'cpu' or 'cuda', not 'abacus'"),
        (
            ("calibrate", "{chain}", "--data", "{config}", "--out", "x", "--device", "abacus"),
            "'cpu' or 'cuda', not 'abacus'",
        ),
        (
            ("finetune", "{chain}", "--width", "2", "--data", "{config}", "--out", "x", "--device", "abacus"),
            "'cpu' or 'cuda', not 'abacus'",
        ),
        (
            ("finetune", "{chain}", "--width", "2", "--data", "{config}", "--out", "x", "--recipe", "{typo}"),
            "typo.toml: lrr: Unexpected keyword argument",
        ),
        (
            ("finetune", "{chain}", "--width", "2", "--data", "{config}", "--out", "x", "--lr", "-1"),
            "lr=-1.0",
        ),
        (
            ("finetune", "{chain}", "--width", "2", "--data", "{config}", "--out", "x", "--recipe", "{crowd}"),
            "40 identities cannot fill a batch of 64",
        ),
        (("finetune", "{chain}", "--width", "2", "--data", "{config}", "--out", ".", "--resume"), "no run to resume"),
        (("refine", "{crowded}", "--out", "x"), "40 identities cannot fill a batch of 64"),
        (("validate", "--data", "synthetic"), "rendered, not read"),
        (("validate", "--data", "market1501:"), "market1501: names no folder or file"),
        (("validate", "--data", ""), "--data names no folder or file"),
        (("calibrate", "{chain}", "--data", "{config}", "--out", "no/x"), "there is no folder no"),
        (("finetune", "{chain}", "--width", "2", "--data", "{config}", "--out", "{config}"), "Not a directory"),
        (("refine", "{few}", "--out", "x"), "80 training images cannot calibrate a chain; at least 256"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    toy: Path, tmp_path: Path, widthwise, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"chain": toy / "run" / "chain.safetensors", "config": toy / "toy.toml", "few": toy / "few.toml"}
    places |= {name: tmp_path / f"{name}.toml" for name in ("typo", "crowd", "crowded")} | {"onnx": tmp_path / "a.onnx"}
    places["few"].write_text(TOY.replace("train_identities = 40", "train_identities = 10"))
    places["typo"].write_text("steps = 8\nlrr = 0.1\n")
    places["crowd"].write_text("steps = 8\nbatch = { identities = 64 }\n")
    places["crowded"].write_text(TOY.replace("{ identities = 4", "{ identities = 64"))
    places["onnx"].write_bytes(b"not looked at")
    done = widthwise(*(argument.format(**places) for argument in arguments))
    assert done.status == 2
    assert message in done.err
    assert (done.err.count("\n"), done.err[:11]) == (1, "widthwise: ")
    assert not (tmp_path / "x").exists()


def test_an_onnx_file_of_another_program_is_refused(tmp_path: Path, widthwise) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    done = widthwise("evaluate", tmp_path / "model.onnx", "--data", "synthetic")
    assert done.status == 2
    assert "no ONNX file that runs" in done.err


def test_without_torch_the_commands_are_listed_and_say_what_they_need(toy: Path) -> None:
    """In a process where torch cannot be imported: `--help`, then a command."""
    code = (
        "import sys, contextlib\n"
        "sys.modules['torch'] = None\n"
        "from app.cli import main\n"
        "sys.argv = ['widthwise', '--help']\n"
        "with contextlib.suppress(SystemExit):\n    main()\n"
        "sys.argv = ['widthwise', 'refine', 'toy.toml']\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=toy, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "finetune" in done.stdout
    assert "needs torch; install the training extra: pip install 'widthwise[train]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_images_in_which_no_query_can_be_answered_are_refused_before_training() -> None:
    unanswerable = ImageSet(np.zeros((3, 4, 2, 3), np.uint8), np.array([1, 2, 3]), np.array([1, 1, 1]))
    with pytest.raises(DataError, match="site: no query has a gallery image of the same identity from another camera"):
        require_answers(Source("site", lambda split: unanswerable))
    require_answers(Source("site", lambda split: replace(unanswerable, camids=np.array([1, 1, int(split == "query")]))))
