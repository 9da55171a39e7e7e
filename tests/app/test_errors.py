from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from structlog.testing import capture_logs

from app.api.errors import PRIVATE_DETAIL, TABLE, field_error, row_of
from app.errors import AppError, DatabaseUnavailable, ObjectCorrupt, StorageUnavailable
from chains.errors import ChainsError

SECRET = "hunter2 at /srv/secret"


def with_descendants(root: type[Exception]) -> Iterator[type[Exception]]:
    yield root
    for child in root.__subclasses__():
        yield from with_descendants(child)


@pytest.mark.parametrize(
    "error", [*with_descendants(ChainsError), *with_descendants(AppError)], ids=lambda e: e.__name__
)
def test_every_error_class_has_a_row(error: type[Exception]) -> None:
    assert error in TABLE
    assert 400 <= TABLE[error].status < 600


def test_a_class_without_a_row_is_answered_as_its_ancestor() -> None:
    class Deeper(ObjectCorrupt):
        pass

    try:
        assert row_of(Deeper()) is TABLE[ObjectCorrupt]
    finally:
        del Deeper


@pytest.mark.parametrize("code", sorted({row.code for row in TABLE.values()}))
def test_codes_are_kebab_case(code: str) -> None:
    assert code == code.lower()
    assert code.replace("-", "").isalpha()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError(SECRET), 500),
        (DatabaseUnavailable(SECRET), 503),
        (StorageUnavailable(SECRET), 503),
        (ObjectCorrupt(SECRET), 500),
        (ChainsError(SECRET), 500),
        (RecursionError(SECRET), 500),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_a_failure_of_ours_keeps_its_words_to_itself(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(app.state.services.registry, "find", fail)
    answer = TestClient(app).get("/chains/pico")
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert SECRET not in answer.text
    assert "Traceback" not in answer.text
    assert answer.json()["detail"] == PRIVATE_DETAIL
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "path-unknown"),
        ("GET", "/models/", 404, "path-unknown"),
        ("GET", "/", 404, "path-unknown"),
        ("DELETE", "/models", 405, "method-not-allowed"),
        ("GET", "/models", 405, "method-not-allowed"),
        ("POST", "/chains", 405, "method-not-allowed"),
        ("GET", "/chains/nobody", 404, "chain-unknown"),
        ("GET", "/chains/nobody/frontier", 404, "chain-unknown"),
        ("GET", "/chains/%00", 404, "chain-unknown"),
        ("GET", "/chains/%ff%fe", 404, "chain-unknown"),
        ("GET", "/chains/..%2f..%2fetc", 404, "path-unknown"),
        ("GET", "/models/" + "0" * 64, 404, "model-unknown"),
        ("GET", "/models/xyz", 404, "model-unknown"),
        ("GET", "/models/%00", 404, "model-unknown"),
        ("GET", "/models/xyz/artifact", 404, "model-unknown"),
        ("HEAD", "/models/xyz/artifact", 404, None),
        ("GET", "/chains?page_size=0", 422, "request-invalid"),
        ("GET", "/chains?page_size=101", 422, "request-invalid"),
        ("GET", "/chains?page_size=x", 422, "request-invalid"),
        ("GET", "/chains?page_token=", 422, "page-token-invalid"),
        ("GET", "/chains?page_token=!!", 422, "page-token-invalid"),
        ("GET", "/chains?page_token=_w", 422, "page-token-invalid"),
        ("GET", "/chains?page_token=AAAA", 422, "page-token-invalid"),
        ("GET", "/chains?page_token=%C3%A4", 422, "page-token-invalid"),
        ("GET", "/chains?page_token=" + "a" * 201, 422, "request-invalid"),
    ],
)
def test_whatever_goes_wrong_the_answer_is_a_problem(
    shared_client: TestClient, method: str, path: str, status: int, code: str | None
) -> None:
    answer = shared_client.request(method, path)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    if code is not None:
        problem = json.loads(answer.content)
        assert problem["code"] == code
        assert problem["type"] == f"urn:widthwise:problem:{code}"
        assert problem["status"] == status
        assert problem["detail"]


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/models", {"POST"}),
        ("/models/x", {"GET"}),
        ("/models/x/artifact", {"GET", "HEAD"}),
        ("/chains/x/frontier", {"GET"}),
        ("/openapi.json", {"GET", "HEAD"}),
    ],
)
def test_405_names_the_methods_there_are(shared_client: TestClient, path: str, methods: set[str]) -> None:
    assert set(shared_client.delete(path).headers["allow"].split(", ")) == methods


