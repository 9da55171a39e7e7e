"""Teachers: registered, uploaded, checked in the sandbox, ready or refused with a reason."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import select

from app.db.tables import AuditRow, JobRow
from app.errors import ChildFailed, JobPermanentlyFailed, SandboxUnavailable, TeacherNotReady
from app.services.teachers import Teachers
from app.storage.port import content_key
from app.worker import teachers as worker
from app.worker.kinds import KINDS
from app.worker.sandbox import CompletedSandbox
from chains.export import load_trained
from chains.model import ReIDModel
from chains.width import Width

INPUT = {"height": 64, "width": 32, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    torch.manual_seed(0)
    model = ReIDModel("resnet18", Width(4))
    state = {name.replace("backbone.", "module."): tensor for name, tensor in model.state_dict().items()}
    state = {name if name.startswith("module.") else f"module.{name}": tensor for name, tensor in state.items()}
    state["module.classifier.weight"] = torch.randn(5, 32)
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save({"state_dict": state}, path)
    return path.read_bytes()


def body(content: bytes, **changes: Any) -> dict[str, Any]:
    return {
        "name": "site-r18",
        "sha256": hashlib.sha256(content).hexdigest(),
        "size_bytes": len(content),
        "license": "MIT",
        "terms": "research",
        "consent_basis": "public",
        "input": INPUT,
        **changes,
    }


def uploaded(client: TestClient, content: bytes, **changes: Any) -> str:
    """The job that checks the teacher."""
    assert client.post("/teachers", json=body(content, **changes)).status_code == 201
    answer = client.put("/teachers/site-r18/weights", content=content)
    assert answer.status_code == 202, answer.text
    return str(answer.headers["location"].removeprefix("/jobs/"))


class Context(SimpleNamespace):
    """What the steps use of a StepContext, without an engine around it."""

    def __init__(self, app: FastAPI, job: str, folder: Path) -> None:
        services = app.state.services
        with services.database.transaction() as session:
            request = session.get(JobRow, job).request
        super().__init__(
            job_id=job,
            request=request,
            outputs={},
            folder=folder,
            settings=SimpleNamespace(teacher_check_memory_bytes=8 * 2**30, teacher_check_timeout_s=120),
            database=services.database,
            store=services.uploads._store,
            kept={},
            logged=[],
        )

    def report(self, **progress: Any) -> None:
        json.dumps(progress)

    def log(self, text: str) -> None:
        self.logged.append(text)

    def check_cancelled(self) -> None:
        pass

    def keep_file(self, path: Path, name: str) -> str:
        content = self.kept[name] = path.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        self.store.put(content_key(sha256), [content], sha256)
        return sha256


def run_steps(context: Context) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, step in KINDS["check-teacher"].steps:
        result = context.outputs[name] = json.loads(json.dumps(step(context)))  # type: ignore[arg-type]
    return result


@pytest.fixture
def checked(app: FastAPI, client: TestClient, tmp_path: Path) -> Callable[..., Context]:
    def check(content: bytes, **changes: Any) -> Context:
        context = Context(app, uploaded(client, content, **changes), tmp_path / "job")
        context.result = run_steps(context)
        return context

    return check


def test_a_teacher_goes_from_its_name_to_ready(
    client: TestClient, checked: Callable[..., Context], weights: bytes, tmp_path: Path
) -> None:
    context = checked(weights)
    assert context.result == {"teacher": "site-r18", "state": "ready"}
    teacher = client.get("/teachers/site-r18").json()
    assert (teacher["state"], teacher["format"], teacher["reason"]) == ("ready", "torch", None)
    assert (teacher["architecture"], teacher["width"], teacher["input"]) == ("resnet18", "4x2-4-8", INPUT)
    report = teacher["report"]
    assert (report["identities"], report["neck"], report["declared"]) == (5, "own", {"input": INPUT})
    kept = context.kept["teacher.safetensors"]
    assert report["teacher_sha256"] == hashlib.sha256(kept).hexdigest()
    (tmp_path / "teacher.safetensors").write_bytes(kept)
    assert load_trained(tmp_path / "teacher.safetensors").classifier.shape == (5, 32)


@pytest.mark.parametrize(
    ("pixels", "kept"),
    [
        ({}, {}),  # whoever knows the size alone leaves mean and std to the file or its toolkit
        ({"mean": [0.5] * 3}, {"mean": [0.5] * 3, "std": [0.229, 0.224, 0.225]}),
        ({"std": [0.5] * 3}, {"mean": [0.485, 0.456, 0.406], "std": [0.5] * 3}),
    ],
)
def test_mean_and_std_are_declared_together_or_not_at_all(
    client: TestClient, weights: bytes, pixels: dict[str, Any], kept: dict[str, Any]
) -> None:
    size = {"height": 64, "width": 32}
    made = client.post("/teachers", json=body(weights, input={**size, **pixels}))
    assert (made.status_code, made.json()["report"]["declared"]) == (201, {"input": {**size, **kept}})


def test_registering_twice_is_once(client: TestClient, weights: bytes) -> None:
    first = client.post("/teachers", json=body(weights))
    again = client.post("/teachers", json=body(weights))
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.headers["location"] == again.headers["location"] == "/teachers/site-r18"
    assert first.json() == again.json()


def test_the_same_registration_after_the_check_is_still_the_same(
    client: TestClient, checked: Callable[..., Context], weights: bytes
) -> None:
    checked(weights)
    again = client.post("/teachers", json=body(weights))
    assert (again.status_code, again.json()["state"]) == (200, "ready")


@pytest.mark.parametrize(
    "change",
    [{"sha256": "0" * 64}, {"size_bytes": 1}, {"terms": "any"}, {"license": "X"}, {"architecture": "resnet50"}],
    ids=lambda change: next(iter(change)),
)
def test_other_content_under_a_name_is_refused(client: TestClient, weights: bytes, change: dict[str, Any]) -> None:
    client.post("/teachers", json=body(weights))
    answer = client.post("/teachers", json=body(weights, **change))
    assert (answer.status_code, answer.json()["code"]) == (409, "teacher-name-taken")
    assert next(iter(change)) in answer.json()["detail"]


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../x"},
        {"name": "x" * 64},
        {"sha256": "A" * 64},
        {"size_bytes": 0},
        {"license": "a\u0000b"},
        {"license": ""},
        {"terms": "whatever"},
        {"consent_basis": None},
        {"architecture": "vgg16"},
        {"input": {"height": 64}},
        {"input": {**INPUT, "std": [0, 1, 1]}},
        {"extra": 1},
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(client: TestClient, weights: bytes, change: dict[str, Any]) -> None:
    assert client.post("/teachers", json=body(weights, **change)).status_code == 422


def test_a_file_too_large_is_refused_before_it_is_sent(client: TestClient, weights: bytes) -> None:
    answer = client.post("/teachers", json=body(weights, size_bytes=2**60))
    assert (answer.status_code, answer.json()["code"]) == (413, "upload-too-large")


def test_teachers_are_listed_by_name_and_page(client: TestClient, weights: bytes) -> None:
    for name in ("b", "a", "c"):
        client.post("/teachers", json=body(weights, name=name))
    first = client.get("/teachers?page_size=2").json()
    assert [teacher["name"] for teacher in first["teachers"]] == ["a", "b"]
    rest = client.get("/teachers", params={"page_token": first["next_page_token"]}).json()
    assert [teacher["name"] for teacher in rest["teachers"]] == ["c"]
    assert rest["next_page_token"] is None


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("DELETE", ""), ("HEAD", "/weights"), ("PUT", "/weights")])
def test_an_unknown_teacher_is_404(client: TestClient, method: str, path: str) -> None:
    for name in ("nobody", "%00", "A"):
        assert client.request(method, f"/teachers/{name}{path}").status_code == 404


def test_a_teacher_is_not_deleted_under_its_check(app: FastAPI, client: TestClient, weights: bytes) -> None:
    job = uploaded(client, weights)
    answer = client.delete("/teachers/site-r18")
    assert (answer.status_code, answer.json()["code"]) == (409, "teacher-in-use")
    assert job in answer.json()["detail"]
    end(app, job)
    assert client.delete("/teachers/site-r18").status_code == 204
    assert client.get("/teachers/site-r18").status_code == 404


def end(app: FastAPI, job: str) -> None:
    with app.state.services.database.transaction() as session:
        session.get(JobRow, job).state = "succeeded"


def test_deleting_forgets_what_has_arrived(client: TestClient, weights: bytes) -> None:
    client.post("/teachers", json=body(weights))
    headers = {"upload-offset": "0", "content-type": "application/offset+octet-stream"}
    client.patch("/teachers/site-r18/weights", content=weights[:100], headers=headers)
    client.delete("/teachers/site-r18")
    client.post("/teachers", json=body(weights))
    assert client.head("/teachers/site-r18/weights").headers["upload-offset"] == "0"


def test_a_stale_upload_begins_again_at_zero(app: FastAPI, client: TestClient, weights: bytes) -> None:
    from datetime import UTC, datetime, timedelta

    client.post("/teachers", json=body(weights))
    assert app.state.services.uploads.drop_stale(datetime.now(UTC) + timedelta(days=9)) == 1
    assert client.head("/teachers/site-r18/weights").headers["upload-offset"] == "0"
    assert client.put("/teachers/site-r18/weights", content=weights).status_code == 202


def test_what_admins_do_is_in_the_audit_trail(app: FastAPI, client: TestClient, weights: bytes) -> None:
    end(app, uploaded(client, weights))
    client.delete("/teachers/site-r18")
    with app.state.services.database.transaction() as session:
        rows = session.scalars(select(AuditRow).where(AuditRow.target == "site-r18").order_by(AuditRow.id)).all()
    assert [row.action for row in rows] == ["teacher.create", "teacher.upload", "teacher.delete"]
    assert all(row.request_id for row in rows)


def test_only_a_ready_teacher_can_be_used(app: FastAPI, client: TestClient, weights: bytes) -> None:
    teachers: Teachers = app.state.services.teachers
    client.post("/teachers", json=body(weights))
    with pytest.raises(TeacherNotReady, match="awaiting-weights"):
        teachers.require_ready("site-r18")


# The check.


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("the file ran code",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (lambda: torch_file({"state_dict": Evil()}), "it can run code"),
        (lambda: torch_file({"w": torch.zeros(1).expand(10**6, 10**6)}), "1,000,000×1,000,000"),
        (lambda: torch_file({"w\udc80": torch.zeros(1)}), "not named as a ResNet's"),
    ],
    ids=["pointer", "code", "strides", "odd names"],
)
def test_a_refusal_is_an_answer_of_the_job(
    client: TestClient, checked: Callable[..., Context], content: Callable[[], bytes], words: str
) -> None:
    context = checked(content())
    assert context.result["state"] == "refused"
    teacher = client.get("/teachers/site-r18").json()
    assert teacher["state"] == "refused"
    assert words in teacher["reason"]
    assert teacher["reason"] == context.result["reason"]
    assert not context.kept
    assert context.logged == []


def torch_file(content: Any) -> bytes:
    import io

    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def test_the_registered_architecture_is_held_against_the_file(
    client: TestClient, checked: Callable[..., Context], weights: bytes
) -> None:
    checked(weights, architecture="resnet50")
    assert "registered as resnet50" in client.get("/teachers/site-r18").json()["reason"]


def test_steps_that_run_twice_give_the_same(
    app: FastAPI, client: TestClient, weights: bytes, checked: Callable[..., Context]
) -> None:
    context = checked(weights)
    before = client.get("/teachers/site-r18").json()
    assert run_steps(context) == context.result
    after = client.get("/teachers/site-r18").json()
    assert after["report"] == before["report"]


def test_a_teacher_is_not_ready_without_the_weights_its_check_kept(
    app: FastAPI, client: TestClient, weights: bytes, tmp_path: Path
) -> None:
    """The check's last step may come long after the one that kept them, when a failed job is sent round again."""
    context = Context(app, uploaded(client, weights), tmp_path / "job")
    context.outputs["check"] = worker.check(context)  # type: ignore[arg-type]
    context.store.delete(content_key(context.outputs["check"]["teacher_sha256"]))
    with pytest.raises(
        JobPermanentlyFailed, match="not kept any more; delete the teacher and register it again"
    ) as gone:
        worker.record(context)  # type: ignore[arg-type]
    assert client.get("/teachers/site-r18").json()["state"] == "checking"
    worker.failed(context, str(gone.value))  # type: ignore[arg-type]
    teacher = client.get("/teachers/site-r18").json()
    assert teacher["state"] == "refused"
    assert "register it again" in teacher["reason"]


