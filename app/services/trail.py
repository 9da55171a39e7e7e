"""Reading the audit trail. Every deed writes its own entry, see `app.db.audit`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from app.db.audit import Audit
from app.db.session import Database
from app.db.tables import AuditRow


@dataclass(frozen=True)
class TrailPage:
    """Some entries, newest first, and the id to continue before (`None`: that was all)."""

    entries: Sequence[AuditRow]
    continue_before: int | None


class Trail:
    """What admins did."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def page(self, before: int | None, size: int) -> TrailPage:
        """Up to `size` entries older than the one of that id (`None`: from the newest)."""
        with self._database.transaction() as session:
            found = Audit(session).page(before, size + 1)
        return TrailPage(found[:size], found[size - 1].id if len(found) > size else None)
