"""Traces: nothing without an endpoint, and with one a span for every stage, in one tree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import structlog
from fastapi.testclient import TestClient
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from app import logs, tracing
from app.errors import TracingNotInstalled

ROOT = Path(__file__).parents[2]
ROOMY = {"limits": {"max_macs": 10**12}}
SERVICE = """
import sys
from pathlib import Path
from fastapi.testclient import TestClient
from opentelemetry import trace
from app import tracing
from app.main import create_app, prepare
from app.settings import Settings

assert tracing.configure("widthwise-api", "1.2.3")
app = create_app(Settings(data_dir=Path(sys.argv[1])))
prepare(app.state.services)
with TestClient(app, base_url="http://localhost", client=("127.0.0.1", 50000)) as client:
    assert client.get("/chains").status_code == 200
trace.get_tracer_provider().shutdown()
"""


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """A provider of this test alone: the global one can be set once per process, so the asking is replaced."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    yield exporter
    provider.shutdown()


def by_name(exporter: InMemorySpanExporter) -> dict[str, list[ReadableSpan]]:
    found: dict[str, list[ReadableSpan]] = {}
    for span in exporter.get_finished_spans():
        found.setdefault(span.name, []).append(span)
    return found


def test_a_request_for_a_model_is_one_tree_of_spans(client: TestClient, spans: InMemorySpanExporter) -> None:
    client.app.state.services.registry.forget_loaded()  # type: ignore[attr-defined]
    answer = client.post("/models", json=ROOMY)
    found = by_name(spans)
    (request,) = found["POST /models"]
    stages = ["provision.choose", "provision.plan", "provision.stream", "store.get", "database.transaction"]
    assert set(stages) <= found.keys()
    trace_id = request.context.trace_id
    assert {span.context.trace_id for name in stages for span in found[name]} == {trace_id}
    (stream,) = found["provision.stream"]
    assert stream.attributes is not None
    assert stream.attributes["width"] == answer.headers["widthwise-width"]
    assert stream.end_time is not None
    assert stream.start_time is not None
    assert stream.end_time >= stream.start_time


def test_a_clients_trace_goes_on_in_ours(client: TestClient, spans: InMemorySpanExporter) -> None:
    theirs = "4bf92f3577b34da6a3ce929d0e0e4736"
    client.get("/chains", headers={"traceparent": f"00-{theirs}-00f067aa0ba902b7-01"})
    (request,) = by_name(spans)["GET /chains"]
    assert trace.format_trace_id(request.context.trace_id) == theirs


def test_errors_mark_a_span_by_class_and_tell_no_words(client: TestClient, spans: InMemorySpanExporter) -> None:
    client.post("/models", json={"limits": {"max_macs": 1}})
    (choose,) = by_name(spans)["provision.choose"]
    assert choose.attributes is not None
    assert choose.attributes["error.type"] == "BudgetTooSmall"
    assert not choose.events
    assert choose.status.description is None


def test_no_key_is_in_a_span(client: TestClient, spans: InMemorySpanExporter) -> None:
    client.get("/chains", headers={"authorization": "Bearer ww_0123456789ab_secret"})
    assert "ww_0123456789ab" not in json.dumps([span.to_json() for span in spans.get_finished_spans()])


def test_log_lines_inside_a_span_carry_its_ids(spans: InMemorySpanExporter) -> None:
    with tracing.span("work") as current:
        assert current is not None
        event = logs.add_trace(structlog.get_logger(), "info", {"event": "x"})
        context = current.get_span_context()
    assert event["trace_id"] == trace.format_trace_id(context.trace_id)
    assert event["span_id"] == trace.format_span_id(context.span_id)
    assert "trace_id" not in logs.add_trace(structlog.get_logger(), "info", {"event": "x"})


def test_a_stream_nobody_finishes_still_ends_its_span(spans: InMemorySpanExporter) -> None:
    chunks = tracing.traced_chunks("read", iter([b"a", b"b"]))
    assert next(chunks) == b"a"
    chunks.close()  # type: ignore[attr-defined]
    assert list(by_name(spans)) == ["read"]


def test_without_a_provider_nothing_is_wrapped() -> None:
    chunks = iter([b"a"])
    assert not tracing.is_on()
    assert tracing.traced_chunks("read", chunks) is chunks
    with tracing.span("work") as current:
        assert current is None


def test_tracing_is_off_unless_an_endpoint_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tracing.ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    assert not tracing.configure("widthwise-api", "1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert not tracing.configure("widthwise-api", "1")


def test_asking_without_the_exporter_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.delenv("OTEL_SDK_DISABLED", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(TracingNotInstalled, match=r"widthwise\[otel\]"):
        tracing.configure("widthwise-api", "1")


def test_spans_reach_a_collector(tmp_path: Path) -> None:
    """A process of its own, as the provider is the process's; the collector is an HTTP server here."""
    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "WIDTHWISE_"))},
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            [sys.executable, "-c", SERVICE, str(tmp_path / "data")],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        collector.shutdown()
    assert done.returncode == 0, done.stderr
    assert {path for path, _ in received} == {"/v1/traces"}
    sent = b"".join(body for _, body in received)
    assert b"GET /chains" in sent
    assert b"database.transaction" in sent
    assert b"widthwise-api" in sent
