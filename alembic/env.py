"""Runs migrations on the connection handed in by `app.db.migrate`, or, from alembic's command line, on the database of
the settings."""

from alembic import context
from sqlalchemy import Connection, text

from app.db.session import Database
from app.db.tables import Base
from app.settings import Settings

LOCK = 7_237_014_203  # any number that no other user of the database's advisory locks takes
LOCK_TIMEOUT_MS = 2000


def run(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        # Two servers that start at once must not migrate at once; the lock ends with the transaction.
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
        # Whoever waits for a table, a backup perhaps, makes everybody wait behind: rather give up and come back.
        connection.execute(text(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}"))
    context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()


def main() -> None:
    handed_in = context.config.attributes.get("connection")
    if handed_in is not None:
        run(handed_in)
        return
    database = Database(Settings().database)
    with database.engine.begin() as connection:
        run(connection)
    database.dispose()


main()
