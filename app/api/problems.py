"""Problem documents (RFC 9457): the one shape of every error answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema
from starlette.responses import Response
from structlog.contextvars import get_contextvars

from app.redaction import redact_keys

MEDIA_TYPE = "application/problem+json"


class FieldError(BaseModel):
    """One thing wrong with the request."""

    pointer: Annotated[str, Field(description="JSON pointer (RFC 6901) into the body, or the parameter's name")]
    code: Annotated[str, Field(description="machine-readable kind of the mistake")]
    message: str


class Problem(BaseModel):
    """An error, after RFC 9457. `code` is stable; `detail` is for people and may change."""

    model_config = ConfigDict(extra="allow")

    type: Annotated[str, Field(examples=["urn:widthwise:problem:budget-too-small"])]
    title: str
    status: int
    code: Annotated[str, Field(examples=["budget-too-small"])]
    detail: str
    request_id: Annotated[
        str | None, Field(description="the X-Request-Id of this answer; quote it when asking for help")
    ]
    errors: Annotated[list[FieldError] | None, Field(description="what is wrong, one entry per mistake")] = None
    limit: Annotated[str | None, Field(description="the binding limit")] = None
    requested: Annotated[int | None, Field(description="what that limit allowed")] = None
    smallest_available: Annotated[int | None, Field(description="the least that any model on offer needs")] = None
    chain: Annotated[str | None, Field(description="the chain that was asked")] = None


class ProblemResponse(Response):
    """A problem document, written in ASCII so that even broken text in a request cannot break its answer."""

    media_type = MEDIA_TYPE

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=True, allow_nan=False).encode()


def problem(
    status: int, code: str, detail: str, headers: Mapping[str, str] | None = None, **extensions: object
) -> ProblemResponse:
    """Answer with a problem document; `extensions` are further members of it."""
    document = {
        "type": f"urn:widthwise:problem:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "code": code,
        "detail": redact_keys(detail),  # it may repeat what a client sent, and clients put keys in the wrong place
        "request_id": get_contextvars().get("request_id"),
        **extensions,
    }
    return ProblemResponse(document, status, {"cache-control": "no-store", **(headers or {})})


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route whose errors have these statuses, for OpenAPI."""
    schema = {"schema": {"$ref": "#/components/schemas/Problem"}}
    return {status: {"description": HTTPStatus(status).phrase, "content": {MEDIA_TYPE: schema}} for status in statuses}


def describe(openapi: dict[str, Any]) -> None:
    """Put the components that `documented` refers to into a description, and what is answered around every handler,
    and take FastAPI's own 422 out of it.

    FastAPI adds that one to every operation with parameters, also where no value can be wrong.
    """
    _, top = models_json_schema([(Problem, "serialization")], ref_template="#/components/schemas/{model}")
    schemas = openapi["components"]["schemas"]
    schemas.update(top["$defs"])
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for operation in (operation for path in openapi["paths"].values() for operation in path.values()):
        if "application/json" in operation["responses"].get("422", {}).get("content", {}):
            del operation["responses"]["422"]
        for status, answer in documented(*_around(operation)).items():
            operation["responses"].setdefault(str(status), answer)
        for answer in operation["responses"].values():
            _without_item_schema(answer)


def _without_item_schema(answer: dict[str, Any]) -> None:
    """FastAPI describes the items of event streams by a word of OpenAPI 3.2, in a description that says it is 3.1."""
    for media in answer.get("content", {}).values():
        if media.pop("itemSchema", None) is not None:
            media.setdefault("schema", {"type": "string"})


def _around(operation: dict[str, Any]) -> list[int]:
    """Statuses that no handler knows of: what the gate and the limits on bodies answer."""
    guarded = [401, 403, 429, 503] if operation.get("security") else [403]
    return guarded + ([408, 413] if "requestBody" in operation else [])
