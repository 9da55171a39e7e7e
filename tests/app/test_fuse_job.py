"""The job `fuse`, step by step with real child processes: a toy network and somebody else's graph become a teacher."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file
from sqlalchemy import func, select

from app.db.tables import AuditRow, DatasetRow, TeacherRow
from app.db.teachers import TeacherRows
from app.errors import ChildFailed, JobPermanentlyFailed
from app.storage.port import content_key
from app.worker import landlock
from app.worker.context import StepContext
from app.worker.fusion import CHECKPOINT, TEACHER
from app.worker.runner import is_transient
from app.worker.sandbox import confinement
from tests.app.conftest import answers, free_port, running
from tests.app.trainings import JOB, ROOT, KilledOnce, World, dataset_row, make_world, run, teacher_row, told
from tests.chains.fusions import a_graph

FUSE = {
    "name": "fused",
    "dataset": "site",
    "inputs": [
        {"teacher": "toy", "view": {"top": 0.0, "bottom": 0.5}},
        {"teacher": "legs", "view": {"top": 0.5, "bottom": 1.0, "height": 24, "width": 20}},
    ],
    "image": {"height": 32, "width": 16},
    "architecture": "resnet18",
    "width": "4",
    "steps": 12,
    "batch": {"identities": 4, "images_per_identity": 2},
    "validation_identities": 6,
    "keep_worse": True,
}


class KilledInFuse(KilledOnce):
    line = "fuse: step 6/12"


@pytest.fixture
def make_fusing(make_world: Callable[[Path], World], tmp_path: Path) -> Callable[[Path], World]:
    """A service that also has a foreign graph of the legs."""
    return lambda folder: with_legs(make_world(folder), tmp_path)


def with_legs(world: World, folder: Path) -> World:
    add_graph(world, "legs", a_graph(folder / "legs.onnx", height=24, width=20, has_map=True), 24, 20)
    return world


def add_graph(world: World, name: str, path: Path, height: int, width: int) -> str:
    """Register an ONNX file as a check leaves it; its sha256."""
    content, now = path.read_bytes(), datetime.now(UTC)
    sha256 = hashlib.sha256(content).hexdigest()
    world.store.put(content_key(sha256), [content], sha256)
    with world.database.transaction() as session:
        session.add(
            TeacherRow(
                name=name, state="ready", sha256=sha256, size_bytes=len(content), format="onnx", architecture="onnx",
                input={"height": height, "width": width, "mean": [0.5] * 3, "std": [0.25] * 3}, report={},
                license="GPL-3.0", terms="any", consent_basis="consent", created_at=now, updated_at=now,
            )
        )  # fmt: skip
    return sha256


def spelt_out(body: Mapping[str, Any]) -> dict[str, Any]:
    """As `POST /jobs` leaves it."""
    views = [{**one, "view": {"height": 32, "width": 16, **one["view"]}} for one in body["inputs"]]
    return {**body, "inputs": views, "width": "4x2-4-8"}


def teachers(world: World) -> dict[str, TeacherRow]:
    with world.database.transaction() as session:
        return {row.name: row for row in TeacherRows(session).page("", 10)}


@pytest.fixture(scope="module")
def half_done(site: Path, teacher_file: Path, tmp_path_factory: pytest.TempPathFactory) -> StepContext:
    """A job that has fused and not registered, on a service of its own."""
    folder = tmp_path_factory.mktemp("half-done")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        world = with_legs(make_world(folder / "service", site, teacher_file), folder)
        context = world.context("fuse", spelt_out({**FUSE, "steps": 1}), folder / "worker")
        run(context, "fuse", ["settle", "fuse"])
    return context


def going_on(world: World, half_done: StepContext, folder: Path, **changes: Any) -> StepContext:
    """That job on another service."""
    context = world.context("fuse", {**half_done.request, **changes}, folder)
    shutil.copytree(half_done.folder / "run", folder / "run")
    context.outputs = dict(half_done.outputs)
    return context


def test_a_fusion_that_loses_its_training_and_its_worker_ends_with_the_teacher_of_an_undisturbed_one(
    tmp_path: Path, make_fusing: Callable[[Path], World]
) -> None:
    world = make_fusing(tmp_path / "service")
    first = world.context("fuse", spelt_out(FUSE), tmp_path / "worker-1")
    first.__class__ = KilledInFuse
    run(first, "fuse", ["settle"])
    with pytest.raises(ChildFailed) as lost:
        run(first, "fuse", ["fuse"])
    assert is_transient(lost.value)
    assert CHECKPOINT in world.files()
    shutil.rmtree(tmp_path / "worker-1")

    second = world.context("fuse", spelt_out(FUSE), tmp_path / "worker-2")
    second.outputs = dict(first.outputs)
    run(second, "fuse", ["fuse"])
    log = [json.loads(line) for line in (second.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in log if "losses" in event] == list(range(1, 13))
    second.flush()
    assert (told(world)["step"], told(world)["steps"]) == (12, 12)
    assert told(world)["losses"].keys() == {"loss", "map", "retrieval"}
    shutil.rmtree(tmp_path / "worker-2")

    third = world.context("fuse", spelt_out(FUSE), tmp_path / "worker-3")
    third.outputs = dict(second.outputs)
    result = run(third, "fuse", ["register"])
    assert run(third, "fuse", ["register"]) == result, "a second time changes nothing"
    assert world.files() == {"config.toml", "metrics.jsonl", TEACHER, "curves.png", "report.json"}
    undisturbed = make_fusing(tmp_path / "another")
    alone = run(undisturbed.context("fuse", spelt_out(FUSE), tmp_path / "alone"), "fuse")
    assert alone == result

    row = teachers(world)["fused"]
    assert (row.state, row.sha256, row.format) == ("ready", result["sha256"], "safetensors")
    assert (row.architecture, row.width, row.input) == ("resnet18", "4x2-4-8", teachers(world)["toy"].input)
    assert (row.license, row.terms, row.consent_basis) == ("MIT AND GPL-3.0 AND CC-BY-NC-4.0", "research", "consent")
    content = b"".join(world.store.get(content_key(row.sha256)))
    assert (hashlib.sha256(content).hexdigest(), len(content)) == (row.sha256, row.size_bytes)
    with world.database.transaction() as session:
        written = session.scalar(select(func.count()).where(AuditRow.action == "teacher.fuse"))
    assert written == 1
    assert str(tmp_path) not in json.dumps([first.outputs, third.outputs, row.report])


def test_the_report_leads_to_every_input_and_says_what_everybody_measures(
    tmp_path: Path, make_fusing: Callable[[Path], World], half_done: StepContext
) -> None:
    world = make_fusing(tmp_path / "service")
    context = going_on(world, half_done, tmp_path / "worker")
    result = run(context, "fuse", ["register"])
    known, report = teachers(world), teachers(world)["fused"].report
    assert report is not None
    assert {name: report[name] for name in ("job", "teacher_sha256", "embedding_dim", "identities", "neck")} == {
        "job": JOB, "teacher_sha256": result["sha256"], "embedding_dim": 32, "identities": 40, "neck": "own",
    }  # fmt: skip
    assert report["accuracy"] == {"dataset": "site", "queries": 24, "gallery": 96, **result["accuracy"]}
    assert report["made_from"]["dataset_digest"] == context.outputs["settle"]["dataset_digest"]
    for one, asked, measured in zip(report["made_from"]["inputs"], FUSE["inputs"], result["inputs"], strict=True):
        teacher = known[asked["teacher"]]
        assert (one["teacher"], one["sha256"], one["weights"]) == (teacher.name, teacher.sha256, teacher.sha256)
        assert one["view"].items() >= asked["view"].items()
        assert measured == {name: one[name] for name in ("teacher", "map", "rank1")}


def test_a_teacher_that_is_worse_than_its_best_input_ends_the_job_with_both_figures(
    tmp_path: Path, make_fusing: Callable[[Path], World], half_done: StepContext
) -> None:
    world = make_fusing(tmp_path / "service")
    context = going_on(world, half_done, tmp_path / "worker", keep_worse=False)
    fused = context.outputs["fuse"]
    best = max(one["map"] for one in fused["inputs"])
    assert fused["inputs"][fused["best_input"]]["map"] == best
    assert fused["is_worse"] == (fused["teacher"]["map"] < best)
    context.outputs["fuse"] = {**fused, "is_worse": True, "best_input": 1}
    worse = rf"mAP {fused['teacher']['map']:.2f} %, and teacher 'legs' alone has {fused['inputs'][1]['map']:.2f} %"
    rights = "license 'MIT AND GPL-3.0 AND CC-BY-NC-4.0', terms 'research' and consent_basis 'consent'"
    for _ in range(2):
        with pytest.raises(JobPermanentlyFailed, match=f"{worse}.*{rights}$") as refused:
            run(context, "fuse", ["register"])
        assert not is_transient(refused.value)
    assert teachers(world).keys() == {"toy", "legs"}
    assert {TEACHER, "report.json"} <= {path.name for path in (context.folder / "run").iterdir()}


def test_a_name_that_was_taken_meanwhile_ends_the_job(
    tmp_path: Path, make_fusing: Callable[[Path], World], half_done: StepContext
) -> None:
    world = make_fusing(tmp_path / "service")
    context = going_on(world, half_done, tmp_path / "worker")
    add_graph(world, "fused", tmp_path / "legs.onnx", 24, 20)
    with pytest.raises(JobPermanentlyFailed, match="somebody else has registered a teacher 'fused' meanwhile"):
        run(context, "fuse", ["register"])
    assert teachers(world)["fused"].format == "onnx"


def test_images_that_are_not_those_of_the_digest_any_more_end_the_job(
    tmp_path: Path, make_fusing: Callable[[Path], World], half_done: StepContext
) -> None:
    world = make_fusing(tmp_path / "service")
    context = going_on(world, half_done, tmp_path / "worker")
    with world.database.transaction() as session:
        session.get_one(DatasetRow, "site").digest = "f" * 64
    with pytest.raises(JobPermanentlyFailed, match="data set 'site'"):
        run(context, "fuse", ["register"])
    assert "fused" not in teachers(world)


def test_a_fusion_begins_with_the_weights_of_another_teacher(
    tmp_path: Path, make_fusing: Callable[[Path], World], teacher_file: Path
) -> None:
    """A step of no length, on the usual schedule."""
    world = make_fusing(tmp_path / "service")
    given = {"start_from": "toy", "preset": "usual", "learning_rate": 1e-9}
    body = {name: value for name, value in FUSE.items() if name != "batch"}
    context = world.context("fuse", spelt_out({**body, "steps": 1, **given}), tmp_path / "worker")
    run(context, "fuse")
    made, start = (load_file(path)["conv1.weight"] for path in (tmp_path / "worker" / "run" / TEACHER, teacher_file))
    np.testing.assert_allclose(made, start, atol=1e-7)
    report = teachers(world)["fused"].report
    assert report is not None
    assert report["made_from"]["start_from"]["sha256"] == hashlib.sha256(teacher_file.read_bytes()).hexdigest()
    config = (tmp_path / "worker" / "run" / "config.toml").read_text()
    assert 'schedule = "steps"' in config


# --- somebody else's graphs


def test_a_graph_that_wants_more_memory_than_it_may_have_ends_the_job_and_not_the_worker(
    tmp_path: Path, make_fusing: Callable[[Path], World]
) -> None:
    world = make_fusing(tmp_path / "service")
    world.settings = world.settings.model_copy(update={"teacher_check_memory_bytes": 1024**3})
    add_graph(world, "hog", a_hog(tmp_path / "hog.onnx"), 32, 16)
    inputs = [{"teacher": "hog", "view": {"top": 0.0, "bottom": 1.0}}]
    context = world.context("fuse", spelt_out({**FUSE, "inputs": inputs}), tmp_path / "worker")
    with pytest.raises(JobPermanentlyFailed, match=r"input 'graphs/hog\.onnx': .*(alloc|memory)") as refused:
        run(context, "fuse")
    assert str(tmp_path) not in str(refused.value)


def test_a_graph_under_the_name_of_a_network_is_not_run_in_the_training(
    tmp_path: Path, make_fusing: Callable[[Path], World]
) -> None:
    world = make_fusing(tmp_path / "service")
    world.settings = world.settings.model_copy(update={"teacher_check_memory_bytes": 1024**3})
    add_graph(world, "hog", a_hog(tmp_path / "hog.onnx"), 32, 16)
    with world.database.transaction() as session:
        row = TeacherRows(session).find("hog")
        assert row is not None
        row.format, row.architecture = "safetensors", "resnet18"
    inputs = [{"teacher": "hog", "view": {"top": 0.0, "bottom": 1.0}}]
    context = world.context("fuse", spelt_out({**FUSE, "inputs": inputs, "steps": 1}), tmp_path / "worker")
    with pytest.raises(JobPermanentlyFailed, match=r"input 'networks/hog\.safetensors': "):
        run(context, "fuse")


def a_hog(path: Path) -> Path:
    """A graph of a few bytes that wants to hold 2 GiB for a moment."""
    nodes = [
        helper.make_node("ConstantOfShape", ["much"], ["zeros"]),
        helper.make_node("ReduceSum", ["zeros"], ["zero"], keepdims=0),
        helper.make_node("ReduceMean", ["x"], ["means"], axes=[2, 3], keepdims=0),
        helper.make_node("Add", ["means", "zero"], ["embedding"]),
    ]
    graph = helper.make_graph(
        nodes,
        "hog",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 32, 16])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(np.array([2**29], np.int64), "much")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


CONFINED = """
import os, socket, sys
from pathlib import Path
refused = []
attempts = {
    "write": lambda: Path("note").write_text("x"), "read": lambda: Path("../secret").read_text(),
    "network": lambda: socket.socket(), "process": os.fork,
}
for name, attempt in attempts.items():
    try:
        attempt()
    except OSError:
        refused.append(name)
