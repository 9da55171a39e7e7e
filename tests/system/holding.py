"""A job looked at, and held, where it is kept, so that a fault hits the step it is meant for on fast and slow machines.

Reading a job through the API tells what it was doing a moment ago. Here its row is locked while a fault is dealt: no
step begins or ends without a change of that row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg

STEPS = ("cluster", "refine", "calibrate", "evaluate", "verify", "publish")
ENDED = ("succeeded", "failed", "cancelled")
PUBLISHING = """
    SELECT count(*) FROM pg_locks WHERE relation = 'chains'::regclass AND mode = 'RowExclusiveLock' AND NOT granted
"""


@dataclass(frozen=True)
class Held:
    """A job at one moment. step: the one that has begun and not ended, of a running job; `None` in between. last: the
    one that began last. training_step: how far the training has told that it is."""

    state: str
    step: str | None
    last: str | None
    training_step: int
    executor: str | None

    @property
    def pid(self) -> int | None:
        """The process that has the job."""
        return int(self.executor.split(".")[2]) if self.executor else None

    def is_past(self, step: str) -> bool:
        """Whether that step is over, for good."""
        return self.state in ENDED or (self.last is not None and STEPS.index(self.last) > STEPS.index(step))


@contextmanager
def held(url: str, job: str) -> Iterator[Held]:
    """The job as it is, and stays until the end of the block: whoever wants to write its row waits for us."""
    with psycopg.connect(url) as connection:
        row = connection.execute(
            "SELECT state, step, progress, executor FROM jobs WHERE id = %s FOR UPDATE", (job,)
        ).fetchone()
        assert row is not None
        state, last, progress, executor = row
        told = [data for kind, data in _events(connection, job) if kind == "step"]
        begun = bool(told) and told[-1]["state"] == "started" and state == "running"
        yield Held(state, last if begun else None, last, (progress or {}).get("step", 0), executor)


def events(url: str, job: str) -> list[tuple[str, dict[str, Any]]]:
    """(kind, data) of every event so far. The API's stream of a job that has not ended has no end either."""
    with psycopg.connect(url) as connection:
        return _events(connection, job)


def _events(connection: psycopg.Connection[Any], job: str) -> list[tuple[str, dict[str, Any]]]:
    return connection.execute("SELECT kind, data FROM job_events WHERE job = %s ORDER BY id", (job,)).fetchall()


@contextmanager
def publishing_held(url: str) -> Iterator[Callable[[], bool]]:
    """No chain gets published until the end of the block; what is called tells whether somebody waits to do so. Chains
    can be read, and jobs go on up to that step: nothing else writes to the table."""
    with psycopg.connect(url) as holder, psycopg.connect(url, autocommit=True) as watcher:
        holder.execute("LOCK TABLE chains IN SHARE MODE")
        yield lambda: _count(watcher, PUBLISHING) > 0


def published(url: str, chain: str) -> int:
    """How often the chain was published, by the audit trail, which is written in the same transaction."""
    with psycopg.connect(url, autocommit=True) as connection:
        return _count(connection, "SELECT count(*) FROM audit WHERE action = 'chain.publish' AND target = %s", (chain,))


def _count(connection: psycopg.Connection[Any], query: str, values: tuple[str, ...] = ()) -> int:
    row = connection.execute(query, values).fetchone()
    assert row is not None
    return int(row[0])