def test_a_teacher_that_was_deleted_meanwhile_stays_deleted(
    app: FastAPI, client: TestClient, weights: bytes, tmp_path: Path
) -> None:
    job = uploaded(client, weights)
    context = Context(app, job, tmp_path / "job")
    end(app, job)
    client.delete("/teachers/site-r18")
    assert run_steps(context) == {"teacher": "site-r18", "state": "gone"}
    assert client.get("/teachers/site-r18").status_code == 404


def completed(returncode: int = 0, stopped: Any = None, line: str = "") -> Callable[..., CompletedSandbox]:
    return lambda *_, **__: CompletedSandbox(returncode, stopped, (line,))


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (completed(-9, "time"), "longer than 120 s"),
        (completed(-9, "disk"), "more to the disk"),
        (completed(-11), "SIGSEGV"),
        (completed(1, line="OSError: odd"), "OSError: odd"),
        (completed(0), "broke the check"),
    ],
)
def test_a_file_that_breaks_its_reader_is_refused(
    app: FastAPI,
    client: TestClient,
    weights: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    outcome: Any,
    words: str,
) -> None:
    monkeypatch.setattr(worker, "run_sandboxed", outcome)
    assert words in run_steps(Context(app, uploaded(client, weights), tmp_path / "job"))["reason"]


