"""One small world for all tests of the service: a pico chain, apps over fresh folders, real servers beside them."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from typing import Any, NoReturn

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app.db.migrate import migrate
from app.db.session import Database
from app.main import create_app, prepare
from app.settings import Settings
from chains import artifact
from chains.testing import pico_chain
from tests.app import trainings

START_TIMEOUT_S = 60


@pytest.fixture(scope="session", autouse=True)
def test_clients_are_on_this_machine() -> Iterator[None]:
    """By default they say that `testclient` asks `testserver`; an open server answers loopback alone."""
    with pytest.MonkeyPatch.context() as patch:
        here = partialmethod(TestClient.__init__, base_url="http://localhost", client=("127.0.0.1", 50000))
        patch.setattr(TestClient, "__init__", here)
        yield


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WIDTHWISE_") and "_TEST_" not in name]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("PORT", raising=False)


@pytest.fixture(scope="session")
def chain_file() -> bytes:
    return artifact.dump(pico_chain())


@pytest.fixture
def make_app(tmp_path: Path, chain_file: bytes) -> Iterator[Callable[..., FastAPI]]:
    """Apps by settings, migrated, with the pico chain published; by default over a folder of the test."""
    made = []

    def make(**settings: object) -> FastAPI:
        made.append(_prepared(Settings(**{"data_dir": tmp_path / "data", **settings}), chain_file))
        return made[-1]

    yield make
    for app in made:
        app.state.services.database.dispose()


def _prepared(settings: Settings, chain_file: bytes) -> FastAPI:
    app = create_app(settings)
    services = app.state.services
    prepare(services)
    services.registry.publish(chain_file)
    return app


@pytest.fixture
def app(make_app: Callable[..., FastAPI]) -> FastAPI:
    return make_app()


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


@pytest.fixture(scope="session")
def shared_client(tmp_path_factory: pytest.TempPathFactory, chain_file: bytes) -> Iterator[TestClient]:
    """A client of one app for all tests that leave nothing behind."""
    with TestClient(_prepared(Settings(data_dir=tmp_path_factory.mktemp("shared")), chain_file)) as client:
        yield client


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """A real S3 server over HTTP: the one of WIDTHWISE_TEST_S3_URL, else moto in a process of its own."""
    given = os.environ.get("WIDTHWISE_TEST_S3_URL")
    if given:
        yield given
        return
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with running(command, lambda: answers(f"http://127.0.0.1:{port}/moto-api/")):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def s3_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test credentials, unless the surroundings bring their own."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, os.environ.get(name, value))


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of a PostgreSQL server where databases can be made: WIDTHWISE_TEST_POSTGRES_URL, else a throw-away one."""
    given = os.environ.get("WIDTHWISE_TEST_POSTGRES_URL")
    if given:
        yield given.replace("postgresql://", "postgresql+psycopg://", 1)
        return
    with throw_away_postgres() as port:
        yield f"postgresql+psycopg://widthwise@127.0.0.1:{port}/postgres"


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """A fresh, empty database."""
    from sqlalchemy import create_engine, make_url, text

    name = f"test_{uuid.uuid4().hex[:12]}"
    server = create_engine(postgres_server, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield make_url(postgres_server).set(database=name).render_as_string(hide_password=False)
    with server.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    server.dispose()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Market-1501 folder of synthetic people, for jobs that train."""
    from chains.data.synthetic import write_market1501

    folder = tmp_path_factory.mktemp("data") / "site"
    write_market1501(folder, trainings.SITE)
    return folder


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher as a check leaves it, with a classifier of other people."""
    import torch

    from chains.export import origin, save_trained
    from chains.model import ReIDModel
    from chains.train import Trained
    from chains.width import Width

    torch.manual_seed(7)
    model = ReIDModel("resnet18", Width(4)).eval()
    mark = origin("teacher", model, trainings.INPUT, "MIT")
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_trained(Trained(model, torch.randn(8, model.backbone.channels)), mark, path)
    return path


@pytest.fixture
def make_world(site: Path, teacher_file: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], trainings.World]:
    """A service with that data set and that teacher, in a folder."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(trainings.ROOT))
    return lambda folder: trainings.make_world(folder, site, teacher_file)


@contextmanager
def throw_away_postgres() -> Iterator[int]:
    """A server from the installed binaries. It refuses to run as root, so root runs it as `nobody`."""
    initdb, postgres = postgres_program("initdb"), postgres_program("postgres")
    port, home = free_port(), Path(tempfile.mkdtemp(prefix="widthwise-postgres-"))  # pytest's folders are root's alone
    as_user: dict[str, Any] = {}
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.chown(home, nobody.pw_uid, nobody.pw_gid)
        as_user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    data = str(home / "data")
    make = [initdb, "-D", data, "-U", "widthwise", "-A", "trust", "-E", "UTF8", "--no-sync"]
    serve = [postgres, "-D", data, "-p", str(port), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
    try:
        subprocess.run(make, check=True, capture_output=True, cwd=home, **as_user)
        serve += ["-c", f"unix_socket_directories={home}"]
        with running(serve, lambda: takes_queries(port), cwd=home, **as_user):
            yield port
    finally:
        shutil.rmtree(home, ignore_errors=True)


def postgres_program(name: str) -> str:
    """The path of one of the server's programs, which Debian keeps out of PATH."""
    found = shutil.which(name) or next(
        (str(path) for path in sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)), None
    )
    return found or lacking(f"PostgreSQL (its program {name}); or set WIDTHWISE_TEST_POSTGRES_URL")


@pytest.fixture
def curl() -> str:
    """The program that the service tells people to use."""
    return shutil.which("curl") or lacking("curl")


def lacking(program: str) -> NoReturn:
    """A bare machine may run the tests without this program, and is told so; continuous integration may not."""
    if os.environ.get("CI"):
        pytest.fail(f"missing in CI: {program}")
    pytest.skip(f"not installed: {program}")


@contextmanager
def running(
    command: list[str], is_up: Callable[[], bool], cwd: Path | None = None, **as_user: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A process of ours, from when it is up until the end of the block; `as_user`: user, group, extra_groups."""
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet, cwd=cwd, **as_user) as process:
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not is_up():
                assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
                assert time.monotonic() < deadline, f"{command[0]} did not come up"
                time.sleep(0.1)
            yield process
        finally:
            process.terminate()
            process.wait(30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def takes_queries(port: int) -> bool:
    """A PostgreSQL server accepts connections a moment before it lets anybody in."""
    import psycopg

    try:
        psycopg.connect(host="127.0.0.1", port=port, user="widthwise", dbname="postgres", connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """Each of the two kinds, migrated and empty."""
    url = None if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    database = Database(Settings(data_dir=tmp_path, database_url=url).database)
    migrate(database)
    yield database
    database.dispose()
