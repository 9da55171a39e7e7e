"""Jobs: asked for here, run by workers.

A job's row and its place in the queue are written in one transaction, so that neither is without the other. Of requests
with the same idempotency key one makes a job and all others get that job; the database's unique key decides which.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.actor import Actor
from app.db.audit import Audit
from app.db.jobs import ENDED, JobRows
from app.db.session import Database
from app.db.tables import JobEventRow, JobFileRow, JobRow
from app.errors import (
    AppError,
    IdempotencyConflict,
    InvalidPageToken,
    JobEnded,
    JobNotRetryable,
    UnknownJob,
    UnknownJobFile,
)
from app.storage.port import ObjectStore, content_key

MAX_PRIORITY = 100
EVENTS_AT_ONCE = 200
# What rows can be called. Anything else is not even looked for: PostgreSQL answers a NUL in a text with an error.
_ID = re.compile(r"[0-9a-f]{32}")
_FILE_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")


class JobQueue(Protocol):
    """Where jobs wait for a worker. Both raise `DatabaseUnavailable`."""

    def add_in(self, session: Session, job_id: str, priority: int) -> None:
        """Queue a new job, in the caller's transaction. Of two jobs the one with the higher priority goes first."""

    def rewind(self, job_id: str) -> None:
        """Queue an ended job again, to go on at the step that failed."""


@dataclass(frozen=True)
class JobPage:
    """Some jobs, newest first, and the id to continue after (`None`: that was all)."""

    jobs: Sequence[JobRow]
    continue_after: str | None


