"""What is counted, through OpenTelemetry's SDK and its Prometheus exporter.

Every process, API or worker, counts for itself in a `Metrics` of its own; nothing is global, so that two apps in one
process do not count each other's requests. Labels are bounded: route templates and not paths, chains and widths that
are published, kinds and steps of jobs that exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from threading import Lock
from wsgiref.simple_server import WSGIServer

from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, Meter, MeterProvider
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
REQUEST_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0, 600.0)
STEP_BUCKETS_S = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 4 * 3600.0, 12 * 3600.0, 24 * 3600.0)

Labels = dict[str, str | int]
Values = Iterable[tuple[float, Labels]]


class Metrics:
    """The instruments of one process, and what they show when they are scraped."""

    def __init__(self) -> None:
        # Here, not at the top: the exporter's registry is made for this process, and importing it starts nothing.
        from opentelemetry.exporter.prometheus import PrometheusMetricReader

        self.registry = CollectorRegistry()
        reader = PrometheusMetricReader(disable_target_info=True, scope_info_enabled=False, registry=self.registry)
        self.provider = MeterProvider([reader], exemplar_filter=AlwaysOffExemplarFilter(), shutdown_on_exit=False)
        self._meter: Meter = self.provider.get_meter("widthwise")  # type: ignore[assignment]
        self._scraping = Lock()
        self.models = self._meter.create_counter(
            "widthwise.models.served", description="Models handed out, by chain and width; ranges count once each."
        )
        self.refusals = self._meter.create_counter(
            "widthwise.budget.refusals", description="Requests no width of the chain fits, by the limit that binds."
        )
        self.not_loaded = self._meter.create_counter(
            "widthwise.terminals.not.loaded",
            description="Requests without a terminal chain whose file cannot be loaded.",
        )
        self._requests = self._meter.create_histogram(
            "http.server.request.duration",
            unit="s",
            description="Requests until their last byte was handed over, by route, method and status (0: client gone).",
            explicit_bucket_boundaries_advisory=REQUEST_BUCKETS_S,
        )
        self._sent = self._meter.create_counter(
            "widthwise.http.sent", unit="By", description="Bytes of answer bodies, by route and method."
        )
        self._received = self._meter.create_counter(
            "widthwise.http.received", unit="By", description="Bytes of request bodies, uploads included."
        )

    def request_ended(
        self, route: str, method: str, status: int, seconds: float, received_bytes: int, sent_bytes: int
    ) -> None:
        """route: its template, empty when no route answered."""
        labels: Labels = {"route": route, "method": method}
        self._requests.record(seconds, {**labels, "status": status})
        self._sent.add(sent_bytes, labels)
        if received_bytes:
            self._received.add(received_bytes, labels)

    def observe(self, name: str, description: str, read: Callable[[], Values], unit: str = "") -> None:
        """A gauge whose values are read whenever it is scraped; labels it no longer reads disappear."""
        self._meter.create_observable_gauge(name, [_callback(read)], unit, description)

    def count(self, name: str, description: str, read: Callable[[], Values]) -> None:
        """A counter that something else keeps, read whenever it is scraped; it must only grow."""
        self._meter.create_observable_counter(name, [_callback(read)], "", description)

    def render(self) -> bytes:
        """Prometheus' text format. One scrape at a time: the exporter hands collected data over in a queue."""
        with self._scraping:
            return generate_latest(self.registry)

    def shutdown(self) -> None:
        self.provider.shutdown()


class JobMetrics:
    """What a worker counts about the steps it runs."""

    def __init__(self, metrics: Metrics) -> None:
        meter = metrics.provider.get_meter("widthwise.worker")
        self._steps = meter.create_histogram(
            "widthwise.job.step.duration",
            unit="s",
            description="How long steps of jobs took, by kind of job, step and outcome.",
            explicit_bucket_boundaries_advisory=STEP_BUCKETS_S,
        )
        self._failures = meter.create_counter(
            "widthwise.job.attempt.failures",
            description="Attempts at a step that failed, by class of error; ChildFailed: its program ended badly.",
        )

    def step_ended(self, kind: str, step: str, outcome: str, seconds: float) -> None:
        """All attempts together. outcome: `succeeded`, `failed`, `cancelled`, or `given-up` to another worker."""
        self._steps.record(seconds, {"kind": kind, "step": step, "outcome": outcome})

    def attempt_failed(self, kind: str, step: str, error: Exception) -> None:
        self._failures.add(1, {"kind": kind, "step": step, "error": type(error).__name__})


def serve_metrics(metrics: Metrics, host: str, port: int) -> WSGIServer:
    """Answer Prometheus from a thread of this process; port 0 takes a free one, `server_port` of the result names it.

    There is no key on this port: it shows durations and counts by kind of job and nothing of their content. Raises
    `OSError` when the port is taken. End it by `shutdown()`.
    """
    server, _thread = start_http_server(port, host, metrics.registry)
    return server


def _callback(read: Callable[[], Values]) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def observe(_options: CallbackOptions) -> Iterable[Observation]:
        return [Observation(value, labels) for value, labels in read()]

    return observe
