"""The app, and the only place that wires it. Importing it connects to nothing, reads no environment, loads no torch."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Security
from fastapi.telemetry import TelemetryConfig

from app.api import (
    aliases,
    audit,
    chains,
    datasets,
    errors,
    garbage,
    health,
    jobs,
    keys,
    metrics,
    models,
    offers,
    problems,
    teachers,
)
from app.api.auth import device
from app.api.deps import Services
from app.api.gate import Gate
from app.api.metrics import Measure
from app.api.middleware import BodyLimit, RequestContext
from app.api.ratelimit import RateLimits
from app.db.migrate import migrate
from app.db.session import Database
from app.metrics import Metrics
from app.services.dataset_sources import SourceRules
from app.services.datasets import Datasets
from app.services.garbage import Garbage
from app.services.job_requests import JobRequests
from app.services.jobs import Jobs
from app.services.keys import Keys
from app.services.monitor import Monitor
from app.services.offers import Offers
from app.services.promotion import Promotion
from app.services.provision import Provision
from app.services.registry import Registry
from app.services.teachers import Teachers
from app.services.trail import Trail
from app.services.uploads import Uploads
from app.settings import Settings
from app.storage import ObjectStore, open_store
from app.storage.traced import TracedStore
from app.worker.enqueue import LazyQueue

if TYPE_CHECKING:
    from app.worker.main import Worker

DESCRIPTION = """\
Hands every edge camera an ONNX person re-identification model that fits its limits, expanded from a weight chain with
no training. All widths of a chain embed into one space, so that cameras with different models can be searched together.

Errors are problem documents (RFC 9457, `application/problem+json`) with a stable `code`.
"""

# Of FastAPI's own telemetry only the span of each request, under a tracer provider that somebody has set: its metrics
# cost more than ours, and its log records repeat exceptions, which may hold secrets.
TELEMETRY: TelemetryConfig = {"metrics": False, "logs": False, "operation_spans": False, "auto_configure": False}


class Described(FastAPI):
    """FastAPI, with our problem documents in its description instead of its own."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            problems.describe(super().openapi())
        return super().openapi()


def create_app(settings: Settings | None = None) -> FastAPI:
    """The service for these settings (default: those of the environment). Connects when first asked something.

    Raises pydantic's `ValidationError` for unsafe or malformed settings.
    """
    settings = settings or Settings()
    wired = wire(settings)
    app = Described(
        title="Widthwise",
        version=health.software_version(),
        description=DESCRIPTION,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        redirect_slashes=False,
        lifespan=_lifespan,
        telemetry=TELEMETRY,
    )
    app.state.services = wired
    errors.install(app)
    for router in (models.router, chains.router):
        app.include_router(router, dependencies=[Security(device)])
    for router in (
        aliases.router,
        offers.router,
        garbage.router,
        datasets.router,
        teachers.router,
        jobs.router,
        health.router,
        metrics.router,
        keys.router,
        audit.router,
    ):  # their handlers say who may call them
        app.include_router(router)
    app.add_middleware(Gate, keys=wired.keys, limits=_rate_limits(settings), only_loopback=not settings.allow_open_bind)
    app.add_middleware(
        BodyLimit,
        max_bytes=settings.max_body_bytes,
        max_upload_bytes=settings.max_upload_bytes,
        timeout_s=settings.body_timeout_s,
    )
    app.add_middleware(Measure, metrics=wired.metrics)
    app.add_middleware(RequestContext)  # added last, so outermost
    return app


def wire(settings: Settings) -> Services:
    """The services for these settings, connected to nothing yet."""
    database = Database(settings.database)
    store = TracedStore(open_store(settings.storage, settings.s3_endpoint_url))
    counted = Metrics()
    registry = Registry(database, store, settings.chain_cache_bytes)
    monitor = Monitor(database, registry, counted, settings.lease_s)
    uploads = _uploads(settings, database, store)
    jobs = Jobs(database, store, LazyQueue(database))
    sources = SourceRules(settings.dataset_roots, settings.dataset_buckets)
    data_sets = Datasets(database, store, uploads, jobs, sources)
    return Services(
        database,
        registry,
        Provision(database, registry, counted),
        counted,
        monitor,
        uploads=uploads,
        keys=_keys(database, settings),
        trail=Trail(database),
        promotion=Promotion(database),
        offers=Offers(database),
        garbage=_garbage(settings, database, store, uploads, data_sets),
        jobs=jobs,
        job_requests=JobRequests(data_sets, settings.max_train_processes),
        datasets=data_sets,
        teachers=Teachers(database, uploads, jobs),
    )


def make_worker(settings: Settings, services: Services) -> Worker:
    """A worker on the same database and object store, not started yet."""
    from app.worker.main import Worker

    store = TracedStore(open_store(settings.storage, settings.s3_endpoint_url))
    return Worker(settings, services.database, store, services.registry, services.garbage, metrics=services.metrics)


def prepare(services: Services) -> None:
    """Bring the database, the job engine's tables and the object store to what this version needs. Safe to do twice,
    and by several processes at once. Raises `DatabaseUnavailable` and `StorageUnavailable`."""
    from app.worker import engine

    migrate(services.database)
    engine.migrate(services.database)
    services.registry.prepare_storage()


def _uploads(settings: Settings, database: Database, store: ObjectStore) -> Uploads:
    return Uploads(
        database,
        store,
        part_bytes=settings.upload_part_bytes,
        max_bytes=settings.max_upload_bytes,
        max_open=settings.max_open_uploads,
        retention=timedelta(hours=settings.upload_retention_h),
    )


def _garbage(
    settings: Settings, database: Database, store: ObjectStore, uploads: Uploads, data_sets: Datasets
) -> Garbage:
    return Garbage(
        database,
        store,
        grace=timedelta(hours=settings.gc_grace_h),
        job_retention=timedelta(days=settings.job_retention_days),
        retention={"uploads": uploads.drop_stale, "datasets": lambda now: len(data_sets.expire(now))},
    )


def _keys(database: Database, settings: Settings) -> Keys:
    admin_key = settings.admin_key.get_secret_value() if settings.admin_key else None
    return Keys(database, required=settings.keys_required, admin_key=admin_key)


def _rate_limits(settings: Settings) -> RateLimits:
    return RateLimits(settings.rate_limit, settings.auth_failure_limit, settings.rate_limit_storage)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    app.state.services.database.dispose()
