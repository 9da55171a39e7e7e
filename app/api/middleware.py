"""What happens around every request: an id, a log line, limits on the body, and an answer whatever goes wrong.

Plain ASGI, because Starlette's `BaseHTTPMiddleware` sits between a streamed body and the client's disconnect.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
import uuid
from urllib.parse import quote

import anyio
import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from app.api.errors import answer_unexpected
from app.api.problems import problem

_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_UPLOAD_PATH = re.compile(r"/(?:teachers/[^/]+/weights|datasets/[^/]+/archive)")
READ_TO_THE_END_BYTES = 64 * 1024
_log = structlog.get_logger("app.http")


class RequestContext:
    """Gives every request an id, logs its outcome, and answers 500 for what nobody else caught."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = sane_request_id(Headers(scope=scope).get("x-request-id"))
        with bound_contextvars(request_id=request_id):
            await self._answer(scope, receive, _Watched(send, request_id))

    async def _answer(self, scope: Scope, receive: Receive, sent: _Watched) -> None:
        started = time.perf_counter()
        try:
            await self.app(scope, receive, sent)
        except ClientDisconnect:
            _log.info("client went away", path=_path(scope))
        except asyncio.CancelledError:  # the server stops and has waited long enough; nothing awaits this task
            _log.warning("cut off, the server stops", path=_path(scope))
        except Exception as error:
            if sent.status:
                raise  # too late for another answer: the server closes the connection, so the client sees it cut
            await answer_unexpected(error)(scope, receive, sent)
        finally:
            milliseconds = round(1000 * (time.perf_counter() - started), 1)
            _log.info(
                "request",
                method=scope["method"],
                path=_path(scope),
                status=sent.status,
                bytes=sent.size,
                ms=milliseconds,
            )


class _Watched:
    """A `send` that adds the request id and remembers status and size."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.status = 0
        self.size = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._request_id
            headers["x-content-type-options"] = "nosniff"
        self.size += len(message.get("body", b""))
        await self._send(message)


class BodyLimit:
    """Answers 413 for bodies above their size, announced or counted, and 408 for those that do not arrive in time.

    Uploads may have `max_upload_bytes` and must not pause for `timeout_s`; all others have `max_bytes` and must be
    there in whole after `timeout_s`. What is refused is not read on: the connection ends with the answer. FastAPI's own
    `max_body_size` sits outside all middleware and answers in plain text.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, max_upload_bytes: int, timeout_s: float) -> None:
        self.app = app
        self._max_bytes = max_bytes
        self._max_upload_bytes = max_upload_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        is_upload = scope["method"] in ("PUT", "PATCH") and _UPLOAD_PATH.fullmatch(scope["path"]) is not None
        allowed = self._max_upload_bytes if is_upload else self._max_bytes
        body = _Body(receive, send, _announced_bytes(scope), allowed, self._timeout_s, restarts=is_upload)
        if math.inf > body.announced_bytes > allowed:
            detail = f"the body has more than the {allowed} bytes that this service reads here"
            await problem(413, "body-too-large", detail)(scope, receive, body.send)
            return
        await self.app(scope, body.receive, body.send)


class _Body:
    """The `receive` and `send` of one request, with limits on the body until it is there or the answer has begun.

    announced_bytes: infinite for a body of unannounced length. restarts: whether each chunk gets the whole time anew.
    """

    def __init__(
        self, receive: Receive, send: Send, announced_bytes: float, max_bytes: int, timeout_s: float, *, restarts: bool
    ) -> None:
        self.announced_bytes = announced_bytes
        self._receive = receive
        self._send = send
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._restarts = restarts
        self._deadline: float | None = None
        self._bytes = 0
        self._is_whole = announced_bytes == 0
        self._is_answered = False

    async def receive(self) -> Message:
        """Raises `HTTPException` of status 408 or 413."""
        if self._is_whole or self._is_answered:
            return await self._receive()  # waits for the client to go away, for as long as the answer takes
        message = await self._in_time()
        self._is_whole = not message.get("more_body", False)
        self._bytes += len(message.get("body", b""))
        if self._bytes > self._max_bytes:
            raise HTTPException(413)
        return message

    async def send(self, message: Message) -> None:
        self._is_answered = True
        if message["type"] == "http.response.start" and self._is_left_unread(message["status"]):
            MutableHeaders(scope=message)["connection"] = "close"
        await self._send(message)

    def _is_left_unread(self, status: int) -> bool:
        """Whether the server would go on reading a body that nobody wants. A little of it is read to the end: closing
        on a client that is sending may cost it the answer."""
        if self._is_whole:
            return False
        return status in (408, 413) or self.announced_bytes - self._bytes > READ_TO_THE_END_BYTES

    async def _in_time(self) -> Message:
        now = anyio.current_time()
        if self._deadline is None or self._restarts:
            self._deadline = now + self._timeout_s
        with anyio.move_on_after(self._deadline - now):
            return await self._receive()
        if self._is_answered:  # meanwhile
            return await self._receive()
        raise HTTPException(408)


def sane_request_id(offered: str | None) -> str:
    """The client's id when it is short and plain, else a new one: it goes into logs."""
    return offered if offered and _SANE_ID.fullmatch(offered) else uuid.uuid4().hex


def _announced_bytes(scope: Scope) -> float:
    headers = Headers(scope=scope)
    if "transfer-encoding" in headers:
        return math.inf
    announced = headers.get("content-length", "")
    return int(announced[:18]) if announced.isascii() and announced.isdigit() else 0


def _path(scope: Scope) -> str:
    """As the client may have sent it, so that no control character of it reaches the log."""
    return quote(scope["path"])[:200]
