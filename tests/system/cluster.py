"""The service beyond one machine, on one: PostgreSQL, an S3 server behind a proxy that can misbehave, two API processes
and two workers, each of which can be killed, stopped, continued and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.app.conftest import answers
from tests.system.ceph import ACCESS_KEY, SECRET_KEY
from tests.system.ports import lasting_port

ROOT = Path(__file__).parents[2]
ADMIN_KEY = "an-admin-key-of-the-system-tests-0123456789"
START_TIMEOUT_S = 240  # on a machine that does much else


@dataclass
class Member:
    """A process of the cluster. `log`: what it wrote, over all its lives."""

    name: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert not self.is_alive, f"{self.name} runs already"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to this process alone: what it started must notice by itself."""
        self.signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait(30)

    def pause(self) -> None:
        """SIGSTOP, until a SIGCONT; to this process alone."""
        self.signal(signal.SIGSTOP)

    def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(30)


@dataclass
class Cluster:
    """`urls[i]` is where API process i answers."""

    home: Path
    environment: dict[str, str]
    ports: tuple[int, int]
    apis: list[Member] = field(default_factory=list)
    workers: list[Member] = field(default_factory=list)

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.ports]

    def member(self, name: str, *arguments: str, **environment: str) -> Member:
        """A process `python -m app.cli …`, not started yet, with a folder of its own for its work."""
        folder = self.home / name
        folder.mkdir(exist_ok=True)
        own = {**self.environment, "WIDTHWISE_DATA_DIR": str(folder), **environment}
        command = [sys.executable, "-m", "app.cli", *arguments]
        return Member(name, command, own, self.home / f"{name}.log")

    def logs(self) -> str:
        """The end of every log, for a test that fails."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.home.glob("*.log")))


@contextmanager
def cluster(home: Path, database_url: str, s3_url: str, bucket: str) -> Iterator[Cluster]:
    """A running cluster on these servers; short leases, so that a dead worker is noticed within seconds."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WIDTHWISE_", "AWS_", "PORT"))}
    environment = {
        **kept,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "WIDTHWISE_DATABASE_URL": database_url,
        "WIDTHWISE_STORAGE_URL": f"s3://{bucket}/objects",
        "WIDTHWISE_S3_ENDPOINT_URL": s3_url,
        "WIDTHWISE_AUTH": "keys",
        "WIDTHWISE_ADMIN_KEY": ADMIN_KEY,
        "WIDTHWISE_HEARTBEAT_S": "0.5",
        "WIDTHWISE_LEASE_S": "4",
        "WIDTHWISE_QUEUE_POLL_S": "0.2",
        "WIDTHWISE_RETRY_WAIT_S": "0.5",
        "WIDTHWISE_STEP_ATTEMPTS": "10",
        "WIDTHWISE_JOB_TAKEOVERS": "30",
        "WIDTHWISE_CHECKPOINT_UPLOAD_S": "1",
        "WIDTHWISE_UPLOAD_PART_BYTES": str(256 * 1024),
        "WIDTHWISE_LOG_LEVEL": "info",
        "OMP_NUM_THREADS": "1",
    }
    made = Cluster(home, environment, (lasting_port(), lasting_port()))
    with ExitStack() as stack:
        migrate = made.member("migrate", "migrate")
        subprocess.run(
            migrate.command, env=migrate.environment, cwd=ROOT, check=True, timeout=START_TIMEOUT_S, capture_output=True
        )
        made.apis = [made.member(f"api-{i}", "serve", WIDTHWISE_PORT=str(port)) for i, port in enumerate(made.ports)]
        made.workers = [made.member(f"worker-{i}", "worker") for i in range(2)]
        for member in (*made.apis, *made.workers):
            stack.callback(member.stop)
            member.start()
        for api, url in zip(made.apis, made.urls, strict=True):
            until_up(api, url)
        yield made


def until_up(api: Member, url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not answers(f"{url}/health/live"):
        assert api.is_alive, f"{api.name} ended: {api.log.read_text()[-2000:]}"
        assert time.monotonic() < deadline, f"{api.name} did not come up: {api.log.read_text()[-2000:]}"
        time.sleep(0.2)
