"""Aliases: promote a chain, take that back, see who did."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Response
from pydantic import BaseModel, Field

from app.api.auth import Admin, Device
from app.api.deps import ThePromotion
from app.api.negotiation import require_json
from app.api.paging import PageSize, PageToken, decoded_id, encoded
from app.api.problems import documented
from app.api.schemas import RequestSchema
from app.db.tables import AliasChangeRow
from app.services.promotion import Expected

router = APIRouter(tags=["aliases"])
Alias = Annotated[str, Path(description="`stable`, which answers when no chain is asked for, or `canary`")]
Chain = Annotated[str, Path(description="name of a chain, or an alias: what `canary` points at can become `stable`")]


class RollbackIn(RequestSchema):
    """Take a promotion back."""

    expected: Annotated[
        str | None,
        Field(
            max_length=63,
            description="the chain the alias points at now, null for none: where it is another, 409 and nothing moves. "
            "Left out: whatever it is",
        ),
    ] = None

    def expectation(self) -> Expected | None:
        """`None` where the field was left out, which is not the same as null."""
        return Expected(self.expected) if "expected" in self.model_fields_set else None


class PromotionIn(RollbackIn):
    """Make an alias point at a chain."""

    accept_unknown: Annotated[
        bool,
        Field(description="promote though terms, consent basis or accuracy are unknown; the audit trail keeps who did"),
    ] = False


class AliasOut(BaseModel):
    """An alias and the chain it points at."""

    alias: str
    chain: str
    changed_at: datetime

    @classmethod
    def of(cls, row: AliasChangeRow) -> AliasOut:
        return cls.model_validate(row, from_attributes=True)


class AliasesOut(BaseModel):
    """Every alias that points at a chain."""

    aliases: list[AliasOut]


class MoveOut(BaseModel):
    """A move of an alias."""

    alias: str
    chain: Annotated[str | None, Field(description="where it went; null: it was removed")]
    previous: Annotated[str | None, Field(description="where it was; null: nowhere")]
    changed_at: datetime
    changed_by: Annotated[
        str | None, Field(description="as in the audit trail; null: before there was one, so nobody knows")
    ]

    @classmethod
    def of(cls, row: AliasChangeRow) -> MoveOut:
        return cls.model_validate(row, from_attributes=True)


class HistoryOut(BaseModel):
    """A page of moves, newest first. `next_page_token` is null on the last page."""

    moves: list[MoveOut]
    next_page_token: str | None


@router.put(
    "/chains/{name}/aliases/{alias}",
    summary="Promote a chain",
    dependencies=[Depends(require_json)],
    responses=documented(400, 404, 409, 415, 422, 500, 503),
)
def promote_chain(name: Chain, alias: Alias, body: PromotionIn, promotion: ThePromotion, by: Admin) -> MoveOut:
    """From the next request on devices that ask for the alias get this chain. Where it points there already, nothing
    changes, and the answer is the move that made it so."""
    moved = promotion.promote(alias, name, by, accept_unknown=body.accept_unknown, expected=body.expectation())
    return MoveOut.of(moved)


@router.get("/aliases", summary="Where the aliases point", responses=documented(500, 503))
def list_aliases(promotion: ThePromotion, _: Device) -> AliasesOut:
    return AliasesOut(aliases=[AliasOut.of(row) for row in promotion.aliases()])


@router.get("/aliases/{alias}/history", summary="Every move of an alias", responses=documented(404, 422, 500, 503))
def get_alias_history(
    alias: Alias, promotion: ThePromotion, _: Admin, page_size: PageSize = 20, page_token: PageToken = None
) -> HistoryOut:
    """Newest first, a page at a time. Chains that are named may have been deleted since."""
    found = promotion.history(alias, decoded_id(page_token), page_size + 1)
    following = encoded(str(found[page_size - 1].id)) if len(found) > page_size else None
    return HistoryOut(moves=[MoveOut.of(row) for row in found[:page_size]], next_page_token=following)


@router.post(
    "/aliases/{alias}/rollback",
    summary="Back to the chain before",
    dependencies=[Depends(require_json)],
    responses=documented(400, 404, 409, 415, 422, 500, 503),
)
def roll_back_alias(alias: Alias, body: RollbackIn, promotion: ThePromotion, by: Admin) -> MoveOut:
    """Twice goes back two chains, never forth again. What was accepted of the chain when it was promoted still is."""
    return MoveOut.of(promotion.roll_back(alias, by, expected=body.expectation()))


@router.delete(
    "/aliases/{alias}",
    summary="Remove an alias",
    status_code=204,
    response_class=Response,
    responses=documented(404, 409, 500, 503),
)
def delete_alias(alias: Alias, promotion: ThePromotion, by: Admin) -> Response:
    """`canary` alone can be removed; its history stays."""
    promotion.remove(alias, by)
    return Response(status_code=204)
