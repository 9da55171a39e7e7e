"""A worker: the engine, its signs of life, and an end in good order."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import structlog

from app.db.jobs import JobRows
from app.db.session import Database
from app.errors import AppError, DatabaseUnavailable
from app.metrics import JobMetrics, Metrics, serve_metrics
from app.services.garbage import Garbage
from app.services.registry import Registry
from app.settings import Settings
from app.storage.port import ObjectStore
from app.worker.context import JobGivenUp
from app.worker.engine import Engine, QueueClient, run_step
from app.worker.housekeeping import Housekeeping
from app.worker.identity import is_surely_gone, new_executor_id
from app.worker.kinds import KINDS, Kind
from app.worker.leases import Leases
from app.worker.runner import Runner, Surroundings

LAST_WORDS_S = 5  # on top of the children's own: what a step may still need to end
_log = structlog.get_logger(__name__)


class Worker:
    """Takes jobs until it is told to stop. One that others have declared dead lets go of everything and begins anew,
    under another id.

    `run` blocks; `stop` may be called from another thread or a signal handler.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        store: ObjectStore,
        registry: Registry,
        garbage: Garbage,
        kinds: Mapping[str, Kind] | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._settings = settings
        self._database = database
        self._store = store
        self._registry = registry
        self._housekeeping = Housekeeping(settings, database, garbage)
        self._kinds = KINDS if kinds is None else kinds
        self._metrics = Metrics() if metrics is None else metrics
        self._counted = JobMetrics(self._metrics)
        self._ending = threading.Event()

    def run(self) -> None:
        """Until `stop`. Raises `DatabaseUnavailable` when the first start fails; later it waits for the database."""
        _remove_leftovers(self._settings.work)
        with showing(self._metrics, self._settings):
            self._life().live()
            while not self._ending.is_set():
                try:
                    self._life().live()
                except AppError as error:
                    _log.warning("the worker cannot begin again yet", reason=str(error))
                    self._ending.wait(self._settings.heartbeat_s)

    def _life(self) -> Life:
        return Life(
            self._settings,
            self._database,
            self._store,
            self._registry,
            self._housekeeping,
            self._kinds,
            self._ending,
            self._counted,
        )

    def stop(self) -> None:
        self._ending.set()


class EmbeddedWorker:
    """A worker in a thread of the server's process."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ask it to end; returns at once."""
        self._worker.stop()

    def join(self) -> None:
        """Wait until it has given its jobs back."""
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            self._worker.run()
        except Exception:
            _log.exception("the worker in this server has ended; jobs wait until the server is started again")


class Life:
    """A worker under one executor id, from its registration to its end."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        store: ObjectStore,
        registry: Registry,
        housekeeping: Housekeeping,
        kinds: Mapping[str, Kind],
        ending: threading.Event,
        counted: JobMetrics,
    ) -> None:
        self._settings = settings
        self._database = database
        self._housekeeping = housekeeping
        self._ending = ending
        self._executor = new_executor_id()
        self._let_go = threading.Event()
        self._lost = False
        self._running: set[str] = set()
        self._queue = QueueClient(database)
        self._leases = Leases(database, self._queue, self._executor, settings.lease_s)
        folder = settings.work / self._executor
        around = Surroundings(settings, database, store, registry, self._executor, folder, self._let_go, counted)
        self._folder = folder
        self._runner = Runner(around, kinds, run_step)

    def live(self) -> None:
        """Take jobs until the worker must end or was declared dead."""
        settings = self._settings
        engine = Engine(
            self._database, self._executor, self._run, slots=settings.worker_slots, poll_s=settings.queue_poll_s
        )
        try:
            self._leases.register()
            engine.start()
            threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
            # Not between two signs of life: a collection may take longer than the lease.
            keep_house, until = self._housekeeping.run, (self._let_go,)
            threading.Thread(target=keep_house, args=until, name="housekeeping", daemon=True).start()
            _log.info("worker takes jobs", worker=self._executor, slots=settings.worker_slots)
            while not self._ending.wait(0.1) and not self._lost:
                pass
        finally:
            self._finish(engine)

    def _finish(self, engine: Engine) -> None:
        self._let_go.set()
        engine.stop(round(self._settings.child_grace_s + LAST_WORDS_S) if self._running else 0)
        try:
            self._leases.stop()
        except DatabaseUnavailable as error:
            _log.warning("the others will notice by themselves that this worker stopped", reason=str(error))
        shutil.rmtree(self._folder, ignore_errors=True)
        _log.info("worker stopped", worker=self._executor, declared_dead=self._lost)

    def _run(self, job_id: str) -> None:
        self._running.add(job_id)
        try:
            self._runner.run(job_id)
        except JobGivenUp:
            self._give_back(job_id, counted=False)
            raise
        except Exception:
            # A mistake of ours outside any step. The engine must not record it as the job's end: it is not in our row.
            _log.exception("a job was dropped", job=job_id)
            self._give_back(job_id, counted=True)
            raise JobGivenUp(job_id) from None
        finally:
            self._running.discard(job_id)

    def _give_back(self, job_id: str, *, counted: bool) -> None:
        """So that another worker goes on at once; only a job that is still ours. Dying halfway is found by others."""
        if self._lost:
            return
        try:
            with self._database.transaction() as session:
                reason = f"worker {self._executor} stops"
                rows = JobRows(session)
                rows.release(job_id, self._executor, reason, counted=counted)
                job = rows.find(job_id)
            if job is not None and job.state == "queued":  # also one that we had not begun yet
                self._queue.resume(job_id)
                _log.info("job given back", job=job_id)
        except Exception as error:  # also a mistake of ours must not reach the engine
            _log.warning("a job could not be given back; it is taken over later", job=job_id, reason=repr(error))

    def _look_after_own(self) -> None:
        """Give back what is ours by the books and runs nowhere: the database was away when it was to be given back."""
        with self._database.transaction() as session:
            held = JobRows(session).held_by(self._executor)
        for job_id in held:
            if job_id not in self._running:
                self._give_back(job_id, counted=True)

    def _beat(self) -> None:
        """Signs of life, and a look at the others, until this life ends."""
        settings = self._settings
        while not self._let_go.wait(settings.heartbeat_s):
            try:
                if not self._leases.beat():
                    _log.error("others took this worker for dead; it lets go of its jobs", worker=self._executor)
                    self._lost = True
                    self._let_go.set()
                    return
                self._leases.look_after_others()
                self._look_after_own()
            except DatabaseUnavailable as error:
                _log.warning("no sign of life could be given", reason=str(error))
            except Exception:
                _log.exception("a mistake in looking after the other workers")


@contextmanager
def showing(metrics: Metrics, settings: Settings) -> Iterator[None]:
    """Metrics on the port of the settings, if they name one. Raises `OSError` when it is taken."""
    if settings.worker_metrics_port is None:
        yield
        return
    server = serve_metrics(metrics, settings.host, settings.worker_metrics_port)
    _log.info("metrics", host=settings.host, port=server.server_port)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def _remove_leftovers(work: Path) -> None:
    """Folders of workers of this machine that are gone; a killed one cannot clean up after itself."""
    if not work.is_dir():
        return
    for folder in work.iterdir():
        if folder.name.count(".") == 3 and is_surely_gone(folder.name, ""):
            shutil.rmtree(folder, ignore_errors=True)
            _log.info("removed what a dead worker left", folder=folder.name)
