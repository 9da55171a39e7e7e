"""Choosing between a model's bytes and its manifest by the Accept header (RFC 9110, 12.5.1), and reading only plain
JSON: UTF-8, and no name twice in one object, because of two equal limits one would be ignored.

The one surprise: `curl --json` sends `Accept: application/json` of its own accord, beside the same Content-Type. A
device that says how it sends its limits must not get a manifest in its model.onnx, so from curl that header alone says
nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated

from fastapi import Depends, Request

from app.api.errors import MalformedBody, NotAcceptable, UnsupportedMediaType

ONNX = "application/onnx"
JSON = "application/json"
_QUALITY = re.compile(r"(0(\.[0-9]{0,3})?|1(\.0{0,3})?)")


async def wanted(request: Request) -> str:
    """`ONNX` or `JSON`. Raises `NotAcceptable`."""
    accept = ",".join(request.headers.getlist("accept")) or None
    if accept == JSON and request.headers.get("user-agent", "").startswith("curl/"):
        return ONNX
    return preferred(accept)


def preferred(accept: str | None, offers: Sequence[str] = (ONNX, JSON)) -> str:
    """The offer the client likes best; the first when all are equal. Raises `NotAcceptable` when it likes none."""
    wishes = [_wish(part) for part in (accept or "*/*").split(",") if part.strip()] or [("*/*", 1.0)]
    best = max(offers, key=lambda offer: _quality(offer, wishes))  # max keeps the earlier of equals
    if _quality(best, wishes) == 0:
        raise NotAcceptable
    return best


async def require_json(request: Request) -> None:
    """Raises `UnsupportedMediaType` unless the body is declared as plain JSON, and `MalformedBody` when it is not.

    FastAPI has read it by now, but takes UTF-16 and the last of equal names.
    """
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if media_type != JSON or coding != "identity":
        raise UnsupportedMediaType
    body = await request.body()
    if not body:
        return  # an empty body is a missing field, which is said elsewhere
    try:
        json.loads(body.decode("utf-8-sig"), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise MalformedBody("the body is no JSON in UTF-8 of moderate depth") from error


def _distinct(fields: list[tuple[str, object]]) -> dict[str, object]:
    """Raises `MalformedBody` when a name stands twice."""
    known = dict(fields)
    if len(known) < len(fields):
        raise MalformedBody("a name stands twice in one object of the body; say each once")
    return known


def _wish(part: str) -> tuple[str, float]:
    media_range, *parameters = (piece.strip().lower() for piece in part.split(";"))
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            return media_range, float(value) if _QUALITY.fullmatch(value.strip()) else 0.0
    return media_range, 1.0


def _quality(offer: str, wishes: Sequence[tuple[str, float]]) -> float:
    """The quality of the most specific range that covers the offer; 0 when none does."""
    for media_range in (offer, f"{offer.split('/', maxsplit=1)[0]}/*", "*/*"):
        qualities = [quality for wished, quality in wishes if wished == media_range]
        if qualities:
            return max(qualities)
    return 0.0


Wanted = Annotated[str, Depends(wanted)]
