"""What workers do beside their jobs."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog
from fastapi import FastAPI
from structlog.testing import capture_logs

from app.db.audit import Audit
from app.errors import DatabaseUnavailable, StorageUnavailable
from app.main import make_worker
from app.services.garbage import ACTION
from app.settings import Settings
from app.storage import open_store
from app.storage.port import content_key
from app.worker import housekeeping
from app.worker.housekeeping import Housekeeping
from app.worker.main import EmbeddedWorker

GOING_ON = threading.Event()


def orphan(settings: Settings, content: bytes) -> Path:
    """The file of an old object that no row names."""
    sha256 = hashlib.sha256(content).hexdigest()
    open_store(settings.storage).put(content_key(sha256), [content], sha256)
    path = settings.data_dir / "objects" / content_key(sha256)
    os.utime(path, (0, 0))
    return path


def unowned(settings: Settings) -> Path:
    """A data set on the worker's disk that the database does not know."""
    folder = settings.data_dir / "datasets" / ("0" * 64)
    folder.mkdir(parents=True)
    return folder


def collections(app: FastAPI) -> list[str]:
    """Who collected garbage, by the audit trail."""
    with app.state.services.database.transaction() as session:
        return [entry.actor for entry in Audit(session).page(None, 100) if entry.action == ACTION]


def keeper(app: FastAPI, settings: Settings) -> Housekeeping:
    return Housekeeping(settings, app.state.services.database, app.state.services.garbage)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data")


def test_garbage_is_collected_once_in_the_time_and_gone_data_sets_every_time(app: FastAPI, settings: Settings) -> None:
    garbage, data_set, house = orphan(settings, b"1"), unowned(settings), keeper(app, settings)
    house.tidy(GOING_ON)
    assert not garbage.exists()
    assert not data_set.exists()
    garbage, data_set = orphan(settings, b"2"), unowned(settings)
    house.tidy(GOING_ON)
    assert garbage.exists()
    assert not data_set.exists()
    assert collections(app) == ["worker"]


def test_an_interval_of_0_leaves_garbage_to_others(app: FastAPI, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data", gc_interval_h=0)
    garbage, data_set = orphan(settings, b"1"), unowned(settings)
    keeper(app, settings).tidy(GOING_ON)
    assert garbage.exists()
    assert not data_set.exists()
    assert collections(app) == []


def test_nothing_is_begun_once_the_worker_ends(app: FastAPI, settings: Settings) -> None:
    garbage, data_set, ended = orphan(settings, b"1"), unowned(settings), threading.Event()
    ended.set()
    house = keeper(app, settings)
    house.tidy(ended)
    house.run(ended)
    assert garbage.exists()
    assert data_set.exists()


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (StorageUnavailable("the bucket does not answer"), "warning"),
        (DatabaseUnavailable("the database does not answer"), "warning"),
        (RuntimeError("a mistake of ours"), "error"),
    ],
)
def test_what_goes_wrong_is_logged_and_the_rest_is_done(
    app: FastAPI, settings: Settings, monkeypatch: pytest.MonkeyPatch, error: Exception, level: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    garbage = orphan(settings, b"1")
    monkeypatch.setattr(housekeeping, "drop_unowned", fail)
    monkeypatch.setattr(housekeeping, "_log", structlog.get_logger())
    with capture_logs() as logged:
        keeper(app, settings).tidy(GOING_ON)
    assert not garbage.exists()
    assert [entry["log_level"] for entry in logged if "housekeeping" in entry["event"]] == [level]


def test_a_running_worker_keeps_house(
    make_app: Callable[..., FastAPI], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping, "EVERY_S", 0.05)
    settings = Settings(data_dir=tmp_path / "data")
    app = make_app()
    garbage = orphan(settings, b"1")
    worker = EmbeddedWorker(make_worker(settings, app.state.services))
    worker.start()
    try:
        deadline = time.monotonic() + 60
        while garbage.exists() or not collections(app):
            assert time.monotonic() < deadline, "nothing was collected"
            time.sleep(0.05)
    finally:
        worker.stop()
        worker.join()
    assert collections(app) == ["worker"]
