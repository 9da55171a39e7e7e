"""The app, and the only place that wires it. Importing it connects to nothing, reads no environment, loads no torch."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from app.api import chains, errors, health, models, problems
from app.api.deps import Services
from app.api.middleware import BodyLimit, RequestContext
from app.db.session import Database
from app.services.provision import Provision
from app.services.registry import Registry
from app.settings import Settings
from app.storage import open_store

DESCRIPTION = """\
Hands every edge camera an ONNX person re-identification model that fits its limits, expanded from a weight chain with
no training. All widths of a chain embed into one space, so that cameras with different models can be searched together.

Errors are problem documents (RFC 9457, `application/problem+json`) with a stable `code`.
"""


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
    )
    app.state.services = wired
    errors.install(app)
    for router in (models.router, chains.router, health.router):
        app.include_router(router)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(RequestContext)  # added last, so outermost
    return app


def wire(settings: Settings) -> Services:
    """The services for these settings, connected to nothing yet."""
    database = Database(settings.database)
    store = open_store(settings.storage, settings.s3_endpoint_url)
    registry = Registry(database, store, settings.chain_cache_bytes)
    return Services(database, registry, Provision(database, registry))


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    app.state.services.database.dispose()
