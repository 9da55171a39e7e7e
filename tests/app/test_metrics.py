"""What Prometheus is told: numbers that agree with what was asked, labels that cannot grow without bound."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from app.db.session import Database
from app.db.stats import JobCount, Stats
from app.db.tables import ExecutorRow, JobRow
from app.metrics import JobMetrics, Metrics, serve_metrics
from app.settings import Settings
from app.storage import open_store
from app.worker.context import StepContext
from app.worker.kinds import Kind
from app.worker.runner import Runner, Surroundings

ROOMY = {"limits": {"max_macs": 10**12}}
ADMIN_KEY = "a-key-of-the-first-admin-0123456789abcdef"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scraped(client: TestClient) -> Samples:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return parsed(answer.text)


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def test_requests_are_counted_by_route_template_method_and_status(client: TestClient) -> None:
    made = client.post("/models", json=ROOMY)
    for _ in range(3):
        client.get(f"{made.headers['location']}/artifact")
    client.get("/models/" + "0" * 64)
    samples = scraped(client)
    count = "http_server_request_duration_seconds_count"
    assert value(samples, count, route="/models", method="POST", status="200") == 1
    assert value(samples, count, route="/models/{model_id}/artifact", method="GET", status="200") == 3
    assert value(samples, count, route="/models/{model_id}", method="GET", status="404") == 1


def test_bytes_both_ways_are_counted_by_route(client: TestClient) -> None:
    answer = client.post("/models", json=ROOMY)
    samples = scraped(client)
    sent = value(samples, "widthwise_http_sent_bytes_total", route="/models", method="POST")
    received = value(samples, "widthwise_http_received_bytes_total", route="/models", method="POST")
    assert sent == len(answer.content)
    assert received == len(answer.request.content)


def test_made_up_paths_and_methods_make_no_series(client: TestClient) -> None:
    for number in range(20):
        client.get(f"/nowhere/{number}")
        client.request(f"MADEUP{number}", "/models")
    samples = scraped(client)
    labels = {tuple(sorted(labels)) for name, labels in samples if name.endswith("duration_seconds_count")}
    methods = {dict(found)["method"] for found in labels}
    routes = {dict(found)["route"] for found in labels}
    assert methods <= {"GET", "POST", "_OTHER"}
    assert routes <= {"", "/models"}


def test_widths_served_and_refusals_by_limit_are_counted(client: TestClient) -> None:
    answer = client.post("/models", json=ROOMY)
    client.post("/models", json={"limits": {"max_macs": 1}})
    client.post("/models", json={"limits": {"max_artifact_bytes": 1}})
    client.post("/models", json={"limits": {"max_artifact_bytes": 1}})
    client.post("/models", json=ROOMY, headers={"accept": "application/json"})  # a manifest is no model served
    samples = scraped(client)
    chain, width = answer.headers["widthwise-chain"], answer.headers["widthwise-width"]
    assert value(samples, "widthwise_models_served_total", chain=chain, width=width) == 1
    assert value(samples, "widthwise_budget_refusals_total", limit="max_macs") == 1
    assert value(samples, "widthwise_budget_refusals_total", limit="max_artifact_bytes") == 2


def test_the_chain_cache_shows_hits_and_misses(client: TestClient, app: FastAPI) -> None:
    app.state.services.registry.forget_loaded()
    before = scraped(client)
    for _ in range(3):
        client.post("/models", json=ROOMY)
    after = scraped(client)
    grown = {
        name: value(after, name) - value(before, name)
        for name in ("widthwise_chain_cache_hits_total", "widthwise_chain_cache_misses_total")
    }
    assert grown == {"widthwise_chain_cache_hits_total": 2, "widthwise_chain_cache_misses_total": 1}


def test_two_apps_in_one_process_count_for_themselves(make_app: Callable[..., FastAPI]) -> None:
    first, second = make_app(), make_app()
    with TestClient(first) as client:
        client.post("/models", json=ROOMY)
    with TestClient(second) as client:
        assert not [name for name, _ in scraped(client) if name == "widthwise_models_served_total"]


def job(number: int, kind: str, state: str, created_at: datetime) -> JobRow:
    return JobRow(
        id=f"{number:032x}",
        kind=kind,
        state=state,
        priority=0,
        request={},
        request_sha256="0" * 64,
        attempts=0,
        cancel_requested=False,
        created_at=created_at,
        updated_at=created_at,
    )


def executor(name: str, heartbeat_at: datetime, stopped_at: datetime | None = None) -> ExecutorRow:
    return ExecutorRow(id=name, started_at=heartbeat_at, heartbeat_at=heartbeat_at, stopped_at=stopped_at)


def fill(database: Database, now: datetime) -> None:
    with database.transaction() as session:
        session.add_all(
            [
                job(1, "refine", "queued", now - timedelta(hours=2)),
                job(2, "refine", "queued", now - timedelta(minutes=1)),
                job(3, "refine", "running", now - timedelta(hours=3)),
                job(4, "evaluate", "failed", now - timedelta(days=1)),
                executor("alive", now),
                executor("silent", now - timedelta(hours=1)),
                executor("stopped", now, stopped_at=now),
            ]
        )


def test_the_queue_is_read_from_the_tables(client: TestClient, app: FastAPI) -> None:
    fill(app.state.services.database, datetime.now(UTC))
    samples = scraped(client)
    assert value(samples, "widthwise_jobs", kind="refine", state="queued") == 2
    assert value(samples, "widthwise_jobs", kind="refine", state="running") == 1
    assert value(samples, "widthwise_jobs", kind="evaluate", state="failed") == 1
    assert value(samples, "widthwise_jobs", kind="evaluate", state="queued") == 0, "a known kind has every state"
    age = value(samples, "widthwise_jobs_oldest_queued_age_seconds", kind="refine")
    assert 2 * 3600 <= age < 2 * 3600 + 60
    assert value(samples, "widthwise_jobs_oldest_queued_age_seconds", kind="evaluate") == 0
    assert value(samples, "widthwise_executors_alive") == 1
    assert value(samples, "widthwise_database_up") == 1


@pytest.mark.parametrize("database_kind", ["sqlite", "postgresql"])
def test_stats_are_the_same_on_both_databases(
    database_kind: str, make_app: Callable[..., FastAPI], request: pytest.FixtureRequest
) -> None:
    given = {"database_url": request.getfixturevalue("postgres_url")} if database_kind == "postgresql" else {}
    database = make_app(**given).state.services.database
    now = datetime.now(UTC).replace(microsecond=0)
    fill(database, now)
    with database.transaction() as session:
        stats = Stats(session)
        assert list(stats.jobs()) == [
            JobCount("evaluate", "failed", 1, now - timedelta(days=1)),
            JobCount("refine", "queued", 2, now - timedelta(hours=2)),
            JobCount("refine", "running", 1, now - timedelta(hours=3)),
        ]
        assert stats.executors_alive(now - timedelta(minutes=1)) == 1


def test_a_scrape_survives_the_database(client: TestClient, app: FastAPI) -> None:
    client.post("/models", json=ROOMY)
    with app.state.services.database.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE jobs RENAME TO away")
    samples = scraped(client)
    assert value(samples, "widthwise_database_up") == 0
    assert "widthwise_executors_alive" not in {name for name, _ in samples}, "not known is not zero"
    assert "widthwise_models_served_total" in {name for name, _ in samples}


def test_metrics_need_a_key_where_keys_are_required(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(auth="keys", admin_key=ADMIN_KEY)) as client:
        assert client.get("/metrics").status_code == 401
        assert client.get("/metrics", headers={"authorization": f"Bearer {ADMIN_KEY}"}).status_code == 200


def test_a_worker_measures_the_steps_it_runs(app: FastAPI, tmp_path: Path) -> None:
    services = app.state.services
    now = datetime.now(UTC)
    with services.database.transaction() as session:
        session.add_all([job(1, "toy", "queued", now), executor("alive", now)])

    def stumble(context: StepContext) -> dict[str, Any]:
        raise ValueError("no good")

    kinds = {"toy": Kind("toy", (("walk", lambda _context: {"metres": 3}), ("stumble", stumble)))}
    metrics = Metrics()
    store = open_store(tmp_path.as_uri())
    settings = Settings(data_dir=tmp_path)
    around = Surroundings(
        settings, services.database, store, services.registry, "alive", tmp_path, Event(), JobMetrics(metrics)
    )
    Runner(around, kinds, lambda _name, step: step()).run(f"{1:032x}")
    samples = parsed(metrics.render().decode())
    count = "widthwise_job_step_duration_seconds_count"
    assert value(samples, count, kind="toy", step="walk", outcome="succeeded") == 1
    assert value(samples, count, kind="toy", step="stumble", outcome="failed") == 1
    failures = "widthwise_job_attempt_failures_total"
    assert value(samples, failures, kind="toy", step="stumble", error="ValueError") == 1


def test_a_worker_shows_its_steps_on_a_port_of_its_own() -> None:
    metrics = Metrics()
    counted = JobMetrics(metrics)
    counted.step_ended("refine", "train", "succeeded", 120.0)
    counted.step_ended("refine", "train", "failed", 3.0)
    counted.attempt_failed("refine", "train", OSError("disk full"))
    server = serve_metrics(metrics, "127.0.0.1", 0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=10) as answer:
            samples = parsed(answer.read().decode())
    finally:
        server.shutdown()
        server.server_close()
    labels: dict[str, Any] = {"kind": "refine", "step": "train"}
    assert value(samples, "widthwise_job_step_duration_seconds_sum", **labels, outcome="succeeded") == 120
    assert value(samples, "widthwise_job_step_duration_seconds_count", **labels, outcome="failed") == 1
    assert value(samples, "widthwise_job_attempt_failures_total", **labels, error="OSError") == 1


def test_every_metric_is_on_the_page_of_operators(client: TestClient, app: FastAPI) -> None:
    metrics = app.state.services.metrics
    fill(app.state.services.database, datetime.now(UTC))
    client.post("/models", json=ROOMY)
    client.post("/models", json={"limits": {"max_macs": 1}})
    metrics.not_loaded.add(1, {"chain": "a"})
    JobMetrics(metrics).step_ended("refine", "train", "succeeded", 1.0)
    JobMetrics(metrics).attempt_failed("refine", "train", OSError())
    shown = {name for name, _ in scraped(client)}
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "operate.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`((?:widthwise|http)_[a-z_]+)`", row)}
    assert named == {re.sub(r"_(count|sum|bucket)$", "", name) for name in shown}
