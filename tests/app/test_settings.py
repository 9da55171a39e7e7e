from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from sqlalchemy import text

from app.cli import main
from app.db.session import Database
from app.settings import Settings, is_loopback


def test_defaults_are_embedded_and_on_loopback() -> None:
    settings = Settings(data_dir=Path("/srv/widthwise"))
    assert settings.database == "sqlite:////srv/widthwise/widthwise.db"
    assert settings.storage == "file:///srv/widthwise/objects"
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "10.0.0.1", "example.org", ""])
def test_answering_the_network_needs_keys(host: str) -> None:
    assert Settings(host=host).keys_required
    with pytest.raises(ValidationError, match="asks nobody for an API key"):
        Settings(host=host, auth="open")


def test_answering_the_network_without_keys_can_be_asked_for_by_its_long_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WIDTHWISE_ALLOW_OPEN_BIND", "true")
    assert Settings(host="0.0.0.0").keys_required, "it opens nothing by itself"
    assert not Settings(host="0.0.0.0", auth="open").keys_required


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"])
def test_loopback_is_recognised(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("name", ["PORT", "WIDTHWISE_PORT"])
def test_the_port_is_read_from_either_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "8123")
    assert Settings().port == 8123


def test_our_own_name_of_the_port_wins_and_an_argument_beats_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "8123")
    monkeypatch.setenv("WIDTHWISE_PORT", "8124")
    assert Settings().port == 8124
    assert Settings(port=8125).port == 8125


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_postgres_urls_use_psycopg(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WIDTHWISE_DATABASE_URL", f"{scheme}://me:secret@db/widthwise")
    assert Settings().database == "postgresql+psycopg://me:secret@db/widthwise"


@pytest.mark.parametrize(("key", "reason"), [("too short to be any good", "has 24 characters"), ("ü" * 32, "ASCII")])
def test_the_command_line_says_what_is_wrong_with_a_key_and_not_the_key(
    monkeypatch: pytest.MonkeyPatch, key: str, reason: str
) -> None:
    monkeypatch.setenv("WIDTHWISE_ADMIN_KEY", key)
    monkeypatch.setattr("sys.argv", ["widthwise", "serve"])
    with pytest.raises(SystemExit, match=f"WIDTHWISE_ADMIN_KEY: .*{reason}") as refused:
        main()
    assert key not in str(refused.value)


def test_a_password_is_not_in_the_settings_representation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WIDTHWISE_DATABASE_URL", "postgresql://me:hunter2@db/widthwise")
    assert "hunter2" not in repr(Settings())
    assert "hunter2" not in str(Settings().model_dump())


@pytest.mark.parametrize("name", ["plain", "a?b", "a%20b", "a#b", "ä b"])
def test_the_embedded_database_lies_in_the_data_folder(tmp_path: Path, name: str) -> None:
    database = Database(Settings(data_dir=tmp_path / name).database)
    with database.transaction() as session:
        session.execute(text("SELECT 1"))
    database.dispose()
    assert (tmp_path / name / "widthwise.db").is_file()


def test_the_command_line_names_the_setting_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WIDTHWISE_LOG_LEVEL", "loud")
    monkeypatch.setattr("sys.argv", ["widthwise", "serve"])
    with pytest.raises(SystemExit, match="WIDTHWISE_LOG_LEVEL: Input should be 'debug'"):
        main()
