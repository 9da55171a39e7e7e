"""All SQL of the workers' signs of life."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from sqlalchemy import ColumnElement, select, update
from sqlalchemy.orm import Session

from app.db.tables import ExecutorRow


class Executors:
    """Worker processes. One that was declared dead stays so: it comes back, if at all, under another id."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, executor: str) -> None:
        now = datetime.now(UTC)
        self._session.add(ExecutorRow(id=executor, started_at=now, heartbeat_at=now, stopped_at=None))
        self._session.flush()

    def beat(self, executor: str) -> bool:
        """Give a sign of life. False when others have declared this executor dead."""
        return self._update(ExecutorRow.id == executor, heartbeat_at=datetime.now(UTC))

    def stop(self, executor: str) -> bool:
        """The executor has ended in good order."""
        return self._update(ExecutorRow.id == executor, stopped_at=datetime.now(UTC))

    def declare_dead(self, executor: str, seen: datetime) -> bool:
        """True for one of all who ask, and only if there was no sign of life after the one they have seen."""
        return self._update(ExecutorRow.id == executor, ExecutorRow.heartbeat_at == seen, stopped_at=datetime.now(UTC))

    def living(self) -> Sequence[ExecutorRow]:
        """Those that neither ended nor were declared dead; the newest first."""
        query = select(ExecutorRow).where(ExecutorRow.stopped_at.is_(None))
        return self._session.scalars(query.order_by(ExecutorRow.started_at.desc())).all()

    def is_living(self, executor: str) -> bool:
        row = self._session.get(ExecutorRow, executor)
        return row is not None and row.stopped_at is None

    def _update(self, *where: ColumnElement[bool], **values: datetime) -> bool:
        changed = self._session.execute(
            update(ExecutorRow).where(*where, ExecutorRow.stopped_at.is_(None)).values(**values)
        )
        return bool(changed.rowcount)  # type: ignore[attr-defined]
