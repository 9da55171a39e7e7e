"""Garbage collection: objects that no row names go, after a grace time, and so do rows whose time is over.

Whoever stores something puts the object first and records it afterwards, so an object without a row may be one that is
about to get one. Three things keep it from being collected just then:

- An object younger than the grace time stays, and putting one that was there already begins its age anew.
- Objects are deleted a few at a time while no row can come to name one (`References.freeze`): one that is named by then
  stays, one that was put anew by then is young, and whoever records later waits until the lock is gone.
- Who records an object looks for it once more, after its row is written and in the same transaction
  (`app.services.stored`). A file that was deleted just between its put and its row is then put again, and no row ever
  names it in vain.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta

import structlog

from app.actor import Actor
from app.db.audit import Audit
from app.db.references import Dropped, Leftovers, References
from app.db.session import Database
from app.errors import DatabaseUnavailable, InvalidKey, ObjectNotFound
from app.storage.port import ObjectStat, ObjectStore, content_key

ACTION = "garbage.collect"
HOLD_S = 2.0  # writers wait no longer than this and one more call of the store
PATIENCE = timedelta(milliseconds=500)
_ATTEMPTS = 20
_PAUSE_S = 0.5
_PREFIX = "sha256/"
Retention = Callable[[datetime], int]  # drops what is too old at that moment, and says how many that were
_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Collected:
    """What went, or, of a dry run, what would have.

    drafts: leavings of writers that were killed. rows: how many by kind; of a dry run those of `Dropped` alone.
    """

    dry_run: bool
    objects: tuple[ObjectStat, ...]
    drafts: int
    rows: Mapping[str, int]

    @property
    def size_bytes(self) -> int:
        return sum(found.size_bytes for found in self.objects)


class _Rehearsed(Exception):
    """Ends the transaction of a dry run, which must leave nothing behind."""


class Garbage:
    """Collects it."""

    def __init__(
        self,
        database: Database,
        store: ObjectStore,
        *,
        grace: timedelta,
        job_retention: timedelta,
        retention: Mapping[str, Retention],
    ) -> None:
        """retention: of other kinds of rows, by the name their number is reported under."""
        self._database = database
        self._store = store
        self._grace = grace
        self._job_retention = job_retention
        self._retention = retention

    def collect(self, by: Actor, *, dry_run: bool = False, grace: timedelta | None = None) -> Collected:
        """Drop old rows, then delete the objects no row names that are at least `grace` old (default: as configured).

        Running twice at once is safe. Raises `StorageError` and `DatabaseUnavailable`; what went until then is in the
        audit trail.
        """
        now = datetime.now(UTC)
        before = now - (self._grace if grace is None else grace)
        if dry_run:
            rows, named = self._rehearse(now)
            found = tuple(self._orphans(named, before))
            return Collected(True, found, self._store.drop_drafts(before, dry_run=True), rows)
        rows, gone = self._drop(now), list[ObjectStat]()
        try:
            self._delete(self._orphans(self._named(), before), before, gone)
            drafts = self._store.drop_drafts(before)
        finally:
            self._audit(by, gone, rows)
        return Collected(False, tuple(gone), drafts, rows)

    def collect_if_due(self, by: Actor, every: timedelta) -> Collected | None:
        """As `collect`, or `None` when somebody did within that time. Of many workers that ask, about one collects."""
        with self._database.transaction() as session:
            last = Leftovers(session).last_audited(ACTION)
        return self.collect(by) if last is None or datetime.now(UTC) - last >= every else None

    def _drop(self, now: datetime) -> dict[str, int]:
        rows = {name: drop(now) for name, drop in self._retention.items()}
        with self._database.transaction() as session:
            return rows | asdict(Leftovers(session).drop(now - self._job_retention))

    def _rehearse(self, now: datetime) -> tuple[dict[str, int], set[str]]:
        """What `_drop` would drop of jobs and workers, and what would still be named after it."""
        dropped, named = Dropped(0, 0, 0), set[str]()
        with suppress(_Rehearsed), self._database.transaction() as session:
            dropped = Leftovers(session).drop(now - self._job_retention)
            named = References(session).digests()
            raise _Rehearsed
        return asdict(dropped), named

    def _named(self) -> set[str]:
        with self._database.transaction() as session:
            return References(session).digests()

    def _orphans(self, named: set[str], before: datetime) -> Iterator[ObjectStat]:
        """The content-addressed objects that are not among the named and were modified before."""
        for key in list(self._store.list(_PREFIX)):
            digest = _digest(key)
            if digest is not None and digest not in named and (found := self._older(key, before)) is not None:
                yield found

    def _older(self, key: str, before: datetime) -> ObjectStat | None:
        try:
            found = self._store.stat(key)
        except ObjectNotFound:
            return None
        return found if found.modified_at <= before else None

    def _delete(self, orphans: Iterator[ObjectStat], before: datetime, gone: list[ObjectStat]) -> None:
        """Delete the orphans that still are some, adding each to `gone`."""
        waiting = list(orphans)
        while waiting:
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    self._delete_some(waiting, before, gone)
                    break
                except DatabaseUnavailable:  # somebody writes; they go first
                    if attempt == _ATTEMPTS:
                        raise
                    time.sleep(_PAUSE_S)

    def _delete_some(self, waiting: list[ObjectStat], before: datetime, gone: list[ObjectStat]) -> None:
        with self._database.transaction() as session:
            references = References(session)
            references.freeze(PATIENCE)
            named = references.digests()
            until = time.monotonic() + HOLD_S
            while waiting and time.monotonic() < until:
                found = waiting.pop()
                if _digest(found.key) not in named and self._older(found.key, before) is not None:
                    self._store.delete(found.key)
                    gone.append(found)

    def _audit(self, by: Actor, gone: list[ObjectStat], rows: Mapping[str, int]) -> None:
        size_bytes = sum(found.size_bytes for found in gone)
        _log.info("garbage collected", objects=len(gone), size_bytes=size_bytes, **rows)
        with self._database.transaction() as session:
            Audit(session).add(by, ACTION, "objects", objects=len(gone), size_bytes=size_bytes, rows=dict(rows))


def _digest(key: str) -> str | None:
    """The digest a content-addressed key stands for; `None` for a key that somebody else made."""
    digest = key.rpartition("/")[2]
    try:
        return digest if content_key(digest) == key else None
    except InvalidKey:
        return None
