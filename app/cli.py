"""The command line: the service's `widthwise serve | worker | migrate | publish | gc | demo`, and the research commands
of `chains.cli`, which load torch only when one of them runs."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import structlog
import typer
import uvicorn
from pydantic import ValidationError

from app import logs, tracing
from app.actor import COMMAND_LINE
from app.api.deps import Services
from app.api.health import software_version
from app.db.session import Database
from app.demo import DemoFailed, run_demo
from app.errors import AppError, WorkerNotAlive
from app.key_commands import keys_cli
from app.main import create_app, make_worker, prepare, wire
from app.redaction import redact
from app.services.demo_chain import publish_demo_chain_if_empty
from app.services.integrity import look
from app.services.promotion import unknowns
from app.services.registry import stated_rights
from app.settings import Settings, is_loopback
from app.storage import open_store
from app.terms import ConsentBasis, Terms
from app.worker.leases import local_worker_is_alive
from chains import artifact
from chains.cli import cli as research
from chains.errors import ChainsError

if TYPE_CHECKING:
    from app.worker.main import EmbeddedWorker

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
        sys.exit(f"widthwise: {redact(str(error))}")


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
    tracing.configure("widthwise-api", software_version())
    app = create_app(settings)
    _prepare(app.state.services)
    app.state.services.keys.require_an_admin_key(settings.host)
    if not (settings.keys_required or is_loopback(settings.host)):
        _log.warning("ANYONE WHO REACHES THIS ADDRESS IS ADMIN: WIDTHWISE_AUTH=open", host=settings.host)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_S,
    )
    Announcing(config, _embedded_worker(settings, app.state.services)).run()


@cli.command()
def worker(
    slots: Annotated[int | None, typer.Option(help="jobs at once; default WIDTHWISE_WORKER_SLOTS or 1")] = None,
) -> None:
    """Run jobs until told to stop; then give the running ones back, so that another worker goes on at once."""
    settings = _settings(worker_slots=slots)
    tracing.configure("widthwise-worker", software_version())
    services = wire(settings)
    running = make_worker(settings, services)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: running.stop())
    running.run()
    services.database.dispose()


@cli.command()
def worker_health() -> None:
    """End with status 0 while a worker of this machine, or of this container, gives signs of life; else with 1."""
    settings = _settings(log_level="error")
    database = Database(settings.database)
    if not local_worker_is_alive(database, settings.lease_s):
        raise WorkerNotAlive(settings.lease_s)
    typer.echo("a worker is alive")


@cli.command()
def migrate() -> None:
    """Bring the database to the newest revision and make the folder or bucket for objects."""
    prepare(wire(_settings()))
    typer.echo("database and object store are ready")


@cli.command()
def publish(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="a chain file")],
    terms: Annotated[Terms | None, typer.Option(help="what it may be used for; default as its provenance says")] = None,
    consent_basis: Annotated[
        ConsentBasis | None,
        typer.Option(help="why the images of people it was made from may be used; default as its provenance says"),
    ] = None,
) -> None:
    """Publish a chain, for every server on this database. The first one published becomes `stable`."""
    services, content = wire(_settings()), file.read_bytes()
    stated = stated_rights(artifact.load(content).chain) if terms or consent_basis else None
    rights = stated and replace(
        stated, terms=terms or stated.terms, consent_basis=consent_basis or stated.consent_basis
    )
    chain = services.registry.publish(content, rights=rights)
    typer.echo(f"published {chain.name} ({chain.digest[:12]}…, {len(chain.widths)} widths)")
    if unknown := unknowns(chain):
        typer.echo(f"nobody knows its {' and its '.join(unknown)}: promoting it needs accept_unknown", err=True)


@cli.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would go, and delete nothing")] = False,
    grace_hours: Annotated[
        float | None, typer.Option(min=0, max=100_000, help="younger objects stay; default WIDTHWISE_GC_GRACE_H or 24")
    ] = None,
) -> None:
    """Delete stored objects that nothing names any more, and old events and files of finished jobs."""
    services = wire(_settings())
    grace = None if grace_hours is None else timedelta(hours=grace_hours)
    collected = services.garbage.collect(COMMAND_LINE, dry_run=dry_run, grace=grace)
    for found in collected.objects:
        typer.echo(f"{found.key}  {found.size_bytes:,} bytes  {found.modified_at:%Y-%m-%d %H:%M}")
    deleted, count = "would delete" if dry_run else "deleted", len(collected.objects)
    rows = ", ".join(f"{number:,} {kind.replace('_', ' ')}" for kind, number in collected.rows.items())
    typer.echo(f"{deleted} {count:,} objects of {collected.size_bytes:,} bytes, {collected.drafts:,} drafts; {rows}")


@cli.command()
def check_storage(
    read: Annotated[bool, typer.Option("--read", help="read and hash every file, not only look at its size")] = False,
) -> None:
    """Say which files the database names and the object store lacks or has damaged; status 1 if there are any."""
    settings = _settings()
    store = open_store(settings.storage, settings.s3_endpoint_url)
    looked = damaged = 0
    for finding in look(Database(settings.database), store, read=read):
        looked += 1
        if finding.damage is not None:
            damaged += 1
            typer.echo(f"{finding.named.what} {finding.damage}: {finding.named.sha256}")
    typer.echo(f"{looked:,} files looked at, {damaged:,} missing or damaged")
    if damaged:
        raise typer.Exit(1)


@cli.command()
def demo(
    url: Annotated[str | None, typer.Option(help="where the service runs; default http://127.0.0.1:PORT")] = None,
    key: Annotated[
        str | None, typer.Option(envvar="WIDTHWISE_KEY", show_envvar=False, help="an API key; default WIDTHWISE_KEY")
    ] = None,
) -> None:
    """Act as three devices with different limits against a running service, and measure what they get."""
    settings = Settings()
    typer.echo(run_demo(url or f"http://127.0.0.1:{settings.port}", key or None))


cli.add_typer(keys_cli, name="keys")
cli.add_typer(research)


class Announcing(uvicorn.Server):
    """A server that says how to use it once it listens, and not before. Its worker begins then and ends with it."""

    def __init__(self, config: uvicorn.Config, worker: EmbeddedWorker | None) -> None:
        super().__init__(config)
        self._worker = worker

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            typer.echo(TRY.format(url=_url(self.servers)))
            if self._worker is not None:
                self._worker.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._worker is not None:
            self._worker.stop()  # it ends while the last downloads do
        await super().shutdown(sockets)
        if self._worker is not None:
            await asyncio.to_thread(self._worker.join)


def _settings(**given: Any) -> Settings:
    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    logs.configure(settings.log_level, settings.log_format, settings.secrets)
    return settings


def _embedded_worker(settings: Settings, services: Services) -> EmbeddedWorker | None:
    if not settings.runs_worker:
        return None
    from app.worker.main import EmbeddedWorker

    return EmbeddedWorker(make_worker(settings, services))


def _prepare(services: Services) -> None:
    prepare(services)
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
