"""What happens around every request: an id, a log line, a limit on the body, and an answer whatever goes wrong.

Plain ASGI, because Starlette's `BaseHTTPMiddleware` sits between a streamed body and the client's disconnect.
"""

from __future__ import annotations

import re
import time
import uuid
from urllib.parse import quote

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from app.api.errors import answer_unexpected
from app.api.problems import problem

_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
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
    """Answers 413 for bodies above `max_bytes`, announced or counted.

    FastAPI's own `max_body_size` sits outside all middleware and answers in plain text.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _announced_bytes(scope) > self.max_bytes:
            detail = f"the body has more than the {self.max_bytes} bytes that this service reads"
            await problem(413, "body-too-large", detail)(scope, receive, send)
            return
        await self.app(scope, self._counted(receive), send)

    def _counted(self, receive: Receive) -> Receive:
        total = 0

        async def counted() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self.max_bytes:
                raise HTTPException(413)
            return message

        return counted


def sane_request_id(offered: str | None) -> str:
    """The client's id when it is short and plain, else a new one: it goes into logs."""
    return offered if offered and _SANE_ID.fullmatch(offered) else uuid.uuid4().hex


def _announced_bytes(scope: Scope) -> int:
    announced = Headers(scope=scope).get("content-length", "")
    return int(announced[:18]) if announced.isascii() and announced.isdigit() else 0


def _path(scope: Scope) -> str:
    """As the client may have sent it, so that no control character of it reaches the log."""
    return quote(scope["path"])[:200]
