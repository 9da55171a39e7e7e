"""All SQL of jobs, their events and their files.

Two things to know. Whatever a worker writes about a job is *fenced*: it counts only while `jobs.executor` still names
that worker, so one that was stopped, replaced and continued can spoil nothing. And an event is added only after the
job's row was updated in the same transaction: the row's lock makes the events of a job appear in the order of their
ids, which a reader that remembers the last id relies on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from sqlalchemy import ColumnElement, and_, delete, exists, func, select, tuple_, update
from sqlalchemy.orm import Session

from app.db.tables import ExecutorRow, JobEventRow, JobFileRow, JobRow

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
STATES: tuple[State, ...] = get_args(State)
UNFINISHED = ("queued", "running")  # of a job that still needs what its request names
ENDED = frozenset(STATES) - frozenset(UNFINISHED)


@dataclass(frozen=True)
class Hold:
    """What a worker must know to go on with a job: is it still its own, and does anybody still want it?"""

    executor: str | None
    cancel_requested: bool


class JobRows:
    """Jobs, as the API and the workers see them."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, job: JobRow) -> None:
        """Raises `IntegrityError` when another job has its idempotency key."""
        self._session.add(job)
        self._session.flush()
        self._add_event(job.id, "state", {"state": job.state})

    def find(self, job_id: str) -> JobRow | None:
        return self._session.get(JobRow, job_id)

    def keyed(self, idempotency_key: str) -> JobRow | None:
        return self._session.scalar(select(JobRow).where(JobRow.idempotency_key == idempotency_key))

    def page(self, after: JobRow | None, size: int, states: Sequence[str], kinds: Sequence[str]) -> Sequence[JobRow]:
        """Up to `size` jobs, newest first, that follow `after`; of all states and kinds when none are named."""
        query = select(JobRow).order_by(JobRow.created_at.desc(), JobRow.id.desc()).limit(size)
        if after is not None:
            query = query.where(tuple_(JobRow.created_at, JobRow.id) < (after.created_at, after.id))
        if states:
            query = query.where(JobRow.state.in_(states))
        if kinds:
            query = query.where(JobRow.kind.in_(kinds))
        return self._session.scalars(query).all()

    def hold(self, job_id: str) -> Hold | None:
        """The two columns a running step looks at again and again."""
        found = self._session.execute(
            select(JobRow.executor, JobRow.cancel_requested).where(JobRow.id == job_id)
        ).one_or_none()
        return None if found is None else Hold(*found)

    def begin(self, job_id: str, executor: str) -> bool:
        """Make the job this executor's. False when it has ended meanwhile, or the executor was declared dead."""
        alive = exists().where(ExecutorRow.id == executor, ExecutorRow.stopped_at.is_(None))
        now = datetime.now(UTC)
        begun = self._update(
            and_(JobRow.id == job_id, JobRow.state.in_(UNFINISHED), alive),
            state="running",
            executor=executor,
            attempts=JobRow.attempts + 1,
            started_at=func.coalesce(JobRow.started_at, now),
            finished_at=None,
        )
        if begun:
            self._add_event(job_id, "state", {"state": "running", "worker": executor})
        return begun

    def progress(self, job_id: str, executor: str | None, events: Sequence[tuple[str, dict[str, Any]]]) -> bool:
        """Write events; the last of kind `progress` also becomes the job's progress. False: the job is not ours."""
        latest = [data for kind, data in events if kind == "progress"][-1:]
        return self._record(job_id, executor, events, {"progress": latest[0]} if latest else {})

    def enter_step(self, job_id: str, executor: str | None, step: str, attempt: int) -> bool:
        event = {"step": step, "state": "started", "attempt": attempt}
        return self._record(job_id, executor, [("step", event)], {"step": step, "progress": None})

    def step_event(self, job_id: str, executor: str | None, event: dict[str, Any]) -> bool:
        return self._record(job_id, executor, [("step", event)], {})

    def end(
        self, job_id: str, executor: str | None, state: State, *, result: dict[str, Any] | None, error: str | None
    ) -> bool:
        """The job's last word. False when it is not the executor's any more."""
        event = {"state": state, **({"error": error} if error else {})}
        values = {"state": state, "result": result, "error": error, "executor": None, "finished_at": datetime.now(UTC)}
        return self._record(job_id, executor, [("state", event)], values)

    def release(self, job_id: str, executor: str | None, reason: str, *, counted: bool) -> bool:
        """Back into the queue, from an executor that stops (`counted` false: it is not to blame) or died."""
        attempts = JobRow.attempts if counted else JobRow.attempts - 1
        event = {"state": "queued", "reason": reason}
        values = {"state": "queued", "executor": None, "attempts": attempts}
        return self._record(job_id, executor, [("state", event)], values, JobRow.state == "running")

    def cancel(self, job_id: str) -> State | None:
        """Ask a running job to stop, or end a queued one. The state it was in; None when it has ended."""
        # Asked first, which locks the row, and looked at afterwards: a job that is given back or begun at this moment
        # is in neither state for whoever tries one after the other.
        if not self._update(and_(JobRow.id == job_id, JobRow.state.in_(UNFINISHED)), cancel_requested=True):
            return None
        if self._update(
            and_(JobRow.id == job_id, JobRow.state == "queued"), state="cancelled", finished_at=datetime.now(UTC)
        ):
            self._add_event(job_id, "state", {"state": "cancelled"})
            return "queued"
        self._add_event(job_id, "cancel", {})
        return "running"

    def requeue_failed(self, job_id: str) -> bool:
        """A failed job waits again. False when it is in another state."""
        again = self._update(
            and_(JobRow.id == job_id, JobRow.state == "failed"),
            state="queued",
            error=None,
            attempts=0,
            finished_at=None,
            cancel_requested=False,
        )
        if again:
            self._add_event(job_id, "state", {"state": "queued", "reason": "tried again"})
        return again

    def claim_waiting(self, job: JobRow) -> bool:
        """Of all who look after a job that has waited long, one is told True."""
        return self._update(and_(JobRow.id == job.id, JobRow.state == "queued", JobRow.updated_at == job.updated_at))

    def orphans(self, limit: int) -> Sequence[JobRow]:
        """Jobs said to be running whose executor has stopped, or is none."""
        lives = exists().where(ExecutorRow.id == JobRow.executor, ExecutorRow.stopped_at.is_(None))
        return self._session.scalars(select(JobRow).where(JobRow.state == "running", ~lives).limit(limit)).all()

    def held_by(self, executor: str) -> Sequence[str]:
        """Ids of the jobs that are this executor's."""
        return self._session.scalars(select(JobRow.id).where(JobRow.executor == executor)).all()

    def waiting_since(self, moment: datetime, limit: int) -> Sequence[JobRow]:
        """Queued jobs with which nothing has happened since then, the longest first."""
        query = select(JobRow).where(JobRow.state == "queued", JobRow.updated_at < moment)
        return self._session.scalars(query.order_by(JobRow.updated_at).limit(limit)).all()

    def events(self, job_id: str, after: int, limit: int, kind: str | None = None) -> Sequence[JobEventRow]:
        """Up to `limit` events in order, from behind the one of id `after`."""
        query = select(JobEventRow).where(JobEventRow.job == job_id, JobEventRow.id > after)
        query = query if kind is None else query.where(JobEventRow.kind == kind)
        return self._session.scalars(query.order_by(JobEventRow.id).limit(limit)).all()

    def files(self, job_id: str) -> Sequence[JobFileRow]:
        return self._session.scalars(select(JobFileRow).where(JobFileRow.job == job_id).order_by(JobFileRow.name)).all()

    def file(self, job_id: str, name: str) -> JobFileRow | None:
        return self._session.get(JobFileRow, (job_id, name))

    def keep_file(self, job_id: str, executor: str | None, name: str, sha256: str, size_bytes: int) -> bool:
        """Point `name` at that object. False when the job is not the executor's any more."""
        if not self._update(_is_held(job_id, executor)):
            return False
        now = datetime.now(UTC)
        row = self.file(job_id, name)
        if row is None:
            row = JobFileRow(job=job_id, name=name, sha256=sha256, size_bytes=size_bytes, updated_at=now)
            self._session.add(row)
        else:
            row.sha256, row.size_bytes, row.updated_at = sha256, size_bytes, now
        return True

    def drop_files(self, job_id: str, executor: str | None, names: Collection[str] | None) -> bool:
        """Forget these files, `None`: all; garbage collection removes their bytes. False when the job is not the
        executor's any more."""
        if not self._update(_is_held(job_id, executor)):
            return False
        chosen = JobFileRow.job == job_id
        self._session.execute(
            delete(JobFileRow).where(chosen if names is None else and_(chosen, JobFileRow.name.in_(names))),
            execution_options={"synchronize_session": False},
        )
        self._session.expire_all()
        return True

    def _record(
        self,
        job_id: str,
        executor: str | None,
        events: Sequence[tuple[str, dict[str, Any]]],
        values: Mapping[str, Any],
        where: ColumnElement[bool] | None = None,
    ) -> bool:
        held = _is_held(job_id, executor)
        if not self._update(held if where is None else and_(held, where), **values):
            return False
        for kind, data in events:
            self._add_event(job_id, kind, data)
        return True

    def _update(self, where: ColumnElement[bool], **values: Any) -> bool:
        """True when a row was changed: the compare-and-set under everything here."""
        changed = self._session.execute(
            update(JobRow).where(where).values(updated_at=datetime.now(UTC), **values),
            execution_options={"synchronize_session": False},
        )
        self._session.expire_all()
        return bool(changed.rowcount)  # type: ignore[attr-defined]

    def _add_event(self, job_id: str, kind: str, data: dict[str, Any]) -> None:
        self._session.add(JobEventRow(job=job_id, at=datetime.now(UTC), kind=kind, data=data))
        self._session.flush()


def _is_held(job_id: str, executor: str | None) -> ColumnElement[bool]:
    return and_(JobRow.id == job_id, JobRow.executor.is_not_distinct_from(executor))