@pytest.mark.parametrize("path", ["/chains/%1b%5b31mred", "/chains/a%0afake", "/chains/%c2%9b31m%e2%80%a8"])
def test_a_path_cannot_write_into_the_log(shared_client: TestClient, path: str) -> None:
    with capture_logs() as lines:
        shared_client.get(path)
    logged = lines[-1]["path"]
    assert logged.startswith("/chains/")
    assert logged.isascii()
    assert logged.isprintable()


@pytest.mark.parametrize("offered", ["abc-1.2_3", "a" * 64])
def test_a_sane_request_id_is_kept(shared_client: TestClient, offered: str) -> None:
    assert shared_client.get("/health/live", headers={"x-request-id": offered}).headers["x-request-id"] == offered


@pytest.mark.parametrize("offered", ["", "a" * 65, "a b", "../x", "a;b", "<script>", "-x", "a%0a"])
def test_another_request_id_is_replaced(shared_client: TestClient, offered: str) -> None:
    given = shared_client.get("/health/live", headers={"x-request-id": offered}).headers["x-request-id"]
    assert given != offered
    assert len(given) == 32


def test_live_says_which_version(shared_client: TestClient) -> None:
    answer = shared_client.get("/health/live").json()
    assert answer["status"] == "live"
    assert answer["version"]


def test_ready_when_database_and_store_answer(shared_client: TestClient) -> None:
    assert shared_client.get("/health/ready").json() == {"status": "ready"}


@pytest.mark.parametrize("what", ["database", "registry"])
def test_not_ready_when_one_is_away(
    app: FastAPI, client: TestClient, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    from app.api import health

    def away(*_: object) -> bool:
        raise {"database": DatabaseUnavailable, "registry": StorageUnavailable}[what](SECRET)

    if what == "database":
        monkeypatch.setattr(health, "is_current", away)
    else:
        monkeypatch.setattr(app.state.services.registry, "check_storage", away)
    answer = client.get("/health/ready")
    assert (answer.status_code, answer.json()["code"]) == (503, "not-ready")
    assert SECRET not in answer.text


def test_not_ready_when_the_folder_of_objects_is_gone(client: TestClient, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "data" / "objects")
    answer = client.get("/health/ready")
    assert (answer.status_code, answer.json()["code"]) == (503, "not-ready")


def test_a_damaged_database_is_named_unavailable(app: FastAPI, client: TestClient, tmp_path: Path) -> None:
    app.state.services.database.dispose()
    for file in (tmp_path / "data").glob("widthwise.db*"):
        file.write_bytes(b"no database" * 1000)
    for path, code in {"/chains": "database-unavailable", "/health/ready": "not-ready"}.items():
        answer = client.get(path)
        assert (answer.status_code, answer.json()["code"]) == (503, code)


def test_not_ready_before_the_database_is_migrated(tmp_path: object) -> None:
    from app.main import create_app
    from app.settings import Settings

    with TestClient(create_app(Settings(data_dir=tmp_path))) as client:
        assert client.get("/health/ready").status_code == 503
        assert client.get("/health/live").status_code == 200
        answer = client.post("/models", json={"limits": {"max_macs": 1}})
        assert (answer.status_code, answer.json()["code"]) == (503, "database-unavailable")


def test_a_misspelt_limit_is_called_an_unknown_field() -> None:
    mistake = {"type": "extra_forbidden", "loc": ("body", "limits", "max_mac"), "msg": "Extra inputs are not permitted"}
    assert field_error(mistake) == {"pointer": "/limits/max_mac", "code": "extra-forbidden", "message": "unknown field"}
