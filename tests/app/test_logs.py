"""Log lines: one pipeline for ours and the libraries', readable by people or by machines."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from fastapi import FastAPI
from fastapi.testclient import TestClient
from structlog.contextvars import bound_contextvars

from app import logs


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """`configure` changes what the whole process logs to; later tests get their own logging back."""
    root, before = logging.getLogger(), structlog.get_config()
    handlers, level = list(root.handlers), root.level
    with warnings.catch_warnings():
        yield
    logging.captureWarnings(capture=False)
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.configure(**before)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_json_is_one_object_a_line_with_what_is_bound(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    with bound_contextvars(request_id="r1", job="j1"):
        structlog.get_logger("app.test").info("hello\nthere", bytes=3)
    (line,) = lines(capsys.readouterr().err)
    assert (line["event"], line["logger"]) == ("hello\nthere", "app.test")
    assert (line["request_id"], line["job"], line["bytes"], line["level"]) == ("r1", "j1", 3, "info")
    assert line["timestamp"].endswith("Z")


@pytest.mark.parametrize("library", ["uvicorn.error", "sqlalchemy.engine.Engine", "dbos", "botocore", "moto"])
def test_lines_of_libraries_go_through_the_same_pipeline(library: str, capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger(library).addHandler(logging.NullHandler())
    logs.configure("info", "json")
    with bound_contextvars(request_id="r1"):
        logging.getLogger(library).warning("from %s", "inside")
    (line,) = lines(capsys.readouterr().err)
    assert line["event"] == "from inside"
    assert (line["logger"], line["level"], line["request_id"]) == (library, "warning", "r1")


def test_the_job_engine_prints_nothing_beside_the_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    from dbos._logger import init_logger

    logs.configure("info", "json")
    init_logger()  # what DBOS() does first: it adds a console handler to a logger that has none
    logging.getLogger("dbos").error("once")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line["event"] for line in lines(captured.err)] == ["once"]


def test_chatty_libraries_are_quiet_below_warning(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("debug", "json")
    for name in logs.CHATTY:
        logging.getLogger(name).info("chatter")
    assert capsys.readouterr().err == ""


def test_warnings_of_python_are_log_lines(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=True)
        warnings.warn("old thing", DeprecationWarning, stacklevel=1)
    (line,) = lines(capsys.readouterr().err)
    assert "old thing" in line["event"]
    assert line["logger"] == "py.warnings"


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_tracebacks_show_no_local_variables(log_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", log_format)  # type: ignore[arg-type]
    hidden = "the-content-of-a-variable"
    try:
        raise ValueError(len(hidden))
    except ValueError:
        structlog.get_logger("app.test").exception("failed")
    text = capsys.readouterr().err
    assert "ValueError" in text
    assert "Traceback" in text
    assert hidden not in text.replace('hidden = "the-content-of-a-variable"', "")


def test_console_lines_are_no_json_and_auto_is_json_when_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "console")
    structlog.get_logger("app.test").info("to people", path="/models")
    assert "path=/models" in capsys.readouterr().err
    logs.configure("info", "auto")  # under pytest standard error is no terminal
    structlog.get_logger("app.test").info("to machines")
    assert lines(capsys.readouterr().err)[0]["event"] == "to machines"


def test_a_request_logs_its_id(app: FastAPI, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    with TestClient(app) as client:
        answer = client.get("/chains", headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    requests = [line for line in lines(capsys.readouterr().err) if line["event"] == "request"]
    assert [(line["request_id"], line["path"], line["status"]) for line in requests] == [("mine-1", "/chains", 200)]
