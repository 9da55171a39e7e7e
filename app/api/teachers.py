"""Teachers: register one, send its weights, see what the check made of them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from app.api.auth import Admin
from app.api.deps import TheTeachers, TheUploads
from app.api.negotiation import require_json
from app.api.paging import PageSize, PageToken, decoded, encoded
from app.api.problems import documented
from app.api.schemas import ImageOut, License, NewName, RequestSchema, Sha256
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
from app.db.tables import TeacherRow
from app.services.teachers import NewTeacher, TeacherPage
from app.terms import ConsentBasis, Rights, Terms
from chains.architectures import architecture

router = APIRouter(tags=["teachers"])
Name = Annotated[str, Path(description="name of a teacher")]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LOCATION = {"Location": {"description": "the teacher", "schema": {"type": "string"}}}


class InputIn(RequestSchema):
    """What the teacher wants to see: RGB crops, `(pixel / 255 - mean) / std`."""

    height: Annotated[int, Field(ge=16, le=1024)]
    width: Annotated[int, Field(ge=16, le=1024)]
    mean: Annotated[
        list[float] | None,
        Field(min_length=3, max_length=3, description="default: with `std`, the file's or its toolkit's; ImageNet's"),
    ] = None
    std: Annotated[list[Annotated[float, Field(gt=0, le=1000)]] | None, Field(min_length=3, max_length=3)] = None

    def stated(self) -> dict[str, Any]:
        """Mean and std together or not at all: who states one of them means ImageNet's other one."""
        size = {"height": self.height, "width": self.width}
        if self.mean is None and self.std is None:
            return size
        return {**size, "mean": self.mean or list(IMAGENET_MEAN), "std": self.std or list(IMAGENET_STD)}


