"""What Prometheus scrapes, and the measuring of every request."""

from __future__ import annotations

import time

from fastapi import APIRouter
from fastapi.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.auth import Device
from app.api.deps import AllServices
from app.api.problems import documented
from app.metrics import CONTENT_TYPE, Metrics

METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
CUT_OFF = 0  # the status of a request that ended without an answer: the client had gone
router = APIRouter(tags=["operations"])


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={
        200: {"description": "Prometheus' text format", "content": {"text/plain": {"schema": {"type": "string"}}}},
        **documented(401, 403, 429, 500, 503),
    },
)
def scrape(services: AllServices, _: Device) -> Response:
    """Of this process, and of the queue as the database has it. Needs a key of any scope where keys are required."""
    return Response(services.monitor.scrape(), media_type=CONTENT_TYPE)


class Measure:
    """Records duration, status and bytes of every request, once its last byte was handed over.

    FastAPI can count requests itself, for six times the CPU time of this, and knows no body sizes.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        received = sent = 0
        status = CUT_OFF

        async def counted_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message

        async def counted_send(message: Message) -> None:
            nonlocal sent, status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            sent += len(message.get("body", b""))

        try:
            await self.app(scope, counted_receive, counted_send)
        finally:
            seconds = time.perf_counter() - started
            self._metrics.request_ended(route_of(scope), method_of(scope), status, seconds, received, sent)


def route_of(scope: Scope) -> str:
    """The template of the route that answered, `/models/{model_id}`; empty when no route did."""
    return str(getattr(scope.get("route"), "path_format", ""))


def method_of(scope: Scope) -> str:
    """A method this service may know; whatever else clients make up is `_OTHER`, after OpenTelemetry's conventions."""
    return str(scope["method"]) if scope["method"] in METHODS else "_OTHER"
