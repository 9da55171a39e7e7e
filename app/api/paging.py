"""Page tokens of lists in order of name or id. Opaque on purpose: what a page continues after is ours to change."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Annotated

from fastapi import Query

from app.errors import InvalidPageToken

_ID = re.compile(r"[0-9]{1,18}")  # what a 64-bit integer can hold
PageSize = Annotated[int, Query(ge=1, le=100)]
PageToken = Annotated[str | None, Query(max_length=200, description="next_page_token of the page before")]


def encoded(name: str | None) -> str | None:
    """The token of the page that follows `name`; none when there is none."""
    return None if name is None else base64.urlsafe_b64encode(name.encode()).decode().rstrip("=")


def decoded(token: str | None) -> str:
    """The name a page follows, empty for the first page. Raises `InvalidPageToken`."""
    if token is None:
        return ""
    try:
        name = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raise InvalidPageToken from None
    if not name:
        raise InvalidPageToken
    return name


def decoded_id(token: str | None) -> int | None:
    """The row's id that a page continues from, `None` for the first page. Raises `InvalidPageToken`."""
    text = decoded(token)
    if text and _ID.fullmatch(text) is None:
        raise InvalidPageToken
    return int(text) if text else None