class TeacherIn(RequestSchema):
    """A teacher, before its weights."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "name": "market-r50",
                    "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
                    "size_bytes": 102_547_968,
                    "license": "MIT",
                    "terms": "research",
                    "consent_basis": "public",
                    "input": {"height": 256, "width": 128},
                }
            ]
        }
    )

    name: NewName
    sha256: Annotated[Sha256, Field(description="of the file that will be sent")]
    size_bytes: Annotated[int, Field(ge=1, le=2**63 - 1)]
    license: License
    terms: Annotated[Terms, Field(description="what it may be used for; chains inherit the strictest")]
    consent_basis: Annotated[ConsentBasis, Field(description="why the images it was trained on may be used")]
    architecture: Annotated[
        str | None, Field(max_length=64, description="refused if the weights turn out to be another one")
    ] = None
    input: Annotated[
        InputIn | None,
        Field(
            description="default: what the file says, else the network's size or 256 × 128, its toolkit's mean and std"
        ),
    ] = None

    def parse(self) -> NewTeacher:
        """Raises `ArchitectureError` for one that this version does not know."""
        declared: dict[str, Any] = {}
        if self.architecture is not None:
            declared["architecture"] = architecture(self.architecture).name
        if self.input is not None:
            declared["input"] = self.input.stated()
        rights = Rights(self.license, self.terms, self.consent_basis)
        return NewTeacher(self.name, self.sha256, self.size_bytes, rights, declared)


class TeacherOut(BaseModel):
    """A teacher. What was recognised in the weights is null until a worker has checked them."""

    name: str
    state: Literal["awaiting-weights", "checking", "ready", "refused"]
    reason: Annotated[str | None, Field(description="why the weights were refused")]
    sha256: str
    size_bytes: int
    format: Annotated[str | None, Field(description="`safetensors`, `torch` or `onnx`")]
    architecture: Annotated[str | None, Field(description="`onnx`: a frozen graph, whose weights cannot be refined")]
    width: str | None
    input: ImageOut | None
    report: Annotated[dict[str, Any] | None, Field(description="what the check found, and what was declared")]
    license: str
    terms: str
    consent_basis: str
    weights: Annotated[str, Field(description="where to send the file: PUT, or HEAD and PATCH to go on")]
    created_at: datetime
    updated_at: datetime

    @classmethod
    def of(cls, row: TeacherRow) -> TeacherOut:
        return cls(
            **{name: getattr(row, name) for name in cls.model_fields.keys() - {"weights", "input"}},
            input=ImageOut.model_validate(row.input) if row.input else None,
            weights=f"/teachers/{row.name}/weights",
        )


class TeachersOut(BaseModel):
    """A page of teachers, by name. `next_page_token` is null on the last page."""

    teachers: list[TeacherOut]
    next_page_token: str | None

    @classmethod
    def of(cls, page: TeacherPage) -> TeachersOut:
        return cls(teachers=[TeacherOut.of(row) for row in page.teachers], next_page_token=encoded(page.continue_after))


@router.post(
    "/teachers",
    summary="Register a teacher",
    status_code=201,
    dependencies=[Depends(require_json)],
    responses={
        200: {"description": "registered with exactly this content before", "model": TeacherOut, "headers": _LOCATION},
        201: {"description": "registered; now send the weights", "model": TeacherOut, "headers": _LOCATION},
        **documented(400, 409, 413, 415, 422, 429, 500, 503),
    },
)
def create_teacher(body: TeacherIn, teachers: TheTeachers, by: Admin) -> Response:
    """Says what will be sent, by its sha256, and under which rights. Then send the file to `weights`."""
    row, is_new = teachers.create(body.parse(), by)
    content = TeacherOut.of(row).model_dump(mode="json")
    return JSONResponse(content, 201 if is_new else 200, {"location": f"/teachers/{row.name}"})


@router.get("/teachers", summary="Registered teachers", responses=documented(422, 500, 503))
def list_teachers(
    teachers: TheTeachers, _: Admin, page_size: PageSize = 20, page_token: PageToken = None
) -> TeachersOut:
    """In order of name, a page at a time."""
    return TeachersOut.of(teachers.page(decoded(page_token), page_size))


@router.get("/teachers/{name}", summary="One teacher", responses=documented(404, 500, 503))
def get_teacher(name: Name, teachers: TheTeachers, _: Admin) -> TeacherOut:
    """Its state, what the check found, and its rights."""
    return TeacherOut.of(teachers.find(name))


@router.delete(
    "/teachers/{name}", summary="Delete a teacher", status_code=204, responses=documented(404, 409, 500, 503)
)
def delete_teacher(name: Name, teachers: TheTeachers, by: Admin) -> None:
    """Refused while a job needs it. Chains made from it stay; its file goes with the next garbage collection."""
    teachers.delete(name, by)


@router.put(
    "/teachers/{name}/weights",
    summary="Send the weights, whole",
    status_code=202,
    response_class=Response,
    responses=PUT_RESPONSES,
    openapi_extra=PUT_BODY,
)
async def put_weights(name: Name, request: Request, uploads: TheUploads, teachers: TheTeachers, by: Admin) -> Response:
    """The file as the body, starting over. If the connection is cut, go on with HEAD and PATCH."""
    return await receive_whole(request, uploads, teachers, name, by)


@router.head(
    "/teachers/{name}/weights",
    summary="How much of the weights has arrived",
    response_class=Response,
    responses=HEAD_RESPONSES,
)
def head_weights(name: Name, teachers: TheTeachers, _: Admin) -> Response:
    """`Upload-Offset` bytes of `Upload-Length` are here."""
    return answer_head(teachers, name)


@router.patch(
    "/teachers/{name}/weights",
    summary="Send more of the weights",
    status_code=202,
    response_class=Response,
    responses=PATCH_RESPONSES,
    openapi_extra=PATCH_BODY,
)
async def patch_weights(
    name: Name, request: Request, uploads: TheUploads, teachers: TheTeachers, upload_offset: UploadOffset, by: Admin
) -> Response:
    """The bytes from `Upload-Offset` on; the part that makes the file whole is answered 202 with the check's job."""
    return await receive_more(request, uploads, teachers, name, upload_offset, by)
