"""Migrations and repositories, on SQLite and PostgreSQL."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import insert, inspect, select, text
from sqlalchemy.exc import IntegrityError

from app.db import migrate as migrate_module
from app.db.migrate import downgrade, is_current, migrate
from app.db.repositories import Aliases, Chains, Models
from app.db.session import Database
from app.db.tables import AliasChangeRow, AliasRow, Base, ChainRow, ModelRow, WidthRow
from app.errors import DatabaseUnavailable

ROOT = Path(__file__).parents[2]
TABLES = set(Base.metadata.tables)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path):
    url = f"sqlite:///{tmp_path / 'a.db'}" if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    database = Database(url)
    yield database
    database.dispose()


def tables(database: Database) -> set[str]:
    return set(inspect(database.engine).get_table_names()) - {"alembic_version"}


def chain(name: str) -> ChainRow:
    return ChainRow(
        name=name,
        digest="0" * 64,
        size_bytes=2**40,
        architecture="resnet18",
        mode="nested",
        teacher_width="8",
        embedding_dim=8,
        embedding_space="s",
        license="l",
        input={"height": 8},
        measurement=None,
        provenance={"seed": 1},
        published_at=datetime.now(UTC),
        widths=[],
    )


def model(model_id: str = "1" * 64) -> ModelRow:
    return ModelRow(
        id=model_id,
        chain="a",
        width="8",
        recipe={"b": [1]},
        artifact_bytes=5,
        artifact_sha256=None,
        created_at=datetime.now(UTC),
    )


def test_migrations_go_up_from_empty_and_down_again(database: Database) -> None:
    assert tables(database) == set()
    migrate(database)
    assert tables(database) == TABLES
    downgrade(database, "base")
    assert tables(database) == set()
    migrate(database)
    assert tables(database) == TABLES


def test_a_width_published_before_minp_was_measured_keeps_its_figures(database: Database) -> None:
    migrate(database)
    row = chain("a")
    row.widths = [
        WidthRow(position=0, width="8", macs=1, params=1, artifact_bytes=1, peak_activation_bytes=1, rank1=60.5)
    ]
    with database.transaction() as session:
        Chains(session).add(row)
    downgrade(database, "0001")
    assert "minp" not in {column["name"] for column in inspect(database.engine).get_columns("widths")}
    migrate(database)
    with database.transaction() as session:
        found = Chains(session).find("a")
        assert found is not None
        assert [(width.rank1, width.minp) for width in found.widths] == [(60.5, None)]


def test_migrating_twice_changes_nothing(database: Database) -> None:
    migrate(database)
    migrate(database)
    assert is_current(database)


def test_a_database_that_a_newer_version_migrated_is_served_as_it_is(database: Database) -> None:
    """As during an upgrade, or after going back from one: this version answers, and may be started anew."""
    migrate(database)
    with database.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    before = tables(database)
    assert is_current(database)
    migrate(database)
    assert is_current(database)
    assert tables(database) == before
    with database.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0002'"))
    assert not is_current(database)


def test_a_migration_that_waits_for_a_backup_lets_everybody_else_pass(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for a table on PostgreSQL makes all others wait behind, the old version's every request."""
    monkeypatch.setattr(migrate_module, "PAUSE_S", 0.2)
    database = Database(postgres_url)
    migrate(database, "0002")
    with ThreadPoolExecutor(1) as other:
        with database.engine.connect() as backup:
            backup.execute(text("LOCK TABLE models IN ACCESS SHARE MODE"))  # as pg_dump does, for as long as it takes
            migrated = other.submit(migrate, database)
            time.sleep(0.5)
            with database.engine.begin() as served:
                served.execute(text("SET LOCAL statement_timeout = '10s'"))
                served.execute(text("SELECT count(*) FROM models"))
            assert not migrated.done()
        migrated.result(30)
    assert is_current(database)
    database.dispose()


def test_an_error_of_the_database_repeats_no_values(database: Database) -> None:
    """They would be in the log: of a job's request, of a data set's place."""
    migrate(database)
    with pytest.raises(IntegrityError) as caught, database.transaction() as session:
        session.execute(insert(AliasRow).values(alias="stable", chain="somebodys-own-chain"))
    assert "INSERT INTO aliases" in str(caught.value)
    assert "parameters:" not in str(caught.value)


def test_a_postgresql_server_that_vanished_is_noticed(postgres_url: str) -> None:
    """The kernel alone would wait a quarter of an hour for an answer."""
    database = Database(postgres_url)
    with database.engine.connect() as connection:
        asked = connection.connection.driver_connection.info.get_parameters()
    database.dispose()
    assert int(asked["tcp_user_timeout"]) <= 30_000
    patience_s = int(asked["keepalives_idle"]) + int(asked["keepalives_interval"]) * int(asked["keepalives_count"])
    assert patience_s <= 30


