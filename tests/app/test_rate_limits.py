"""Limits on how often, how long and how much: floods, guesses, stalled and endless bodies."""

from __future__ import annotations

import http.client
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from pydantic import ValidationError
from structlog.testing import capture_logs

from app.actor import Actor
from app.api.ratelimit import RateLimits, bucket_of
from app.errors import RateLimitsUnavailable
from app.settings import Settings

ADMIN_KEY = "correct-horse-battery-staple-0123456789"
BY = Actor("test")
WRONG = {"authorization": "Bearer ww_0123456789ab_" + "0" * 64}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def make_key(app: FastAPI) -> dict[str, str]:
    return bearer(app.state.services.keys.create("camera", "device", None, BY).key)


def test_too_many_requests_are_told_when_to_come_back(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(rate_limit="3 per 2 seconds")) as client:
        answers = [client.get("/chains") for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        refusal = answers[-1]
        assert refusal.headers["content-type"] == "application/problem+json"
        assert refusal.json()["code"] == "too-many-requests"
        assert "3 per 2 second" in refusal.json()["detail"]
        wait_s = int(refusal.headers["retry-after"])
        assert 1 <= wait_s <= 2
        time.sleep(wait_s)
        assert client.get("/chains").status_code == 200


def test_each_key_has_its_own_limit_wherever_it_is_used(make_app: Callable[..., FastAPI]) -> None:
    app = make_app(auth="keys", rate_limit="2/hour")
    first, second = make_key(app), make_key(app)
    statuses = []
    for address in ("10.0.0.1", "10.0.0.2", "10.0.0.3"):
        with TestClient(app, client=(address, 1)) as client:
            statuses.append((client.get("/chains", headers=first).status_code, client.get("/x").status_code))
    assert statuses == [(200, 404), (200, 404), (429, 404)]
    with TestClient(app, client=("10.0.0.1", 1)) as client:
        assert client.get("/chains", headers=second).status_code == 200


def test_without_a_key_the_address_is_limited(make_app: Callable[..., FastAPI]) -> None:
    app = make_app(auth="keys", rate_limit="2/hour")
    with TestClient(app, client=("10.0.0.1", 1)) as client:
        assert [client.get("/chains").status_code for _ in range(3)] == [401, 401, 429]
        assert client.get("/health/ready").status_code == 429
        assert client.get("/health/live").status_code == 200, "a process that is asked too much is alive"
    with TestClient(app, client=("10.0.0.2", 1)) as client:
        assert client.get("/chains").status_code == 401


def test_guessing_keys_ends_after_a_few(make_app: Callable[..., FastAPI]) -> None:
    """Once an address has used up its failures, not even the right key is tried: the guesser learns nothing more."""
    app = make_app(auth="keys", admin_key=ADMIN_KEY, auth_failure_limit="3/hour")
    with TestClient(app, client=("10.0.0.1", 1)) as client:
        guesses = [client.get("/chains", headers=WRONG) for _ in range(5)]
        assert [answer.status_code for answer in guesses] == [401, 401, 401, 429, 429]
        assert 3500 < int(guesses[-1].headers["retry-after"]) <= 3601
        assert client.get("/chains", headers=bearer(ADMIN_KEY)).status_code == 429
        assert client.get("/chains", headers=make_key(app)).status_code == 429
    with TestClient(app, client=("10.0.0.2", 1)) as client:
        assert client.get("/chains", headers=bearer(ADMIN_KEY)).status_code == 200


def test_one_bad_camera_does_not_lock_out_the_others_behind_its_address(make_app: Callable[..., FastAPI]) -> None:
    app = make_app(auth="keys", auth_failure_limit="3/hour")
    good, revoked = make_key(app), make_key(app)
    with TestClient(app, client=("10.0.0.1", 1)) as client:
        assert client.get("/chains", headers=good).status_code == 200
        assert client.get("/chains", headers=revoked).status_code == 200
        app.state.services.keys.revoke(revoked["authorization"].split("_")[1], BY)
        assert [client.get("/chains", headers=WRONG).status_code for _ in range(4)] == [401, 401, 401, 429]
        assert client.get("/chains", headers=good).status_code == 200, "it was good before"
        assert client.get("/chains", headers=revoked).status_code == 429, "it is good no more"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),  # what one customer gets
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("10.0.0.1", "10.0.0.2", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("fe80::1%eth0", "fe80::2%eth0", True),
    ],
)
def test_what_counts_as_one_address(one: str, other: str, same: bool) -> None:
    assert (bucket_of(one) == bucket_of(other)) == same


