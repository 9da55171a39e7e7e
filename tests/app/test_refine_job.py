"""The jobs that train and measure, step by step with real child processes, on a toy data set and a toy teacher."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnx
import pytest

from app.db.jobs import JobRows
from app.db.migrate import migrate
from app.db.session import Database
from app.db.tables import DatasetRow, JobRow, TeacherRow
from app.errors import ChildFailed, JobPermanentlyFailed
from app.services.job_requests import parse
from app.services.jobs import request_sha256
from app.services.registry import Registry
from app.settings import Settings
from app.storage.factory import open_store
from app.storage.port import ObjectStore, content_key
from app.terms import Rights
from app.worker import landlock
from app.worker.archives import Limits
from app.worker.context import StepContext
from app.worker.file_tree import digest_of, list_tree
from app.worker.kinds import KINDS
from app.worker.refinement import CHECKPOINT, PASSING
from app.worker.runner import is_transient
from chains.artifact import dump, load
from chains.chain import InputSpec
from chains.data.synthetic import PeopleSettings, write_market1501
from chains.export import origin, save_trained
from chains.model import ReIDModel
from chains.onnxfile import EmitOptions
from chains.onnxfile import write as write_onnx
from chains.testing import pico_chain
from chains.train import Trained
from chains.width import Width

ROOT = Path(__file__).parents[2]
INPUT = InputSpec(32, 16, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SITE = PeopleSettings(train_identities=40, test_identities=12, height=32, width=16)
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
JOB = "0123456789abcdef0123456789abcdef"


@dataclass
class World:
    """A service's database and store with the toy teacher and data set in it."""

    settings: Settings
    database: Database
    store: ObjectStore
    registry: Registry

    def context(self, kind: str, body: Mapping[str, Any], folder: Path) -> StepContext:
        """The job's, on a worker with this scratch folder."""
        request = parse(kind, body).model_dump(mode="json")
        with self.database.transaction() as session:
            if session.get(JobRow, JOB) is None:
                session.add(job_row(kind, request))
        folder.mkdir(parents=True, exist_ok=True)
        return StepContext(
            JOB, request, {}, folder, self.settings, self.database, self.store, self.registry, executor="me"
        )

    def files(self) -> set[str]:
        with self.database.transaction() as session:
            return {row.name for row in JobRows(session).files(JOB)}


def job_row(kind: str, request: Mapping[str, Any]) -> JobRow:
    now = datetime.now(UTC)
    return JobRow(
        id=JOB, kind=kind, state="running", priority=0, request=dict(request),
        request_sha256=request_sha256(kind, request), attempts=1, cancel_requested=False, executor="me",
        created_by="test", created_at=now, updated_at=now,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Market-1501 folder of synthetic people."""
    folder = tmp_path_factory.mktemp("data") / "site"
    write_market1501(folder, SITE)
    return folder


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher as a check leaves it, with a classifier of other people."""
    import torch

    torch.manual_seed(7)
    model = ReIDModel("resnet18", Width(4)).eval()
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_trained(Trained(model, torch.randn(8, model.backbone.channels)), origin("teacher", model, INPUT, "MIT"), path)
    return path


@pytest.fixture
def make_world(site: Path, teacher_file: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], World]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def make(folder: Path) -> World:
        settings = Settings(data_dir=folder, dataset_roots=(site.parent,), checkpoint_upload_s=0.01)
        database, store = Database(settings.database), open_store(settings.storage, settings.s3_endpoint_url)
        migrate(database)
        registry = Registry(database, store, 10**8)
        registry.prepare_storage()
        content = teacher_file.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        store.put(content_key(sha256), [content], sha256)
        digest = digest_of(list_tree(site, Limits(10**5, 10**9)))
        with database.transaction() as session:
            session.add(teacher_row(sha256, len(content)))
            session.add(dataset_row(site, digest))
        return World(settings, database, store, registry)

    return make


def teacher_row(sha256: str, size_bytes: int) -> TeacherRow:
    now = datetime.now(UTC)
    return TeacherRow(
        name="toy", state="ready", sha256=sha256, size_bytes=size_bytes, format="safetensors", architecture="resnet18",
        width="4x2-4-8", input={"height": 32, "width": 16, "mean": list(INPUT.mean), "std": list(INPUT.std)},
        report={"teacher_sha256": sha256}, license="MIT", terms="any", consent_basis="synthetic",
        created_at=now, updated_at=now,
    )  # fmt: skip


def dataset_row(site: Path, digest: str) -> DatasetRow:
    now = datetime.now(UTC)
    return DatasetRow(
        name="site", state="ready", source="folder", location=str(site), options={}, digest=digest,
        report={"layout": "market1501", "place": "."}, license="CC-BY-NC-4.0", terms="research",
        consent_basis="synthetic", created_at=now, updated_at=now,
    )  # fmt: skip


def run(context: StepContext, kind: str, steps: Sequence[str] | None = None) -> dict[str, Any]:
    """The named steps, all by default, as a worker runs them; the output of the last."""
    output: dict[str, Any] = {}
    for name, step in KINDS[kind].steps:
        if steps is None or name in steps:
            output = json.loads(json.dumps(step(context)))
            context.outputs[name] = output
    return output


class KilledOnce(StepContext):
    """A context whose training loses a process to SIGKILL once it has told of a step behind its first checkpoint."""

    kills = 1

    def run_child(self, command: Sequence[str], *, on_line: Callable[[str], None], **options: Any) -> None:
        def killing(line: str) -> None:
            on_line(line)
            if "refinement: step 6/12" in line and self.kills:
                self.kills -= 1
                for pid in training_processes(self.folder):
                    os.kill(pid, signal.SIGKILL)

        super().run_child(command, on_line=killing, **options)


def training_processes(folder: Path) -> list[int]:
    """The processes that torchrun started for the task in `folder`."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = place.read_bytes().split(b"\0")
        except OSError:
            continue
        is_launcher = b"torch.distributed.run" in words or any(word.endswith(b"guard.py") for word in words)
        if str(folder / "task.json").encode() in words and not is_launcher:
            found.append(int(place.parent.name))
    return found


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


def told(world: World) -> dict[str, Any]:
    """The job's progress as its row has it."""
    with world.database.transaction() as session:
        return dict(session.get_one(JobRow, JOB).progress or {})


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
