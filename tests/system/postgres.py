"""A PostgreSQL server that a test may stop and start again, on the same port and data."""

from __future__ import annotations

import os
import pwd
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.app.conftest import postgres_program, takes_queries
from tests.system.ports import lasting_port

START_TIMEOUT_S = 240  # with a recovery, on a machine that does much else


@dataclass
class Postgres:
    """A running server. `url`: of its database."""

    url: str
    port: int
    command: list[str]
    as_user: dict[str, Any]
    home: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(self.command, stdout=quiet, stderr=quiet, cwd=self.home, **self.as_user)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not takes_queries(self.port):
            assert time.monotonic() < deadline, "PostgreSQL did not come up"
            time.sleep(0.1)

    def stop(self) -> None:
        """At once, as in a crash: clients are cut off, and the next start recovers from the log."""
        if self.process is not None:
            self.process.send_signal(3)  # SIGQUIT: immediate shutdown
            self.process.wait(60)

    def restart(self, away_s: float = 3) -> None:
        self.stop()
        time.sleep(away_s)
        self.start()


@contextmanager
def restartable_postgres(folder: Path) -> Iterator[Postgres]:
    """A server of this test run. It refuses to run as root, so root runs it as `nobody`."""
    home, port = folder / "postgres", lasting_port()
    home.mkdir()
    as_user: dict[str, Any] = {}
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.chmod(folder, 0o755)  # noqa: PTH101 - nobody must get to its folder in there
        os.chown(home, nobody.pw_uid, nobody.pw_gid)
        as_user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    data = str(home / "data")
    make = [postgres_program("initdb"), "-D", data, "-U", "widthwise", "-A", "trust", "-E", "UTF8", "--no-sync"]
    subprocess.run(make, check=True, capture_output=True, cwd=home, **as_user)
    serve = [postgres_program("postgres"), "-D", data, "-p", str(port), "-c", "listen_addresses=127.0.0.1"]
    command = [*serve, "-c", f"unix_socket_directories={home}", "-c", "max_connections=200"]
    server = Postgres(f"postgresql://widthwise@127.0.0.1:{port}/postgres", port, command, as_user, home)
    server.start()
    try:
        yield server
    finally:
        server.stop()
