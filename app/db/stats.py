"""What operators watch, read from the tables at the moment of asking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.db.tables import (
    ChainRow,
    DatasetRow,
    ExecutorRow,
    JobFileRow,
    JobRow,
    TeacherRow,
    UploadPartRow,
)

WHOLE = ("checking", "ready")  # states of a teacher or data set whose file has arrived


@dataclass(frozen=True)
class JobCount:
    """How many jobs of this kind are in this state; `oldest`: when the first of them was created."""

    kind: str
    state: str
    jobs: int
    oldest: datetime


@dataclass(frozen=True)
class Named:
    """An object that must be in the store, and what names it, in words. size_bytes: `None` when no row says."""

    what: str
    sha256: str
    size_bytes: int | None


class Stats:
    """Counts over the tables of the service; nothing here writes."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def jobs(self) -> Sequence[JobCount]:
        """A row for each kind and state that some job has, in that order."""
        found = self._session.execute(
            select(JobRow.kind, JobRow.state, func.count(), func.min(JobRow.created_at))
            .group_by(JobRow.kind, JobRow.state)
            .order_by(JobRow.kind, JobRow.state)
        )
        return [JobCount(*row) for row in found]

    def executors_alive(self, since: datetime) -> int:
        """Workers that did not stop and gave a sign of life at or after `since`."""
        alive = ExecutorRow.stopped_at.is_(None) & (ExecutorRow.heartbeat_at >= since)
        return self._session.scalar(select(func.count()).select_from(ExecutorRow).where(alive)) or 0

    def named(self) -> Sequence[Named]:
        """Every object that must be there; files that were announced and have not arrived are left out."""
        chains = select(ChainRow.name, ChainRow.digest, ChainRow.size_bytes).order_by(ChainRow.name)
        teachers = select(TeacherRow.name, TeacherRow.sha256, TeacherRow.size_bytes).where(TeacherRow.state.in_(WHOLE))
        archives = select(DatasetRow.name, DatasetRow.location, DatasetRow.size_bytes).where(
            DatasetRow.source == "archive", DatasetRow.state.in_(WHOLE)
        )
        files = select(JobFileRow.job + "/" + JobFileRow.name, JobFileRow.sha256, JobFileRow.size_bytes)
        parts = select(UploadPartRow.upload, UploadPartRow.sha256, UploadPartRow.size_bytes)
        return [
            Named(f"{kind} {name}", sha256, size_bytes)
            for kind, query in (
                ("chain", chains),
                ("teacher", teachers),
                ("data set", archives),
                ("file of job", files),
                ("part of upload", parts),
            )
            for name, sha256, size_bytes in self._session.execute(query)
        ]
