"""Jobs over HTTP and in the database, without workers; with them: test_engine_service.py."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app.actor import COMMAND_LINE
from app.api.deps import Services
from app.db.audit import Audit
from app.db.executors import Executors
from app.db.jobs import JobRows
from app.db.migrate import downgrade, is_current, migrate
from app.db.session import Database
from app.db.tables import DatasetRow, TeacherRow
from app.errors import ChainExists, IdempotencyConflict, UnknownJob
from app.main import create_app, prepare
from app.settings import Settings
from app.worker.context import JobGivenUp, StepContext
from app.worker.engine import QueueClient
from app.worker.engine import migrate as migrate_engine
from app.worker.kinds import Kind
from app.worker.leases import Leases
from app.worker.runner import Runner, Surroundings
from chains import artifact
from chains.testing import pico_chain

EVALUATE = {"kind": "evaluate", "request": {"chain": "stable", "dataset": "people"}}
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["sqlite", "postgres"])
def app(request: pytest.FixtureRequest, make_app: Callable[..., FastAPI]) -> FastAPI:
    if request.param == "sqlite":
        return make_app()
    return make_app(database_url=request.getfixturevalue("postgres_url"))


@pytest.fixture
def services(app: FastAPI) -> Services:
    found: Services = app.state.services
    with found.database.transaction() as session:
        now = datetime.now(UTC)
        session.add(
            DatasetRow(
                name="people",
                state="ready",
                source="folder",
                location="/data/people",
                options={},
                digest="0" * 64,
                license="MIT",
                terms="any",
                consent_basis="synthetic",
                created_at=now,
                updated_at=now,
            )
        )
    return found


@pytest.fixture
def client(app: FastAPI, services: Services) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


def submitted(services: Services, kind: str = "toy", **request: Any) -> str:
    return services.jobs.submit(kind, request, COMMAND_LINE)[0].id


def place(services: Services, job_id: str) -> str | None:
    """What the engine says of the job."""
    return QueueClient(services.database).places([job_id]).get(job_id, (None, None))[0]


def end(services: Services, job_id: str, state: Any = "succeeded") -> None:
    with services.database.transaction() as session:
        assert JobRows(session).end(job_id, None, state, result={}, error=None if state == "succeeded" else "why")


def test_a_job_is_accepted_with_its_place_in_the_queue(client: TestClient, services: Services) -> None:
    answer = client.post("/jobs", json=EVALUATE | {"priority": 7})
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert (job["kind"], job["state"], job["priority"], job["attempts"]) == ("evaluate", "queued", 7, 0)
    assert job["request"]["rerank"] is False, "defaults are spelt out"
    assert client.get(answer.headers["location"]).json() == job
    assert place(services, job["id"]) == "ENQUEUED"
    with services.database.transaction() as session:
        (entry,) = [entry for entry in Audit(session).page(None, 10) if entry.target == job["id"]]
    assert (entry.action, entry.detail) == ("job.create", {"kind": "evaluate"})


def test_the_same_key_gives_the_same_job(client: TestClient) -> None:
    key = {"idempotency-key": "a-key"}
    first = client.post("/jobs", json=EVALUATE, headers=key)
    again = client.post("/jobs", json=EVALUATE, headers=key)
    assert (first.status_code, again.status_code) == (202, 200)
    assert first.json() == again.json()
    assert again.headers["location"] == first.headers["location"]
    other = client.post("/jobs", json={**EVALUATE, "request": {**EVALUATE["request"], "seed": 1}}, headers=key)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency-key-reused")
    assert first.json()["id"] in other.json()["detail"]
    assert client.post("/jobs", json=EVALUATE).json()["id"] != first.json()["id"]
    assert len(client.get("/jobs").json()["jobs"]) == 2


def test_a_job_stays_with_the_chain_that_its_alias_meant(client: TestClient, services: Services) -> None:
    key = {"idempotency-key": "a-key"}
    job = client.post("/jobs", json=EVALUATE, headers=key).json()
    assert job["request"]["chain"] == "pico"
    services.registry.publish(artifact.dump(pico_chain(name="next", seed=1)))
    services.promotion.promote("stable", "next", COMMAND_LINE, accept_unknown=True)
    assert client.get(f"/jobs/{job['id']}").json()["request"]["chain"] == "pico"
    refused = client.delete("/chains/pico")
    assert (refused.status_code, refused.json()["code"]) == (409, "chain-in-use")
    assert job["id"] in refused.json()["detail"]
    assert client.post("/jobs", json=EVALUATE, headers=key).json()["id"] == job["id"], "the same words, the same job"
    assert client.post("/jobs", json=EVALUATE).json()["request"]["chain"] == "next"
    assert client.post(f"/jobs/{job['id']}/cancel").status_code == 202
    assert client.delete("/chains/pico").status_code == 204


def test_deleting_a_chain_and_asking_for_a_job_at_once_never_leaves_a_job_without_its_chain(
    client: TestClient, services: Services
) -> None:
    content = artifact.dump(pico_chain(name="fleeting", seed=1))
    body = {"kind": "evaluate", "request": {"chain": "fleeting", "dataset": "people"}}
    for _ in range(5):
        services.registry.publish(content)
        with ThreadPoolExecutor(2) as pool:
            deleting = pool.submit(client.delete, "/chains/fleeting")
            asking = pool.submit(client.post, "/jobs", json=body)
            deleted, asked = deleting.result(), asking.result()
        assert (deleted.status_code, asked.status_code) in {(204, 404), (409, 202)}, asked.text
        if asked.status_code == 202:
            client.post(f"/jobs/{asked.json()['id']}/cancel")


def test_deleting_a_teacher_and_asking_for_a_job_at_once_never_leaves_a_job_without_its_teacher(
    client: TestClient, services: Services
) -> None:
    body = {"kind": "evaluate", "request": {"teacher": "fleeting", "dataset": "people"}}
    for _ in range(5):
        with services.database.transaction() as session:
            session.merge(ready_teacher("fleeting"))
        with ThreadPoolExecutor(2) as pool:
            deleting = pool.submit(client.delete, "/teachers/fleeting")
            asking = pool.submit(client.post, "/jobs", json=body)
            deleted, asked = deleting.result(), asking.result()
        assert (deleted.status_code, asked.status_code) in {(204, 404), (409, 202)}, (deleted.text, asked.text)
        if asked.status_code == 202:
            client.post(f"/jobs/{asked.json()['id']}/cancel")


def ready_teacher(name: str) -> TeacherRow:
    now = datetime.now(UTC)
    return TeacherRow(
        name=name, state="ready", sha256="1" * 64, size_bytes=1, format="safetensors", architecture="resnet18",
        width="16x2-4-8", license="MIT", terms="any", consent_basis="synthetic", created_at=now, updated_at=now,
        input={"height": 64, "width": 32, "mean": [0, 0, 0], "std": [1, 1, 1]}, report={},
    )  # fmt: skip


def test_ten_requests_with_one_key_at_once_make_one_job(app: FastAPI, services: Services) -> None:
    second = create_app(_settings_of(services))
    servers = [services, second.state.services]
    barrier = threading.Barrier(10)

    def post(number: int) -> tuple[str, bool]:
        barrier.wait()
        row, is_new = servers[number % 2].jobs.submit("toy", {"a": 1}, COMMAND_LINE, idempotency_key="k")
        return row.id, is_new

    try:
        with ThreadPoolExecutor(10) as pool:
            answers = list(pool.map(post, range(10)))
    finally:
        second.state.services.database.dispose()
    assert len({job_id for job_id, _ in answers}) == 1
    assert [is_new for _, is_new in answers].count(True) == 1
    assert len(services.jobs.page("", 50).jobs) == 1
    with pytest.raises(IdempotencyConflict, match=answers[0][0]):
        services.jobs.submit("toy", {"a": 2}, COMMAND_LINE, idempotency_key="k")


def test_a_check_that_fails_because_the_same_key_came_first_finds_that_job(services: Services) -> None:
    """Of two requests at once, the later one's check sees what the earlier one's job has taken."""

    def too_late(_: object) -> NoReturn:
        earlier.append(services.jobs.submit("toy", {"a": 1}, COMMAND_LINE, idempotency_key="k")[0].id)
        raise ChainExists("job x is making a chain 'a'")

    earlier: list[str] = []
    row, is_new = services.jobs.submit("toy", {"a": 1}, COMMAND_LINE, idempotency_key="k", check=too_late)
    assert ([row.id], is_new) == (earlier, False)
    with pytest.raises(ChainExists):
        services.jobs.submit("toy", {"a": 1}, COMMAND_LINE, idempotency_key="other", check=_taken)


def _taken(_: object) -> NoReturn:
    raise ChainExists("job x is making a chain 'a'")


def _settings_of(services: Services) -> Settings:
    return Settings(database_url=services.database.engine.url.render_as_string(hide_password=False))


def test_a_job_of_a_transaction_that_fails_is_nowhere(services: Services) -> None:
    made = []

    def fail_after_submitting() -> None:
        with services.database.transaction() as session:
            made.append(services.jobs.submit_in(session, "toy", {}, COMMAND_LINE).id)
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail_after_submitting()
    with pytest.raises(UnknownJob):
        services.jobs.find(made[0])
    assert place(services, made[0]) is None


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"kind": "evaluate"}, "/evaluate/request"),
        ({"kind": "check-teacher", "request": {}}, ""),
        ({"kind": "evaluate", "request": {"chain": "stable", "dataset": "people", "speed": 1}}, "/speed"),
        (EVALUATE | {"priority": 101}, "/priority"),
        (EVALUATE | {"priority": "1"}, "/priority"),
        (EVALUATE | {"owner": "me"}, "/owner"),
    ],
)
def test_a_malformed_request_says_where(make_app: Callable[..., FastAPI], body: dict[str, Any], pointer: str) -> None:
    with TestClient(make_app()) as client:
        answer = client.post("/jobs", json=body)
        assert (answer.status_code, answer.json()["code"]) == (422, "request-invalid")
        assert any(error["pointer"].endswith(pointer) for error in answer.json()["errors"]), answer.text
        assert client.get("/jobs").json()["jobs"] == []


def test_a_request_for_what_is_not_there_makes_no_job(client: TestClient) -> None:
    body = {"kind": "evaluate", "request": {"chain": "stable", "dataset": "nobody"}}
    answer = client.post("/jobs", json=body, headers={"idempotency-key": "k"})
    assert answer.status_code == 404
    assert client.get("/jobs").json()["jobs"] == []
    assert client.post("/jobs", json=EVALUATE, headers={"idempotency-key": "k"}).status_code == 202


def test_jobs_are_listed_newest_first_by_state_and_kind(client: TestClient, services: Services) -> None:
    made = [submitted(services, kind) for kind in ("toy", "other", "toy", "toy")]
    end(services, made[0])
    pages, token = [], ""
    while token is not None:
        page = client.get("/jobs", params={"page_size": 3, **({"page_token": token} if token else {})}).json()
        pages.append([job["id"] for job in page["jobs"]])
        token = page["next_page_token"]
    assert pages == [[made[3], made[2], made[1]], [made[0]]]
    listed = client.get("/jobs", params={"state": ["queued", "failed"], "kind": "toy"}).json()["jobs"]
    assert [job["id"] for job in listed] == [made[3], made[2]]
    assert client.get("/jobs", params={"state": "lost"}).status_code == 422
    assert client.get("/jobs", params={"page_token": "bm9ib2R5"}).json()["code"] == "page-token-invalid"


def test_an_unknown_job_is_404_everywhere(client: TestClient) -> None:
    for path in ("", "/events", "/log", "/files", "/files/a"):
        answer = client.get(f"/jobs/nobody{path}")
        assert (answer.status_code, answer.json()["code"]) == (404, "job-unknown"), path
    for verb in ("cancel", "retry"):
        assert client.post(f"/jobs/nobody/{verb}").json()["code"] == "job-unknown"


def test_a_queued_job_is_cancelled_at_once_and_only_once(client: TestClient, services: Services) -> None:
    job_id = submitted(services)
    answer = client.post(f"/jobs/{job_id}/cancel")
    assert (answer.status_code, answer.json()["state"]) == (202, "cancelled")
    again = client.post(f"/jobs/{job_id}/cancel")
    assert (again.status_code, again.json()["state"]) == (202, "cancelled")
    assert [kind for kind, _ in events(client, job_id)] == ["state", "state"]
    done = submitted(services)
    end(services, done)
    assert client.post(f"/jobs/{done}/cancel").json()["code"] == "job-ended"


@pytest.mark.parametrize("app", ["postgres"], indirect=True)  # SQLite has one writer: nothing happens between two looks
def test_a_job_that_is_given_back_at_this_moment_is_cancelled(client: TestClient, services: Services) -> None:
    """Neither queued nor running for whoever looks at one state after the other: it was answered that it had ended."""
    job_id = submitted(services)
    with services.database.transaction() as session:
        Executors(session).add("me")
        assert JobRows(session).begin(job_id, "me")
    with ThreadPoolExecutor(1) as other:
        with services.database.transaction() as session:
            assert JobRows(session).release(job_id, "me", "it stops", counted=False)
            answer = other.submit(client.post, f"/jobs/{job_id}/cancel")
            time.sleep(0.5)  # it has looked, and waits for us
            assert not answer.done()
        assert (answer.result().status_code, answer.result().json()["state"]) == (202, "cancelled")


def test_only_failed_jobs_are_tried_again(client: TestClient, services: Services) -> None:
    answer = client.post(f"/jobs/{submitted(services)}/retry")
    assert (answer.status_code, answer.json()["code"]) == (409, "job-not-retryable")


def events(client: TestClient, job_id: str, last: int | None = None) -> list[tuple[str, dict[str, Any]]]:
    """Read a stream to its end: (kind, data with the id)."""
    headers = {} if last is None else {"last-event-id": str(last)}
    found, current = [], {}
    with client.stream("GET", f"/jobs/{job_id}/events", headers=headers) as stream:
        assert stream.status_code == 200
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            name, _, value = line.partition(": ")
            if not line and "event" in current:
                found.append((current["event"], json.loads(current["data"]) | {"id": int(current["id"])}))
            current = current | {name: value} if line else {}
    return found


def test_events_stream_until_the_job_has_ended_and_go_on_where_they_were_cut(
    client: TestClient, services: Services
) -> None:
    job_id = submitted(services)

    def work() -> None:
        time.sleep(0.3)
        for number in range(3):
            with services.database.transaction() as session:
                assert JobRows(session).progress(job_id, None, [("progress", {"epoch": number})])
            time.sleep(0.1)
        end(services, job_id)

    worker = threading.Thread(target=work)
    worker.start()
    seen = events(client, job_id)
    worker.join()
    assert [kind for kind, _ in seen] == ["state", "progress", "progress", "progress", "state"]
    assert [data["epoch"] for kind, data in seen if kind == "progress"] == [0, 1, 2]
    assert seen[-1][1]["state"] == "succeeded"
    ids = [data["id"] for _, data in seen]
    assert ids == sorted(set(ids))
    with TestClient(create_app(_settings_of(services))) as another_server:
        assert events(another_server, job_id, last=ids[1]) == seen[2:]
        assert events(another_server, job_id, last=ids[-1]) == []
    assert client.get(f"/jobs/{job_id}/events", headers={"last-event-id": "x"}).status_code == 422


def test_more_events_than_are_read_at_once_all_come(client: TestClient, services: Services) -> None:
    job_id = submitted(services)
    with services.database.transaction() as session:
        JobRows(session).progress(job_id, None, [("log", {"text": str(number)}) for number in range(450)])
    end(services, job_id)
    assert [data["text"] for kind, data in events(client, job_id) if kind == "log"] == [str(n) for n in range(450)]
    assert len(client.get(f"/jobs/{job_id}/log").text.splitlines()) == 450


def test_a_silent_stream_is_kept_alive(client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastapi.routing._PING_INTERVAL", 0.1)
    job_id = submitted(services)
    threading.Timer(1, end, (services, job_id)).start()
    with client.stream("GET", f"/jobs/{job_id}/events") as stream:
        assert sum(line == ": ping" for line in stream.iter_lines()) >= 2


def context(services: Services, job_id: str, tmp_path: Path, executor: str | None = None) -> StepContext:
    store = services.jobs._store
    return StepContext(
        job_id, {}, {}, tmp_path, Settings(), services.database, store, services.registry, executor=executor
    )


def test_a_kept_file_is_listed_downloaded_and_fetched(client: TestClient, services: Services, tmp_path: Path) -> None:
    job_id = submitted(services)
    step = context(services, job_id, tmp_path)
    for content in (b"old", b"new content"):
        (tmp_path / "made").write_bytes(content)
        sha256 = step.keep_file(tmp_path / "made", "chain.safetensors")
    (listed,) = client.get(f"/jobs/{job_id}/files").json()["files"]
    assert (listed["name"], listed["size_bytes"], listed["sha256"]) == ("chain.safetensors", 11, sha256)
    answer = client.get(listed["content"])
    assert answer.content == b"new content"
    assert answer.headers["content-length"] == "11"
    assert answer.headers["etag"] == f'"{sha256}"'
    assert client.get(f"/jobs/{job_id}/files/other").json()["code"] == "job-file-unknown"
    assert step.fetch_file("chain.safetensors", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == b"new content"
    assert not step.fetch_file("other", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="no name for a job's file"):
        step.keep_file(tmp_path / "made", "../made")


def test_no_secret_of_a_child_is_kept_in_the_log_or_the_error(
    client: TestClient, services: Services, tmp_path: Path
) -> None:
    words = "postgresql://me:hunter2hunter2@db/widthwise refused ww_0k3y_c0ffeec0ffee"

    def step(context: StepContext) -> dict[str, Any]:
        # The second line has its secrets where the log cuts it off.
        code = f"import sys; print({words!r}); sys.exit({'.' * 3970!r} + {words!r})"
        context.run_child([sys.executable, "-c", code], on_line=context.log)
        return {}

    with services.database.transaction() as session:
        Executors(session).add("me")
    job_id = submitted(services)
    around = Surroundings(
        Settings(), services.database, services.jobs._store, services.registry, "me", tmp_path, threading.Event()
    )
    Runner(around, {"toy": Kind("toy", (("print", step),))}, lambda _, run: run()).run(job_id)
    job = client.get(f"/jobs/{job_id}").json()
    told = [job["error"], client.get(f"/jobs/{job_id}/log").text, str(events(client, job_id))]
    assert job["state"] == "failed"
    assert "postgresql://me:[redacted]@db/widthwise refused ww_0k3y_[redacted]" in job["error"]
    for text in told:
        assert "postgresql://me:[redacted]@" in text
        assert "hunter2" not in text
        assert "c0ffee" not in text


def test_what_a_step_reports_is_json_that_every_database_takes(
    client: TestClient, services: Services, tmp_path: Path
) -> None:
    job_id = submitted(services)
    step = context(services, job_id, tmp_path)
    step.report(step=3, loss=float("nan"), losses={"triplet": float("inf"), "id": 0.5}, map=(0.25,))
    step.report(eta_s=4.0)
    step.log("nul \x00 and\nlines")
    step.flush()
    job = client.get(f"/jobs/{job_id}").json()
    assert job["progress"] == {
        "step": 3, "loss": None, "losses": {"triplet": None, "id": 0.5}, "map": [0.25], "eta_s": 4.0,
    }  # fmt: skip
    assert "nul  and\nlines" in client.get(f"/jobs/{job_id}/log").text
    with pytest.raises(TypeError, match="PosixPath"):
        step.report(path=tmp_path)


def test_a_worker_that_lost_a_job_can_write_nothing_about_it(services: Services, tmp_path: Path) -> None:
    job_id = submitted(services)
    with services.database.transaction() as session:
        for executor in ("old", "new"):
            Executors(session).add(executor)
            assert JobRows(session).begin(job_id, executor)
    old = context(services, job_id, tmp_path, executor="old")
    (tmp_path / "file").write_text("x")
    before = services.jobs.find(job_id)
    with pytest.raises(JobGivenUp):
        old.report(epoch=1)
    with pytest.raises(JobGivenUp):
        old.keep_file(tmp_path / "file", "file")
    with pytest.raises(JobGivenUp):
        old.check_cancelled()
    assert services.jobs.files(job_id) == []
    assert services.jobs.find(job_id).progress == before.progress
    with services.database.transaction() as session:
        rows = JobRows(session)
        assert not rows.end(job_id, "old", "failed", result=None, error="no")
        assert rows.end(job_id, "new", "succeeded", result={}, error=None)


def test_a_worker_declared_dead_begins_nothing(services: Services) -> None:
    job_id = submitted(services)
    with services.database.transaction() as session:
        executors = Executors(session)
        executors.add("late")
        (row,) = executors.living()
        assert executors.declare_dead("late", row.heartbeat_at)
        assert not executors.beat("late")
        assert not JobRows(session).begin(job_id, "late")


class NoQueue:
    """Remembers what was to be queued."""

    def __init__(self) -> None:
        self.resumed: list[str] = []

    def resume(self, job_id: str) -> None:
        self.resumed.append(job_id)

    def rewind(self, job_id: str) -> None:
        raise NotImplementedError

    def enqueue(self, job_id: str, priority: int) -> None:
        raise NotImplementedError

    def places(self, job_ids: Any) -> dict[str, tuple[str, str | None]]:
        return dict.fromkeys(job_ids, ("ENQUEUED", None))


def test_of_many_that_see_a_worker_dead_one_takes_its_job_over(services: Services) -> None:
    job_id = submitted(services)
    with services.database.transaction() as session:
        Executors(session).add("elsewhere.0.1.dead")
        assert JobRows(session).begin(job_id, "elsewhere.0.1.dead")
    queue = NoQueue()
    others = [Leases(services.database, queue, f"elsewhere.0.{number}.x", 0.4) for number in range(2, 7)]
    for leases in others:
        leases.register()
    barrier = threading.Barrier(len(others))

    def look(leases: Leases) -> None:
        deadline = time.monotonic() + 1.5
        barrier.wait()
        while time.monotonic() < deadline:
            assert leases.beat()
            leases.look_after_others()
            time.sleep(0.05)

    with ThreadPoolExecutor(len(others)) as pool:
        list(pool.map(look, others))
    assert queue.resumed == [job_id]
    assert services.jobs.find(job_id).state == "queued"
    with services.database.transaction() as session:
        assert len(Executors(session).living()) == len(others), "only the silent one was declared dead"


def test_nobody_is_declared_dead_for_a_silence_that_was_not_watched(services: Services) -> None:
    """The database was away for everybody: who comes back first must not take the others for dead."""
    with services.database.transaction() as session:
        Executors(session).add("elsewhere.0.1.silent")
    leases = Leases(services.database, NoQueue(), "elsewhere.0.2.x", 0.6)
    leases.register()
    leases.look_after_others()
    time.sleep(0.8)
    leases.look_after_others()
    with services.database.transaction() as session:
        assert Executors(session).is_living("elsewhere.0.1.silent")


def test_the_engines_tables_and_ours_do_not_disturb_each_other(services: Services) -> None:
    database: Database = services.database
    migrate_engine(database)
    assert is_current(database)
    downgrade(database, "base")
    migrate(database)
    prepare(services)
    assert is_current(database)
    assert services.jobs.page("", 1).jobs == []
    submitted(services)


def test_servers_that_start_at_once_prepare_one_after_another(postgres_url: str, tmp_path: Path) -> None:
    code = "from app.main import prepare, wire; from app.settings import Settings; prepare(wire(Settings()))"
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "WIDTHWISE_DATABASE_URL": postgres_url,
        "WIDTHWISE_DATA_DIR": str(tmp_path),
    }

    def start(_: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)

    with ThreadPoolExecutor(3) as pool:
        for done in pool.map(start, range(3)):
            assert done.returncode == 0, done.stderr


def test_the_engine_is_not_loaded_before_the_first_job() -> None:
    code = "import app.main, app.cli, sys; assert not {'dbos', 'torch'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
