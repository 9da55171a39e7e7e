"""Receiving files of any size for teachers, data sets, and whatever else implements `UploadTarget`.

`PUT` sends the whole file at once and starts over; `HEAD` says how many bytes are here; `PATCH` goes on from there. The
words are those of tus: `Upload-Offset`, `Upload-Length`, `application/offset+octet-stream`. Bytes are collected on the
event loop and stored a part at a time in a worker thread, so that a slow client holds no thread, and a fast one no more
memory than a part. When a connection is cut, what had arrived is stored: it is a prefix of the file.
"""

from __future__ import annotations

from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import Header, Request
from fastapi.responses import Response

from app.actor import Actor
from app.api.errors import NotAnUpload
from app.api.problems import documented
from app.db.tables import UploadRow
from app.errors import UploadIncomplete, UploadTooLong
from app.services.uploads import Uploads, UploadTarget

OFFSET_STREAM = "application/offset+octet-stream"
UploadOffset = Annotated[
    int, Header(ge=0, le=2**63 - 1, description="where the bytes sent begin: the Upload-Offset that HEAD answered")
]
_OFFSET = {"Upload-Offset": {"description": "bytes that are here", "schema": {"type": "integer"}}}
_LENGTH = {"Upload-Length": {"description": "bytes of the whole file", "schema": {"type": "integer"}}}
_LOCATION = {"Location": {"description": "the job that checks the file", "schema": {"type": "string"}}}
_CHECKING: dict[int | str, dict[str, Any]] = {
    202: {"description": "the file is whole and being checked by a job", "headers": {**_OFFSET, **_LENGTH, **_LOCATION}}
}
_ERRORS = documented(400, 404, 408, 409, 413, 415, 422, 429, 500, 503)
PUT_RESPONSES = {**_CHECKING, **_ERRORS}
PATCH_RESPONSES = {
    **_CHECKING,
    204: {"description": "stored; more is awaited", "headers": {**_OFFSET, **_LENGTH}},
    **_ERRORS,
}
HEAD_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "how much is here", "headers": {**_OFFSET, **_LENGTH}},
    **documented(404, 500, 503),
}
PUT_BODY = {
    "requestBody": {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
}
PATCH_BODY = {"requestBody": {"content": {OFFSET_STREAM: {"schema": {"type": "string", "format": "binary"}}}}}


async def receive_whole(request: Request, uploads: Uploads, target: UploadTarget, name: str, by: Actor) -> Response:
    """The whole file as the body; bytes received before are forgotten. Answers 202 with the job that checks it.

    Raises as `UploadTarget.upload` and `Uploads.add_part`; `UploadIncomplete` for a body that ends early, of which
    everything is kept."""
    _require_plain(request)
    upload = await run_sync(target.upload, name)
    _require_fit(request, upload, upload.size_bytes)
    if upload.received_bytes:
        upload = await run_sync(uploads.restart, upload)
    upload = await _store(request, uploads, upload)
    if upload.received_bytes < upload.size_bytes:
        raise UploadIncomplete(upload.received_bytes, upload.size_bytes)
    return await _completed(target, upload, name, by)


async def receive_more(
    request: Request, uploads: Uploads, target: UploadTarget, name: str, offset: int, by: Actor
) -> Response:
    """Bytes from `offset` on. Answers 204 while more is awaited, then 202 with the job that checks the file.

    With no bytes left to send it finishes a file whose last answer was lost. Raises as `receive_whole`, and
    `OffsetMismatch`."""
    _require_plain(request)
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != OFFSET_STREAM:
        raise NotAnUpload(f"PATCH sends bytes as {OFFSET_STREAM}, from Upload-Offset on; the whole file goes by PUT")
    upload = uploads.at_offset(await run_sync(target.upload, name), offset)
    _require_fit(request, upload, upload.size_bytes - upload.received_bytes)
    upload = await _store(request, uploads, upload)
    if upload.received_bytes < upload.size_bytes:
        return Response(status_code=204, headers=_progress(upload.received_bytes, upload.size_bytes))
    return await _completed(target, upload, name, by)


def answer_head(target: UploadTarget, name: str) -> Response:
    """How many bytes are here and how many were announced."""
    return Response(headers={**_progress(*target.arrived_bytes(name)), "cache-control": "no-store"})


async def _store(request: Request, uploads: Uploads, upload: UploadRow) -> UploadRow:
    """Store the body part by part. Whatever ends it early, what had arrived is stored before the error goes on."""
    held, chunks = bytearray(), request.stream()
    while True:
        try:
            chunk = await anext(chunks, None)
        except Exception:  # the client went away, or was too slow
            await run_sync(uploads.add_part, upload, bytes(held))
            raise
        if chunk is None:
            return await run_sync(uploads.add_part, upload, bytes(held))
        held += chunk
        while len(held) >= uploads.part_bytes:
            part, held = bytes(held[: uploads.part_bytes]), held[uploads.part_bytes :]
            upload = await run_sync(uploads.add_part, upload, part)


async def _completed(target: UploadTarget, upload: UploadRow, name: str, by: Actor) -> Response:
    job = await run_sync(target.complete, name, by)
    headers = {**_progress(upload.size_bytes, upload.size_bytes), "location": f"/jobs/{job}"}
    return Response(status_code=202, headers=headers)


def _progress(received_bytes: int, size_bytes: int) -> dict[str, str]:
    return {"upload-offset": str(received_bytes), "upload-length": str(size_bytes)}


def _require_plain(request: Request) -> None:
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise NotAnUpload("send the bytes as they are, without Content-Encoding: the sha256 is that of the file")


def _require_fit(request: Request, upload: UploadRow, free_bytes: int) -> None:
    """Refuse a body that announces more than the rest of the file before a byte of it is read."""
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced[:18]) > free_bytes:
        raise UploadTooLong(upload.size_bytes)
