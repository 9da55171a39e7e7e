"""Engine and transactions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    NoSuchModuleError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, sessionmaker

from app.errors import DatabaseUnavailable
from app.tracing import span

BUSY_TIMEOUT_MS = 10_000  # SQLite lets one writer in at a time; the others wait this long
# A PostgreSQL whose machine vanished answers nothing, not even that a connection is gone: without these, a thread waits
# for the kernel's quarter of an hour, or for ever.
PATIENCE = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,  # ms
    # A process that is stopped inside a transaction, or whose machine is, keeps its locks: its connection is alive. The
    # server ends the transaction, longer after than any takes to look at a slow store.
    "options": "-c idle_in_transaction_session_timeout=60000",
}


class Database:
    """A database that nothing has connected to yet; the first transaction does."""

    def __init__(self, url: str) -> None:
        try:
            self.engine = _engine(url)
        except (ArgumentError, NoSuchModuleError) as error:
            raise DatabaseUnavailable("WIDTHWISE_DATABASE_URL is no URL of a supported database") from error
        except OSError as error:
            raise DatabaseUnavailable(f"the folder of the database cannot be made: {error}") from error
        self._sessions = sessionmaker(self.engine, expire_on_commit=False)

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """One transaction: committed at the end, rolled back on any error. Raises `DatabaseUnavailable`.

        The two errors that blame the values and not the database go through.
        """
        try:
            with span("database.transaction"), self._sessions.begin() as session:
                yield session
        except (IntegrityError, DataError):
            raise
        except (DBAPIError, PoolTimeout) as error:
            raise DatabaseUnavailable(f"the database failed: {_first_line(error)}") from error

    def dispose(self) -> None:
        self.engine.dispose()


def _engine(url: str) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return create_engine(parsed, pool_pre_ping=True, hide_parameters=True, connect_args=PATIENCE)
    if parsed.database and parsed.database != ":memory:":
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(parsed, hide_parameters=True)
    event.listen(engine, "connect", _configure_sqlite)
    return engine


def _configure_sqlite(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", f"busy_timeout={BUSY_TIMEOUT_MS}"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _first_line(error: Exception) -> str:
    """The driver's own words, without SQLAlchemy's copy of statement and parameters."""
    words = str(error.orig) if isinstance(error, DBAPIError) else str(error)
    return words.strip().splitlines()[0] if words.strip() else type(error).__name__
