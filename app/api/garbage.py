"""Garbage collection on demand."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field

from app.api.auth import Admin
from app.api.deps import TheGarbage
from app.api.negotiation import require_json
from app.api.problems import documented
from app.api.schemas import RequestSchema
from app.services.garbage import Collected
from app.storage.port import ObjectStat

router = APIRouter(tags=["operations"])
MAX_LISTED = 1000


class CollectionIn(RequestSchema):
    """Collect, or only look."""

    dry_run: Annotated[bool, Field(description="true: say what would go, and delete nothing")]


class ObjectOut(BaseModel):
    """An object that no row names."""

    key: str
    size_bytes: int
    modified_at: datetime

    @classmethod
    def of(cls, found: ObjectStat) -> ObjectOut:
        return cls.model_validate(found, from_attributes=True)


class CollectionOut(BaseModel):
    """What went, or, of a dry run, what would have."""

    dry_run: bool
    object_count: int
    size_bytes: Annotated[int, Field(description="of all these objects")]
    objects: Annotated[list[ObjectOut], Field(description=f"the first {MAX_LISTED}")]
    drafts: Annotated[int, Field(description="leavings of writers that were killed")]
    rows: Annotated[
        dict[str, int],
        Field(description="old rows by kind; a dry run knows those of jobs and workers only"),
    ]

    @classmethod
    def of(cls, collected: Collected) -> CollectionOut:
        return cls(
            dry_run=collected.dry_run,
            object_count=len(collected.objects),
            size_bytes=collected.size_bytes,
            objects=[ObjectOut.of(found) for found in collected.objects[:MAX_LISTED]],
            drafts=collected.drafts,
            rows=dict(collected.rows),
        )


@router.post(
    "/garbage-collection",
    summary="Delete what nothing needs any more",
    dependencies=[Depends(require_json)],
    responses=documented(400, 415, 422, 500, 503),
)
def collect_garbage(body: CollectionIn, garbage: TheGarbage, by: Admin) -> CollectionOut:
    """Takes as long as it takes to list the object store; a worker does it by itself once a day."""
    return CollectionOut.of(garbage.collect(by, dry_run=body.dry_run))