class Jobs:
    """Takes jobs in, finds them, stops them."""

    def __init__(self, database: Database, store: ObjectStore, queue: JobQueue) -> None:
        self._database = database
        self._store = store
        self._queue = queue

    def submit(
        self,
        kind: str,
        request: Mapping[str, Any],
        by: Actor,
        *,
        priority: int = 0,
        idempotency_key: str | None = None,
        check: Callable[[Session], Mapping[str, Any]] | None = None,
    ) -> tuple[JobRow, bool]:
        """Ask for a job; also: is it new? `request`: JSON values without secrets.

        priority: -100 … 100. check: called for a new job, in the transaction that queues it; returns the request as it
        is to be done, and what it raises goes through, and there is no job. Raises `IdempotencyConflict` when the key
        came with another request, and `DatabaseUnavailable`.
        """
        earlier = self._keyed(kind, request, idempotency_key)
        if earlier is not None:
            return earlier, False
        try:
            with self._database.transaction() as session:
                settled = request if check is None else check(session)
                asked = request_sha256(kind, request)  # the same words are the same request, wherever aliases point
                return self._add_in(session, kind, settled, asked, by, priority, idempotency_key), True
        except (IntegrityError, AppError):  # another server took the key just now, and with it what the job is to make
            earlier = self._keyed(kind, request, idempotency_key)
            if earlier is None:
                raise
            return earlier, False

    def submit_in(
        self, session: Session, kind: str, request: Mapping[str, Any], by: Actor, *, priority: int = 0
    ) -> JobRow:
        """As `submit`, in the caller's transaction: with what it is about, or not at all."""
        return self._add_in(session, kind, request, request_sha256(kind, request), by, priority, None)

    def find(self, job_id: str) -> JobRow:
        """Raises `UnknownJob`."""
        with self._database.transaction() as session:
            return _known(session, job_id)

    def page(self, after: str, size: int, states: Sequence[str] = (), kinds: Sequence[str] = ()) -> JobPage:
        """Up to `size` jobs, newest first, that follow the one of id `after` (empty: from the newest).

        Raises `InvalidPageToken`.
        """
        with self._database.transaction() as session:
            rows = JobRows(session)
            last = rows.find(after) if _ID.fullmatch(after) else None
            if after and last is None:
                raise InvalidPageToken
            found = rows.page(last, size + 1, states, kinds)
        return JobPage(found[:size], found[size - 1].id if len(found) > size else None)

    def cancel(self, job_id: str, by: Actor) -> JobRow:
        """A queued job ends now, a running one within seconds. Doing it twice changes nothing.

        Raises `UnknownJob`, and `JobEnded` for a job that has succeeded or failed.
        """
        with self._database.transaction() as session:
            job = _known(session, job_id)
            if job.state == "cancelled" or (job.cancel_requested and job.state not in ENDED):
                return job
            was = JobRows(session).cancel(job_id)
            job = _known(session, job_id)
            if was is None:
                raise JobEnded(job_id, job.state)
            Audit(session).add(by, "job.cancel", job_id, kind=job.kind, was=was)
            return job

    def retry(self, job_id: str, by: Actor) -> JobRow:
        """A failed job goes on at the step that failed, with what the steps before it have made.

        Raises `UnknownJob`, and `JobNotRetryable` for a job in any other state.
        """
        with self._database.transaction() as session:
            job = _known(session, job_id)
            if not JobRows(session).requeue_failed(job_id):
                raise JobNotRetryable(job_id, job.state)
            Audit(session).add(by, "job.retry", job_id, kind=job.kind)
            job = _known(session, job_id)
        # Not in that transaction: on SQLite the queue's own would wait for it. Should we die right here, the workers
        # find a queued job without a place in the queue, and give it one.
        self._queue.rewind(job_id)
        return job

    def events(self, job_id: str, after: int) -> tuple[Sequence[JobEventRow], bool]:
        """Some events from behind the one of id `after`, and whether these are the last the job will have.

        A failed job that is tried again has more. Raises `UnknownJob`.
        """
        with self._database.transaction() as session:
            # The state first: an ended job's last event was there when it ended.
            ended = _known(session, job_id).state in ENDED
            found = JobRows(session).events(job_id, after, EVENTS_AT_ONCE)
        return found, ended and len(found) < EVENTS_AT_ONCE

    def log(self, job_id: str) -> Iterator[str]:
        """What the job logged so far, a line at a time. Raises `UnknownJob` before the first."""
        self.find(job_id)
        return self._log(job_id)

    def files(self, job_id: str) -> Sequence[JobFileRow]:
        """Raises `UnknownJob`."""
        with self._database.transaction() as session:
            _known(session, job_id)
            return JobRows(session).files(job_id)

    def file(self, job_id: str, name: str) -> JobFileRow:
        """Raises `UnknownJob` and `UnknownJobFile`."""
        with self._database.transaction() as session:
            _known(session, job_id)
            row = JobRows(session).file(job_id, name) if _FILE_NAME.fullmatch(name) else None
        if row is None:
            raise UnknownJobFile(job_id, name)
        return row

    def content(self, file: JobFileRow) -> Iterator[bytes]:
        """The file's bytes. Raises `StorageError` at the first chunk."""
        return self._store.get(content_key(file.sha256))

    def _log(self, job_id: str) -> Iterator[str]:
        after = 0
        while True:
            with self._database.transaction() as session:
                found = JobRows(session).events(job_id, after, EVENTS_AT_ONCE, kind="log")
            for event in found:
                after = event.id
                yield f"{event.at.isoformat(timespec='seconds')} {event.data.get('text', '')}\n"
            if len(found) < EVENTS_AT_ONCE:
                return

    def _keyed(self, kind: str, request: Mapping[str, Any], key: str | None) -> JobRow | None:
        if key is None:
            return None
        with self._database.transaction() as session:
            job = JobRows(session).keyed(key)
        if job is not None and job.request_sha256 != request_sha256(kind, request):
            raise IdempotencyConflict(job.id)
        return job

    def _add_in(
        self,
        session: Session,
        kind: str,
        request: Mapping[str, Any],
        asked_sha256: str,
        by: Actor,
        priority: int,
        key: str | None,
    ) -> JobRow:
        if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
            raise ValueError(f"priority {priority} is outside -{MAX_PRIORITY} … {MAX_PRIORITY}")
        now = datetime.now(UTC)
        job = JobRow(
            id=uuid.uuid4().hex,
            kind=kind,
            state="queued",
            priority=priority,
            request=dict(request),
            request_sha256=asked_sha256,
            idempotency_key=key,
            attempts=0,
            cancel_requested=False,
            created_by=by.id,
            created_at=now,
            updated_at=now,
        )
        JobRows(session).add(job)
        self._queue.add_in(session, job.id, priority)
        Audit(session).add(by, "job.create", job.id, kind=kind)
        return job


def request_sha256(kind: str, request: Mapping[str, Any]) -> str:
    """What makes two requests the same: sha256 of the canonical JSON of kind and request."""
    canonical = json.dumps([kind, request], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _known(session: Session, job_id: str) -> JobRow:
    job = JobRows(session).find(job_id) if _ID.fullmatch(job_id) else None
    if job is None:
        raise UnknownJob(job_id)
    return job
