"""Who may do what, and attacks on a server that asks for no keys."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import ValidationError
from structlog.contextvars import get_contextvars
from structlog.testing import capture_logs

from app.actor import Actor
from app.settings import Settings

ADMIN_KEY = "correct-horse-battery-staple-0123456789"
BY = Actor("test")
OPEN_TO_ALL = {("get", "/health/live"), ("get", "/health/ready")}
DEVICES_MAY = {
    ("post", "/models"),
    ("get", "/models/{model_id}"),
    ("get", "/models/{model_id}/artifact"),
    ("head", "/models/{model_id}/artifact"),
    ("get", "/chains"),
    ("get", "/chains/{name}"),
    ("get", "/chains/{name}/frontier"),
    ("get", "/aliases"),
    ("get", "/metrics"),
}


@pytest.fixture
def guarded(make_app: Callable[..., FastAPI]) -> FastAPI:
    return make_app(auth="keys", admin_key=ADMIN_KEY, auth_failure_limit="1000/minute")


@pytest.fixture
def client(guarded: FastAPI) -> Iterator[TestClient]:
    with TestClient(guarded) as client:
        yield client


@pytest.fixture
def device_key(guarded: FastAPI) -> str:
    return guarded.state.services.keys.create("camera", "device", None, BY).key


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def operations(client: TestClient) -> list[tuple[str, str]]:
    paths = client.get("/openapi.json").json()["paths"]
    return [(method, path) for path, methods in paths.items() for method in methods]


def ask(client: TestClient, method: str, path: str, headers: dict[str, str]) -> tuple[int, str | None]:
    """Status and, of problems, code, for a request that is well-formed but for the names in it."""
    for name in ("{model_id}", "{job_id}", "{key_id}", "{name}", "{alias}", "{file}"):
        path = path.replace(name, "nothing")
    body = {"json": {}} if method in ("post", "put", "patch") else {}
    answer = client.request(method, path, headers=headers, **body)  # type: ignore[arg-type]
    is_problem = answer.headers.get("content-type") == "application/problem+json" and method != "head"
    return answer.status_code, answer.json()["code"] if is_problem else None


def test_every_operation_but_the_probes_needs_a_key(client: TestClient) -> None:
    assert len(operations(client)) > 10
    for method, path in operations(client):
        status, _ = ask(client, method, path, {})
        assert (status == 401) == ((method, path) not in OPEN_TO_ALL), (method, path, status)


def test_a_stream_ends_when_its_key_is_revoked(
    guarded: FastAPI, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lasts as long as a job, which may be days; a revoked key works for seconds."""
    monkeypatch.setattr("app.api.jobs.CACHE_S", 0.1)
    keys, jobs = guarded.state.services.keys, guarded.state.services.jobs
    leaving = keys.create("leaving", "admin", None, BY)
    job_id = jobs.submit("toy", {}, BY)[0].id
    seen = []

    def follow() -> None:
        with client.stream("GET", f"/jobs/{job_id}/events", headers=bearer(leaving.key)) as stream:
            seen.extend([stream.status_code, stream.read()])

    follower = threading.Thread(target=follow)
    follower.start()
    follower.join(1)
    assert follower.is_alive()  # a key that works goes on being told
    keys.revoke(leaving.row.id, BY)
    follower.join(10)
    ended_by_itself = not follower.is_alive()
    jobs.cancel(job_id, BY)
    follower.join(10)
    assert ended_by_itself
    assert seen[0] == 200
    assert client.get(f"/jobs/{job_id}/events", headers=bearer(leaving.key)).status_code == 401


def test_a_device_key_asks_for_models_and_nothing_else(client: TestClient, device_key: str) -> None:
    for method, path in operations(client):
        status, _ = ask(client, method, path, bearer(device_key))
        assert status != 401, (method, path)
        assert (status == 403) == ((method, path) not in DEVICES_MAY | OPEN_TO_ALL), (method, path, status)


def test_an_admin_key_is_turned_away_nowhere(client: TestClient) -> None:
    for method, path in operations(client):
        assert ask(client, method, path, bearer(ADMIN_KEY))[0] not in (401, 403), (method, path)