def test_servers_that_start_at_once_migrate_once(database: Database, tmp_path: Path) -> None:
    url = database.engine.url.render_as_string(hide_password=False)
    environment = {**os.environ, "WIDTHWISE_DATABASE_URL": url, "WIDTHWISE_DATA_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "app.cli", "migrate"]
    servers = [subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL) for _ in range(4)]
    assert [server.wait(60) for server in servers] == [0, 0, 0, 0]
    assert is_current(database)


def test_migrations_make_the_tables_the_code_expects(database: Database) -> None:
    migrate(database)
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_a_database_without_tables_is_not_current(database: Database) -> None:
    assert not is_current(database)
    with pytest.raises(DatabaseUnavailable), database.transaction() as session:
        Chains(session).is_empty()


def test_moments_keep_their_zone(database: Database) -> None:
    migrate(database)
    moment = datetime(2026, 5, 1, 14, 0, 0, 123456, tzinfo=timezone(timedelta(hours=2)))
    row = chain("a")
    row.published_at = moment
    with database.transaction() as session:
        Chains(session).add(row)
    with database.transaction() as session:
        found = Chains(session).find("a")
        assert found is not None
        assert found.published_at == moment
        assert found.published_at.utcoffset() == timedelta(0)


def test_a_failing_transaction_leaves_nothing(database: Database) -> None:
    migrate(database)

    def fail_half_way() -> None:
        with database.transaction() as session:
            Chains(session).add(chain("a"))
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    with database.transaction() as session:
        assert Chains(session).is_empty()


def test_a_model_is_added_once(database: Database) -> None:
    migrate(database)
    with database.transaction() as session:
        Chains(session).add(chain("a"))
    added = []
    for _ in range(2):
        with database.transaction() as session:
            added.append(Models(session).add_if_absent(model()))
    assert added == [True, False]


def test_of_many_who_add_a_model_at_once_one_is_first(database: Database) -> None:
    migrate(database)
    with database.transaction() as session:
        Chains(session).add(chain("a"))

    def add(_: int) -> bool:
        with database.transaction() as session:
            return Models(session).add_if_absent(model())

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(add, range(8))) == [False] * 7 + [True]


def test_an_artifact_digest_is_learnt_once(database: Database) -> None:
    migrate(database)
    with database.transaction() as session:
        Chains(session).add(chain("a"))
        Models(session).add_if_absent(model())
    for digest in ("a" * 64, "b" * 64):
        with database.transaction() as session:
            Models(session).set_artifact_digest("1" * 64, digest)
    with database.transaction() as session:
        found = Models(session).find("1" * 64)
        assert found is not None
        assert found.artifact_sha256 == "a" * 64
        assert found.recipe == {"b": [1]}


def test_an_alias_moves_and_remembers(database: Database) -> None:
    migrate(database)
    now = datetime.now(UTC)
    with database.transaction() as session:
        for name in ("a", "b"):
            Chains(session).add(chain(name))
        Aliases(session).point("stable", "a", None, now, "me")
    with database.transaction() as session:
        Aliases(session).point("stable", "b", "a", now, "you")
    with database.transaction() as session:
        found = Chains(session).find("stable")
        assert found is not None
        assert (found.name, [alias.alias for alias in found.aliases]) == ("b", ["stable"])
        history = session.scalars(select(AliasChangeRow).order_by(AliasChangeRow.id)).all()
        moves = [(change.previous, change.chain, change.changed_by) for change in history]
        assert moves == [(None, "a", "me"), ("a", "b", "you")]


def test_chains_come_in_pages(database: Database) -> None:
    migrate(database)
    with database.transaction() as session:
        for name in ("c", "a", "b"):
            Chains(session).add(chain(name))
    with database.transaction() as session:
        assert [row.name for row in Chains(session).page("", 2)] == ["a", "b"]
        assert [row.name for row in Chains(session).page("b", 2)] == ["c"]


@pytest.mark.parametrize("url", ["postgresql+psycopg://nobody:hunter2@127.0.0.1:9/none", "sqlite:////proc/none/a.db"])
def test_a_database_that_is_away_is_named_unavailable_without_its_password(url: str) -> None:
    with pytest.raises((DatabaseUnavailable, OSError)) as caught:
        is_current(Database(url))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["nonsense", "oracledb+none://x"])
def test_other_urls_are_no_databases(url: str) -> None:
    with pytest.raises(DatabaseUnavailable, match="WIDTHWISE_DATABASE_URL"):
        Database(url)
