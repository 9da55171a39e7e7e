"""Signs of life, and the jobs of workers that give none.

A worker is declared dead by another that has itself watched the same sign of life not change for a whole lease. No two
clocks are compared, and after an outage of the database nobody is declared dead for the silence of that time. Exactly
one worker gets to declare it (compare-and-set on the sign of life), and exactly one puts each of its jobs back into the
queue (compare-and-set on the job's executor). Whoever dies halfway leaves a queued job that is not in the queue; the
next one to look finds that, too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Protocol

import structlog

from app.db.executors import Executors
from app.db.jobs import JobRows
from app.db.session import Database
from app.db.tables import JobRow
from app.worker.identity import is_here, is_surely_gone

AT_ONCE = 50
_log = structlog.get_logger(__name__)


class Mover(Protocol):
    """What of the queue is needed to move jobs; see `app.worker.engine.QueueClient`."""

    def resume(self, job_id: str) -> None: ...

    def rewind(self, job_id: str) -> None: ...

    def enqueue(self, job_id: str, priority: int) -> None: ...

    def places(self, job_ids: Sequence[str]) -> dict[str, tuple[str, str | None]]: ...


class Leases:
    """One worker's view of all workers. Methods raise `DatabaseUnavailable`; call again later."""

    def __init__(self, database: Database, queue: Mover, executor: str, lease_s: float) -> None:
        self._database = database
        self._queue = queue
        self._executor = executor
        self._lease_s = lease_s
        self._watched: dict[str, tuple[datetime, float]] = {}  # the last sign of life, and since when we watch it
        self._looked_at = time.monotonic()

    def register(self) -> None:
        """Those that ran here and whose processes are gone are declared dead at once."""
        with self._database.transaction() as session:
            executors = Executors(session)
            executors.add(self._executor)
            for other in executors.living():
                if is_surely_gone(other.id, self._executor) and executors.declare_dead(other.id, other.heartbeat_at):
                    _log.warning("a worker of this machine had died", worker=other.id)

    def beat(self) -> bool:
        """Give a sign of life. False: others have declared this worker dead, all it does is void."""
        with self._database.transaction() as session:
            return Executors(session).beat(self._executor)

    def stop(self) -> None:
        with self._database.transaction() as session:
            Executors(session).stop(self._executor)

    def look_after_others(self) -> None:
        """Declare dead who is, and bring the jobs nobody has back into the queue."""
        self._declare_dead()
        for job in self._orphans():
            self._take_over(job)
        self._requeue_lost()

    def _declare_dead(self) -> None:
        now = time.monotonic()
        if now - self._looked_at > self._lease_s / 2:  # we did not watch: stopped, or without a database
            self._watched.clear()
        with self._database.transaction() as session:
            living = [row for row in Executors(session).living() if row.id != self._executor]
        self._looked_at = now
        watched = {}
        for row in living:
            beat, since = self._watched.get(row.id, (row.heartbeat_at, now))
            watched[row.id] = (beat, since) if beat == row.heartbeat_at else (row.heartbeat_at, now)
        self._watched = watched
        for executor, (beat, since) in watched.items():
            if now - since >= self._lease_s:
                with self._database.transaction() as session:
                    if Executors(session).declare_dead(executor, beat):
                        _log.warning("a worker gave no sign of life and is taken for dead", worker=executor)

    def _orphans(self) -> list[JobRow]:
        with self._database.transaction() as session:
            return list(JobRows(session).orphans(AT_ONCE))

    def _take_over(self, job: JobRow) -> None:
        reason = f"worker {job.executor} gave no sign of life"
        with self._database.transaction() as session:
            taken = JobRows(session).release(job.id, job.executor, reason, counted=True)
        if taken:
            _log.warning("putting a dead worker's job back into the queue", job=job.id, worker=job.executor)
            self._queue.resume(job.id)

    def _requeue_lost(self) -> None:
        """Queued jobs with which nothing happened for a lease, and which nobody is about to begin."""
        moment = datetime.now(UTC) - timedelta(seconds=self._lease_s)
        with self._database.transaction() as session:
            jobs = JobRows(session).waiting_since(moment, AT_ONCE)
        if not jobs:
            return
        places = self._queue.places([job.id for job in jobs])
        for job in jobs:
            status, executor = places.get(job.id, ("missing", None))
            with self._database.transaction() as session:
                beginning = status == "PENDING" and executor is not None and Executors(session).is_living(executor)
                if status in ("ENQUEUED", "DELAYED") or beginning or not JobRows(session).claim_waiting(job):
                    continue
            _log.warning("a queued job was not in the queue", job=job.id, engine=status)
            if status == "missing":
                self._queue.enqueue(job.id, job.priority)
            else:
                self._queue.rewind(job.id)


def local_worker_is_alive(database: Database, lease_s: float) -> bool:
    """Whether some worker of this very machine and container gave a sign of life within a lease. Its clock is ours."""
    since = datetime.now(UTC) - timedelta(seconds=lease_s)
    with database.transaction() as session:
        return any(is_here(row.id) and row.heartbeat_at >= since for row in Executors(session).living())
