"""The adapter to the workflow engine (DBOS), and the only module that imports it.

The engine keeps its tables in the service's own database: a job's row and its place in the queue are one transaction,
and there is one thing to back up. On PostgreSQL they lie in the schema `dbos`, on SQLite beside ours.

A job is one workflow with the job's id, a step of the job is one step of it. What a step returns is recorded, so after
a crash the next worker goes on behind the last recorded step. The engine never sees an exception of a step: failing is
a result here, so that nothing but JSON is stored and nothing is unpickled.

Importing this costs a tenth of a second, so the API does it when the first job is asked for (`app.worker.enqueue`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from dbos import DBOS, DBOSClient, DBOSPortableJSONSerializer, EnqueueOptions
from dbos import error as dbos_errors
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from app.db.session import PATIENCE, Database
from app.errors import DatabaseUnavailable

APPLICATION = "widthwise"
# Of the workflow below, not of the release: by default the engine takes a hash of our code, and every upgrade would
# leave the jobs of the version before it without a worker. A change that old jobs cannot bear gets another number.
WORKFLOW_VERSION = "1"
QUEUE = "jobs"
WORKFLOW = "run-job"
SCHEMA = "dbos"
LOWEST_PRIORITY = 1000  # the engine's priorities begin at 1, and 1 goes first
MIGRATION_LOCK = 7_237_014_204
MIGRATION_WAIT_S = 120
Result = TypeVar("Result")

logging.getLogger("dbos").addHandler(logging.NullHandler())  # else it adds one that writes to standard error


class QueueClient:
    """Puts jobs into the queue and moves them, from any process; runs none."""

    def __init__(self, database: Database) -> None:
        self._client = DBOSClient(
            system_database_engine=database.engine,
            dbos_system_schema=SCHEMA,
            serializer=DBOSPortableJSONSerializer(),
            application_name=APPLICATION,
            lazy=True,
            retry_connection_errors=False,
        )

    def add_in(self, session: Session, job_id: str, priority: int) -> None:
        """Queue a job in the caller's transaction."""
        self._client.enqueue_in_transaction(session, _options(job_id, priority), job_id)

    def enqueue(self, job_id: str, priority: int) -> None:
        """Queue a job that the engine does not know."""
        _answering(partial(self._client.enqueue, _options(job_id, priority), job_id))

    def resume(self, job_id: str) -> None:
        """Queue a job whose worker is gone; whoever takes it goes on behind its last recorded step."""
        _answering(partial(self._client.resume_workflow, job_id, queue_name=QUEUE))

    def rewind(self, job_id: str) -> None:
        """Queue a job again, from the step that failed on, or behind the last one where none did.

        One that waits already is left as it is, and one that the engine does not know is left to the workers, who look
        for such jobs.
        """
        status, _ = self.places([job_id]).get(job_id, (None, None))
        if status is None or status in ("ENQUEUED", "DELAYED"):
            return

        def rewind() -> None:
            if status == "PENDING":  # its worker died, or is about to tell the engine what our own row says already
                self._client.cancel_workflow(job_id)
            steps = self._client.list_workflow_steps(job_id)
            failed = [step["function_id"] for step in steps if "output" not in (step["output"] or {})]
            self._client.rewind_workflow(
                job_id,
                start_step=min(failed, default=len(steps) + 1),
                application_version=WORKFLOW_VERSION,
                queue_name=QUEUE,
            )

        _answering(rewind)

    def places(self, job_ids: Sequence[str]) -> dict[str, tuple[str, str | None]]:
        """Of the jobs that the engine knows: its status of each, and the executor that has it or had it last."""
        found = _answering(
            partial(self._client.list_workflows, workflow_ids=list(job_ids), load_input=False, load_output=False)
        )
        return {flow.workflow_id: (flow.status, flow.executor_id) for flow in found}


