"""Is the process alive, and can it do its work?"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter

from app.api.deps import AllServices
from app.api.errors import NotReady
from app.api.problems import documented
from app.api.schemas import Live, Ready
from app.db.migrate import is_current
from app.errors import DatabaseUnavailable, StorageError

router = APIRouter(prefix="/health", tags=["health"])


def software_version() -> str:
    """Version of the installed package; `0+unknown` when run from a bare folder."""
    try:
        return version("widthwise")
    except PackageNotFoundError:
        return "0+unknown"


@router.get("/live", summary="The process answers")
async def live() -> Live:
    """Looks at nothing else: a restart would not help a database that is away."""
    return Live(version=software_version())


@router.get("/ready", summary="Database and object store answer", responses=documented(429, 503))
def ready(services: AllServices) -> Ready:
    """503 while the database is away or not migrated, or the object store does not answer."""
    try:
        current = is_current(services.database)
        services.registry.check_storage()
    except (DatabaseUnavailable, StorageError) as error:
        raise NotReady(str(error)) from error
    if not current:
        raise NotReady("the database is not migrated: run `widthwise migrate`")
    return Ready()
