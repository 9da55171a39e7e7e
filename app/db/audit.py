"""The audit trail."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.actor import Actor
from app.db.tables import AuditRow


class Audit:
    """What admins did. An entry is written in the transaction of the deed, so that neither is without the other."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, by: Actor, action: str, target: str, **detail: Any) -> None:
        """`action`: a noun and a verb such as `alias.move`; `detail`: JSON values, never a secret."""
        self._session.add(
            AuditRow(
                at=datetime.now(UTC),
                actor=by.id,
                action=action,
                target=target[:200],
                detail=detail,
                request_id=by.request_id,
            )
        )

    def page(self, before: int | None, size: int) -> Sequence[AuditRow]:
        """Up to `size` entries, newest first, from before the entry of that id."""
        query = select(AuditRow).order_by(AuditRow.id.desc()).limit(size)
        return self._session.scalars(query if before is None else query.where(AuditRow.id < before)).all()
