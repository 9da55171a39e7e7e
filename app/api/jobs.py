"""Jobs: ask for one, follow it, stop it.

An event stream reads rows, so any server can carry on where another left off: the id of an event is the id of its row.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import datetime
from itertools import chain
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Path, Query
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, ConfigDict, Field

from app.api.auth import Admin
from app.api.deps import TheJobRequests, TheJobs, TheKeys
from app.api.negotiation import require_json
from app.api.paging import PageSize, PageToken, decoded, encoded
from app.api.problems import documented
from app.api.schemas import RequestSchema
from app.db.jobs import State
from app.db.tables import JobEventRow, JobFileRow, JobRow
from app.errors import DatabaseUnavailable, UnknownJob
from app.services.job_requests import CalibrateIn, CompressIn, EvaluateIn, FinetuneIn, FuseIn, RefineIn
from app.services.jobs import MAX_PRIORITY, JobPage
from app.services.keys import CACHE_S

router = APIRouter(tags=["jobs"])
POLL_S = 0.5  # between looks for new events: two queries by primary key and index
RECONNECT_MS = 2000
JobId = Annotated[str, Path(max_length=64, description="id of a job")]
FileName = Annotated[str, Path(max_length=128, description="name of a file that the job keeps")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=128,
        pattern=r"^[\x21-\x7e]+$",
        description="of your choice, one per job: sending the request again then gives the same job, not another",
    ),
]
LastEventId = Annotated[
    int | None, Header(ge=0, le=2**63 - 1, description="go on behind this event; browsers send it by themselves")
]
_LOCATION = {"Location": {"description": "the job", "schema": {"type": "string"}}}


class _JobIn(RequestSchema):
    priority: Annotated[
        int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="jobs of higher priority begin first")
    ] = 0


class RefineJobIn(_JobIn):
    """A teacher becomes a chain."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "kind": "refine",
                    "request": {
                        "name": "market-chain",
                        "teacher": "market-r50",
                        "dataset": "market",
                        "preset": "paper",
                    },
                }
            ]
        }
    )

    kind: Literal["refine"]
    request: RefineIn


class CalibrateJobIn(_JobIn):
    """Statistics of every width, measured anew."""

    kind: Literal["calibrate"]
    request: CalibrateIn


class EvaluateJobIn(_JobIn):
    """Accuracy of a chain or of a teacher."""

    kind: Literal["evaluate"]
    request: EvaluateIn


class FinetuneJobIn(_JobIn):
    """One student, trained on a data set."""

    kind: Literal["finetune"]
    request: FinetuneIn


class CompressJobIn(_JobIn):
    """One network for one target."""

    kind: Literal["compress"]
    request: CompressIn


class FuseJobIn(_JobIn):
    """Teachers become one that a chain can be made of."""

    kind: Literal["fuse"]
    request: FuseIn


JobIn = Annotated[
    RefineJobIn | CalibrateJobIn | EvaluateJobIn | FinetuneJobIn | CompressJobIn | FuseJobIn,
    Field(discriminator="kind"),
]


class JobOut(BaseModel):
    """A job. `failed` can be tried again, from the step that failed."""

    id: str
    kind: Annotated[str, Field(description="as asked for, or `check-teacher`, `check-dataset` of an upload")]
    state: State
    priority: int
    request: Annotated[dict[str, Any], Field(description="as it will be done: defaults spelt out, chains by name")]
    step: Annotated[str | None, Field(description="the step it is in, or was in last")]
    progress: Annotated[dict[str, Any] | None, Field(description="what that step last reported")]
    result: Annotated[dict[str, Any] | None, Field(description="what the last step made of it all")]
    error: Annotated[str | None, Field(description="why it failed")]
    attempts: Annotated[int, Field(description="workers that began it; more than one: the others died")]
    cancel_requested: bool
    created_by: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    updated_at: datetime
    events: Annotated[str, Field(description="where its events are streamed")]

    @classmethod
    def of(cls, row: JobRow) -> JobOut:
        fields = {name: getattr(row, name) for name in cls.model_fields.keys() - {"events"}}
        return cls(**fields, events=f"/jobs/{row.id}/events")


class JobsOut(BaseModel):
    """A page of jobs, newest first."""

    jobs: list[JobOut]
    next_page_token: str | None

    @classmethod
    def of(cls, page: JobPage) -> JobsOut:
        return cls(jobs=[JobOut.of(row) for row in page.jobs], next_page_token=encoded(page.continue_after))


class JobFileOut(BaseModel):
    """A file that a job keeps."""

    name: str
    size_bytes: int
    sha256: str
    updated_at: datetime
    content: Annotated[str, Field(description="where the bytes are")]

    @classmethod
    def of(cls, row: JobFileRow) -> JobFileOut:
        fields = {name: getattr(row, name) for name in cls.model_fields.keys() - {"content"}}
        return cls(**fields, content=f"/jobs/{row.job}/files/{row.name}")


class JobFilesOut(BaseModel):
    """What a job keeps, by name: checkpoints while it runs, results after."""

    files: list[JobFileOut]


