"""Data sets: register one, send its archive, see what the check made of it, delete it with what shows its people."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from app.api.auth import Admin
from app.api.deps import TheDatasets, TheUploads
from app.api.negotiation import require_json
from app.api.paging import PageSize, PageToken, decoded, encoded
from app.api.problems import documented
from app.api.schemas import ONE_LINE, License, NewName, RequestSchema, Sha256
from app.api.uploads import (
    HEAD_RESPONSES,
    PATCH_BODY,
    PATCH_RESPONSES,
    PUT_BODY,
    PUT_RESPONSES,
    UploadOffset,
    answer_head,
    receive_more,
    receive_whole,
)
from app.db.tables import DatasetRow
from app.services.datasets import DatasetPage, NewDataset, Source
from app.terms import ConsentBasis, Rights, Terms
from chains.data.readers.dataset import Boxes, Camera

router = APIRouter(tags=["data sets"])
Name = Annotated[str, Path(description="name of a data set")]
State = Literal["awaiting-archive", "checking", "ready", "refused", "deleted"]
Layout = Literal["auto", "market1501", "cuhk03-np", "msmt17", "viper", "csv", "folder"]  # a test compares with KINDS
_LOCATION = {"Location": {"description": "the data set", "schema": {"type": "string"}}}
_JOB = {"Location": {"description": "the job that checks it", "schema": {"type": "string"}}}


class FolderIn(RequestSchema):
    """A folder that every worker sees under the same path, below one of WIDTHWISE_DATASET_ROOTS. Read in place."""

    kind: Literal["folder"]
    path: Annotated[str, Field(max_length=1000, pattern=ONE_LINE, examples=["/data/market1501"])]

    def parse(self) -> Source:
        return Source("folder", self.path)


class S3In(RequestSchema):
    """A prefix of a bucket among WIDTHWISE_DATASET_BUCKETS, on the service's own S3 server."""

    kind: Literal["s3"]
    url: Annotated[str, Field(max_length=1000, pattern=ONE_LINE, examples=["s3://people/market1501/"])]

    def parse(self) -> Source:
        return Source("s3", self.url)


class ArchiveIn(RequestSchema):
    """A zip, tar or tar.gz that will be sent to `archive`."""

    kind: Literal["archive"]
    sha256: Annotated[Sha256, Field(description="of the archive")]
    size_bytes: Annotated[int, Field(ge=1, le=2**63 - 1)]

    def parse(self) -> Source:
        return Source("archive", self.sha256, self.size_bytes)


class OptionsIn(RequestSchema):
    """How its layout is read; those that a layout does not know are ignored by it."""

    seed: Annotated[int, Field(ge=0, le=2**32 - 1, description="of the split, where the layout has none")] = 0
    boxes: Annotated[Boxes, Field(description="of CUHK03-NP")] = "detected"
    has_val_in_train: Annotated[bool, Field(description="MSMT17: train on its validation images, too")] = False
    query_camera: Annotated[Camera, Field(description="of VIPeR")] = "a"
    queries_per_identity: Annotated[int, Field(ge=1, le=1000, description="where the layout has no split")] = 1