def test_the_description_says_which_operations_need_a_key(client: TestClient) -> None:
    description = client.get("/openapi.json").json()
    assert description["components"]["securitySchemes"]["apiKey"]["scheme"] == "bearer"
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            assert bool(operation.get("security")) == ((method, path) not in OPEN_TO_ALL), (method, path)


def test_refusals_are_problems_that_say_what_to_do(client: TestClient, device_key: str) -> None:
    missing = client.get("/keys")
    assert missing.headers["www-authenticate"] == "Bearer"
    assert missing.headers["content-type"] == "application/problem+json"
    assert (missing.status_code, missing.json()["code"]) == (401, "unauthenticated")
    assert "Authorization: Bearer" in missing.json()["detail"]
    scope = client.get("/keys", headers=bearer(device_key))
    assert (scope.status_code, scope.json()["code"]) == (403, "forbidden")
    assert "www-authenticate" not in scope.headers
    assert device_key not in scope.text


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Basic YWRtaW46YWRtaW4=", ADMIN_KEY, f"Bearer {ADMIN_KEY} x", "Bearer \xff\xfe"]
)
def test_an_authorization_header_that_holds_no_key_of_ours(client: TestClient, header: str) -> None:
    answer = client.get("/chains", headers={"authorization": header.encode("latin-1")})  # type: ignore[dict-item]
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_two_authorization_headers_are_none(client: TestClient) -> None:
    header = ("authorization", f"Bearer {ADMIN_KEY}")
    assert client.get("/chains", headers=[header, header]).status_code == 401  # type: ignore[arg-type]


def test_a_wrong_key_is_refused_even_where_none_is_needed(client: TestClient) -> None:
    assert client.get("/openapi.json", headers=bearer("ww_wrong")).status_code == 401
    assert client.get("/health/live", headers=bearer("ww_wrong")).status_code == 200, "probes look at no key"


def test_a_key_in_the_address_opens_nothing(client: TestClient) -> None:
    """Addresses land in logs and in histories."""
    names = ("key", "api_key", "access_token", "token", "authorization")
    assert client.get("/chains", params=dict.fromkeys(names, ADMIN_KEY)).status_code == 401
    client.cookies.set("authorization", f"Bearer {ADMIN_KEY}")
    assert client.get("/chains").status_code == 401


def test_a_refused_key_is_in_the_log_by_its_address_alone(client: TestClient) -> None:
    with capture_logs() as logs:
        client.get("/chains", headers=bearer("ww_0123456789ab_" + "5" * 64))
    refused = [log for log in logs if log["event"] == "key refused"]
    assert [log["client"] for log in refused] == ["127.0.0.1"]
    assert "5" * 64 not in str(logs)


def test_what_a_handler_logs_names_the_caller(guarded: FastAPI, device_key: str) -> None:
    seen: list[dict[str, Any]] = []

    @guarded.get("/seen")
    async def look() -> None:
        seen.append(dict(get_contextvars()))

    with TestClient(guarded) as client:
        client.get("/seen", headers=bearer(device_key) | {"x-request-id": "r-1"})
    assert seen == [{"request_id": "r-1", "actor": device_key.split("_")[1]}]
    assert "actor" not in get_contextvars()


# Settings


def test_keys_are_needed_everywhere_but_on_loopback() -> None:
    assert not Settings().keys_required
    assert not Settings(host="::1").keys_required
    assert Settings(host="0.0.0.0").keys_required
    assert Settings(auth="keys").keys_required
    assert Settings(host="0.0.0.0", allow_open_bind=True).keys_required, "another setting opens it"
    assert not Settings(host="0.0.0.0", allow_open_bind=True, auth="open").keys_required


