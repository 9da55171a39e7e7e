"""Bring a database to the newest revision, with alembic."""

from __future__ import annotations

import time
from pathlib import Path

import structlog
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from app.db.session import Database
from app.errors import DatabaseUnavailable

_PACKAGED = Path(__file__).parent.parent / "_alembic"  # in an installed package
_CHECKOUT = Path(__file__).parent.parent.parent / "alembic"
ATTEMPTS, PAUSE_S = 40, 3.0  # at migrating beside somebody who holds a table
_LOCK_NOT_AVAILABLE = "55P03"  # PostgreSQL's code
_log = structlog.get_logger(__name__)


def migrate(database: Database, revision: str = "head") -> None:
    """Upgrade to `revision` in one transaction; of servers that start at once, one migrates and the others wait for it.

    A database that a newer version has migrated is left as it is: that version bears this one beside it. While others
    hold a table, a backup for example, it is tried again, so that nobody waits behind the migration for long.
    Raises `DatabaseUnavailable`.
    """
    for left in reversed(range(ATTEMPTS)):
        try:
            _migrate(database, revision)
            return
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) != _LOCK_NOT_AVAILABLE or not left:
                raise DatabaseUnavailable(f"the database cannot be migrated: {error.orig}") from error
            _log.warning("somebody holds a table that is to be migrated, trying again", left=left)
            time.sleep(PAUSE_S)


def _migrate(database: Database, revision: str) -> None:
    """Raises SQLAlchemy's `DBAPIError`."""
    with database.engine.begin() as connection:
        if connection.dialect.name == "sqlite":  # what the advisory lock in alembic/env.py is to PostgreSQL
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        if _is_newer(_applied(connection)):
            _log.warning("the database was migrated by a newer version and is left as it is")
            return
        command.upgrade(_config(connection=connection), revision)


def downgrade(database: Database, revision: str) -> None:
    """Go back to `revision` (`base`: no tables); what the newer tables hold is lost."""
    with database.engine.begin() as connection:
        command.downgrade(_config(connection=connection), revision)


def is_current(database: Database) -> bool:
    """True when the database is at this version's newest revision, or a newer version has migrated it.

    During an upgrade the servers of both are to answer. Raises `DatabaseUnavailable` when the database does not answer.
    """
    with database.transaction() as session:
        applied = _applied(session.connection())
    return applied == set(ScriptDirectory.from_config(_config()).get_heads()) or _is_newer(applied)


def _applied(connection: Connection) -> set[str]:
    return set(MigrationContext.configure(connection).get_current_heads())


def _is_newer(applied: set[str]) -> bool:
    """Whether there is a revision that this version does not know."""
    return not applied <= {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}


def _config(**attributes: object) -> Config:
    config = Config(attributes=dict(attributes))
    config.set_main_option("script_location", str(_PACKAGED if _PACKAGED.is_dir() else _CHECKOUT).replace("%", "%%"))
    return config
