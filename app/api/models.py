"""Models: ask for one by limits, look at it, fetch its bytes."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from app.api.conditions import ByteRange, is_not_modified, requested_range
from app.api.deps import TheProvision
from app.api.negotiation import JSON, ONNX, Wanted, require_json
from app.api.problems import documented
from app.api.schemas import Manifest, ModelIn
from app.services.provision import Model, Provision

router = APIRouter(tags=["models"])
FOREVER = "public, max-age=31536000, immutable"
ModelId = Annotated[str, Path(description="id of a model: 64 hex digits")]
_BYTES = {"schema": {"type": "string", "format": "binary"}}
_MANIFEST = {"schema": {"$ref": "#/components/schemas/Manifest"}}
_HEADERS = {
    name: {"description": description, "schema": {"type": kind}}
    for name, description, kind in (
        ("Location", "the model's manifest", "string"),
        ("ETag", "strong; the model id; of the file", "string"),
        ("Repr-Digest", "sha-256 of the whole file (RFC 9530), once it was streamed in full", "string"),
        ("Widthwise-Width", "the width chosen", "string"),
        ("Widthwise-Chain", "the chain it comes from", "string"),
        ("Widthwise-Macs", "multiply-adds of one image", "integer"),
        ("Widthwise-Flops", "2 × MACs", "integer"),
        ("Widthwise-Params", "float initialiser elements", "integer"),
        ("Widthwise-Artifact-Bytes", "size of the file", "integer"),
        ("Widthwise-Peak-Activation-Bytes", "largest sum of values alive at once", "integer"),
        ("Widthwise-Memory-Bytes-Bound", "2.7 × weights plus activations", "integer"),
    )
}
_OF_ARTIFACT = {name: header for name, header in _HEADERS.items() if name != "Location"}
_OF_MANIFEST = {name: header for name, header in _HEADERS.items() if name not in ("ETag", "Repr-Digest")}
_CONTENT_RANGE = {"description": "which bytes of how many", "schema": {"type": "string"}}
_NOT_MODIFIED = {"description": "the client has it already", "headers": {"ETag": _HEADERS["ETag"]}}
_ARTIFACT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "the whole file", "content": {ONNX: _BYTES}, "headers": _OF_ARTIFACT},
    206: {
        "description": "the range asked for",
        "content": {ONNX: _BYTES},
        "headers": {**_OF_ARTIFACT, "Content-Range": _CONTENT_RANGE},
    },
    304: _NOT_MODIFIED,
    **documented(404, 410, 412, 416, 500, 503),
}


@router.post(
    "/models",
    summary="The widest model that fits the limits",
    response_class=Response,
    dependencies=[Depends(require_json)],
    responses={
        200: {
            "description": "the ONNX file; or, for `Accept: application/json`, the manifest of a model known before",
            "content": {ONNX: _BYTES, JSON: _MANIFEST},
            "headers": _HEADERS,
        },
        201: {"description": "the manifest of a new model", "model": Manifest, "headers": _OF_MANIFEST},
        **documented(400, 404, 406, 413, 415, 422, 500, 503),
    },
)
def create_model(body: ModelIn, provision: TheProvision, wanted: Wanted) -> Response:
    """Answers with the model's bytes, or, for `Accept: application/json`, with its manifest.

    `curl --json` sends that header by itself, so curl gets the bytes; the manifest is what `Location` leads to.
    """
    model = provision.provide(body.parse())
    headers = _headers(model) | {"location": f"/models/{model.id}", "vary": "Accept, User-Agent"}
    headers["cache-control"] = (
        "no-store"  # what fits may be another model tomorrow; the artifact's own path is for ever
    )
    if wanted == JSON:
        return _manifest(model, 201 if model.is_new else 200, headers)
    return _whole(provision, model, headers | {"content-location": f"/models/{model.id}/artifact"})


@router.get("/models/{model_id}", summary="Manifest of a model", responses=documented(404, 410, 500, 503))
def get_model(model_id: ModelId, provision: TheProvision) -> Manifest:
    """Width, costs, accuracy, how to feed it, and how its embeddings compare with those of other widths."""
    return Manifest.of(provision.rebuild(provision.recorded(model_id)))


@router.get(
    "/models/{model_id}/artifact",
    summary="The ONNX file",
    response_class=Response,
    responses=_ARTIFACT_RESPONSES,
)
def get_artifact(model_id: ModelId, request: Request, provision: TheProvision) -> Response:
    """The bytes never change. Ranges resume a broken download; `If-None-Match` answers 304 without making any."""
    recorded = provision.recorded(model_id)
    if is_not_modified(request.headers, _etag(model_id)):
        return Response(status_code=304, headers=_validators(model_id))
    model = provision.rebuild(recorded)
    wanted = requested_range(request.headers, _etag(model_id), model.plan.total_bytes)
    return _part(provision, model, wanted) if wanted else _whole(provision, model, _headers(model))


@router.head(
    "/models/{model_id}/artifact",
    summary="Headers of the ONNX file",
    response_class=Response,
    responses={
        200: {"description": "the headers of GET", "headers": _OF_ARTIFACT},
        304: _NOT_MODIFIED,
        **documented(404, 410, 412, 500, 503),
    },
)
def head_artifact(model_id: ModelId, request: Request, provision: TheProvision) -> Response:
    """As GET, without the bytes."""
    recorded = provision.recorded(model_id)
    if is_not_modified(request.headers, _etag(model_id)):
        return Response(status_code=304, headers=_validators(model_id))
    return Response(headers=_headers(provision.rebuild(recorded)), media_type=ONNX)


def _whole(provision: Provision, model: Model, headers: dict[str, str]) -> Response:
    return _streamed(provision.stream(model), 200, headers)


def _part(provision: Provision, model: Model, wanted: ByteRange) -> Response:
    length = str(wanted.stop - wanted.start)
    headers = _headers(model) | {"content-range": wanted.content_range, "content-length": length}
    return _streamed(provision.stream(model, wanted.start, wanted.stop), 206, headers)


def _streamed(chunks: Iterator[bytes | memoryview], status: int, headers: dict[str, str]) -> Response:
    return StreamingResponse(chunks, status, headers, media_type=ONNX)  # a plain iterator runs in a worker thread


def _manifest(model: Model, status: int, headers: dict[str, str]) -> Response:
    kept = {
        name: value for name, value in headers.items() if name.startswith("widthwise-") or name in ("location", "vary")
    }
    return JSONResponse(Manifest.of(model).model_dump(mode="json"), status, kept)


def _etag(model_id: str) -> str:
    return f'"{model_id}"'


def _validators(model_id: str) -> dict[str, str]:
    return {"etag": _etag(model_id), "cache-control": FOREVER}


def _headers(model: Model) -> dict[str, str]:
    """Headers of the whole file."""
    costs = model.costs
    headers = _validators(model.id) | {
        "accept-ranges": "bytes",
        "content-length": str(model.plan.total_bytes),
        "content-disposition": f'attachment; filename="{model.plan.file_name}"',
        "widthwise-width": str(model.width),
        "widthwise-chain": model.stored.chain.name,
        "widthwise-macs": str(costs.macs),
        "widthwise-flops": str(costs.flops),
        "widthwise-params": str(costs.params),
        "widthwise-artifact-bytes": str(costs.artifact_bytes),
        "widthwise-peak-activation-bytes": str(costs.peak_activation_bytes),
        "widthwise-memory-bytes-bound": str(costs.memory_bytes_bound),
    }
    if model.artifact_sha256 is not None:
        digest = base64.b64encode(bytes.fromhex(model.artifact_sha256)).decode()
        headers["repr-digest"] = f"sha-256=:{digest}:"
    return headers
