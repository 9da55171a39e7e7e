"""Bring a database to the newest revision, with alembic."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import DBAPIError

from app.db.session import Database
from app.errors import DatabaseUnavailable

_PACKAGED = Path(__file__).parent.parent / "_alembic"  # in an installed package
_CHECKOUT = Path(__file__).parent.parent.parent / "alembic"


def migrate(database: Database, revision: str = "head") -> None:
    """Upgrade to `revision` in one transaction; of servers that start at once, one migrates and the others wait for it.

    Raises `DatabaseUnavailable`.
    """
    try:
        with database.engine.begin() as connection:
            if connection.dialect.name == "sqlite":  # what the advisory lock in alembic/env.py is to PostgreSQL
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            command.upgrade(_config(connection=connection), revision)
    except DBAPIError as error:
        raise DatabaseUnavailable(f"the database cannot be migrated: {error.orig}") from error


def downgrade(database: Database, revision: str) -> None:
    """Go back to `revision` (`base`: no tables); what the newer tables hold is lost."""
    with database.engine.begin() as connection:
        command.downgrade(_config(connection=connection), revision)


def is_current(database: Database) -> bool:
    """True when the database is at the newest revision. Raises `DatabaseUnavailable` when it does not answer."""
    with database.transaction() as session:
        applied = set(MigrationContext.configure(session.connection()).get_current_heads())
    return applied == set(ScriptDirectory.from_config(_config()).get_heads())


def _config(**attributes: object) -> Config:
    config = Config(attributes=dict(attributes))
    config.set_main_option("script_location", str(_PACKAGED if _PACKAGED.is_dir() else _CHECKOUT).replace("%", "%%"))
    return config
