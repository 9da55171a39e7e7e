"""SQL of garbage collection: what rows name in the object store, and rows whose time is over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, cast

from sqlalchemy import CursorResult, delete, func, select, text
from sqlalchemy.orm import Session

from app.db.datasets import ARCHIVE, DELETED
from app.db.jobs import UNFINISHED
from app.db.tables import (
    AuditRow,
    ChainRow,
    DatasetRow,
    ExecutorRow,
    JobEventRow,
    JobFileRow,
    JobRow,
    TeacherRow,
    UploadPartRow,
    UploadRow,
)

_NAMING = (ChainRow, DatasetRow, JobFileRow, TeacherRow, UploadPartRow, UploadRow)  # tables that name objects


@dataclass(frozen=True)
class Dropped:
    """How many rows went."""

    job_events: int
    job_files: int
    executors: int


class References:
    """The objects that rows name."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def freeze(self, patience: timedelta) -> None:
        """From here to the end of the transaction no row comes to name an object; writers wait.

        Raises SQLAlchemy's `OperationalError` when writers did not let go within `patience`. That must be shorter than
        PostgreSQL's deadlock timeout (1 s): of two who wait for each other, this one gives up.
        """
        if self._session.get_bind().dialect.name == "postgresql":
            self._session.execute(text(f"SET LOCAL lock_timeout = {int(patience.total_seconds() * 1000)}"))
            tables = ", ".join(row.__tablename__ for row in _NAMING)
            self._session.execute(text(f"LOCK TABLE {tables} IN SHARE MODE"))
        else:  # SQLite has one writer: a write that changes nothing
            self._session.execute(delete(UploadPartRow).where(UploadPartRow.upload.is_(None)))

    def digests(self) -> set[str]:
        """The sha256 of every object that some row names."""
        columns = (ChainRow.digest, JobFileRow.sha256, TeacherRow.sha256, UploadPartRow.sha256, UploadRow.sha256)
        found = {digest for column in columns for digest in self._session.scalars(select(column).distinct())}
        is_kept = (DatasetRow.source == ARCHIVE) & (DatasetRow.state != DELETED)
        found.update(self._session.scalars(select(DatasetRow.location).where(is_kept)))
        for report in self._session.scalars(select(TeacherRow.report)):
            found.update(_named(report or {}))
        return found


class Leftovers:
    """Rows that nobody needs any more."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def drop(self, before: datetime) -> Dropped:
        """Drop events and files of jobs that finished before that moment, and workers that were last seen before it.

        A silent worker that still has a job is kept: whoever takes the job over looks for it.
        """
        finished = select(JobRow.id).where(JobRow.finished_at < before, JobRow.state.not_in(UNFINISHED))
        busy = select(JobRow.executor).where(JobRow.state.in_(UNFINISHED), JobRow.executor.is_not(None))
        last_seen = func.coalesce(ExecutorRow.stopped_at, ExecutorRow.heartbeat_at)
        return Dropped(
            job_events=self._deleted(delete(JobEventRow).where(JobEventRow.job.in_(finished))),
            job_files=self._deleted(delete(JobFileRow).where(JobFileRow.job.in_(finished))),
            executors=self._deleted(delete(ExecutorRow).where(last_seen < before, ExecutorRow.id.not_in(busy))),
        )

    def last_audited(self, action: str) -> datetime | None:
        """When somebody last did that."""
        return self._session.scalar(select(func.max(AuditRow.at)).where(AuditRow.action == action))

    def _deleted(self, statement: Any) -> int:
        """The number of rows; of a DELETE the result is a cursor's, which the types do not say."""
        done = cast("CursorResult[Any]", self._session.execute(statement.execution_options(synchronize_session=False)))
        return done.rowcount


def _named(report: dict[str, Any]) -> Iterator[str]:
    """A checked ONNX or wrapped teacher has its bare weights as another object."""
    sha256 = report.get("teacher_sha256")
    if isinstance(sha256, str):
        yield sha256
