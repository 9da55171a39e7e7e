"""SQL of data sets, and of the jobs that use them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Text, cast, delete, select, update
from sqlalchemy.orm import Session

from app.db.jobs import UNFINISHED
from app.db.tables import DatasetRow, JobFileRow, JobRow

AWAITING, CHECKING, READY, REFUSED, DELETED = "awaiting-archive", "checking", "ready", "refused", "deleted"
STATES = (AWAITING, CHECKING, READY, REFUSED, DELETED)
ARCHIVE = "archive"
CHECK = "check-dataset"  # the kind of job that checks one
_NAMED_BY = ("dataset", "datasets")  # fields of a job's request


class DatasetRows:
    """Registered data sets. Deleted ones stay, for the provenance of what was made from them."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def find(self, name: str) -> DatasetRow | None:
        return self._session.get(DatasetRow, name)

    def find_kept(self, name: str) -> DatasetRow | None:
        """As `find`, and nobody else changes the row until this transaction ends."""
        if self._session.get_bind().dialect.name == "sqlite":  # knows no row locks; whoever writes is alone
            self._session.execute(update(DatasetRow).where(DatasetRow.name == name).values(name=DatasetRow.name))
        return self._session.get(DatasetRow, name, with_for_update={"read": True}, populate_existing=True)

    def page(self, after: str, size: int, state: str | None) -> Sequence[DatasetRow]:
        """Up to `size` data sets whose names follow `after`, in order of name; `None`: all but the deleted."""
        wanted = DatasetRow.state != DELETED if state is None else DatasetRow.state == state
        return self._session.scalars(
            select(DatasetRow).where(DatasetRow.name > after, wanted).order_by(DatasetRow.name).limit(size)
        ).all()

    def add(self, dataset: DatasetRow) -> None:
        self._session.add(dataset)
        self._session.flush()

    def move(self, name: str, sources: Collection[str], state: str, at: datetime, **values: Any) -> bool:
        """Bring a data set from one of these states into another; False when it is in none of them. Until the
        transaction ends, nobody else can move it."""
        moved = self._session.scalars(
            update(DatasetRow)
            .where(DatasetRow.name == name, DatasetRow.state.in_(sources))
            .values(state=state, updated_at=at, **values)
            .returning(DatasetRow.name)
        )
        return moved.one_or_none() is not None

    def due(self, now: datetime) -> Sequence[str]:
        """Names of the data sets whose retention time is over."""
        return self._session.scalars(
            select(DatasetRow.name)
            .where(DatasetRow.retain_until <= now, DatasetRow.state != DELETED)
            .order_by(DatasetRow.name)
        ).all()

    def digests(self) -> set[str]:
        """Digests of all data sets whose files may be on a worker."""
        found = self._session.scalars(
            select(DatasetRow.digest).where(DatasetRow.digest.is_not(None), DatasetRow.state != DELETED)
        )
        return {digest for digest in found if digest is not None}

    def open_job(self, name: str) -> str | None:
        """The id of the oldest job that has not ended and names this data set in its request."""
        return next((job.id for job in self._jobs(name) if job.state in UNFINISHED), None)

    def last_check(self, name: str) -> str | None:
        """The id of the newest job that checks, or checked, this data set."""
        return next((job.id for job in reversed(self._jobs(name)) if job.kind == CHECK), None)

    def jobs(self, name: str) -> list[str]:
        """Ids of all jobs that used this data set, oldest first; checks are none."""
        return [job.id for job in self._jobs(name) if job.kind != CHECK]

    def drop_job_files(self, name: str, kinds: Collection[str]) -> list[str]:
        """Forget the files kept by jobs of these kinds that used this data set; returns their sha256."""
        jobs = [job.id for job in self._jobs(name) if job.kind in kinds]
        dropped: list[str] = []
        for start in range(0, len(jobs), 500):  # SQLite takes so many parameters
            piece = delete(JobFileRow).where(JobFileRow.job.in_(jobs[start : start + 500]))
            dropped += self._session.scalars(piece.returning(JobFileRow.sha256))
        return dropped

    def _jobs(self, name: str) -> list[JobRow]:
        """Jobs whose request names this data set, oldest first: the database finds the word, Python the place."""
        jobs = self._session.scalars(
            select(JobRow)
            .where(cast(JobRow.request, Text).contains(f'"{name}"', autoescape=True))
            .order_by(JobRow.created_at, JobRow.id)
        )
        return [job for job in jobs if uses(job.request, name)]


def uses(request: Any, name: str) -> bool:
    """Whether a job's request names this data set: in a field `dataset` or `datasets`, however deep.

    >>> uses({"kind": "evaluate", "data": {"dataset": "site"}}, "site")
    True
    """
    if isinstance(request, Mapping):
        named = (value for field, value in request.items() if field in _NAMED_BY)
        if any(value == name or (isinstance(value, list) and name in value) for value in named):
            return True
        return any(uses(value, name) for value in request.values())
    return isinstance(request, list) and any(uses(value, name) for value in request)
