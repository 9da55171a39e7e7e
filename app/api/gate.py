"""The gate around every request: is this machine asked, whose key is it, may it ask again so soon.

What it finds lies in the ASGI scope for `app.api.auth`. An open server has no keys to tell its user from a stranger, so
it looks at where the request comes from: the peer must be this machine, the Host header must name it (a page that made
its own host name point at 127.0.0.1 still sends that name), and so must the Origin of what a browser's page sends.
"""

from __future__ import annotations

import re

import structlog
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from app.actor import Actor
from app.api.auth import ACTOR
from app.api.errors import answer_known
from app.api.ratelimit import RateLimits, bucket_of
from app.errors import AppError, NotOnLoopback, Unauthenticated
from app.services.keys import Keys, anonymous
from app.settings import is_loopback

PROBES = "/health/"  # asked by machines that have no key
UNLIMITED = "/health/live"  # looks at nothing: also when the store of the rate limits is away, the process is alive
_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._-]+)(?::[0-9]{1,5})?")
_ORIGIN = re.compile(rf"https?://{_HOST.pattern}")
_log = structlog.get_logger(__name__)


class Gate:
    """Turns away whom the service does not serve, as a problem document.

    only_loopback: whether an open server insists on this machine; not where something in front of it guards the port.
    """

    def __init__(self, app: ASGIApp, keys: Keys, limits: RateLimits, *, only_loopback: bool) -> None:
        self.app = app
        self._keys = keys
        self._limits = limits
        self._only_loopback = only_loopback and not keys.required

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            actor = await self._admit(scope)
        except AppError as error:
            response = await answer_known(None, error)
            await response(scope, receive, send)
            return
        with bound_contextvars(**({"actor": actor.id} if actor else {})):
            scope[ACTOR] = actor
            await self.app(scope, receive, send)

    async def _admit(self, scope: Scope) -> Actor | None:
        """Who asks; `None` without a key. Raises the errors of a refusal."""
        headers = Headers(scope=scope)
        if self._only_loopback:
            _require_loopback(scope, headers)
        if scope["path"] == UNLIMITED:
            return None
        address = bucket_of(scope["client"][0]) if scope.get("client") else "local"
        if not self._keys.required:
            await self._limits.count_request(address)
            return anonymous()
        is_probe = scope["path"].startswith(PROBES)
        actor = None if is_probe else await self._authenticated(headers.getlist("authorization"), address)
        await self._limits.count_request(f"key {actor.id}" if actor else address)
        return actor

    async def _authenticated(self, presented: list[str], address: str) -> Actor | None:
        """Who has this key. From where too many keys were refused, only keys that were good before are tried."""
        if not presented:
            return None
        key = _bearer(presented)
        if (actor := self._keys.recall(key)) is not None:
            return actor
        if not self._keys.was_good(key):
            await self._limits.check_failures(address)
        try:
            return await run_in_threadpool(self._keys.authenticate, key)
        except Unauthenticated:
            _log.warning("key refused", client=address)
            await self._limits.count_failure(address)
            raise


def _bearer(presented: list[str]) -> str:
    """The key in the one Authorization header; empty, which no key is, for another scheme or several headers."""
    scheme, _, key = presented[0].partition(" ")
    return key.strip() if len(presented) == 1 and scheme.lower() == "bearer" else ""


def _require_loopback(scope: Scope, headers: Headers) -> None:
    """Raises `NotOnLoopback`."""
    client = scope.get("client")  # none: a socket of this machine's file system
    if client and not is_loopback(client[0]):
        raise NotOnLoopback("the request comes from another one")
    hosts = headers.getlist("host")
    if len(hosts) != 1 or not _is_loopback(_HOST.fullmatch(hosts[0])):
        raise NotOnLoopback("the Host header names another one")
    origin = headers.get("origin")
    if origin is not None and not _is_loopback(_ORIGIN.fullmatch(origin)):
        raise NotOnLoopback("the Origin header says that a page of another one asks")


def _is_loopback(authority: re.Match[str] | None) -> bool:
    """`localhost.` with the dot of the root is the same host."""
    return authority is not None and is_loopback(authority["name"].lower().removesuffix("."))