print(Path("graph.onnx").read_text(), *refused, "WIDTHWISE_ADMIN_KEY" in os.environ)
"""


@pytest.mark.skipif(landlock.version() == 0, reason="this kernel has no Landlock")
def test_the_program_of_a_graph_reads_its_folder_and_can_do_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WIDTHWISE_ADMIN_KEY", "k" * 32)
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / "graph.onnx").write_text("graph")
    (tmp_path / "secret").write_text("secret")
    command, environment = confinement(tmp_path / "graphs", 1024**3, 60)
    words = [*command, sys.executable, "-c", CONFINED]
    done = subprocess.run(words, env=environment, cwd=tmp_path / "graphs", capture_output=True, text=True, check=False)
    assert done.stdout == "graph write read network process False\n", done.stderr
    assert not (tmp_path / "graphs" / "note").exists()


def test_a_program_that_cannot_be_confined_is_not_run_and_says_why(tmp_path: Path) -> None:
    command, environment = confinement(tmp_path / "graphs", 1024**3, 60)
    plan = {**json.loads(command[-1]), "limits": {"AS": "much"}}
    words = [*command[:-1], json.dumps(plan), sys.executable, "-c", "print('run')"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (126, "")
    assert "TypeError" in done.stderr


# --- names, over HTTP


@pytest.mark.parametrize("engine", ["sqlite", "postgres"])
def test_a_job_holds_the_name_of_its_teacher_and_the_teachers_it_needs(
    engine: str, make_app: Callable[..., FastAPI], request: pytest.FixtureRequest
) -> None:
    url = {"database_url": request.getfixturevalue("postgres_url")} if engine == "postgres" else {}
    app = make_app(**url, embedded_worker=False)
    with app.state.services.database.transaction() as session:
        session.add_all([*ready_teachers(), dataset_row(Path("/data/site"), "1" * 64)])
    with TestClient(app) as client:
        asked = client.post("/jobs", json={"kind": "fuse", "request": {**FUSE, "start_from": "start"}})
        assert asked.status_code == 202, asked.text
        job = asked.json()
        assert job["request"] == {**job["request"], **spelt_out(FUSE)}

        new = {"sha256": "2" * 64, "size_bytes": 5, "license": "MIT", "terms": "any", "consent_basis": "consent"}
        claimed = client.post("/teachers", json={"name": "fused", **new})
        assert (claimed.status_code, claimed.json()["code"]) == (409, "teacher-exists")
        assert job["id"] in claimed.json()["detail"]
        again = client.post("/jobs", json={"kind": "fuse", "request": FUSE})
        assert (again.status_code, again.json()["code"]) == (409, "teacher-exists")
        for name in ("toy", "legs", "start"):
            needed = client.delete(f"/teachers/{name}")
            assert (needed.status_code, needed.json()["code"]) == (409, "teacher-in-use")
        assert client.delete("/teachers/idle").status_code == 204
        assert client.post("/jobs", json={"kind": "refine", "request": {**REFINE, "name": "fused"}}).status_code == 202

        assert client.post(f"/jobs/{job['id']}/cancel").status_code == 202
        assert client.delete("/teachers/legs").status_code == 204
        assert client.post("/teachers", json={"name": "fused", **new}).status_code == 201
        taken = client.post("/jobs", json={"kind": "fuse", "request": {**FUSE, "inputs": [{"teacher": "start"}]}})
        assert (taken.status_code, taken.json()["code"]) == (409, "teacher-exists")
        assert "teacher 'fused' exists already" in taken.json()["detail"]


REFINE = {"teacher": "start", "dataset": "site", "preset": "small"}


def ready_teachers() -> list[TeacherRow]:
    rows = [teacher_row(f"{number}" * 64, 5) for number in range(4)]
    for row, name in zip(rows, ("toy", "legs", "start", "idle"), strict=True):
        row.name = name
    rows[1].architecture, rows[1].format, rows[1].input = "onnx", "onnx", {"height": 24, "width": 20}
    return rows


# --- the whole way


@pytest.mark.timeout(900)
def test_partial_teachers_whole_way_to_three_devices(tmp_path: Path) -> None:
    port = free_port()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WIDTHWISE_") and name != "PORT"}
    environment = {**kept, "WIDTHWISE_DATA_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    serve = [sys.executable, "-m", "app.cli", "serve", "--port", str(port)]
    script = [sys.executable, str(ROOT / "examples" / "partial_teachers_to_device.py"), "--keep-worse"]
    short = ["--name", "whole", "--part-steps", "3", "--fuse-steps", "3", "--steps", "3"]
    with running(serve, lambda: answers(f"http://127.0.0.1:{port}/health/ready"), cwd=ROOT, env=environment):
        done = subprocess.run(
            [*script, *short, "--url", f"http://127.0.0.1:{port}"],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for words in ("mAP of whole-legs alone: ", "mAP of the fused teacher: ", "mAP of the three devices"):
        assert words in done.stdout
    assert "chain whole was made from teacher whole, " in done.stdout
    assert done.stdout.count("device with") == 3
