"""Who may call a handler: `Device` for keys of either scope, `Admin` for those of scope `admin` alone.

Keys are read and checked by `app.api.gate`, around every request; here a handler says which scope it needs. On an open
server everybody is the admin `anonymous`.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from app.actor import Actor
from app.errors import Forbidden, Unauthenticated

ACTOR = "widthwise.actor"  # where the gate leaves its finding in the ASGI scope: an Actor, or None without a key
_BEARER = HTTPBearer(
    scheme_name="apiKey",
    bearerFormat="ww_<id>_<secret>",
    description="An API key. An open server, on loopback, asks for none.",
    auto_error=False,
)
_Described = Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)]


async def device(request: Request, _: _Described) -> Actor:
    """Raises `Unauthenticated` without a key."""
    actor: Actor | None = request.scope[ACTOR]  # a server without its gate fails here, and lets nobody in
    if actor is None:
        raise Unauthenticated("this needs an API key: send the header `Authorization: Bearer ww_…`")
    return actor


async def admin(actor: Annotated[Actor, Security(device)]) -> Actor:
    """Raises `Unauthenticated` without a key and `Forbidden` for one of another scope."""
    if actor.scope != "admin":
        raise Forbidden(f"this needs a key of scope admin; key {actor.id} has scope {actor.scope}")
    return actor


Device = Annotated[Actor, Security(device)]
Admin = Annotated[Actor, Security(admin)]
