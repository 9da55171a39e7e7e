"""What Prometheus is told of the whole service, next to what this process counted itself.

Jobs and workers are read from the database at the moment of the scrape, so every API process tells the same of them;
take the largest, not the sum. When the database is away those series are missing and `widthwise_database_up` is 0: a
scrape never fails for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from threading import Lock

from app.db.jobs import STATES
from app.db.session import Database
from app.db.stats import JobCount, Stats
from app.errors import DatabaseUnavailable
from app.metrics import Metrics, Values
from app.services.registry import Registry


@dataclass(frozen=True)
class _Seen:
    """The tables as one transaction saw them; `executors_alive` is `None` when it could not."""

    at: datetime
    jobs: tuple[JobCount, ...] = ()
    executors_alive: int | None = None


class Monitor:
    """Answers scrapes. alive_s: a worker whose last sign of life is older counts as dead."""

    def __init__(self, database: Database, registry: Registry, metrics: Metrics, alive_s: float) -> None:
        self._database = database
        self._metrics = metrics
        self._alive = timedelta(seconds=alive_s)
        self._scraping = Lock()
        self._seen = _Seen(datetime.now(UTC))
        metrics.count(
            "widthwise.chain.cache.hits", "Chains that were in memory when asked for.", _of(lambda: registry.cache.hits)
        )
        metrics.count("widthwise.chain.cache.misses", "Chains that had to be read.", _of(lambda: registry.cache.misses))
        metrics.observe("widthwise.database.up", "1 when the last scrape could read the database.", self._database_up)
        metrics.observe("widthwise.jobs", "Jobs by kind and state.", self._jobs)
        metrics.observe(
            "widthwise.jobs.oldest.queued.age", "Age of the oldest job still queued; 0 without one.", self._ages, "s"
        )
        metrics.observe("widthwise.executors.alive", "Workers that gave a sign of life lately.", self._executors)

    def scrape(self) -> bytes:
        """Everything, in Prometheus' text format."""
        with self._scraping:
            self._seen = self._look()
            return self._metrics.render()

    def _look(self) -> _Seen:
        now = datetime.now(UTC)
        try:
            with self._database.transaction() as session:
                stats = Stats(session)
                return _Seen(now, tuple(stats.jobs()), stats.executors_alive(now - self._alive))
        except DatabaseUnavailable:
            return _Seen(now)

    def _database_up(self) -> Values:
        return [(int(self._seen.executors_alive is not None), {})]

    def _jobs(self) -> Values:
        """Zeros too, for every kind that some job has: a series that comes and goes cannot be alerted on."""
        found = {(row.kind, row.state): row.jobs for row in self._seen.jobs}
        for kind in self._kinds():
            for state in STATES:
                yield found.get((kind, state), 0), {"kind": kind, "state": state}

    def _ages(self) -> Values:
        oldest = {row.kind: row.oldest for row in self._seen.jobs if row.state == "queued"}
        for kind in self._kinds():
            age = (self._seen.at - oldest[kind]).total_seconds() if kind in oldest else 0.0
            yield max(0.0, age), {"kind": kind}

    def _executors(self) -> Values:
        alive = self._seen.executors_alive
        return [] if alive is None else [(alive, {})]

    def _kinds(self) -> Iterator[str]:
        yield from dict.fromkeys(row.kind for row in self._seen.jobs)


def _of(read: Callable[[], int]) -> Callable[[], Values]:
    return lambda: [(read(), {})]
