"""What handlers are given. These are coroutines because FastAPI sends plain functions to a worker thread each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request

from app.db.session import Database
from app.metrics import Metrics
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


@dataclass(frozen=True)
class Services:
    """The wired services of one app."""

    database: Database
    registry: Registry
    provision: Provision
    metrics: Metrics
    monitor: Monitor
    uploads: Uploads
    keys: Keys
    trail: Trail
    promotion: Promotion
    offers: Offers
    garbage: Garbage
    jobs: Jobs
    job_requests: JobRequests
    datasets: Datasets
    teachers: Teachers


async def services(request: Request) -> Services:
    return cast("Services", request.app.state.services)


async def registry(request: Request) -> Registry:
    return (await services(request)).registry


async def provision(request: Request) -> Provision:
    return (await services(request)).provision


async def uploads(request: Request) -> Uploads:
    return (await services(request)).uploads


async def teachers(request: Request) -> Teachers:
    return (await services(request)).teachers


async def keys(request: Request) -> Keys:
    return (await services(request)).keys


async def jobs(request: Request) -> Jobs:
    return (await services(request)).jobs


async def job_requests(request: Request) -> JobRequests:
    return (await services(request)).job_requests


async def trail(request: Request) -> Trail:
    return (await services(request)).trail


async def datasets(request: Request) -> Datasets:
    return (await services(request)).datasets


async def promotion(request: Request) -> Promotion:
    return (await services(request)).promotion


async def offers(request: Request) -> Offers:
    return (await services(request)).offers


async def garbage(request: Request) -> Garbage:
    return (await services(request)).garbage


AllServices = Annotated[Services, Depends(services)]
ThePromotion = Annotated[Promotion, Depends(promotion)]
TheOffers = Annotated[Offers, Depends(offers)]
TheGarbage = Annotated[Garbage, Depends(garbage)]
TheRegistry = Annotated[Registry, Depends(registry)]
TheProvision = Annotated[Provision, Depends(provision)]
TheUploads = Annotated[Uploads, Depends(uploads)]
TheTeachers = Annotated[Teachers, Depends(teachers)]
TheKeys = Annotated[Keys, Depends(keys)]
TheDatasets = Annotated[Datasets, Depends(datasets)]
TheJobRequests = Annotated[JobRequests, Depends(job_requests)]
TheJobs = Annotated[Jobs, Depends(jobs)]
TheTrail = Annotated[Trail, Depends(trail)]