def test_serving_a_model_costs_next_to_nothing_more(make_app: Callable[..., FastAPI]) -> None:
    """The key is remembered and the count is in memory: neither asks a database."""
    from sqlalchemy import event

    app = make_app(auth="keys")
    device = make_key(app)
    with TestClient(app) as client:
        client.get("/chains/pico", headers=device)
        asked: list[str] = []
        event.listen(
            app.state.services.database.engine, "before_cursor_execute", lambda *arguments: asked.append(arguments[2])
        )
        client.get("/chains/pico", headers=device)
    assert asked
    assert not [statement for statement in asked if "api_keys" in statement]


@pytest.mark.parametrize("name", ["rate_limit", "auth_failure_limit"])
@pytest.mark.parametrize("rate", ["", "many", "-1/minute", "5/fortnight"])
def test_a_rate_that_cannot_be_read_is_refused_at_start(name: str, rate: str) -> None:
    with pytest.raises(ValidationError, match="is no rate"):
        Settings(**{name: rate})


@pytest.mark.parametrize("url", ["carrier-pigeon://me:hunter2@host", "nonsense", ""])
def test_a_store_of_limits_that_does_not_exist_is_refused_at_start(url: str) -> None:
    with pytest.raises(RateLimitsUnavailable, match="WIDTHWISE_RATE_LIMIT_STORAGE_URL") as refused:
        RateLimits("1/minute", "1/minute", url)
    assert "hunter2" not in str(refused.value)


def test_a_store_of_limits_that_fails_lets_nobody_in(
    make_app: Callable[..., FastAPI], monkeypatch: pytest.MonkeyPatch
) -> None:
    from limits.errors import StorageError
    from limits.storage import MemoryStorage

    def fail(*_: object, **__: object) -> int:
        raise StorageError(ConnectionError("redis://:hunter2@limits.internal:6379 does not answer"))

    app = make_app()
    monkeypatch.setattr(MemoryStorage, "incr", fail)
    with TestClient(app) as client, capture_logs() as logs:
        answer = client.get("/chains")
        assert (answer.status_code, answer.json()["code"]) == (503, "rate-limits-unavailable")
        assert "hunter2" not in answer.text
        assert "limits.internal" not in answer.text
        assert client.get("/health/live").status_code == 200
    assert any("limits.internal" in str(log) for log in logs)


@pytest.fixture
def redis_port() -> Iterator[int]:
    """A server of its own; the client library comes with the extra `redis`."""
    pytest.importorskip("redis")
    program = shutil.which("redis-server") or pytest.skip("not installed: redis-server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--requirepass", "sesame"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd="/tmp") as server:
        try:
            wait_for(lambda: accepts(port))
            yield port
        finally:
            server.kill()


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_processes_that_share_redis_count_together(make_app: Callable[..., FastAPI], redis_port: int) -> None:
    shared = {"rate_limit": "3/hour", "rate_limit_storage_url": f"redis://:sesame@127.0.0.1:{redis_port}/0"}
    with TestClient(make_app(**shared)) as one, TestClient(make_app(**shared)) as other:
        assert [client.get("/chains").status_code for client in (one, other, one, other)] == [200, 200, 200, 429]
        assert int(other.get("/chains").headers["retry-after"]) > 3000


def test_guesses_are_counted_together_too(make_app: Callable[..., FastAPI], redis_port: int) -> None:
    shared = {"auth_failure_limit": "2/hour", "rate_limit_storage_url": f"redis://:sesame@127.0.0.1:{redis_port}/0"}
    apps = [make_app(auth="keys", **shared) for _ in range(2)]
    with TestClient(apps[0]) as one, TestClient(apps[1]) as other:
        assert [client.get("/chains", headers=WRONG).status_code for client in (one, other, one)] == [401, 401, 429]


def test_redis_that_is_away_is_a_503(make_app: Callable[..., FastAPI]) -> None:
    pytest.importorskip("redis")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"redis://:sesame@127.0.0.1:{nobody.getsockname()[1]}/0"
        with TestClient(make_app(rate_limit_storage_url=url)) as client:
            answer = client.get("/chains")
    assert (answer.status_code, answer.json()["code"]) == (503, "rate-limits-unavailable")


# Over a real socket: bodies that stall, trickle, or never end.


@contextmanager
def serving(app: FastAPI) -> Iterator[int]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False, lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def head(method: str, path: str, size: int) -> bytes:
    lines = (
        f"{method} {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {size}",
    )
    return ("\r\n".join(lines) + f"\r\nContent-Length: {size}\r\n\r\n").encode()


def answer_of(connection: socket.socket) -> http.client.HTTPResponse:
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response


