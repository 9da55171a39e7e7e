"""The jobs that train and measure, step by step with real child processes, on a toy data set and a toy teacher."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from app.db.tables import DatasetRow, TeacherRow
from app.errors import ChildFailed, JobPermanentlyFailed
from app.storage.port import content_key
from app.terms import Rights
from app.worker import landlock
from app.worker.archives import Limits
from app.worker.context import StepContext
from app.worker.file_tree import digest_of, list_tree
from app.worker.kinds import KINDS
from app.worker.refinement import CHECKPOINT, PASSING
from app.worker.runner import is_transient
from chains.artifact import dump, load
from chains.onnxfile import EmitOptions
from chains.onnxfile import write as write_onnx
from chains.testing import pico_chain
from chains.width import Width
from tests.app.trainings import JOB, SITE, KilledOnce, World, run, told

REFINE = {
    "name": "toy-chain",
    "teacher": "toy",
    "dataset": "site",
    "steps": 12,
    "narrowest": "2",
    "rungs": 3,
    "batch": {"identities": 4, "images_per_identity": 2},
    "evaluation": {"calibration_images": 256, "validation_identities": 6},
}


def test_a_refinement_that_loses_its_training_and_its_worker_ends_with_the_chain_of_an_undisturbed_one(
    tmp_path: Path, make_world: Callable[[Path], World]
) -> None:
    world = make_world(tmp_path / "service")
    first = world.context("refine", REFINE, tmp_path / "worker-1")
    first.__class__ = KilledOnce
    run(first, "refine", ["cluster"])
    with pytest.raises(ChildFailed) as lost:
        run(first, "refine", ["refine"])
    assert is_transient(lost.value)
    assert CHECKPOINT in world.files()
    shutil.rmtree(tmp_path / "worker-1")

    second = world.context("refine", REFINE, tmp_path / "worker-2")
    second.outputs = dict(first.outputs)
    run(second, "refine", ["refine", "calibrate"])
    log = [json.loads(line) for line in (second.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in log if "losses" in event] == list(range(1, 13))
    shutil.rmtree(tmp_path / "worker-2")

    third = world.context("refine", REFINE, tmp_path / "worker-3")
    third.outputs = dict(second.outputs)
    result = run(third, "refine", ["evaluate", "verify", "publish"])
    assert result["digest"] == undisturbed(first, tmp_path / "alone")
    assert run(third, "refine", ["publish"]) == result  # a second time changes nothing
    assert world.files().isdisjoint(PASSING)

    row = world.registry.find("toy-chain")
    assert (row.digest, row.job, row.terms, row.consent_basis) == (result["digest"], JOB, "research", "synthetic")
    chain = world.registry.load(row.digest).chain
    assert chain.license == row.license == "MIT AND CC-BY-NC-4.0"
    assert license_in(write_onnx(world.registry.load(row.digest), chain.ladder[0], EmitOptions())) == chain.license
    assert chain.provenance["classifier"] == "centroids"
    assert chain.provenance["made_from"] == {
        "job": JOB, "teacher": "toy", "teacher_sha256": first.outputs["cluster"]["teacher_weights"],
        "dataset": "site", "dataset_digest": first.outputs["cluster"]["dataset_digest"],
    }  # fmt: skip
    assert chain.frontier is not None
    assert chain.frontier.dataset == "site"
    assert {width["width"]: width["map"] for width in result["widths"]} == {
        str(measured.width): measured.map for measured in chain.frontier.widths
    }
    progress = told(world)
    assert (progress["step"], progress["steps"]) == (12, 12)
    assert progress["early_map"].keys() == {"map narrowest", "map full"}
    assert progress["losses"].keys() == {"full", "narrowest", "between"}
    assert progress["epoch"] > 0
    assert str(tmp_path) not in json.dumps([first.outputs, third.outputs, dict(chain.provenance)])


def license_in(student: bytes) -> str:
    """What an ONNX file says of itself."""
    return {entry.key: entry.value for entry in onnx.load_from_string(student).metadata_props}["license"]


def undisturbed(context: StepContext, folder: Path) -> str:
    """The digest of the same run, done in one go by one process."""
    settled = context.outputs["cluster"]
    config = dict(settled["config"])
    recipe = config.pop("recipe")
    weights = folder / "weights.safetensors"
    folder.mkdir()
    weights.write_bytes(b"".join(context.store.get(content_key(settled["teacher_weights"]))))
    config["teacher"] = {**config["teacher"], "source": str(weights)}
    with context.database.transaction() as session:
        location = session.get_one(DatasetRow, "site").location
    config["data"] = {**config["data"], "kind": "market1501", "root": location, "name": "site"}
    task = {"do": "refine", "config": config, "folder": str(folder / "run"), "until": "evaluate", **recipe}
    (folder / "task.json").write_text(json.dumps(task))
    command = [sys.executable, "-m", "chains.stages", "task.json", "result.json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load(folder / "run" / "chain.safetensors").digest


def test_what_a_stage_refuses_ends_the_job_with_its_words_and_no_folder(
    tmp_path: Path, make_world: Callable[[Path], World]
) -> None:
    context = make_world(tmp_path / "service").context(
        "refine", {**REFINE, "batch": {"identities": 100}}, tmp_path / "worker"
    )
    with pytest.raises(JobPermanentlyFailed, match="40 identities cannot fill a batch of 100") as refused:
        run(context, "refine", ["cluster"])
    assert str(tmp_path) not in str(refused.value)
    assert not is_transient(refused.value)


@pytest.mark.skipif(landlock.version() == 0, reason="this kernel has no Landlock")
def test_a_stage_can_read_the_data_set_and_not_write_it(
    tmp_path: Path, make_world: Callable[[Path], World], site: Path
) -> None:
    """Also as root, to whom file modes mean nothing, and in what it starts itself."""
    context = make_world(tmp_path / "service").context("refine", REFINE, tmp_path / "worker")
    code = f"""
