"""The SQL of API keys."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from app.db.tables import KeyRow


class ApiKeys:
    """API keys, the expired and revoked ones too: the audit trail names them."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, key: KeyRow) -> None:
        self._session.add(key)
        self._session.flush()

    def find(self, key_id: str) -> KeyRow | None:
        return self._session.get(KeyRow, key_id)

    def find_for_change(self, key_id: str) -> KeyRow | None:
        """As `find`; on PostgreSQL nobody else changes the row until the transaction ends."""
        return self._session.get(KeyRow, key_id, with_for_update=True)

    def page(self, after: str, size: int) -> Sequence[KeyRow]:
        """Up to `size` keys whose ids follow `after`, in order of id."""
        return self._session.scalars(select(KeyRow).where(KeyRow.id > after).order_by(KeyRow.id).limit(size)).all()

    def has_admin(self, now: datetime) -> bool:
        """True when a key of scope admin works at that moment."""
        works = or_(KeyRow.expires_at.is_(None), KeyRow.expires_at > now)
        query = select(KeyRow.id).where(KeyRow.scope == "admin", KeyRow.revoked_at.is_(None), works)
        return self._session.scalar(query.limit(1)) is not None

    def touch(self, key_id: str, now: datetime, at_most_every: timedelta) -> None:
        """Remember the use. One statement, so that of many processes only one writes in each interval."""
        is_due = or_(KeyRow.last_used_at.is_(None), KeyRow.last_used_at <= now - at_most_every)
        self._session.execute(update(KeyRow).where(KeyRow.id == key_id, is_due).values(last_used_at=now))
