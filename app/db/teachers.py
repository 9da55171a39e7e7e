"""SQL of teachers."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app.db.jobs import UNFINISHED
from app.db.tables import JobRow, TeacherRow


class TeacherRows:
    """Registered teachers."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def find(self, name: str) -> TeacherRow | None:
        return self._session.get(TeacherRow, name)

    def lock(self, name: str) -> None:
        """Nobody else changes or deletes the teacher of that name until the transaction ends."""
        self._session.execute(update(TeacherRow).where(TeacherRow.name == name).values(name=TeacherRow.name))

    def page(self, after: str, size: int) -> Sequence[TeacherRow]:
        """Up to `size` teachers whose names follow `after`, in order of name."""
        return self._session.scalars(
            select(TeacherRow).where(TeacherRow.name > after).order_by(TeacherRow.name).limit(size)
        ).all()

    def add(self, teacher: TeacherRow) -> None:
        self._session.add(teacher)
        self._session.flush()

    def delete(self, teacher: TeacherRow) -> None:
        self._session.delete(teacher)
        self._session.flush()

    def move(self, name: str, sha256: str, sources: Sequence[str], state: str, at: datetime, **values: Any) -> bool:
        """Bring the teacher with these weights from one of `sources` into another state; False when it is in none."""
        moved = self._session.scalars(
            update(TeacherRow)
            .where(TeacherRow.name == name, TeacherRow.sha256 == sha256, TeacherRow.state.in_(sources))
            .values(state=state, updated_at=at, **values)
            .returning(TeacherRow.name)
        )
        return moved.one_or_none() is not None

    def open_job(self, name: str) -> str | None:
        """The id of a job that has not ended and names this teacher in its request, if there is one."""
        return self._session.scalar(
            select(JobRow.id)
            .where(JobRow.state.in_(UNFINISHED), JobRow.request["teacher"].as_string() == name)
            .order_by(JobRow.created_at)
            .limit(1)
        )