def test_a_check_that_others_killed_is_a_failure_and_can_be_sent_round_again(
    app: FastAPI, client: TestClient, weights: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = Context(app, uploaded(client, weights), tmp_path / "job")
    with monkeypatch.context() as patch:
        patch.setattr(worker, "run_sandboxed", completed(-9))
        with pytest.raises(ChildFailed):
            run_steps(context)
    worker.failed(context, "the machine was short of memory")  # type: ignore[arg-type]
    teacher = client.get("/teachers/site-r18").json()
    assert (teacher["state"], "short of memory" in teacher["reason"]) == ("refused", True)
    assert run_steps(context)["state"] == "ready"
    assert client.get("/teachers/site-r18").json()["reason"] is None


def test_without_a_sandbox_nothing_is_read(
    app: FastAPI, client: TestClient, weights: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.worker import sandbox

    monkeypatch.setattr(sandbox, "_limits", lambda *_: {"NO_SUCH_LIMIT": 1})
    context = Context(app, uploaded(client, weights), tmp_path / "job")
    with pytest.raises(SandboxUnavailable):
        run_steps(context)


def test_a_lost_object_is_no_refusal(app: FastAPI, client: TestClient, weights: bytes, tmp_path: Path) -> None:
    from app.errors import StorageError

    context = Context(app, uploaded(client, weights), tmp_path / "job")
    context.store.delete(content_key(hashlib.sha256(weights).hexdigest()))
    with pytest.raises(StorageError):
        run_steps(context)
