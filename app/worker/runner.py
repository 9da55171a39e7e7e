"""One job from its beginning to its end, on this worker."""

from __future__ import annotations

import errno
import importlib.util
import os
import random
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import structlog
from structlog.contextvars import bound_contextvars

from app.db.jobs import ENDED, JobRows, State
from app.db.session import Database
from app.db.tables import JobRow
from app.errors import (
    AppError,
    ChildFailed,
    DatabaseUnavailable,
    JobCancelled,
    JobPermanentlyFailed,
    ObjectCorrupt,
    StorageError,
    StorageUnavailable,
    TrainingNotInstalled,
)
from app.metrics import JobMetrics, Metrics
from app.redaction import redact
from app.services.registry import Registry
from app.settings import Settings
from app.storage.port import ObjectStore
from app.tracing import span
from app.worker.context import JobGivenUp, StepContext, json_values
from app.worker.kinds import Kind, Step
from chains.errors import ChainsError

LONGEST_WAIT_S = 120
DATABASE_WAIT_S = 5
MAX_ERROR_CHARACTERS = 8000
_PASSING = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE}
)
Result = TypeVar("Result")
RunStep = Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]]
_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Surroundings:
    """What all jobs of a worker share. stopping: set when the worker must let go of its jobs."""

    settings: Settings
    database: Database
    store: ObjectStore
    registry: Registry
    executor: str
    folder: Path
    stopping: Event
    counted: JobMetrics = field(default_factory=lambda: JobMetrics(Metrics()))


