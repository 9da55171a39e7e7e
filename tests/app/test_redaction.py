"""No secret reaches a log line or the text of an error, whichever way it came."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.redaction import REDACTED, Redactor, redact
from app.settings import Settings

ROOT = Path(__file__).parents[2]
KEY_SECRET = "f" * 64
FORMS = [
    (f"key ww_0123456789ab_{KEY_SECRET} refused", KEY_SECRET),
    (f"Authorization: Bearer ww_0123456789ab_{KEY_SECRET}", KEY_SECRET),
    ("{'authorization': 'Bearer opaque-token.1/2+3='}", "opaque-token.1/2+3="),
    ("header b'Authorization: Basic dXNlcjpwYXNz'", "dXNlcjpwYXNz"),
    ("could not connect to postgresql+psycopg://widthwise:hunter2@db:5432/w", "hunter2"),
    ("postgresql://me:p@ss:w%2Ford@db/w", "p@ss:w%2Ford"),
    ("redis://:hunter2@limits:6379/0 is away", "hunter2"),
    ("https://user:hunter2@example.org/x", "hunter2"),
    ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG", "wJalrXUtnFEMI/K7MDENG"),
    ("AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG", "wJalrXUtnFEMI/K7MDENG"),
    ("AWS_SESSION_TOKEN: FwoGZXIvYXdzE", "FwoGZXIvYXdzE"),
    ("GET https://s3/b/k?X-Amz-Signature=deadbeef&x=1", "deadbeef"),
    ("connection failed: password=hunter2 host=db", "hunter2"),
    ("{'db_password': 'hunter2', 'host': 'db'}", "hunter2"),
    ('{"PASSWORD": "hunter2"}', "hunter2"),
    ('"{\\"client_secret\\": \\"hunter2\\"}"', "hunter2"),
    ("x-api-key: hunter2", "hunter2"),
    ("WIDTHWISE_ADMIN_KEY=hunter2hunter2", "hunter2hunter2"),
]
LOGS_EVERYTHING = """
import logging, sys
import structlog
from app import logs
from app.settings import Settings

settings = Settings()
logs.configure(settings.log_level, settings.log_format, settings.secrets)
log = structlog.get_logger("test")
texts = sys.stdin.read().splitlines()


def fail(text):
    local = text
    raise RuntimeError(text) from ValueError(text)


for text in texts:
    log.warning("event " + text, detail=text, nested={"deep": [text]})
    logging.getLogger("library").warning("from a library: %s", text)
    for tell in (log.error, logging.getLogger("library").error):
        try:
            fail(text)
        except RuntimeError:
            tell("it failed", exc_info=True)
log.warning("named", password=texts[-1], request={"headers": {"authorization": texts[-1]}}, api_key=texts[-1])
"""


@pytest.mark.parametrize(("text", "secret"), FORMS)
def test_what_has_the_form_of_a_secret_is_taken_out(text: str, secret: str) -> None:
    said = redact(text)
    assert secret not in said
    assert REDACTED in said


@pytest.mark.parametrize(
    "text",
    [
        "there is no chain or alias 'x'; GET /chains lists what there is",
        "page_token is not one of ours: pass next_page_token of the page before, unchanged",
        "bytes=12 method=POST ms=1.5 path=/models request_id=0123456789abcdef status=200",
        "Widthwise answers on http://127.0.0.1:8000 (docs: http://127.0.0.1:8000/docs)",
        "key=0123456789ab revoked",
        "s3://bucket/prefix and postgresql://db/widthwise",
        "2026-11-21T11:26:00Z mail a@b.example",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_whose_key_it_was_can_still_be_read() -> None:
    assert redact(f"ww_0123456789ab_{KEY_SECRET}") == f"ww_0123456789ab_{REDACTED}"


def test_exact_values_are_taken_out_wherever_they_stand() -> None:
    redactor = Redactor(["tr0ub4dor", "tr0ub4dor&3", "ab"])
    assert redactor.text("say tr0ub4dor&3, cab") == f"say {REDACTED}, cab"


def test_fields_with_the_names_of_secrets_lose_their_values() -> None:
    event = {"password": "x", "n": 1, "in": [{"DB-Token": b"y", "name": "z"}], "token_count": 3}
    assert Redactor().value(event) == {
        "password": REDACTED,
        "n": 1,
        "in": [{"DB-Token": REDACTED, "name": "z"}],
        "token_count": 3,
    }


@pytest.mark.parametrize(
    "hostile",
    ["a-" * 100_000, "password=" * 30_000, "a://b:" * 30_000, "bearer " * 30_000, "\\\"'" * 60_000, "ww_a_" * 40_000],
)
def test_a_hostile_line_is_read_in_linear_time(hostile: str) -> None:
    began = time.process_time()
    redact(hostile)
    assert time.process_time() - began < 2


def test_the_secrets_of_the_settings_are_known() -> None:
    settings = Settings(
        database_url="postgresql://me:hun%40ter2@db/w",
        rate_limit_storage_url="redis://:sesame99@limits",
        admin_key="k" * 40,
    )
    assert set(settings.secrets) == {"hun%40ter2", "hun@ter2", "sesame99", "k" * 40}
    assert Settings().secrets == []
    assert Settings(database_url="postgresql://[oops").secrets == []
    assert not any(secret in repr(settings) for secret in settings.secrets)


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_no_secret_reaches_the_log(log_format: str) -> None:
    """Events, their fields, libraries' records, exceptions with their causes: everything one process can write."""
    unformed = ["kkkkkkkk-admin-key-of-forty-characters-0", "hunter2-of-the-database", "aws-secret-without-a-form"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WIDTHWISE_", "AWS_"))}
    environment |= {
        "WIDTHWISE_ADMIN_KEY": unformed[0],
        "WIDTHWISE_DATABASE_URL": f"postgresql://me:{unformed[1]}@db/w",
        "AWS_SECRET_ACCESS_KEY": unformed[2],
        "WIDTHWISE_LOG_FORMAT": log_format,
    }
    texts = [text for text, _ in FORMS] + [f"the value is {secret} here" for secret in unformed]
    done = subprocess.run(
        [sys.executable, "-c", LOGS_EVERYTHING],
        input="\n".join([*texts, "hunter3"]),
        env=environment | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stderr.count("it failed") == 2 * (len(texts) + 1)
    for secret in [*(secret for _, secret in FORMS), *unformed]:
        assert secret not in done.stderr, secret
    named = next(line for line in done.stderr.splitlines() if "named" in line)
    assert "hunter3" not in named
    if log_format == "json":
        assert all(json.loads(line) for line in done.stderr.splitlines())


def test_a_secret_in_an_error_reaches_no_answer(client: TestClient) -> None:
    """A client that puts its key in the wrong place reads about it without the key."""
    answer = client.get(f"/chains/ww_0123456789ab_{KEY_SECRET}")
    assert answer.status_code == 404
    assert KEY_SECRET not in answer.text