class Engine:
    """Runs queued jobs in this process. One at a time per process: the library is a singleton.

    run: does the job of that id; what it raises other than `BaseException` ends the workflow as failed.
    """

    def __init__(
        self, database: Database, executor: str, run: Callable[[str], None], *, slots: int, poll_s: float
    ) -> None:
        self._slots, self._poll_s = slots, poll_s
        logging.getLogger("dbos").setLevel(logging.WARNING)
        DBOS(
            config={
                "name": APPLICATION,
                "system_database_url": _url(database),
                "dbos_system_schema": SCHEMA,
                "application_version": WORKFLOW_VERSION,
                "executor_id": executor,
                "serializer": DBOSPortableJSONSerializer(),
                "run_migrations": False,
                "enable_otlp": False,
                "log_level": "WARNING",
                "sys_db_pool_size": 5,
                "db_engine_kwargs": _engine_options(database),
            }
        )

        def run_job(job_id: str) -> None:  # a function: the library sets attributes on it
            run(job_id)

        DBOS.workflow(name=WORKFLOW, max_recovery_attempts=None)(run_job)

    def start(self) -> None:
        """Begin to take jobs. Raises `DatabaseUnavailable` when the database is not migrated or does not answer."""
        try:
            DBOS.launch()
            # The queue's settings lie in the database: the worker that starts last decides for all.
            DBOS.register_queue(
                QUEUE,
                worker_concurrency=self._slots,
                polling_interval_sec=self._poll_s,
                on_conflict="always_update",
            )
        except (DBAPIError, dbos_errors.DBOSException) as error:
            self.stop(0)
            raise DatabaseUnavailable(
                f"the job engine cannot use the database, perhaps 'widthwise migrate' was not run: {error}"
            ) from error

    def stop(self, wait_s: int) -> None:
        """Take no more jobs, wait up to `wait_s` seconds for those that run, let go of the database."""
        DBOS.destroy(destroy_registry=True, workflow_completion_timeout_sec=wait_s)


def _options(job_id: str, priority: int) -> EnqueueOptions:
    return {
        "workflow_name": WORKFLOW,
        "queue_name": QUEUE,
        "workflow_id": job_id,
        "app_version": WORKFLOW_VERSION,
        "priority": LOWEST_PRIORITY - priority,
    }


def run_step(name: str, step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Inside a workflow: the step's recorded result, or run it and record what it returns (JSON values)."""
    return DBOS.run_step({"name": name}, step)


def migrate(database: Database) -> None:
    """Make or bring up to date the engine's tables; of processes that start at once, one does it at a time.

    The engine has a lock of its own, but goes on without it after half a minute. Raises `DatabaseUnavailable`.
    """
    logging.getLogger("dbos").setLevel(logging.WARNING)
    if database.engine.dialect.name != "postgresql":
        _answering(partial(DBOS.migrate, _url(database), schema=SCHEMA))  # in one transaction that others wait for
        return
    # Asked for again and again instead of waited for: the engine builds indexes concurrently, and that waits for every
    # statement that runs, also for one that waits for this lock.
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        deadline = time.monotonic() + MIGRATION_WAIT_S
        while not connection.scalar(text("SELECT pg_try_advisory_lock(:lock)"), {"lock": MIGRATION_LOCK}):
            if time.monotonic() > deadline:
                raise DatabaseUnavailable(f"another process has been migrating for {MIGRATION_WAIT_S} s")
            time.sleep(0.5)
        try:
            _answering(partial(DBOS.migrate, _url(database), schema=SCHEMA))
        finally:
            connection.execute(text("SELECT pg_advisory_unlock(:lock)"), {"lock": MIGRATION_LOCK})


def _engine_options(database: Database) -> dict[str, Any] | None:
    """That a server whose machine vanished is noticed, on the engine's own connections, too."""
    if database.engine.dialect.name != "postgresql":
        return None
    return {"connect_args": {**PATIENCE, "application_name": APPLICATION}}


def _url(database: Database) -> str:
    return database.engine.url.render_as_string(hide_password=False)


def _answering(ask: Callable[[], Result]) -> Result:
    """Raises `DatabaseUnavailable` for the driver's errors, and for the engine's words for them."""
    try:
        return ask()
    except (DBAPIError, dbos_errors.DBOSException) as error:
        words = str(error.orig) if isinstance(error, DBAPIError) else str(error)
        raise DatabaseUnavailable(f"the job queue failed: {words.strip().splitlines()[0]}") from error