class Runner:
    """Runs jobs with the kinds it is given; `run_step` is the engine's, which records what a step returns."""

    def __init__(self, around: Surroundings, kinds: Mapping[str, Kind], run_step: RunStep) -> None:
        self._around = around
        self._kinds = kinds
        self._run_step = run_step

    def run(self, job_id: str) -> None:
        """Do the job, or what is left of it. Nothing happens to a job that has ended, except what follows a cancel.

        Raises `JobGivenUp` when this worker stops or has lost the job; then nothing was recorded as its end.
        """
        with bound_contextvars(job=job_id):
            job = self._begin(job_id)
            if job is None:
                return
            context = self._context(job)
            try:
                self._do(job, context)
            finally:
                shutil.rmtree(context.folder, ignore_errors=True)

    def _begin(self, job_id: str) -> JobRow | None:
        """The job, now ours; None when there is nothing to do."""
        if self._around.stopping.is_set():
            raise JobGivenUp(job_id)
        begun = self._patiently(lambda rows: rows.begin(job_id, self._around.executor))
        job = self._patiently(lambda rows: rows.find(job_id))
        if begun or job is None:
            return job
        if job.state == "cancelled":
            return job
        if job.state in ENDED:
            return None
        raise JobGivenUp(job_id)  # it has not ended and cannot begin: this worker was declared dead

    def _context(self, job: JobRow) -> StepContext:
        around = self._around
        folder = around.folder / job.id
        folder.mkdir(parents=True, exist_ok=True)
        return StepContext(
            job_id=job.id,
            request=dict(job.request),
            outputs={},
            folder=folder,
            settings=around.settings,
            database=around.database,
            store=around.store,
            registry=around.registry,
            executor=None if job.state == "cancelled" else around.executor,
            stopping=around.stopping,
        )

    def _do(self, job: JobRow, context: StepContext) -> None:
        kind = self._kinds.get(job.kind)
        if job.state == "cancelled":  # while it was still queued
            self._after_failure(kind, context, "cancelled")
            return
        _log.info("job begins", kind=job.kind, attempt=job.attempts)
        last = self._steps(job, kind, context)
        if "output" in last:
            self._end(context, "succeeded", result=last["output"])
        elif "cancelled" in last:
            self._after_failure(kind, context, "cancelled")
            self._end(context, "cancelled")
        else:
            self._after_failure(kind, context, last["failed"])
            self._end(context, "failed", error=last["failed"])

    def _steps(self, job: JobRow, kind: Kind | None, context: StepContext) -> dict[str, Any]:
        """Run the steps; the last one's result: `output`, `failed` with a reason, or `cancelled`."""
        if kind is None:
            return {"failed": f"this worker knows no jobs of kind '{job.kind}'; is it older than the server?"}
        if job.attempts > self._around.settings.job_takeovers:
            return {
                "failed": f"{job.attempts - 1} workers died while they ran this job, the last in step "
                f"'{job.step}'; perhaps it needs more memory than they have"
            }
        done: dict[str, Any] = {"output": {}}
        for name, step in kind.steps:
            done = self._run_step(name, partial(self._measured, kind, context, name, step))
            if "output" not in done:
                break
            context.outputs[name] = done["output"]
        return done

    def _measured(self, kind: Kind, context: StepContext, name: str, step: Step) -> dict[str, Any]:
        """`_step`, timed and traced."""
        started, outcome = time.monotonic(), "given-up"
        try:
            with span("job.step", job=context.job_id, kind=kind.name, step=name):
                done = self._step(kind, context, name, step)
            outcome = next((state for state in ("failed", "cancelled") if state in done), "succeeded")
            return done
        finally:
            self._around.counted.step_ended(kind.name, name, outcome, time.monotonic() - started)

    def _step(self, kind: Kind, context: StepContext, name: str, step: Step) -> dict[str, Any]:
        """One step, as often as it takes. What goes wrong is a result: the engine must not record exceptions."""
        if kind.needs_training and importlib.util.find_spec("torch") is None:
            return {"failed": str(TrainingNotInstalled(kind.name))}
        for attempt in count(1):
            try:
                context.check_cancelled()
                self._fenced(context, lambda rows: rows.enter_step(*_at(context), name, attempt))  # noqa: B023
                output = json_values(step(context))
                context.flush()
            except JobCancelled:
                return {"cancelled": True}
            except Exception as error:  # whatever a step raises is the job's affair, not the worker's
                reason = public_reason(error)
                _log.warning("step failed", step=name, attempt=attempt, exc_info=error)
                self._around.counted.attempt_failed(kind.name, name, error)
                if not is_transient(error) or attempt >= self._around.settings.step_attempts:
                    self._tell(context, {"step": name, "state": "failed", "attempt": attempt, "error": reason})
                    return {"failed": reason}
                wait_s = self._wait_s(attempt)
                self._tell(
                    context,
                    {"step": name, "state": "waiting", "attempt": attempt, "error": reason, "seconds": round(wait_s)},
                )
                try:
                    self._sleep(context, wait_s)
                except JobCancelled:
                    return {"cancelled": True}
                continue
            self._tell(context, {"step": name, "state": "finished", "attempt": attempt})
            return {"output": output}
        raise AssertionError  # `count` has no end

    def _after_failure(self, kind: Kind | None, context: StepContext, reason: str) -> None:
        if kind is None or kind.failed is None:
            return
        for attempt in count(1):
            try:
                kind.failed(context, reason)
            except Exception as error:
                _log.exception("what follows a failed job failed itself", kind=kind.name)
                if not is_transient(error) or attempt >= self._around.settings.step_attempts:
                    return
                time.sleep(min(self._wait_s(attempt), DATABASE_WAIT_S))
            else:
                return

    def _end(
        self, context: StepContext, state: State, *, result: dict[str, Any] | None = None, error: str | None = None
    ) -> None:
        self._fenced(context, lambda rows: rows.end(*_at(context), state, result=result, error=error))
        _log.info("job ended", state=state)

    def _tell(self, context: StepContext, event: dict[str, Any]) -> None:
        self._fenced(context, lambda rows: rows.step_event(*_at(context), event))

    def _fenced(self, context: StepContext, write: Callable[[JobRows], bool]) -> None:
        if not self._patiently(write):
            raise JobGivenUp(context.job_id)

    def _patiently(self, ask: Callable[[JobRows], Result]) -> Result:
        """Ask the database, and wait for one that is away: a job must not fail for that. Raises `JobGivenUp`."""
        for attempt in count(1):
            try:
                with self._around.database.transaction() as session:
                    return ask(JobRows(session))
            except DatabaseUnavailable as error:
                _log.warning("waiting for the database", reason=str(error))
                if self._around.stopping.wait(min(0.2 * attempt, DATABASE_WAIT_S)):
                    raise JobGivenUp from error
        raise AssertionError

    def _wait_s(self, attempt: int) -> float:
        """Twice as long each time, give or take a quarter: workers that failed together must not come back together."""
        longest = min(self._around.settings.retry_wait_s * 2.0 ** (attempt - 1), LONGEST_WAIT_S)
        return longest * random.uniform(0.75, 1.25)  # noqa: S311 - no secret

    def _sleep(self, context: StepContext, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            context.check_cancelled()
            time.sleep(min(left, 0.2))


def is_transient(error: Exception) -> bool:
    """Whether trying again may help: something the job needs is away, full or was taken from it."""
    if isinstance(error, ChildFailed):
        return error.is_transient
    if isinstance(error, (StorageUnavailable, ObjectCorrupt, DatabaseUnavailable, ConnectionError, TimeoutError)):
        return True
    return isinstance(error, OSError) and error.errno in _PASSING


def public_reason(error: Exception) -> str:
    """Why a step failed, in words that may leave the house: no host, no folder of the server, no secret."""
    if isinstance(error, DatabaseUnavailable):
        return "the database did not answer; the worker's log has more"
    if isinstance(error, StorageError):
        return "the object store did not answer, or gave back something else than was stored; the worker's log has more"
    if isinstance(error, (AppError, ChainsError, JobPermanentlyFailed)):
        return _storable(redact(str(error)))[:MAX_ERROR_CHARACTERS]
    if isinstance(error, OSError) and error.errno is not None:
        return f"the worker's system says: {os.strerror(error.errno)}"
    return f"an unexpected error ({type(error).__name__}); the worker's log has more"


def _storable(text: str) -> str:
    """Without what no text column holds: a NUL that a program wrote, half a character of a file's name."""
    return text.replace("\x00", "").encode(errors="replace").decode()


def _at(context: StepContext) -> tuple[str, str | None]:
    return context.job_id, context.executor