class DatasetIn(RequestSchema):
    """A data set and the rights to it. `unknown` may be said; what is made from it then cannot be promoted unawares."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "name": "station-2026",
                    "source": {"kind": "folder", "path": "/data/station-2026"},
                    "license": "internal",
                    "terms": "any",
                    "consent_basis": "consent",
                    "retention_days": 365,
                },
            ]
        }
    )

    name: NewName
    source: Annotated[FolderIn | S3In | ArchiveIn, Field(discriminator="kind")]
    layout: Annotated[Layout, Field(description="`auto`: found out by the check")] = "auto"
    options: Annotated[OptionsIn, Field(default_factory=OptionsIn)]
    license: License
    terms: Annotated[Terms, Field(description="what it may be used for; chains inherit the strictest")]
    consent_basis: Annotated[ConsentBasis, Field(description="why images of these people may be used")]
    retention_days: Annotated[
        int | None, Field(ge=1, le=36_500, description="deleted so many days after it was registered; null: kept")
    ] = None

    def parse(self) -> NewDataset:
        options = {"layout": self.layout, **self.options.model_dump()}
        rights = Rights(self.license, self.terms, self.consent_basis)
        return NewDataset(self.name, self.source.parse(), options, rights, self.retention_days)


class DatasetOut(BaseModel):
    """A data set. Digest and report are null until a worker has read its files."""

    name: str
    state: State
    reason: Annotated[str | None, Field(description="why it was refused")]
    source: Literal["folder", "s3", "archive"]
    location: Annotated[str, Field(description="the folder, the `s3://` URL, or the sha256 of the archive")]
    size_bytes: Annotated[int | None, Field(description="of the archive")]
    options: Annotated[dict[str, Any], Field(description="the layout that was asked for, and how it is read")]
    digest: Annotated[str | None, Field(description="stands for every file and its name; jobs use exactly these")]
    report: Annotated[dict[str, Any] | None, Field(description="layout, identities, cameras, images, broken files")]
    license: str
    terms: str
    consent_basis: str
    retain_until: Annotated[datetime | None, Field(description="when it is deleted; null: never by itself")]
    archive: Annotated[str | None, Field(description="where to send the archive: PUT, or HEAD and PATCH to go on")]
    created_at: datetime
    updated_at: datetime

    @classmethod
    def of(cls, row: DatasetRow) -> DatasetOut:
        return cls(
            **{name: getattr(row, name) for name in cls.model_fields.keys() - {"archive"}},
            archive=f"/datasets/{row.name}/archive" if row.source == "archive" else None,
        )


class DatasetsOut(BaseModel):
    """A page of data sets, by name. `next_page_token` is null on the last page."""

    datasets: list[DatasetOut]
    next_page_token: str | None

    @classmethod
    def of(cls, page: DatasetPage) -> DatasetsOut:
        return cls(datasets=[DatasetOut.of(row) for row in page.datasets], next_page_token=encoded(page.continue_after))


@router.post(
    "/datasets",
    summary="Register a data set",
    status_code=201,
    dependencies=[Depends(require_json)],
    responses={
        200: {"description": "registered with exactly this content before", "model": DatasetOut, "headers": _LOCATION},
        201: {"description": "registered; now send the archive", "model": DatasetOut, "headers": _LOCATION},
        202: {"description": "registered, and being checked by a job", "model": DatasetOut, "headers": _LOCATION},
        **documented(400, 409, 413, 415, 422, 429, 500, 503),
    },
)
def create_dataset(body: DatasetIn, datasets: TheDatasets, by: Admin) -> Response:
    """A folder or a bucket is checked at once; an archive when it has been sent to `archive`."""
    row, is_new = datasets.create(body.parse(), by)
    status = 200 if not is_new else 201 if row.source == "archive" else 202
    return JSONResponse(DatasetOut.of(row).model_dump(mode="json"), status, {"location": f"/datasets/{row.name}"})


@router.get("/datasets", summary="Registered data sets", responses=documented(422, 500, 503))
def list_datasets(
    datasets: TheDatasets,
    _: Admin,
    page_size: PageSize = 20,
    page_token: PageToken = None,
    state: Annotated[State | None, Query(description="only those; default: all but the deleted")] = None,
) -> DatasetsOut:
    """In order of name, a page at a time."""
    return DatasetsOut.of(datasets.page(decoded(page_token), page_size, state))


@router.get("/datasets/{name}", summary="One data set", responses=documented(404, 500, 503))
def get_dataset(name: Name, datasets: TheDatasets, _: Admin) -> DatasetOut:
    """Its state, what the check found, and the rights to it. A deleted one still tells what it was."""
    return DatasetOut.of(datasets.find(name))


@router.delete(
    "/datasets/{name}", summary="Delete a data set", status_code=204, responses=documented(404, 409, 500, 503)
)
def delete_dataset(name: Name, datasets: TheDatasets, by: Admin) -> None:
    """Its archive, and the embeddings and tables that jobs keep of it. Refused while a job needs it. A folder or bucket
    is not touched; the name stays taken."""
    datasets.delete(name, by)


@router.post(
    "/datasets/{name}/recheck",
    summary="Check a data set again",
    status_code=202,
    response_class=Response,
    responses={
        202: {"description": "being checked by a job", "headers": _JOB},
        **documented(404, 409, 500, 503),
    },
)
def recheck_dataset(name: Name, datasets: TheDatasets, by: Admin) -> Response:
    """After its files changed, or a check that did not finish. Its digest is then that of the files as they are."""
    return Response(status_code=202, headers={"location": f"/jobs/{datasets.recheck(name, by)}"})


@router.put(
    "/datasets/{name}/archive",
    summary="Send the archive, whole",
    status_code=202,
    response_class=Response,
    responses=PUT_RESPONSES,
    openapi_extra=PUT_BODY,
)
async def put_archive(name: Name, request: Request, uploads: TheUploads, datasets: TheDatasets, by: Admin) -> Response:
    """The file as the body, starting over. If the connection is cut, go on with HEAD and PATCH."""
    return await receive_whole(request, uploads, datasets, name, by)


@router.head(
    "/datasets/{name}/archive",
    summary="How much of the archive has arrived",
    response_class=Response,
    responses={**HEAD_RESPONSES, **documented(409)},
)
def head_archive(name: Name, datasets: TheDatasets, _: Admin) -> Response:
    """`Upload-Offset` bytes of `Upload-Length` are here."""
    return answer_head(datasets, name)


@router.patch(
    "/datasets/{name}/archive",
    summary="Send more of the archive",
    status_code=202,
    response_class=Response,
    responses=PATCH_RESPONSES,
    openapi_extra=PATCH_BODY,
)
async def patch_archive(
    name: Name, request: Request, uploads: TheUploads, datasets: TheDatasets, upload_offset: UploadOffset, by: Admin
) -> Response:
    """The bytes from `Upload-Offset` on; the part that makes the file whole is answered 202 with the check's job."""
    return await receive_more(request, uploads, datasets, name, upload_offset, by)
