"""What a step of a job is given: its request, a folder, and the ways to tell the world how it goes.

Everything that leaves a step is fenced: once another worker has taken the job over, `report`, `log` and `keep_file`
raise `JobGivenUp` and change nothing.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import structlog

from app.db.jobs import JobRows
from app.db.session import Database
from app.errors import DatabaseUnavailable, JobCancelled, StorageUnavailable
from app.redaction import redact
from app.services.registry import Registry
from app.services.stored import put_and_name, require_stored
from app.settings import Settings
from app.storage.port import CHUNK_BYTES, ObjectStore, content_key, fetch_to
from app.worker.child import run_child
from app.worker.file_tree import sha256_of

WRITE_EVERY_S = 1.0  # progress and log lines are gathered this long: they are events for people
LOOK_EVERY_S = 1.0  # how often a step asks whether it is still wanted
MAX_PENDING = 2000
MAX_LOG_CHARACTERS = 4000
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_log = structlog.get_logger(__name__)


class JobGivenUp(BaseException):
    """The worker no longer works on the job: another has taken it over, or this one stops.

    No `Exception`, so that no step handles it as a failure of its own. Nothing more may be written about the job.
    """


@dataclass
class StepContext:
    """One job on one worker. A step may use everything here that has no underscore.

    outputs: what earlier steps returned, by step name. folder: scratch of this job on this worker, kept between its
    steps on one worker and empty on another; outside of it nothing may be written.
    """

    job_id: str
    request: dict[str, Any]
    outputs: dict[str, Any]
    folder: Path
    settings: Settings
    database: Database
    store: ObjectStore
    registry: Registry
    executor: str | None = None
    stopping: Event = field(default_factory=Event)
    _progress: dict[str, Any] = field(default_factory=dict)
    _pending: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    _written_at: float = 0.0
    _looked_at: float = 0.0

    def report(self, **progress: Any) -> None:
        """Add JSON values to the job's progress; about once a second they are written, and told as an event.

        Numbers that are not finite become null. Raises `JobGivenUp`.
        """
        self._progress |= {name: json_values(value) for name, value in progress.items()}
        self._pending = [entry for entry in self._pending if entry[0] != "progress"]
        self._pending.append(("progress", dict(self._progress)))
        self._write_if_due()

    def log(self, text: str) -> None:
        """Add to the job's log, without what looks like a secret. Raises `JobGivenUp`."""
        # Before it is cut, or half a secret would be none; PostgreSQL's text takes no NUL.
        clean = redact(text.replace("\x00", "").rstrip())[:MAX_LOG_CHARACTERS]
        self._pending = [*self._pending, ("log", {"text": clean})][-MAX_PENDING:]
        self._write_if_due()

    def flush(self) -> None:
        """Write what `report` and `log` have gathered. A database that does not answer just now gets it later.

        Raises `JobGivenUp`.
        """
        if not self._pending:
            return
        self._written_at = time.monotonic()
        try:
            with self.database.transaction() as session:
                held = JobRows(session).progress(self.job_id, self.executor, self._pending)
        except DatabaseUnavailable as error:
            _log.warning("progress is written later", job=self.job_id, reason=str(error))
            return
        if not held:
            raise JobGivenUp(self.job_id)
        self._pending.clear()

    def check_cancelled(self) -> None:
        """Cheap enough for every pass of a loop. Raises `JobCancelled`, or `JobGivenUp`."""
        if self.stopping.is_set():
            raise JobGivenUp(self.job_id)
        if time.monotonic() - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = time.monotonic()
        try:
            with self.database.transaction() as session:
                hold = JobRows(session).hold(self.job_id)
        except DatabaseUnavailable:
            return  # nobody can cancel it, or take it over, either
        if hold is None or hold.executor != self.executor:
            raise JobGivenUp(self.job_id)
        if hold.cancel_requested:
            raise JobCancelled(self.job_id)

    def keep_file(self, path: Path, name: str) -> str:
        """Keep a file with the job, in the object store, instead of an older one of that name; returns its sha256.

        `name`: up to 128 letters, digits, '.', '_' and '-'. Raises `StorageUnavailable`, `DatabaseUnavailable`,
        `OSError` and `JobGivenUp`.
        """
        if _FILE_NAME.fullmatch(name) is None:
            raise ValueError(f"'{name}' is no name for a job's file: use letters, digits, '.', '_' and '-'")
        sha256, size = sha256_of(path), path.stat().st_size

        def name_it() -> bool:
            with self.database.transaction() as session:
                held = JobRows(session).keep_file(self.job_id, self.executor, name, sha256, size)
                if held:
                    require_stored(session, self.store, sha256)
                return held

        if not put_and_name(lambda: self.store.put(content_key(sha256), _chunks(path), sha256), name_it):
            raise JobGivenUp(self.job_id)
        return sha256

    def fetch_file(self, name: str, path: Path) -> bool:
        """Put a kept file at `path`; False when the job keeps none of that name.

        Raises `StorageError`, `DatabaseUnavailable` and `OSError`; `path` then is as it was.
        """
        with self.database.transaction() as session:
            row = JobRows(session).file(self.job_id, name)
        if row is None:
            return False
        fetch_to(self.store, row.sha256, path)
        return True

    def drop_files(self, names: Collection[str] | None = None) -> None:
        """Keep these files no longer; `None`: none of the job's. Raises `DatabaseUnavailable` and `JobGivenUp`."""
        with self.database.transaction() as session:
            held = JobRows(session).drop_files(self.job_id, self.executor, names)
        if not held:
            raise JobGivenUp(self.job_id)

    def run_child(
        self,
        command: Sequence[str],
        *,
        on_line: Callable[[str], None],
        every_s: float = 5,
        tick: Callable[[], None] | None = None,
        cwd: Path | None = None,
    ) -> None:
        """Run a program until it ends; see `app.worker.child`. Each line it writes goes to `on_line`.

        tick: called every `every_s` seconds and once after the end, however that came about: the place to keep a
        checkpoint. That a store or database does not answer it is logged, and tried again at the next.
        Raises `ChildFailed`, `JobCancelled` and `JobGivenUp`; then the program and all it started are gone.
        """

        def keep() -> None:
            try:
                if tick is not None:
                    tick()
            except (StorageUnavailable, DatabaseUnavailable) as error:
                _log.warning("a checkpoint could not be kept, trying again", job=self.job_id, reason=str(error))
                self.log("a checkpoint could not be kept just now; it is tried again")

        def look() -> None:
            self.check_cancelled()
            self._write_if_due()

        run_child(
            command,
            folder=self.folder if cwd is None else cwd,
            on_line=on_line,
            look=look,
            tick=keep,
            every_s=every_s,
            grace_s=self.settings.child_grace_s,
        )

    def _write_if_due(self) -> None:
        if time.monotonic() - self._written_at >= WRITE_EVERY_S:
            self.flush()


def json_values(value: Any) -> Any:
    """The value as JSON can hold it: numbers that are not finite become null. Raises `TypeError` for what it cannot."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): json_values(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_values(entry) for entry in value]
    if value is None or isinstance(value, (str, int)):
        return value
    raise TypeError(f"a step's report or result holds a {type(value).__name__}, which JSON cannot")


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as source:
        while chunk := source.read(CHUNK_BYTES):
            yield chunk
