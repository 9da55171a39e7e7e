"""Chains: what can be asked for, and what each width costs and is worth."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated

from fastapi import APIRouter, Path, Query

from app.api.deps import TheRegistry
from app.api.problems import documented
from app.api.schemas import ChainOut, ChainsOut, FrontierOut
from app.errors import InvalidPageToken

router = APIRouter(tags=["chains"])
Name = Annotated[str, Path(description="name of a chain, or an alias such as `stable`")]
PageSize = Annotated[int, Query(ge=1, le=100)]
PageToken = Annotated[str | None, Query(max_length=200, description="next_page_token of the page before")]


@router.get("/chains", summary="Published chains", responses=documented(422, 500, 503))
def list_chains(registry: TheRegistry, page_size: PageSize = 20, page_token: PageToken = None) -> ChainsOut:
    """In order of name, a page at a time."""
    page = registry.page(_decoded(page_token), page_size)
    return ChainsOut.of(page, _encoded(page.continue_after))


@router.get("/chains/{name}", summary="One chain", responses=documented(404, 500, 503))
def get_chain(name: Name, registry: TheRegistry) -> ChainOut:
    return ChainOut.of(registry.find(name))


@router.get("/chains/{name}/frontier", summary="Costs and accuracy of every width", responses=documented(404, 500, 503))
def get_frontier(name: Name, registry: TheRegistry) -> FrontierOut:
    """Costs are those of the default model of each width; accuracies say how they were measured."""
    return FrontierOut.of(registry.find(name))


def _encoded(name: str | None) -> str | None:
    """Opaque on purpose: what a page continues after is ours to change."""
    return None if name is None else base64.urlsafe_b64encode(name.encode()).decode().rstrip("=")


def _decoded(token: str | None) -> str:
    """Raises `InvalidPageToken`."""
    if token is None:
        return ""
    try:
        name = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raise InvalidPageToken from None
    if not name:
        raise InvalidPageToken
    return name
