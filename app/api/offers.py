"""Offers: which terminal chains answer beside which chain."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Response
from pydantic import BaseModel, Field

from app.api.auth import Admin
from app.api.deps import TheOffers
from app.api.negotiation import require_json
from app.api.problems import documented
from app.api.schemas import RequestSchema
from app.services.offers import Offer

router = APIRouter(tags=["offers"])
Terminal = Annotated[str, Path(description="name of a terminal chain, or an alias")]


class OfferIn(RequestSchema):
    """Offer a terminal chain with another chain."""

    chain: Annotated[str, Field(max_length=63, description="name of a chain with students, or an alias")]
    accept_unknown: Annotated[
        bool,
        Field(description="offer it though its terms or consent basis are unknown; the audit trail keeps who did"),
    ] = False


class OfferOut(BaseModel):
    """A terminal chain is offered with another chain."""

    terminal: str
    chain: Annotated[str, Field(description="by its own name: the offer stays with it when an alias moves")]
    previous: Annotated[str | None, Field(description="with which chain it was offered before; null: with none")]
    same_embedding_space: Annotated[
        bool, Field(description="false: only requests with `embedding_space: any` can get it")
    ]

    @classmethod
    def of(cls, offer: Offer) -> OfferOut:
        return cls.model_validate(offer, from_attributes=True)


@router.put(
    "/chains/{name}/offer",
    summary="Offer a terminal chain with another",
    dependencies=[Depends(require_json)],
    responses=documented(400, 404, 409, 415, 422, 500, 503),
)
def offer_chain(name: Terminal, body: OfferIn, offers: TheOffers, by: Admin) -> OfferOut:
    """From the next request on, devices that ask for the other chain get this one where it fits and measures better. It
    is offered with one chain at a time. Where it is offered with that one already, nothing changes."""
    return OfferOut.of(offers.offer(name, body.chain, by, accept_unknown=body.accept_unknown))


@router.delete(
    "/chains/{name}/offer",
    summary="Offer a terminal chain no more",
    status_code=204,
    response_class=Response,
    responses=documented(404, 500, 503),
)
def delete_offer(name: Terminal, offers: TheOffers, by: Admin) -> Response:
    """Models that devices have fetched stay as they are."""
    offers.withdraw(name, by)
    return Response(status_code=204)
