"""Chains: what can be asked for, and what each width costs and is worth."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Response

from app.api.auth import Admin
from app.api.deps import TheRegistry
from app.api.paging import PageSize, PageToken, decoded, encoded
from app.api.problems import documented
from app.api.schemas import ChainOut, ChainsOut, FrontierOut

router = APIRouter(tags=["chains"])
Name = Annotated[str, Path(description="name of a chain, or an alias such as `stable`")]


@router.get("/chains", summary="Published chains", responses=documented(422, 500, 503))
def list_chains(registry: TheRegistry, page_size: PageSize = 20, page_token: PageToken = None) -> ChainsOut:
    """In order of name, a page at a time."""
    page = registry.page(decoded(page_token), page_size)
    return ChainsOut.of(page, encoded(page.continue_after))


@router.get("/chains/{name}", summary="One chain", responses=documented(404, 500, 503))
def get_chain(name: Name, registry: TheRegistry) -> ChainOut:
    return ChainOut.of(registry.find(name))


@router.get("/chains/{name}/frontier", summary="Costs and accuracy of every width", responses=documented(404, 500, 503))
def get_frontier(name: Name, registry: TheRegistry) -> FrontierOut:
    """Costs are those of the default model of each width; accuracies say how they were measured."""
    return FrontierOut.of(registry.find(name))


@router.delete(
    "/chains/{name}",
    summary="Delete a chain",
    status_code=204,
    response_class=Response,
    responses=documented(404, 409, 500, 503),
)
def delete_chain(name: Name, registry: TheRegistry, by: Admin) -> Response:
    """Its models go with it, its file with the next collection of garbage. Refused while an alias points at it or a job
    that has not ended names it."""
    registry.delete(name, by)
    return Response(status_code=204)