import os, pathlib, subprocess, sys, tempfile
image = next(pathlib.Path({str(site)!r}).glob("*/*.jpg"))
assert image.read_bytes()
tempfile.NamedTemporaryFile().close()
refused = 0
for attempt in (lambda: image.write_bytes(b""), image.unlink, (image.parent / "new").mkdir):
    try:
        attempt()
    except OSError:
        refused += 1
child = subprocess.run(["/bin/sh", "-c", f"echo x > {{image}}"], stderr=subprocess.DEVNULL)
sys.exit(0 if refused == 3 and child.returncode else 1)
"""
    before = digest_of(list_tree(site, Limits(10**5, 10**9)))
    context.run_child([sys.executable, "-c", code], on_line=context.log)
    assert digest_of(list_tree(site, Limits(10**5, 10**9))) == before


def test_a_data_set_that_has_changed_since_the_job_began_ends_it(
    tmp_path: Path, make_world: Callable[[Path], World]
) -> None:
    world = make_world(tmp_path / "service")
    context = world.context("refine", REFINE, tmp_path / "worker")
    context.outputs["cluster"] = {"dataset_digest": "f" * 64, "teacher_weights": "", "config": {"recipe": {}}}
    with pytest.raises(JobPermanentlyFailed, match="'site' is no longer the one this job began with"):
        run(context, "refine", ["verify"])


def test_a_cancelled_job_keeps_nothing_and_a_failed_one_all(
    tmp_path: Path, make_world: Callable[[Path], World]
) -> None:
    world = make_world(tmp_path / "service")
    context = world.context("refine", REFINE, tmp_path / "worker")
    (context.folder / "file").write_bytes(b"checkpoint")
    context.keep_file(context.folder / "file", CHECKPOINT)
    after = KINDS["refine"].failed
    assert after is not None
    after(context, "something broke")
    assert world.files() == {CHECKPOINT}
    after(context, "cancelled")
    after(context, "cancelled")
    assert world.files() == set()


def test_a_calibrated_chain_is_published_in_the_space_of_the_old_one(
    tmp_path: Path, make_world: Callable[[Path], World]
) -> None:
    world = make_world(tmp_path / "service")
    old = world.registry.publish(dump(pico_chain(height=32, width=16)), rights=Rights("MIT", "any", "consent"))
    body = {"chain": "stable", "dataset": "site", "images": 256, "name": "pico-site"}
    result = run(world.context("calibrate", body, tmp_path / "worker"), "calibrate")
    row = world.registry.find("pico-site")
    assert (row.digest, row.embedding_space) == (result["digest"], old.embedding_space)
    assert (row.terms, row.consent_basis, row.job) == ("research", "consent", JOB)
    chain = world.registry.load(row.digest).chain
    assert chain.license == row.license == f"{old.license} AND CC-BY-NC-4.0"
    assert chain.provenance["made_from"]["chain"] == "pico"
    assert chain.provenance["calibrated_on"]["chain_digest"] == old.digest
    assert chain.frontier is not None
    assert chain.frontier.dataset == "site"
    assert world.files() >= {"chain.safetensors", "report.json", "widths.csv", "frontier.png"}


def test_teachers_are_measured_whole_and_as_onnx_in_the_sandbox(
    tmp_path: Path, make_world: Callable[[Path], World], teacher_file: Path
) -> None:
    world = make_world(tmp_path / "service")
    first = run(world.context("evaluate", {"teacher": "toy", "dataset": "site"}, tmp_path / "worker"), "evaluate")
    assert (first["queries"], first["published"]) == (SITE.test_identities * SITE.queries_per_identity, False)
    onnx = write_onnx(load(dump(pico_chain(height=32, width=16))), Width(8), EmitOptions())
    sha256 = hashlib.sha256(onnx).hexdigest()
    world.store.put(content_key(sha256), [onnx], sha256)
    with world.database.transaction() as session:
        row = session.get_one(TeacherRow, "toy")
        row.format, row.architecture, row.sha256, row.report = "onnx", "onnx", sha256, {}
    shutil.rmtree(tmp_path / "worker")
    second = run(world.context("evaluate", {"teacher": "toy", "dataset": "site"}, tmp_path / "worker"), "evaluate")
    assert second["map"] > 0
    assert second["queries"] == first["queries"]
    assert world.files() == {"report.json"}


def test_a_finetuned_student_stays_with_the_job(tmp_path: Path, make_world: Callable[[Path], World]) -> None:
    world = make_world(tmp_path / "service")
    world.registry.publish(dump(pico_chain(height=32, width=16)))
    body = {
        "chain": "pico", "width": "4", "dataset": "site", "preset": None, "steps": 3, "processes": 2,
        "batch": {"identities": 4, "images_per_identity": 2},
    }  # fmt: skip
    context = world.context("finetune", body, tmp_path / "worker")
    result = run(context, "finetune")
    assert result["before"].keys() == result["after"].keys() == {"map", "rank1"}
    assert world.files() >= {"student.safetensors", "student.onnx", "chain.safetensors", "report.json"}
    assert {row.name for row in world.registry.page("", 10).chains} == {"pico"}
    shutil.rmtree(tmp_path / "worker")
    again = world.context("finetune", body, tmp_path / "another")
    again.outputs = {"settle": context.outputs["settle"]}
    assert run(again, "finetune", ["finetune"]) == context.outputs["finetune"]  # it was complete: nothing is trained
    assert not (again.folder / "task.json").exists()
