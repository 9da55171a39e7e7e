"""Values that one database takes and the other refuses: both must answer the same, and never with a 500."""

from __future__ import annotations

import base64
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app.actor import COMMAND_LINE
from app.api.deps import Services
from app.db.executors import Executors
from app.errors import JobPermanentlyFailed
from app.settings import Settings
from app.worker.context import StepContext
from app.worker.kinds import Kind
from app.worker.runner import Runner, Surroundings

TEACHER = {
    "name": "t",
    "sha256": "0" * 64,
    "size_bytes": 5,
    "license": "MIT",
    "terms": "any",
    "consent_basis": "synthetic",
    "input": {"height": 32, "width": 16, "mean": [0.5, 0.5, 0.5]},
}
NUL_TOKEN = base64.urlsafe_b64encode(b"a\x00b").decode().rstrip("=")


@pytest.fixture(params=["sqlite", "postgres"])
def app(request: pytest.FixtureRequest, make_app: Callable[..., FastAPI]) -> FastAPI:
    if request.param == "sqlite":
        return make_app()
    return make_app(database_url=request.getfixturevalue("postgres_url"))


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def test_a_nul_in_a_path_names_nothing(client: TestClient) -> None:
    for path in ("", "/events", "/log", "/files", "/files/a"):
        answer = client.get(f"/jobs/a%00b{path}")
        assert (answer.status_code, answer.json()["code"]) == (404, "job-unknown"), path
    for verb in ("cancel", "retry"):
        assert client.post(f"/jobs/a%00b/{verb}").json()["code"] == "job-unknown"
    for path in ("/chains/a%00b", "/teachers/a%00b", "/datasets/a%00b", "/models/a%00b", "/keys/a%00b"):
        assert client.get(path).status_code in (404, 405), path


def test_a_nul_in_the_name_of_a_jobs_file_names_nothing(app: FastAPI, client: TestClient) -> None:
    job_id = app.state.services.jobs.submit("toy", {}, COMMAND_LINE)[0].id
    answer = client.get(f"/jobs/{job_id}/files/a%00b")
    assert (answer.status_code, answer.json()["code"]) == (404, "job-file-unknown")


@pytest.mark.parametrize("path", ["/jobs", "/chains", "/teachers", "/datasets", "/keys", "/audit"])
def test_a_nul_in_a_page_token_is_refused(client: TestClient, path: str) -> None:
    answer = client.get(path, params={"page_token": NUL_TOKEN})
    assert (answer.status_code, answer.json()["code"]) == (422, "page-token-invalid")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_teacher_with_a_mean_that_is_no_number_is_refused(client: TestClient, number: str) -> None:
    """It was stored on SQLite, and from then on no list of teachers could be answered."""
    body = json.dumps(TEACHER).replace("[0.5,", f"[{number},")
    answer = client.post("/teachers", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (422, "request-invalid")
    assert answer.json()["errors"][0]["pointer"] == "/input/mean/0"
    assert client.get("/teachers").json()["teachers"] == []


def _run(services: Services, folder: Path, step: Callable[[StepContext], dict[str, Any]]) -> str:
    with services.database.transaction() as session:
        Executors(session).add("me")
    job_id = services.jobs.submit("toy", {}, COMMAND_LINE)[0].id
    around = Surroundings(
        Settings(), services.database, services.jobs._store, services.registry, "me", folder, threading.Event()
    )
    Runner(around, {"toy": Kind("toy", (("print", step),))}, lambda _, run: run()).run(job_id)
    return job_id


def test_a_job_ends_though_its_program_wrote_a_nul(app: FastAPI, client: TestClient, tmp_path: Path) -> None:
    def step(context: StepContext) -> dict[str, Any]:
        code = "import sys; sys.stdout.write('half\\0a line'); sys.exit(3)"
        context.run_child([sys.executable, "-c", code], on_line=context.log)
        return {}

    job_id = _run(app.state.services, tmp_path, step)
    job = client.get(f"/jobs/{job_id}").json()
    assert job["state"] == "failed"
    assert "halfa line" in job["error"]


def test_a_job_ends_though_a_file_has_an_impossible_name(app: FastAPI, client: TestClient, tmp_path: Path) -> None:
    def step(_context: StepContext) -> dict[str, Any]:
        raise JobPermanentlyFailed("cannot read " + os.fsdecode(b"x\xff.jpg"))

    job_id = _run(app.state.services, tmp_path, step)
    job = client.get(f"/jobs/{job_id}").json()
    assert job["state"] == "failed"
    assert job["error"].endswith("x?.jpg")
