"""`widthwise check-storage`: what the database names is in the store, whole, or is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi import FastAPI
from typer.testing import CliRunner

from app.cli import cli
from app.db.stats import Stats
from app.services.integrity import look
from app.storage import ObjectStore, open_store
from app.storage.port import content_key


@pytest.fixture
def store(app: FastAPI, tmp_path: Path) -> ObjectStore:
    return open_store((tmp_path / "data" / "objects").as_uri())


@pytest.fixture
def stored_file(app: FastAPI, tmp_path: Path) -> Path:
    """The only file of the store: that of the pico chain."""
    (found,) = (path for path in (tmp_path / "data" / "objects").rglob("*") if path.is_file())
    return found


def damages(app: FastAPI, store: ObjectStore, *, read: bool = False) -> list[str | None]:
    return [finding.damage for finding in look(app.state.services.database, store, read=read)]


def test_a_whole_store_has_everything(app: FastAPI, store: ObjectStore) -> None:
    assert damages(app, store) == [None]
    assert damages(app, store, read=True) == [None]


def test_a_missing_file_is_named(app: FastAPI, store: ObjectStore, stored_file: Path) -> None:
    stored_file.unlink()
    (finding,) = look(app.state.services.database, store)
    assert (finding.named.what, finding.damage) == ("chain pico", "is missing")


def test_a_truncated_file_is_seen_by_its_size(app: FastAPI, store: ObjectStore, stored_file: Path) -> None:
    stored_file.write_bytes(stored_file.read_bytes()[:-1])
    (damage,) = damages(app, store)
    assert damage is not None
    assert "bytes instead of" in damage


def test_a_changed_byte_is_seen_by_reading(app: FastAPI, store: ObjectStore, stored_file: Path) -> None:
    content = bytearray(stored_file.read_bytes())
    content[-1] ^= 1
    stored_file.write_bytes(content)
    assert damages(app, store) == [None], "its size is right"
    (damage,) = damages(app, store, read=True)
    assert damage is not None
    assert damage.startswith("has sha256 ")


def test_the_command_ends_with_status_1_for_damage(
    app: FastAPI, stored_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WIDTHWISE_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr("app.cli.logs.configure", lambda *_: None)
    good = CliRunner().invoke(cli, ["check-storage", "--read"])
    assert (good.exit_code, good.output) == (0, "1 files looked at, 0 missing or damaged\n")
    stored_file.unlink()
    bad = CliRunner().invoke(cli, ["check-storage"])
    assert bad.exit_code == 1
    assert bad.output.startswith("chain pico is missing: ")


def test_every_object_that_garbage_collection_keeps_is_looked_at(app: FastAPI) -> None:
    from app.db.references import References

    with app.state.services.database.transaction() as session:
        assert {content_key(one.sha256) for one in Stats(session).named()} == {
            content_key(digest) for digest in References(session).digests()
        }
