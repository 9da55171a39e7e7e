"""Uploads: whatever is cut, what had arrived is kept, and only the announced bytes are ever put to use."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app.errors import (
    ObjectNotFound,
    OffsetMismatch,
    TooManyUploads,
    UnknownUpload,
    UploadCorrupt,
    UploadIncomplete,
    UploadTooLarge,
    UploadTooLong,
)
from app.services.uploads import Uploads
from app.storage.port import content_key, read_verified
from tests.app.conftest import free_port

PART = 64 * 1024
CONTENT = os.urandom(5 * PART + 1234)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
OFFSET_STREAM = {"content-type": "application/offset+octet-stream"}


@pytest.fixture(params=["sqlite", "postgres"])
def any_app(request: pytest.FixtureRequest, make_app: Callable[..., FastAPI]) -> FastAPI:
    more = {"database_url": request.getfixturevalue("postgres_url")} if request.param == "postgres" else {}
    return make_app(upload_part_bytes=PART, max_upload_bytes=100 * PART, max_open_uploads=3, **more)


@pytest.fixture
def app(make_app: Callable[..., FastAPI]) -> FastAPI:
    return make_app(upload_part_bytes=PART, max_upload_bytes=100 * PART, max_open_uploads=3)


@pytest.fixture
def uploads(any_app: FastAPI) -> Uploads:
    return opened(any_app)


def opened(app: FastAPI, target: str = "t", sha256: str = SHA256, size_bytes: int = len(CONTENT)) -> Uploads:
    uploads: Uploads = app.state.services.uploads
    with app.state.services.database.transaction() as session:
        uploads.create_in(session, "teacher", target, sha256, size_bytes)
    return uploads


def chunks(content: bytes, size: int = 1000) -> Iterator[bytes]:
    return (content[start : start + size] for start in range(0, len(content), size))


def cut(content: bytes) -> Iterator[bytes]:
    yield from chunks(content)
    raise ConnectionResetError


def finish(app: FastAPI, uploads: Uploads) -> None:
    upload = uploads.find("teacher", "t")
    uploads.assemble(upload)
    with app.state.services.database.transaction() as session:
        uploads.finish_in(session, upload)


def stored(app: FastAPI) -> bytes:
    return read_verified(app.state.services.uploads._store, SHA256)


def test_what_was_sent_in_pieces_becomes_one_object(any_app: FastAPI, uploads: Uploads) -> None:
    half = uploads.append("teacher", "t", 0, chunks(CONTENT[:100_000]))
    assert half.received_bytes == 100_000
    assert uploads.append("teacher", "t", 100_000, chunks(CONTENT[100_000:])).received_bytes == len(CONTENT)
    finish(any_app, uploads)
    assert stored(any_app) == CONTENT
    with pytest.raises(UnknownUpload):
        uploads.find("teacher", "t")


def test_a_cut_connection_keeps_every_byte_that_arrived(any_app: FastAPI, uploads: Uploads) -> None:
    with pytest.raises(ConnectionResetError):
        uploads.append("teacher", "t", 0, cut(CONTENT[: PART + 77]))
    assert uploads.find("teacher", "t").received_bytes == PART + 77
    uploads.append("teacher", "t", PART + 77, chunks(CONTENT[PART + 77 :]))
    finish(any_app, uploads)
    assert stored(any_app) == CONTENT


def test_only_the_next_free_place_is_written_to(uploads: Uploads) -> None:
    uploads.append("teacher", "t", 0, [CONTENT[:10]])
    for offset in (0, 9, 11):
        with pytest.raises(OffsetMismatch) as refused:
            uploads.append("teacher", "t", offset, [b"x"])
        assert refused.value.received_bytes == 10


def test_of_clients_that_send_the_same_bytes_one_wins_each_part(any_app: FastAPI, uploads: Uploads) -> None:
    start = threading.Barrier(3)

    def send(_: int) -> int:
        start.wait()
        try:
            return uploads.append("teacher", "t", 0, chunks(CONTENT)).received_bytes
        except OffsetMismatch:
            return -1

    with ThreadPoolExecutor(3) as pool:
        outcomes = sorted(pool.map(send, range(3)))
    received = uploads.find("teacher", "t").received_bytes
    if received < len(CONTENT):  # each may have lost a part to another
        uploads.append("teacher", "t", received, [CONTENT[received:]])
    assert outcomes[0] == outcomes[1] == -1
    finish(any_app, uploads)
    assert stored(any_app) == CONTENT


def test_another_digest_starts_the_upload_over_and_loses_nothing_else(any_app: FastAPI, uploads: Uploads) -> None:
    other = opened(any_app, "other")
    other.append("teacher", "other", 0, [CONTENT[:500]])
    uploads.append("teacher", "t", 0, chunks(b"\0" + CONTENT[1:]))
    with pytest.raises(UploadCorrupt):
        finish(any_app, uploads)
    assert uploads.find("teacher", "t").received_bytes == 0
    assert uploads.find("teacher", "other").received_bytes == 500
    with pytest.raises(ObjectNotFound):
        stored(any_app)
    uploads.append("teacher", "t", 0, chunks(CONTENT))
    finish(any_app, uploads)
    assert stored(any_app) == CONTENT


def test_an_upload_is_assembled_when_it_is_whole_and_not_before(any_app: FastAPI, uploads: Uploads) -> None:
    uploads.append("teacher", "t", 0, [CONTENT[:-1]])
    with pytest.raises(UploadIncomplete, match="send the rest"):
        finish(any_app, uploads)


def test_more_than_was_announced_is_refused(uploads: Uploads) -> None:
    with pytest.raises(UploadTooLong):
        uploads.append("teacher", "t", 0, chunks(CONTENT + b"x"))
    assert uploads.find("teacher", "t").received_bytes == 5 * PART


def test_a_lost_part_starts_the_upload_over(any_app: FastAPI, uploads: Uploads) -> None:
    uploads.append("teacher", "t", 0, chunks(CONTENT))
    uploads._store.delete(content_key(hashlib.sha256(CONTENT[:PART]).hexdigest()))
    with pytest.raises(UploadCorrupt):
        finish(any_app, uploads)
    assert uploads.find("teacher", "t").received_bytes == 0


def test_uploads_are_limited_in_size_and_number(any_app: FastAPI) -> None:
    with pytest.raises(UploadTooLarge, match="6,553,601"):
        opened(any_app, size_bytes=100 * PART + 1)
    for target in ("a", "b", "c"):
        opened(any_app, target)
    with pytest.raises(TooManyUploads, match="3 uploads are open"):
        opened(any_app, "d")


def test_stale_uploads_are_dropped_and_fresh_ones_stay(any_app: FastAPI, uploads: Uploads) -> None:
    uploads.append("teacher", "t", 0, [CONTENT[:10]])
    now = datetime.now(UTC)
    assert uploads.drop_stale(now + timedelta(hours=47)) == 0
    assert uploads.find("teacher", "t").received_bytes == 10
    assert uploads.drop_stale(now + timedelta(hours=49)) == 1
    with pytest.raises(UnknownUpload):
        uploads.append("teacher", "t", 10, [b"x"])


def test_a_client_of_a_restarted_upload_writes_nothing_more(uploads: Uploads) -> None:
    old = uploads.find("teacher", "t")
    uploads.restart(old)
    with pytest.raises(OffsetMismatch):
        uploads.add_part(old, b"x")
    with pytest.raises(OffsetMismatch):
        uploads.restart(old)


def test_memory_does_not_grow_with_the_file(any_app: FastAPI) -> None:
    content = os.urandom(80 * PART)
    uploads = opened(any_app, "big", hashlib.sha256(content).hexdigest(), len(content))
    tracemalloc.start()
    uploads.append("teacher", "big", 0, chunks(content, 16 * 1024))
    uploads.assemble(uploads.find("teacher", "big"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 25 * PART, f"{peak / PART:.1f} parts"


# Over HTTP: a teacher's weights, as any other target's file.


@pytest.fixture
def path(client: TestClient) -> str:
    answer = client.post("/teachers", json=teacher())
    assert answer.status_code == 201, answer.text
    return str(answer.json()["weights"])


def teacher(**changes: Any) -> dict[str, Any]:
    return {
        "name": "t",
        "sha256": SHA256,
        "size_bytes": len(CONTENT),
        "license": "MIT",
        "terms": "any",
        "consent_basis": "synthetic",
        **changes,
    }


def offset(client: TestClient, path: str) -> int:
    answer = client.head(path)
    assert answer.status_code == 200
    assert answer.headers["upload-length"] == str(len(CONTENT))
    return int(answer.headers["upload-offset"])


def patch(client: TestClient, path: str, start: int, content: bytes, **headers: str) -> Any:
    return client.patch(path, content=content, headers={**OFFSET_STREAM, "upload-offset": str(start), **headers})


def test_put_sends_the_file_whole(app: FastAPI, client: TestClient, path: str) -> None:
    answer = client.put(path, content=CONTENT)
    assert answer.status_code == 202, answer.text
    assert re.fullmatch("/jobs/[0-9a-f-]+", answer.headers["location"])
    assert offset(client, path) == len(CONTENT)
    assert stored(app) == CONTENT


def test_put_takes_a_chunked_body(app: FastAPI, client: TestClient, path: str) -> None:
    answer = client.put(path, content=chunks(CONTENT))
    assert answer.status_code == 202, answer.text
    assert stored(app) == CONTENT


def test_put_starts_over(app: FastAPI, client: TestClient, path: str) -> None:
    assert patch(client, path, 0, b"\0" * 100).status_code == 204
    assert client.put(path, content=CONTENT).status_code == 202
    assert stored(app) == CONTENT


def test_patch_goes_on_where_head_says(app: FastAPI, client: TestClient, path: str) -> None:
    assert offset(client, path) == 0
    answer = patch(client, path, 0, CONTENT[:100_000])
    assert (answer.status_code, answer.headers["upload-offset"]) == (204, "100000")
    assert offset(client, path) == 100_000
    answer = patch(client, path, 100_000, CONTENT[100_000:])
    assert (answer.status_code, answer.headers["upload-offset"]) == (202, str(len(CONTENT)))
    assert answer.headers["location"].startswith("/jobs/")
    assert stored(app) == CONTENT


def test_a_lost_last_answer_is_asked_for_again(app: FastAPI, client: TestClient, path: str) -> None:
    app.state.services.uploads.append("teacher", "t", 0, chunks(CONTENT))  # the process died before it assembled them
    answer = patch(client, path, len(CONTENT), b"")
    assert answer.status_code == 202, answer.text
    assert stored(app) == CONTENT


@pytest.mark.parametrize(
    ("start", "content", "headers", "status", "code"),
    [
        (5, b"x", {}, 409, "upload-offset-mismatch"),
        (0, CONTENT + b"x", {}, 413, "upload-too-long"),
        (0, b"x", {"content-type": "application/octet-stream"}, 415, "upload-media-type-unsupported"),
        (0, b"x", {"content-encoding": "gzip"}, 415, "upload-media-type-unsupported"),
        (0, b"x", {"upload-offset": "-1"}, 422, "request-invalid"),
        (0, b"x", {"upload-offset": "9" * 30}, 422, "request-invalid"),
    ],
)
def test_what_does_not_fit_is_refused(
    client: TestClient, path: str, start: int, content: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    answer = patch(client, path, start, content, **headers)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert offset(client, path) == 0


def test_the_right_offset_stands_in_the_refusal(client: TestClient, path: str) -> None:
    patch(client, path, 0, CONTENT[:7])
    assert patch(client, path, 0, CONTENT[:7]).headers["upload-offset"] == "7"


def test_a_body_that_ends_early_is_kept_and_refused(client: TestClient, path: str) -> None:
    answer = client.put(path, content=CONTENT[:-9])
    assert (answer.status_code, answer.json()["code"]) == (422, "upload-incomplete")
    assert answer.headers["upload-offset"] == str(len(CONTENT) - 9) == str(offset(client, path))


def test_a_wrong_file_is_refused_and_can_be_sent_again(client: TestClient, path: str) -> None:
    answer = client.put(path, content=bytes(len(CONTENT)))
    assert (answer.status_code, answer.json()["code"]) == (422, "upload-corrupt")
    assert offset(client, path) == 0
    assert client.put(path, content=CONTENT).status_code == 202


def test_a_file_that_is_there_is_not_taken_again(client: TestClient, path: str) -> None:
    client.put(path, content=CONTENT)
    for answer in (client.put(path, content=CONTENT), patch(client, path, len(CONTENT), b"")):
        assert (answer.status_code, answer.json()["code"]) == (409, "upload-not-awaited")


@pytest.fixture
def server(app: FastAPI) -> Iterator[int]:
    """The app behind a real server, in a thread; its port."""
    config = uvicorn.Config(app, host="127.0.0.1", port=free_port(), log_config=None, lifespan="off")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        threading.Event().wait(0.02)
    yield config.port
    running.should_exit = True
    thread.join()


def test_a_client_that_goes_away_can_go_on(app: FastAPI, client: TestClient, path: str, server: int) -> None:
    half = 2 * PART + 500
    connection = http.client.HTTPConnection("127.0.0.1", server)
    connection.putrequest("PUT", path)
    connection.putheader("content-length", str(len(CONTENT)))
    connection.endheaders()
    connection.send(CONTENT[:half])
    deadline = threading.Event()
    for _ in range(200):  # the bytes are on their way
        if offset(client, path) >= 2 * PART:
            break
        deadline.wait(0.02)
    connection.close()
    for _ in range(200):
        if offset(client, path) == half:
            break
        deadline.wait(0.02)
    assert offset(client, path) == half
    assert patch(client, path, half, CONTENT[half:]).status_code == 202
    assert stored(app) == CONTENT
