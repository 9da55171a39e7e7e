"""The queue as the API sees it: loads the engine when the first job is put in, not when the server starts."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from sqlalchemy.orm import Session

from app.db.session import Database

if TYPE_CHECKING:
    from app.worker.engine import QueueClient


class LazyQueue:
    """`app.services.jobs.JobQueue`, and what workers need of it to move jobs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add_in(self, session: Session, job_id: str, priority: int) -> None:
        self.client.add_in(session, job_id, priority)

    def rewind(self, job_id: str) -> None:
        self.client.rewind(job_id)

    @cached_property
    def client(self) -> QueueClient:
        from app.worker.engine import QueueClient  # a tenth of a second

        return QueueClient(self._database)
