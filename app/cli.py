"""The command line: the service's `widthwise serve | migrate | publish | demo`, and the research commands of
`chains.cli`, which load torch only when one of them runs."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer
import uvicorn
from pydantic import ValidationError

from app import logs
from app.api.deps import Services
from app.db.migrate import migrate as migrate_database
from app.demo import DemoFailed, run_demo
from app.errors import AppError
from app.main import create_app, wire
from app.services.demo_chain import publish_demo_chain_if_empty
from app.settings import Settings, is_loopback
from chains.cli import cli as research
from chains.errors import ChainsError

cli = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
_log = structlog.get_logger("app.cli")
SHUTDOWN_TIMEOUT_S = 5  # downloads can be resumed, and container engines kill after 10 seconds
TRY = """\
Widthwise answers on {url} (docs: {url}/docs). Try:

  curl --fail-with-body --json '{{"limits":{{"max_macs":10000000}}}}' {url}/models -o model.onnx
"""


def main() -> None:
    """Entry point. Expected failures end with one line on standard error and status 1 (of a research command: 2), never
    with a traceback."""
    try:
        cli()
    except ValidationError as error:
        sys.exit(f"widthwise: {'; '.join(_reason(mistake['loc'], str(mistake['msg'])) for mistake in error.errors())}")
    except (AppError, ChainsError, DemoFailed) as error:
        sys.exit(f"widthwise: {error}")


def _reason(where: tuple[int | str, ...], message: str) -> str:
    """What is wrong with a setting, by the name it is set with; rules about several settings name them themselves."""
    text = message.removeprefix("Value error, ")
    return f"WIDTHWISE_{str(where[0]).upper().removeprefix('WIDTHWISE_')}: {text}" if where else text


@cli.callback()
def widthwise() -> None:
    """Hands every edge camera an ONNX person re-identification model that fits its limits."""


@cli.command()
def serve(
    host: Annotated[str | None, typer.Option(help="address to bind; default WIDTHWISE_HOST or 127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="port; default WIDTHWISE_PORT, PORT or 8000")] = None,
) -> None:
    """Migrate, publish the demo chain if there is none, and serve."""
    settings = _settings(host=host, port=port)
    app = create_app(settings)
    _prepare(app.state.services)
    if not is_loopback(settings.host):
        _log.warning(
            "ANYONE WHO REACHES THIS ADDRESS CAN USE THE SERVICE: there are no API keys yet", host=settings.host
        )
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_S,
    )
    Announcing(config).run()


@cli.command()
def migrate() -> None:
    """Bring the database to the newest revision and make the folder or bucket for objects."""
    services = wire(_settings())
    migrate_database(services.database)
    services.registry.prepare_storage()
    typer.echo("database and object store are ready")


@cli.command()
def publish(file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="a chain file")]) -> None:
    """Publish a chain, for every server on this database. The first one published becomes `stable`."""
    services = wire(_settings())
    chain = services.registry.publish(file.read_bytes())
    typer.echo(f"published {chain.name} ({chain.digest[:12]}…, {len(chain.widths)} widths)")


@cli.command()
def demo(
    url: Annotated[str | None, typer.Option(help="where the service runs; default http://127.0.0.1:PORT")] = None,
) -> None:
    """Act as three devices with different limits against a running service, and measure what they get."""
    settings = Settings()
    typer.echo(run_demo(url or f"http://127.0.0.1:{settings.port}"))


cli.add_typer(research)


class Announcing(uvicorn.Server):
    """A server that says how to use it once it listens, and not before."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            typer.echo(TRY.format(url=_url(self.servers)))


def _settings(**given: Any) -> Settings:
    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    logs.configure(settings.log_level)
    return settings


def _prepare(services: Services) -> None:
    migrate_database(services.database)
    services.registry.prepare_storage()
    published = publish_demo_chain_if_empty(services.registry)
    if published is not None:
        _log.info("published the demo chain", chain=published.name, widths=len(published.widths))
    elif services.registry.is_empty():
        _log.warning("there is no chain to serve, and this package carries no demo chain")


def _url(servers: Sequence[Any]) -> str:
    """Where a client on this machine finds the first listening socket."""
    host, port, *_ = servers[0].sockets[0].getsockname()
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 - compared, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


if __name__ == "__main__":
    main()
