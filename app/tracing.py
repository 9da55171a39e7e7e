"""Traces, by OpenTelemetry. Off unless OTEL_EXPORTER_OTLP_ENDPOINT is set, and then next to nothing is spent on them.

The standard variables configure the exporter: endpoint, headers, sampler (`OTEL_TRACES_SAMPLER`), resource attributes.
Only the commands that serve or work call `configure`; as a library the service opens spans for whatever provider its
surroundings have set, and for none when they have set none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

from opentelemetry import trace
from opentelemetry.trace import ProxyTracerProvider, Span, StatusCode
from opentelemetry.util.types import AttributeValue

from app.errors import TracingNotInstalled

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
Chunk = TypeVar("Chunk")
_NOT_TRACED: AbstractContextManager[None] = nullcontext()


def configure(service: str, version: str) -> bool:
    """Send spans to the endpoint that the environment names; False when it names none.

    service: `widthwise-api` or `widthwise-worker`, unless `OTEL_SERVICE_NAME` has another. Raises
    `TracingNotInstalled` when the exporter is asked for and not installed.
    """
    if not is_asked_for():
        return False
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise TracingNotInstalled from error
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named = {"service.name": os.environ.get("OTEL_SERVICE_NAME") or service, "service.version": version}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return True


def is_asked_for() -> bool:
    """Whether the environment names an endpoint; `OTEL_SDK_DISABLED=true` overrules it, as everywhere."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    return any(os.environ.get(name) for name in ENDPOINTS)


def is_on() -> bool:
    """Whether anybody set a provider."""
    return not isinstance(trace.get_tracer_provider(), ProxyTracerProvider)


def span(name: str, **attributes: AttributeValue) -> AbstractContextManager[Span | None]:
    """A span around a block, under the current one; errors mark it by their class and not by their words."""
    return _spanned(name, attributes) if is_on() else _NOT_TRACED


def traced_chunks(name: str, chunks: Iterator[Chunk], **attributes: AttributeValue) -> Iterator[Chunk]:
    """`chunks`, with a span from the first until the last or until nobody wants more."""
    return _spanned_chunks(name, chunks, attributes) if is_on() else chunks


def _spanned_chunks(name: str, chunks: Iterator[Chunk], attributes: dict[str, AttributeValue]) -> Iterator[Chunk]:
    """The span is never the current one: each chunk may be made in another thread, with another context."""
    current = trace.get_tracer("widthwise").start_span(name, attributes=attributes)
    try:
        yield from chunks
    except Exception as error:
        _mark(current, error)
        raise
    finally:
        current.end()


@contextmanager
def _spanned(name: str, attributes: dict[str, AttributeValue]) -> Iterator[Span]:
    tracer = trace.get_tracer("widthwise")
    with tracer.start_as_current_span(
        name, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as current:
        try:
            yield current
        except Exception as error:
            _mark(current, error)
            raise


def _mark(current: Span, error: BaseException) -> None:
    current.set_attribute("error.type", type(error).__qualname__)
    current.set_status(StatusCode.ERROR)
