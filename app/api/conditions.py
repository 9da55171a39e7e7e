"""Conditional and ranged requests, after RFC 9110 sections 13 and 14, for a resource with one strong entity tag."""

from __future__ import annotations

import re
from dataclasses import dataclass

from starlette.datastructures import Headers

from app.api.errors import PreconditionFailed, RangeNotSatisfiable

_TAG = re.compile(r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"')
_RANGE = re.compile(r"bytes=[ \t]*(?P<first>[0-9]*)-(?P<last>[0-9]*)[ \t]*", re.IGNORECASE)
_HUGE = 10**18  # numbers this long all lie behind any artifact's end


@dataclass(frozen=True)
class ByteRange:
    """The bytes `[start:stop]` of a whole of `size` bytes."""

    start: int
    stop: int
    size: int

    @property
    def content_range(self) -> str:
        return f"bytes {self.start}-{self.stop - 1}/{self.size}"


def is_not_modified(headers: Headers, etag: str) -> bool:
    """True when the client has this version already: If-None-Match, weak comparison. Raises `PreconditionFailed` when
    If-Match, strong comparison, names others only (RFC 9110, 13.2.2: it is looked at first).
    """
    if "if-match" in headers and not _names(headers, "if-match", etag, weak=False):
        raise PreconditionFailed
    return _names(headers, "if-none-match", etag, weak=True)


def requested_range(headers: Headers, etag: str, size: int) -> ByteRange | None:
    """The single byte range asked for; `None` means the whole.

    Other units, several ranges and malformed values are ignored, as RFC 9110, 14.2 allows; so is a range whose If-Range
    is not exactly this entity tag (13.1.5; dates never match, there is no Last-Modified).
    Raises `RangeNotSatisfiable` when the range begins behind the end, or asks for the last zero bytes.
    """
    match = _RANGE.fullmatch(headers.get("range", ""))
    if match is None or headers.get("if-range", etag) != etag:
        return None
    first, last = (_number(match[part]) for part in ("first", "last"))
    if first is None and last is None:
        return None
    if first is None:
        start, stop = max(0, size - (last or 0)), size
    else:
        start, stop = first, size if last is None else min(last + 1, size)
        if last is not None and last < first:
            return None
    if start >= size:
        raise RangeNotSatisfiable(size)
    return ByteRange(start, stop, size)


def _number(digits: str) -> int | None:
    if not digits:
        return None
    return int(digits) if len(digits) <= 18 else _HUGE


def _names(headers: Headers, header: str, etag: str, *, weak: bool) -> bool:
    value = ",".join(headers.getlist(header)).strip()
    if value == "*":
        return True
    tags = _TAG.findall(value)
    return etag in ([tag.removeprefix("W/") for tag in tags] if weak else tags)