@pytest.fixture
def impatient(make_app: Callable[..., FastAPI]) -> FastAPI:
    app = make_app(body_timeout_s=0.5, max_upload_bytes=200_000)

    @app.put("/teachers/{name}/weights")
    async def weights(name: str, request: Request) -> int:
        return sum([len(chunk) async for chunk in request.stream()])

    app.router.routes.insert(0, app.router.routes.pop())  # before the one that wants a teacher
    return app


def test_a_body_that_stalls_is_given_up(impatient: FastAPI) -> None:
    with serving(impatient) as port, socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head("POST", "/models", 100) + b'{"limits"')
        began = time.monotonic()
        answer = answer_of(connection)
        assert 0.3 < time.monotonic() - began < 5
        assert answer.status == 408
        assert answer.headers["content-type"] == "application/problem+json"
        assert b'"body-stalled"' in answer.read()


def test_a_body_that_trickles_is_given_up_as_well(impatient: FastAPI) -> None:
    """A byte now and then would keep a timer of pauses from ever ending."""
    with serving(impatient) as port, socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head("POST", "/models", 1000))
        began = time.monotonic()
        try:
            while time.monotonic() - began < 5:
                connection.sendall(b" ")
                time.sleep(0.1)
        except OSError:
            pass
        else:
            pytest.fail("the server read on and on")


def test_an_upload_may_take_its_time_but_not_pause(impatient: FastAPI) -> None:
    with serving(impatient) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(head("PUT", "/teachers/t/weights", 8))
            for _ in range(8):
                connection.sendall(b"x")
                time.sleep(0.2)
            assert answer_of(connection).read() == b"8", "1.6 s in all, and never 0.5 s of silence"
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(head("PUT", "/teachers/t/weights", 8) + b"x")
            assert answer_of(connection).status == 408


def test_a_slow_reader_is_not_taken_for_a_stalled_body(impatient: FastAPI) -> None:
    with serving(impatient) as port, socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        body = b'{"limits":{"max_macs":1000000000}}'
        connection.sendall(head("POST", "/models", len(body)) + body)
        answer = answer_of(connection)
        assert answer.status == 200
        time.sleep(1.2)
        assert len(answer.read()) == int(answer.headers["content-length"])


def test_uploads_alone_may_be_large(impatient: FastAPI) -> None:
    with TestClient(impatient) as client:
        assert client.put("/teachers/t/weights", content=b"x" * 150_000).json() == 150_000
        assert client.put("/teachers/t/weights", content=b"x" * 200_001).status_code == 413
        for method, path in (
            ("POST", "/models"),
            ("POST", "/teachers/t/weights"),
            ("PUT", "/teachers/t/weights/more"),
            ("PUT", "/teachers/a/b/weights"),
            ("PUT", "/x/teachers/t/weights"),
            ("PUT", "/teachers//weights"),
        ):
            answer = client.request(method, path, content=b"x" * 65_537)
            assert (answer.status_code, answer.json()["code"]) == (413, "body-too-large"), path


def test_a_body_of_unannounced_length_ends_at_the_limit(impatient: FastAPI) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 10**7:
            sent += 10_000
            yield b" " * 10_000

    with serving(impatient) as port:
        for path in ("/models", "/teachers/t/weights"):
            sent = 0
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            try:
                connection.request("PUT" if "weights" in path else "POST", path, endless())
                assert connection.getresponse().status == 413
            except (BrokenPipeError, ConnectionResetError):
                pass  # refused while it was still sending
            finally:
                connection.close()
            assert sent < 10**7


def test_a_small_body_of_unannounced_length_is_read(impatient: FastAPI) -> None:
    def trickle() -> Iterator[bytes]:
        yield b'{"limits":'
        yield b'{"max_macs":1000000000}}'

    with TestClient(impatient) as client:
        answer = client.post("/models", content=trickle(), headers={"content-type": "application/json"})
        assert answer.status_code == 200


def test_the_upload_of_a_stranger_is_not_read(make_app: Callable[..., FastAPI]) -> None:
    """Refused by its key, and then cut: gigabytes would be read for nothing."""
    with serving(make_app(auth="keys")) as port, socket.create_connection(("127.0.0.1", port), timeout=10) as stranger:
        stranger.sendall(head("PUT", "/teachers/t/weights", 8 * 1024**3) + b"x" * 1000)
        answer = answer_of(stranger)
        assert answer.status == 401
        assert answer.headers["connection"] == "close"
        answer.read()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            stranger.sendall(b"x" * 10**8)


def test_the_settings_of_a_limit_reach_the_server(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    assert (settings.rate_limit, settings.auth_failure_limit, settings.body_timeout_s) == (
        "100000/minute",
        "20/minute",
        30,
    )
