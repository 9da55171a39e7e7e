"""The audit trail: what admins did, newest first."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from app.api.auth import Admin
from app.api.deps import TheTrail
from app.api.paging import PageSize, PageToken, decoded_id, encoded
from app.api.problems import documented
from app.services.trail import TrailPage

router = APIRouter(tags=["audit"])


class EntryOut(BaseModel):
    """One deed, written in the transaction that did it."""

    id: int
    at: datetime
    actor: Annotated[
        str,
        Field(description="id of an API key, or `anonymous`, `admin-key`, `command-line`, `worker`"),
    ]
    action: Annotated[str, Field(description="a noun and a verb", examples=["key.create"])]
    target: str
    detail: dict[str, Any]
    request_id: str | None


class AuditOut(BaseModel):
    """A page of the trail. `next_page_token` is null on the last page."""

    entries: list[EntryOut]
    next_page_token: str | None

    @classmethod
    def of(cls, page: TrailPage) -> AuditOut:
        entries = [EntryOut.model_validate(row, from_attributes=True) for row in page.entries]
        token = None if page.continue_before is None else str(page.continue_before)
        return cls(entries=entries, next_page_token=encoded(token))


@router.get("/audit", summary="What admins did", responses=documented(422, 500, 503))
def list_audit(trail: TheTrail, _: Admin, page_size: PageSize = 20, page_token: PageToken = None) -> AuditOut:
    """Newest first, a page at a time. Nothing of this service changes or deletes an entry."""
    return AuditOut.of(trail.page(decoded_id(page_token), page_size))