@pytest.mark.parametrize("key", ["short", "x" * 31, "x" * 31 + " ", "ü" * 40, "x" * 40 + "\n"])
def test_an_admin_key_that_can_be_guessed_or_not_sent_is_refused(key: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Settings(admin_key=key)
    assert key not in str(refused.value)


# An open server


@pytest.mark.parametrize(
    "host",
    [
        "rebound.attacker.example",
        "rebound.attacker.example:8000",
        "localhost.attacker.example",
        "127.0.0.1.attacker.example",
        "attacker.example#localhost",
        "localhost@attacker.example",
        "127.0.0.1@attacker.example",
        "192.168.1.7:8000",
        "0.0.0.0:8000",
        "[::ffff:192.168.1.7]",
        "2130706433.attacker.example",
        "",
        "[",
        "localhost:8000, attacker.example",
    ],
)
def test_dns_rebinding_is_turned_away(make_app: Callable[..., FastAPI], host: str) -> None:
    """A page of attacker.example points that name at 127.0.0.1 and asks itself; the browser sends the name."""
    with TestClient(make_app()) as client:
        for method, path in (
            ("GET", "/chains"),
            ("DELETE", "/keys/0123456789ab"),
            ("GET", "/health/live"),
            ("GET", "/x"),
        ):
            answer = client.request(method, path, headers={"host": host})
            assert (answer.status_code, answer.json()["code"]) == (403, "not-on-loopback"), (method, path)
        assert "WIDTHWISE_AUTH=keys" in answer.json()["detail"]


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "localhost.", "127.0.0.1", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000"]
)
def test_an_open_server_answers_to_every_name_of_this_machine(make_app: Callable[..., FastAPI], host: str) -> None:
    with TestClient(make_app()) as client:
        assert client.get("/chains", headers={"host": host}).status_code == 200


def test_two_host_headers_are_none(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app()) as client:
        hosts = [("host", "localhost"), ("host", "attacker.example")]
        assert client.get("/chains", headers=hosts).status_code in (400, 403)  # type: ignore[arg-type]


@pytest.mark.parametrize("address", ["192.168.1.7", "10.0.0.1", "2001:db8::1", "::ffff:10.0.0.1", "garbage"])
def test_an_open_server_answers_no_other_machine_whatever_host_it_names(
    make_app: Callable[..., FastAPI], address: str
) -> None:
    """Bound to the network behind the back of the settings, or reached through a proxy that says for whom."""
    with TestClient(make_app(), client=(address, 50000)) as client:
        answer = client.get("/chains")
    assert (answer.status_code, answer.json()["code"]) == (403, "not-on-loopback")


@pytest.mark.parametrize(
    "origin", ["https://attacker.example", "null", "http://localhost.attacker.example", "file://", ""]
)
def test_a_page_elsewhere_cannot_use_an_open_server(make_app: Callable[..., FastAPI], origin: str) -> None:
    """Browsers send some requests across origins without asking first, and say where from."""
    with TestClient(make_app()) as client:
        answer = client.post("/keys/0123456789ab/rotate", content="{}", headers={"origin": origin})
        assert (answer.status_code, answer.json()["code"]) == (403, "not-on-loopback")
        assert client.get("/chains", headers={"origin": "http://localhost:3000"}).status_code == 200


def test_an_open_server_takes_whoever_asks_for_admin_and_audits_it(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app()) as client:
        made = client.post("/keys", json={"name": "camera", "scope": "device"}, headers={"x-request-id": "r-2"})
        assert made.status_code == 201
        newest = client.get("/audit").json()["entries"][0]
    assert (newest["actor"], newest["action"], newest["request_id"]) == ("anonymous", "key.create", "r-2")


def test_where_something_else_guards_the_port_any_host_may_ask(make_app: Callable[..., FastAPI]) -> None:
    app = make_app(host="0.0.0.0", allow_open_bind=True, auth="open")
    with TestClient(app, base_url="http://widthwise.example", client=("10.0.0.1", 1)) as client:
        assert client.get("/chains").status_code == 200


def test_a_server_with_keys_answers_any_host(client: TestClient, device_key: str) -> None:
    headers = bearer(device_key) | {"host": "widthwise.example", "origin": "https://console.example"}
    assert client.get("/chains", headers=headers).status_code == 200


def test_a_request_that_never_passed_the_gate_is_answered_by_no_handler(guarded: FastAPI) -> None:
    """Were the gate forgotten, nobody would be let in; and a client cannot set what it leaves behind."""
    guarded.user_middleware = [layer for layer in guarded.user_middleware if layer.cls.__name__ != "Gate"]  # type: ignore[attr-defined]
    with TestClient(guarded, raise_server_exceptions=False) as client:
        assert client.get("/chains", headers=bearer(ADMIN_KEY)).status_code == 500
