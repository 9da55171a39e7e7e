"""API keys: make, list, rotate, revoke. A key's text is in the answer that made it and nowhere after."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Path, Response
from pydantic import AwareDatetime, BaseModel, BeforeValidator, Field

from app.actor import Scope
from app.api.auth import Admin
from app.api.deps import TheKeys
from app.api.negotiation import require_json
from app.api.paging import PageSize, PageToken, decoded, encoded
from app.api.problems import documented
from app.api.schemas import RequestSchema
from app.db.tables import KeyRow
from app.services.keys import DEFAULT_OVERLAP_S, MAX_OVERLAP_S, NAME, IssuedKey, Page

router = APIRouter(tags=["keys"])
KeyId = Annotated[str, Path(description="id of a key: 12 hex digits")]
Name = Annotated[str, Field(pattern=NAME, description="what the key is for")]


def _text(value: object) -> object:
    """Raises `ValueError` for the numbers that pydantic would take for seconds since 1970."""
    if not isinstance(value, str):
        raise ValueError("must be text such as 2027-01-31T00:00:00Z")
    return value


Moment = Annotated[AwareDatetime, Field(strict=False), BeforeValidator(_text, json_schema_input_type=str)]
NO_STORE = {"cache-control": "no-store"}
_MADE = {
    "description": "the new key",
    "headers": {"Location": {"description": "the key", "schema": {"type": "string"}}},
}


class KeyIn(RequestSchema):
    """A key to make."""

    name: Name
    scope: Annotated[Scope, Field(description="`device`: asks for models; `admin`: everything")]
    expires_at: Annotated[
        Moment | None, Field(description="when it stops working: RFC 3339 with a time zone; null: never")
    ] = None


class RotationIn(RequestSchema):
    """How long the old key goes on working."""

    overlap_s: Annotated[int, Field(ge=0, le=MAX_OVERLAP_S, description="seconds")] = DEFAULT_OVERLAP_S


class KeyOut(BaseModel):
    """A key without its secret."""

    id: str
    name: str
    scope: Scope
    state: Annotated[Literal["active", "expired", "revoked"], Field(description="now")]
    created_at: datetime
    last_used_at: Annotated[datetime | None, Field(description="to within a minute")]
    expires_at: datetime | None
    revoked_at: datetime | None

    @classmethod
    def of(cls, row: KeyRow) -> KeyOut:
        stored = {name: getattr(row, name) for name in cls.model_fields.keys() - {"state"}}
        return cls(**stored, state=_state(row))


class IssuedKeyOut(KeyOut):
    """A new key, and its text this once."""

    key: Annotated[str, Field(description="`ww_<id>_<secret>`: what `Authorization: Bearer` takes; not shown again")]

    @classmethod
    def issued(cls, made: IssuedKey) -> IssuedKeyOut:
        return cls(**KeyOut.of(made.row).model_dump(), key=made.key)


class KeysOut(BaseModel):
    """A page of keys, by id. `next_page_token` is null on the last page."""

    keys: list[KeyOut]
    next_page_token: str | None

    @classmethod
    def of(cls, page: Page) -> KeysOut:
        return cls(keys=[KeyOut.of(row) for row in page.keys], next_page_token=encoded(page.continue_after))


@router.post(
    "/keys",
    status_code=201,
    summary="Make a key",
    dependencies=[Depends(require_json)],
    responses={201: _MADE, **documented(400, 413, 415, 422, 500, 503)},
)
def create_key(body: KeyIn, keys: TheKeys, by: Admin, response: Response) -> IssuedKeyOut:
    """The answer is the only place where the key's text ever stands: the service keeps its sha256."""
    return _issued(keys.create(body.name, body.scope, body.expires_at, by), response)


@router.get("/keys", summary="Keys", responses=documented(422, 500, 503))
def list_keys(keys: TheKeys, _: Admin, page_size: PageSize = 20, page_token: PageToken = None) -> KeysOut:
    """In order of id, the expired and revoked ones too."""
    return KeysOut.of(keys.page(decoded(page_token), page_size))


@router.get("/keys/{key_id}", summary="One key", responses=documented(404, 500, 503))
def get_key(key_id: KeyId, keys: TheKeys, _: Admin) -> KeyOut:
    return KeyOut.of(keys.find(key_id))


@router.post(
    "/keys/{key_id}/rotate",
    status_code=201,
    summary="Replace a key",
    dependencies=[Depends(require_json)],
    responses={201: _MADE, **documented(400, 404, 409, 413, 415, 422, 500, 503)},
)
def rotate_key(key_id: KeyId, body: RotationIn, keys: TheKeys, by: Admin, response: Response) -> IssuedKeyOut:
    """A new key of the same name, scope and lifetime. The old one works for `overlap_s` seconds more."""
    return _issued(keys.rotate(key_id, body.overlap_s, by), response)


@router.delete("/keys/{key_id}", status_code=204, summary="Revoke a key", responses=documented(404, 500, 503))
def revoke_key(key_id: KeyId, keys: TheKeys, by: Admin) -> None:
    """It stops working here at once, on other servers within seconds. Its entry stays, for the audit trail."""
    keys.revoke(key_id, by)


def _issued(made: IssuedKey, response: Response) -> IssuedKeyOut:
    response.headers.update(NO_STORE | {"location": f"/keys/{made.row.id}"})
    return IssuedKeyOut.issued(made)


def _state(row: KeyRow) -> Literal["active", "expired", "revoked"]:
    if row.revoked_at is not None:
        return "revoked"
    is_over = row.expires_at is not None and row.expires_at <= datetime.now(UTC)
    return "expired" if is_over else "active"
