"""`widthwise keys`: API keys without the API, for the first admin key and for the day when none is left.

These work on the database directly. A new key goes to standard output, alone and this once, so that a script can catch
it; what people read goes to standard error.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from app import logs
from app.actor import COMMAND_LINE, Scope
from app.db.migrate import migrate
from app.db.tables import KeyRow
from app.main import wire
from app.services.keys import DEFAULT_OVERLAP_S, MAX_LIFETIME, MAX_OVERLAP_S, NAME, IssuedKey, Keys
from app.settings import Settings

PAGE = 100
keys_cli = typer.Typer(no_args_is_help=True, help="Make, list, rotate and revoke API keys.")
KeyId = Annotated[str, typer.Argument(metavar="ID", help="the 12 hex digits after `ww_`")]


def _named(name: str) -> str:
    if re.fullmatch(NAME, name) is None:
        raise typer.BadParameter("up to 64 letters, digits, spaces and . _ -, beginning with a letter or digit")
    return name


@keys_cli.command()
def create(
    name: Annotated[str, typer.Argument(callback=_named, help="what the key is for")],
    scope: Annotated[Scope, typer.Option(help="`device` asks for models, `admin` may do everything")] = "device",
    expires_in_days: Annotated[
        int | None, typer.Option(min=1, max=MAX_LIFETIME.days, help="default: it never expires")
    ] = None,
) -> None:
    """Make a key and print it, once."""
    expires_at = None if expires_in_days is None else datetime.now(UTC) + timedelta(days=expires_in_days)
    _show(_keys().create(name, scope, expires_at, COMMAND_LINE))


@keys_cli.command(name="list")
def list_keys() -> None:
    """Every key, the expired and revoked ones too, without its secret."""
    keys = _keys()
    after: str | None = ""
    while after is not None:
        page = keys.page(after, PAGE)
        for key in page.keys:
            typer.echo(_line(key))
        after = page.continue_after


@keys_cli.command()
def rotate(
    key_id: KeyId,
    overlap_s: Annotated[
        int, typer.Option(min=0, max=MAX_OVERLAP_S, help="for how long the old key works still, in seconds")
    ] = DEFAULT_OVERLAP_S,
) -> None:
    """Make a key in place of an old one and print it, once."""
    _show(_keys().rotate(key_id, overlap_s, COMMAND_LINE))


@keys_cli.command()
def revoke(key_id: KeyId) -> None:
    """End a key. Running servers notice within seconds."""
    _keys().revoke(key_id, COMMAND_LINE)
    typer.echo(f"revoked {key_id}", err=True)


def _keys() -> Keys:
    settings = Settings()
    logs.configure(settings.log_level, settings.log_format, settings.secrets)
    services = wire(settings)
    migrate(services.database)  # the first key comes before the first start
    return services.keys


def _show(made: IssuedKey) -> None:
    typer.echo(f"{_line(made.row)}\nkeep it now, it is not shown again:", err=True)
    typer.echo(made.key)


def _line(key: KeyRow) -> str:
    moments = (("last used", key.last_used_at), ("expires", key.expires_at), ("revoked", key.revoked_at))
    told = [f"{what} {moment:%Y-%m-%dT%H:%MZ}" for what, moment in moments if moment is not None]
    return "  ".join([key.id, f"{key.scope:6}", key.name, f"made {key.created_at:%Y-%m-%dT%H:%MZ}", *told])
