"""SQL of teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from app.db.jobs import UNFINISHED
from app.db.tables import JobRow, TeacherRow

FUSE = "fuse"  # the kind of job that makes a teacher, called `name` in its request, of several


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
        """The id of a job that has not ended and needs this teacher, if there is one."""
        asked = or_(JobRow.request["teacher"].as_string() == name, JobRow.kind == FUSE)
        found = self._session.scalars(
            select(JobRow).where(JobRow.state.in_(UNFINISHED), asked).order_by(JobRow.created_at)
        )
        return next((job.id for job in found if name in _teachers_in(job.request)), None)


def _teachers_in(request: Mapping[str, Any]) -> set[str | None]:
    """The teachers that the request of a job names as what it needs."""
    inputs = {one["teacher"] for one in request.get("inputs", ())}
    return {request.get("teacher"), request.get("start_from"), *inputs}
