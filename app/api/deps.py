"""What handlers are given. These are coroutines because FastAPI sends plain functions to a worker thread each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request

from app.db.session import Database
from app.services.provision import Provision
from app.services.registry import Registry


@dataclass(frozen=True)
class Services:
    """The wired services of one app."""

    database: Database
    registry: Registry
    provision: Provision


async def services(request: Request) -> Services:
    return cast("Services", request.app.state.services)


async def registry(request: Request) -> Registry:
    return (await services(request)).registry


async def provision(request: Request) -> Provision:
    return (await services(request)).provision


AllServices = Annotated[Services, Depends(services)]
TheRegistry = Annotated[Registry, Depends(registry)]
TheProvision = Annotated[Provision, Depends(provision)]
