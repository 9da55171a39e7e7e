"""The job `compress`, step by step with real child processes: from a teacher or a chain to a terminal chain."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from fastapi.testclient import TestClient

from app.db.tables import ChainRow, DatasetRow, TeacherRow
from app.errors import ChildFailed, JobPermanentlyFailed
from app.main import create_app, prepare
from app.services.job_requests import parse
from app.storage.port import content_key
from app.terms import Rights
from app.worker.compression import LASTING, PASSING, TRAININGS, trainings_of
from app.worker.context import StepContext
from app.worker.runner import is_transient
from app.worker.training import METRICS, RunFiles
from chains.architectures import architecture
from chains.artifact import dump, load
from chains.cost import count_macs
from chains.testing import pico_chain
from chains.width import Width
from tests.app.trainings import INPUT, JOB, KilledOnce, World, run, told
from tests.compress.pruned import a_terminal_chain

MACS = count_macs(architecture("resnet18"), Width(4), INPUT)
COMPRESS = {
    "name": "toy-small",
    "teacher": "toy",
    "dataset": "site",
    "limits": {"max_macs": MACS * 6 // 10},
    "preset": None,
    "steps": 12,
    "finetune_steps": 8,
    "batch": {"identities": 4, "images_per_identity": 2},
}
OF_A_CHAIN = {**COMPRESS, "teacher": None, "chain": "pico", "limits": None, "steps": 3, "finetune_steps": 2}


def test_a_compression_that_loses_both_trainings_and_their_workers_ends_with_the_chain_of_an_undisturbed_one(
    tmp_path: Path, make_world: Callable[[Path], World]
) -> None:
    world = make_world(tmp_path / "service")
    first = losing(world, COMPRESS, tmp_path / "worker-1", "prune: step 3/12")
    run(first, "compress", ["settle"])
    with pytest.raises(ChildFailed) as lost:
        run(first, "compress", ["compress"])
    assert is_transient(lost.value)
    assert {"start.safetensors", "checkpoint-prune.safetensors"} <= world.files()
    assert world.files().isdisjoint({"pruned.safetensors", "checkpoint-finetune.safetensors"})
    shutil.rmtree(tmp_path / "worker-1")

    second = losing(world, COMPRESS, tmp_path / "worker-2", "finetune: step 3/8")
    second.outputs = dict(first.outputs)
    with pytest.raises(ChildFailed):
        run(second, "compress", ["compress"])
    assert set(PASSING) <= world.files()
    second.flush()
    assert told(world)["training"] == "finetune"
    shutil.rmtree(tmp_path / "worker-2")

    third = world.context("compress", COMPRESS, tmp_path / "worker-3")
    third.outputs = dict(first.outputs)
    result = run(third, "compress", ["compress", "verify", "publish"])
    log = [json.loads(line) for line in (third.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [(event["stage"], event["step"]) for event in log if "losses" in event]
    assert steps == [("prune", n) for n in range(1, 13)] + [("finetune", n) for n in range(1, 9)]
    assert result["digest"] == undisturbed(first, tmp_path / "alone")
    assert run(third, "compress", ["publish"]) == result, "a second time changes nothing"
    assert world.files().isdisjoint(PASSING)
    assert world.files() >= {"student.safetensors", "chain.safetensors", "report.json", "curves.png"}
    assert str(tmp_path) not in json.dumps([first.outputs, third.outputs])
    is_published(world, result)
    is_served(world, result)


def losing(world: World, body: Mapping[str, Any], folder: Path, line: str) -> StepContext:
    """The job on a worker whose training is killed when it says `line`."""
    context = world.context("compress", body, folder)
    context.__class__ = KilledOnce
    context.line = line  # type: ignore[attr-defined]
    return context


def is_published(world: World, result: Mapping[str, Any]) -> None:
    """As what it is, with its rights and where it comes from."""
    row = world.registry.find("toy-small")
    assert (row.digest, row.job, row.embedding_space) == (result["digest"], JOB, result["embedding_space"])
    assert (row.terms, row.consent_basis, row.aliases) == ("research", "synthetic", [])
    chain = world.registry.load(row.digest).chain
    assert chain.sizes is not None
    assert chain.license == row.license == "MIT AND CC-BY-NC-4.0"
    assert chain.provenance["limits"] == result["limits"] == COMPRESS["limits"]
    with world.database.transaction() as session:
        teacher, dataset = session.get_one(TeacherRow, "toy"), session.get_one(DatasetRow, "site")
        assert chain.provenance["made_from"] == {
            "job": JOB, "teacher": "toy", "teacher_sha256": teacher.sha256,
            "dataset": "site", "dataset_digest": dataset.digest,
        }  # fmt: skip
    assert chain.frontier is not None
    (measured,) = chain.frontier.widths
    assert result["after"] == {"map": measured.map, "rank1": measured.rank1}
    assert result["teacher"] == result["before"]
    assert result["costs"]["macs"] <= COMPRESS["limits"]["max_macs"]


def is_served(world: World, result: Mapping[str, Any]) -> None:
    """By its name, to a device with these limits; and its ONNX file costs what was said."""
    app = create_app(world.settings)
    prepare(app.state.services)
    with TestClient(app) as client:
        answer = client.post("/models", json={"chain": "toy-small", "limits": COMPRESS["limits"]})
        assert answer.status_code == 200, answer.text
        tighter = {"chain": "toy-small", "limits": {"max_macs": result["costs"]["macs"] - 1}}
        assert client.post("/models", json=tighter).json()["code"] == "budget-too-small"
    app.state.services.database.dispose()
    assert len(answer.content) == result["costs"]["artifact_bytes"]
    assert {entry.key: entry.value for entry in onnx.load_from_string(answer.content).metadata_props}["license"] == (
        "MIT AND CC-BY-NC-4.0"
    )
    session = onnxruntime.InferenceSession(answer.content, providers=["CPUExecutionProvider"])
    (embeddings,) = session.run(None, {"images": np.zeros((2, 3, INPUT.height, INPUT.width), np.float32)})
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)


def undisturbed(context: StepContext, folder: Path) -> str:
    """The digest of the same compression, done in one go by one process."""
    settled = context.outputs["settle"]
    folder.mkdir()
    (folder / "toy.safetensors").write_bytes(b"".join(context.store.get(content_key(settled["source"]))))
    with context.database.transaction() as session:
        location = session.get_one(DatasetRow, "site").location
    task = {
        "do": "compress",
        "source": str(folder / "toy.safetensors"),
        "data": {"kind": "market1501", "root": location, "name": "site"},
        "folder": str(folder / "run"),
        "name": "toy-small",
        "license": "MIT AND CC-BY-NC-4.0",
        "made_from": settled["made_from"],
        "limits": COMPRESS["limits"],
        "changes": trainings_of(context.request),
    }
    (folder / "task.json").write_text(json.dumps(task))
    command = [sys.executable, "-m", "chains.stages", "task.json", "result.json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load(folder / "run" / "chain.safetensors").digest


def test_a_student_of_a_chain_is_compressed_towards_its_space_by_two_processes(
    tmp_path: Path, make_world: Callable[[Path], World]
) -> None:
    world = make_world(tmp_path / "service")
    old = world.registry.publish(dump(pico_chain(height=32, width=16)), rights=Rights("MIT", "any", "consent"))
    body = {**OF_A_CHAIN, "width": "8x2-4-8", "compatible_with": "pico", "processes": 2}
    context = world.context("compress", body, tmp_path / "worker")
    result = run(context, "compress")
    record = result["compatible_with"]
    assert (result["embedding_space"] == old.embedding_space) == record["is_met"]
    assert (result["width"], result["limits"]) == ("8x2-4-8", {})
    row = world.registry.find("toy-small")
    assert (row.consent_basis, row.license) == ("consent", "MIT AND CC-BY-NC-4.0")
    provenance = world.registry.load(row.digest).chain.provenance
    assert provenance["made_from"] == {
        "job": JOB, "chain": "pico", "chain_digest": old.digest,
        "dataset": "site", "dataset_digest": context.outputs["settle"]["dataset_digest"],
    }  # fmt: skip
    assert provenance["recipe"]["prune"]["micro_batches"] == 2
    shutil.rmtree(tmp_path / "worker")
    again = world.context("compress", body, tmp_path / "another")
    again.outputs = {"settle": context.outputs["settle"]}
    assert run(again, "compress", ["compress"]) == context.outputs["compress"]
    assert not (again.folder / "task.json").exists(), "it was complete: nothing is trained"


def test_a_compressed_network_is_compressed_further(tmp_path: Path, make_world: Callable[[Path], World]) -> None:
    world = make_world(tmp_path / "service")
    world.registry.publish(dump(a_terminal_chain()), rights=Rights("MIT", "any", "consent"))
    before = world.registry.find("terminal").widths[0].macs
    body = {**OF_A_CHAIN, "chain": "terminal", "width": "4x2-4-8", "limits": {"max_macs": before * 95 // 100}}
    made = run(world.context("compress", body, tmp_path / "worker"), "compress", ["settle", "compress"])
    assert made["costs"]["macs"] < before


def test_rights_are_the_strictest_of_everything_it_learns_from(
    tmp_path: Path, make_world: Callable[[Path], World]
) -> None:
    world = make_world(tmp_path / "service")
    world.registry.publish(dump(pico_chain(height=32, width=16)), rights=Rights("old", "unknown", "public"))
    context = world.context("compress", {**COMPRESS, "compatible_with": "pico"}, tmp_path / "worker")
    settled = run(context, "compress", ["settle"])
    assert settled["rights"] == {
        "license": "MIT AND CC-BY-NC-4.0 AND old", "terms": "unknown", "consent_basis": "public"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "body", "refusal"),
    [
        (TeacherRow, COMPRESS, "teacher 'toy' is not there any more"),
        (ChainRow, {**OF_A_CHAIN, "compatible_with": "pico"}, "chain 'pico' is not there any more"),
    ],
)
def test_what_went_before_the_job_began_ends_it(
    tmp_path: Path,
    make_world: Callable[[Path], World],
    row: type[TeacherRow | ChainRow],
    body: Mapping[str, Any],
    refusal: str,
) -> None:
    world = make_world(tmp_path / "service")
    with world.database.transaction() as session:
        for found in session.query(row):
            session.delete(found)
    with pytest.raises(JobPermanentlyFailed, match=refusal):
        run(world.context("compress", body, tmp_path / "worker"), "compress", ["settle"])


def test_what_the_stage_refuses_ends_the_job_with_its_words_and_no_folder(
    tmp_path: Path, make_world: Callable[[Path], World]
) -> None:
    """A budget below the floor never gets here by `POST /jobs`."""
    world = make_world(tmp_path / "service")
    context = world.context("compress", {**COMPRESS, "limits": {"max_macs": 1000}}, tmp_path / "worker")
    with pytest.raises(JobPermanentlyFailed, match="no compression of 'toy' fits: the smallest needs") as no:
        run(context, "compress")
    assert str(tmp_path) not in str(no.value)
    assert not is_transient(no.value)
    assert "compression.toml" not in world.files()


def test_progress_is_told_from_a_log_that_was_rewound_and_has_grown_since(
    tmp_path: Path, make_world: Callable[[Path], World]
) -> None:
    """Each training rewinds the log when it begins, between two looks."""
    world = make_world(tmp_path / "service")
    context = world.context("compress", COMPRESS, tmp_path / "worker")
    files, log = RunFiles(context, context.folder, LASTING, TRAININGS), context.folder / METRICS
    for training, lines in (("prune", 3), ("finetune", 40)):
        events = [{"stage": training, "step": step, "losses": {"loss": step / 7}} for step in range(1, lines + 1)]
        log.write_text("".join(json.dumps(event) + "\n" for event in events) + '{"stage": "half')
        files.tell()
        context.flush()
        assert (told(world)["training"], told(world)["step"]) == (training, lines)


SMALL = {"steps": 300, "warmup_steps": 30, "micro_batches": 1}
AFTER = {"steps": 50, "warmup_steps": 5, "micro_batches": 1}
AS_DEAP = {"precision": "float32", "micro_batches": 1}


@pytest.mark.parametrize(
    ("asked", "prune", "finetune"),
    [
        ({}, AS_DEAP, AS_DEAP),
        ({"steps": 5000}, {"steps": 5000, "warmup_steps": 100}, AS_DEAP),
        ({"preset": "small"}, SMALL, AFTER),
        ({"preset": "small", "learning_rate": 0.1}, {**SMALL, "lr": 0.1}, AFTER),
        ({"preset": None, "steps": 3}, {"steps": 3, "warmup_steps": 0}, {"steps": 1, "warmup_steps": 0}),
        ({"preset": None, "steps": 60, "finetune_steps": 40}, {"steps": 60}, {"steps": 40, "warmup_steps": 4}),
        ({"preset": "small", "processes": 2, "batch": {}}, {"micro_batches": 2}, {"micro_batches": 2}),
    ],
)
def test_a_request_says_what_differs_from_the_schedule_of_deap(
    asked: Mapping[str, Any], prune: Mapping[str, Any], finetune: Mapping[str, Any]
) -> None:
    request = parse("compress", {"name": "new", "teacher": "toy", "dataset": "site", **asked}).model_dump(mode="json")
    found = trainings_of(request)
    assert found["prune"].items() >= prune.items()
    assert found["finetune"].items() >= finetune.items()
    assert ("lr" in found["prune"], "lr" in found["finetune"]) == ("learning_rate" in asked, False)
    if not asked:
        assert (found["prune"], found["finetune"]) == (AS_DEAP, AS_DEAP)
