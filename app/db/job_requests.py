"""SQL over the requests of jobs that have not ended."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.jobs import ENDED
from app.db.tables import JobRow


class OpenRequests:
    """Requests of jobs that have not ended."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def naming(self, name: str, kinds: Sequence[str]) -> str | None:
        """The id of the oldest job of these kinds that will make something called `name`, if there is one."""
        return self._session.scalar(
            select(JobRow.id)
            .where(
                JobRow.kind.in_(kinds), JobRow.state.not_in(tuple(ENDED)), JobRow.request["name"].as_string() == name
            )
            .order_by(JobRow.created_at)
            .limit(1)
        )