@router.post(
    "/jobs",
    summary="Ask for a job",
    status_code=202,
    response_model=JobOut,
    responses={
        200: {"model": JobOut, "description": "asked for before, with this key", "headers": _LOCATION},
        202: {"headers": _LOCATION},
        **documented(400, 404, 409, 415, 422, 500, 503),
    },
    dependencies=[Depends(require_json)],
)
def post_job(
    body: JobIn, jobs: TheJobs, requests: TheJobRequests, by: Admin, idempotency_key: IdempotencyKey = None
) -> JSONResponse:
    """It waits for a worker. With an `Idempotency-Key` the request can be sent again without harm."""
    row, is_new = jobs.submit(
        body.kind,
        body.request.model_dump(mode="json"),
        by,
        priority=body.priority,
        idempotency_key=idempotency_key,
        check=lambda session: requests.check_in(session, body.request).model_dump(mode="json"),
    )
    content = JobOut.of(row).model_dump(mode="json")
    return JSONResponse(content, 202 if is_new else 200, {"location": f"/jobs/{row.id}"})


@router.get("/jobs", summary="Jobs", responses=documented(422, 500, 503))
def list_jobs(
    jobs: TheJobs,
    _: Admin,
    state: Annotated[list[State] | None, Query(max_length=5, description="only these")] = None,
    kind: Annotated[
        list[Annotated[str, Field(pattern="^[a-z-]{1,32}$")]] | None, Query(max_length=16, description="only these")
    ] = None,
    page_size: PageSize = 20,
    page_token: PageToken = None,
) -> JobsOut:
    """Newest first, a page at a time."""
    return JobsOut.of(jobs.page(decoded(page_token), page_size, state or (), kind or ()))


@router.get("/jobs/{job_id}", summary="One job", responses=documented(404, 422, 500, 503))
def get_job(job_id: JobId, jobs: TheJobs, _: Admin) -> JobOut:
    """State, step, progress, result."""
    return JobOut.of(jobs.find(job_id))


def _existing(job_id: JobId, jobs: TheJobs, _: Admin) -> str:
    """Looked up before the stream begins: afterwards no other status can be answered."""
    return jobs.find(job_id).id


@router.get(
    "/jobs/{job_id}/events",
    summary="Follow a job",
    response_class=EventSourceResponse,
    responses=documented(404, 422, 500, 503),
)
async def follow_job(
    job_id: Annotated[str, Depends(_existing)],
    jobs: TheJobs,
    keys: TheKeys,
    by: Admin,
    last_event_id: LastEventId = None,
) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events: `state`, `step`, `progress`, `log`, `cancel`. Ends after the event that ends the job, and
    when the key that asked no longer works.

    After a cut connection `Last-Event-ID` goes on without a gap, also on another server.
    """
    yield ServerSentEvent(retry=RECONNECT_MS, comment=f"events of job {job_id}")
    after, is_over = last_event_id or 0, False
    admitted_at = time.monotonic()
    while not is_over:
        try:
            if time.monotonic() - admitted_at >= CACHE_S:
                if not await asyncio.to_thread(keys.still_admits, by):
                    return
                admitted_at = time.monotonic()
            events, is_over = await asyncio.to_thread(jobs.events, job_id, after)
        except DatabaseUnavailable:
            events = ()
        except UnknownJob:  # deleted meanwhile
            return
        for event in events:
            yield _sent(event)
            after = event.id
        if not events and not is_over:
            await asyncio.sleep(POLL_S)


@router.get(
    "/jobs/{job_id}/log",
    summary="A job's log",
    response_class=PlainTextResponse,
    responses=documented(404, 422, 500, 503),
)
def get_log(job_id: JobId, jobs: TheJobs, _: Admin) -> Response:
    """What its steps logged so far, a line each, with the time in UTC."""
    return StreamingResponse(jobs.log(job_id), media_type="text/plain; charset=utf-8")


@router.get("/jobs/{job_id}/files", summary="Files of a job", responses=documented(404, 422, 500, 503))
def list_files(job_id: JobId, jobs: TheJobs, _: Admin) -> JobFilesOut:
    """In order of name."""
    return JobFilesOut(files=[JobFileOut.of(row) for row in jobs.files(job_id)])


@router.get(
    "/jobs/{job_id}/files/{name}",
    summary="A file of a job",
    response_class=Response,
    responses={
        200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
        **documented(404, 422, 500, 503),
    },
)
def get_file(job_id: JobId, name: FileName, jobs: TheJobs, _: Admin) -> Response:
    """Its bytes. A checkpoint of a running job is replaced now and then; the entity tag tells."""
    file = jobs.file(job_id, name)
    chunks = jobs.content(file)
    first = next(chunks, b"")  # a store that does not answer is told as such, not as a cut connection
    headers = {
        "content-length": str(file.size_bytes),
        "content-disposition": f'attachment; filename="{file.name}"',
        "etag": f'"{file.sha256}"',
    }
    return StreamingResponse(chain([first], chunks), headers=headers, media_type="application/octet-stream")


@router.post(
    "/jobs/{job_id}/cancel", summary="Cancel a job", status_code=202, responses=documented(404, 409, 422, 500, 503)
)
def cancel_job(job_id: JobId, jobs: TheJobs, by: Admin) -> JobOut:
    """A queued job ends now, a running one within seconds, also in the middle of a training step."""
    return JobOut.of(jobs.cancel(job_id, by))


@router.post(
    "/jobs/{job_id}/retry",
    summary="Try a failed job again",
    status_code=202,
    responses=documented(404, 409, 422, 500, 503),
)
def retry_job(job_id: JobId, jobs: TheJobs, by: Admin) -> JobOut:
    """It goes on at the step that failed; what the steps before it made is kept."""
    return JobOut.of(jobs.retry(job_id, by))


def _sent(event: JobEventRow) -> ServerSentEvent:
    at = event.at.isoformat(timespec="milliseconds")
    return ServerSentEvent(id=str(event.id), event=event.kind, data={"at": at, **event.data})
