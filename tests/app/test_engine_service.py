"""Jobs under real workers that are killed, stopped, continued and asked to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url, text

from app.actor import COMMAND_LINE, WORKER
from app.api.deps import Services
from app.db.executors import Executors
from app.db.jobs import JobRows
from app.db.tables import JobRow
from app.main import prepare, wire
from app.settings import Settings

ROOT = Path(__file__).parents[2]
QUICK = {
    "WIDTHWISE_HEARTBEAT_S": "0.3",
    "WIDTHWISE_LEASE_S": "1.5",
    "WIDTHWISE_QUEUE_POLL_S": "0.1",
    "WIDTHWISE_RETRY_WAIT_S": "0.1",
    "WIDTHWISE_CHILD_GRACE_S": "1",
    "WIDTHWISE_STEP_ATTEMPTS": "3",
}


@dataclass
class World:
    """A database with its workers; `ledger` says what the toy jobs did."""

    services: Services
    environment: dict[str, str]
    ledger: Path
    log: Path
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as sink:
            command = [sys.executable, str(ROOT / "tests/app/toy_worker.py"), *arguments]
            self.workers.append(subprocess.Popen(command, env=self.environment, cwd=ROOT, stderr=sink))
        return self.workers[-1]

    def start_and_wait(self, *arguments: str) -> subprocess.Popen[bytes]:
        before = self.log.read_text().count("worker takes jobs") if self.log.exists() else 0
        worker = self.start(*arguments)
        self.wait(lambda: self.log.read_text().count("worker takes jobs") > before, "the worker did not start")
        return worker

    def submit(self, kind: str, priority: int = 0, **request: Any) -> str:
        request = {"ledger": str(self.ledger), **request}
        return self.services.jobs.submit(kind, request, COMMAND_LINE, priority=priority)[0].id

    def job(self, job_id: str) -> JobRow:
        return self.services.jobs.find(job_id)

    def entries(self, what: str) -> list[tuple[str, int]]:
        """(step, pid) of each entry of that sort."""
        lines = self.ledger.read_text().split("\n") if self.ledger.exists() else []
        found = [line.split() for line in lines if line]
        return [(step, int(pid)) for entry, step, pid in found if entry == what]

    def worker_in(self, step: str, count: int = 1) -> int:
        """The process id of the worker that began this step the `count`th time, once it did."""

        def begun() -> list[int]:
            return [pid for name, pid in self.entries("begin") if name == step]

        self.wait(lambda: len(begun()) >= count, f"nobody began step {step}")
        return begun()[count - 1]

    def until(self, job_id: str, *states: str, timeout_s: float = 60) -> JobRow:
        self.wait(lambda: self.job(job_id).state in states, f"job {job_id} did not become {states}", timeout_s)
        return self.job(job_id)

    def wait(self, holds: Callable[[], bool], otherwise: str, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline, f"{otherwise}\n{self.log.read_text()[-6000:]}"
            time.sleep(0.05)

    def events(self, job_id: str, kind: str) -> list[dict[str, Any]]:
        return [event.data for event in self.services.jobs.events(job_id, 0)[0] if event.kind == kind]

    def kill(self, pid: int) -> None:
        worker = next(worker for worker in self.workers if worker.pid == pid)
        worker.kill()
        worker.wait()


@pytest.fixture
def make_world(tmp_path: Path) -> Iterator[Callable[..., World]]:
    with ExitStack() as stack:

        def make(database_url: str | None = None, **settings: str) -> World:
            kept = {name: value for name, value in os.environ.items() if not name.startswith("WIDTHWISE_")}
            chosen = QUICK | {"WIDTHWISE_DATA_DIR": str(tmp_path / "data")} | settings
            if database_url is not None:
                chosen["WIDTHWISE_DATABASE_URL"] = database_url
            with pytest.MonkeyPatch.context() as patch:
                for name, value in chosen.items():
                    patch.setenv(name, value)
                services = wire(Settings())
            prepare(services)
            environment = kept | chosen | {"PYTHONPATH": str(ROOT), "AWS_SECRET_ACCESS_KEY": "x", "PGPASSWORD": "x"}
            world = World(services, environment, tmp_path / "ledger", tmp_path / "log")
            stack.callback(end, world)
            return world

        yield make


def end(world: World) -> None:
    for worker in world.workers:
        if worker.poll() is None:
            worker.send_signal(signal.SIGCONT)
            worker.kill()
        worker.wait()
    world.services.database.dispose()


@pytest.fixture(params=["sqlite", "postgres"])
def world(request: pytest.FixtureRequest, make_world: Callable[..., World]) -> World:
    return make_world(request.getfixturevalue("postgres_url") if request.param == "postgres" else None)


@pytest.fixture
def on_postgres(make_world: Callable[..., World], postgres_url: str) -> World:
    return make_world(postgres_url)


@pytest.fixture
def on_sqlite(make_world: Callable[..., World]) -> World:
    return make_world()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_done_once(world: World, job_id: str) -> None:
    """Ended with the result of all steps, and told so once."""
    job = world.until(job_id, "succeeded", "failed", "cancelled")
    assert (job.state, job.error) == ("succeeded", None)
    assert job.result == {"done": ["one", "two", "three"]}
    assert [event["state"] for event in world.events(job_id, "state")].count("succeeded") == 1
    assert job.executor is None


def test_a_worker_killed_in_each_step_is_replaced_and_no_finished_step_runs_again(on_postgres: World) -> None:
    world = on_postgres
    world.start()
    world.start()
    job_id = world.submit("toy", step_s=1.0)
    for step in ("one", "two", "three"):
        victim = world.worker_in(step)
        world.start()
        world.kill(victim)
        world.worker_in(step, count=2)
    assert_done_once(world, job_id)
    assert [step for step, _ in world.entries("begin")] == ["one", "one", "two", "two", "three", "three"]
    assert [step for step, _ in world.entries("end")] == ["one", "two", "three"]
    assert world.job(job_id).attempts == 4


def test_a_killed_worker_that_is_started_again_goes_on_at_once(on_sqlite: World) -> None:
    world = on_sqlite
    first = world.start()
    job_id = world.submit("toy")
    assert world.worker_in("two") == first.pid
    world.kill(first.pid)
    world.start()
    assert_done_once(world, job_id)
    assert [step for step, _ in world.entries("end")] == ["one", "two", "three"]
    assert "a worker of this machine had died" in world.log.read_text()
    left = list(Path(world.environment["WIDTHWISE_DATA_DIR"], "work").iterdir())
    assert len(left) == 1, "what the killed worker left lies about"


def test_a_stopped_and_continued_worker_changes_nothing(on_postgres: World) -> None:
    world = on_postgres
    zombie = world.start_and_wait()
    job_id = world.submit("toy-hang", step_s=1.0)
    assert world.worker_in("hang") == zombie.pid
    zombie.send_signal(signal.SIGSTOP)
    other = world.start()
    job = world.until(job_id, "succeeded")
    assert job.result == {"by": other.pid}
    zombie.send_signal(signal.SIGCONT)
    world.wait(lambda: world.log.read_text().count("worker takes jobs") == 3, "the zombie did not begin anew")
    time.sleep(0.5)
    assert [pid for _, pid in world.entries("end")] == [other.pid], "it went on behind its fence"
    assert world.job(job_id).result == {"by": other.pid}
    assert [event["state"] for event in world.events(job_id, "state")].count("succeeded") == 1
    second = world.submit("toy", step_s=0.1)
    assert_done_once(world, second)


def test_a_running_child_and_all_it_started_end_when_the_job_is_cancelled(world: World) -> None:
    world.start()
    job_id = world.submit("toy-train")
    world.wait(lambda: bool(world.entries("trainer")), "no child ran")
    asked = time.monotonic()
    world.services.jobs.cancel(job_id, COMMAND_LINE)
    world.until(job_id, "cancelled", timeout_s=8)
    assert time.monotonic() - asked < 6
    children = [world.entries("launcher")[0][1], world.entries("trainer")[0][1]]
    assert not [pid for pid in children if is_running(pid)]
    assert [file.name for file in world.services.jobs.files(job_id)] == ["checkpoint"]
    assert [reason for reason, _ in world.entries("failed")] == ["cancelled"]


def test_children_die_with_a_killed_worker(on_sqlite: World) -> None:
    world = on_sqlite
    worker = world.start()
    world.submit("toy-train")
    world.wait(lambda: bool(world.entries("trainer")), "no child ran")
    children = [world.entries("launcher")[0][1], world.entries("trainer")[0][1]]
    assert all(is_running(pid) for pid in children)
    world.kill(worker.pid)
    world.wait(lambda: not any(is_running(pid) for pid in children), "children outlived their worker", 5)


def test_children_see_no_credentials(on_sqlite: World) -> None:
    world = on_sqlite
    world.start()
    world.submit("toy-train")
    world.wait(lambda: bool(world.entries("trainer")), "no child ran")
    (seen,) = Path(world.environment["WIDTHWISE_DATA_DIR"]).glob("work/*/*/secrets")
    names = set(seen.read_text().split("\n"))
    assert "PATH" in names
    assert not [name for name in names if name.startswith(("WIDTHWISE_", "AWS_", "PG"))]


def test_a_worker_asked_to_end_gives_its_job_back_at_once(on_postgres: World) -> None:
    world = make_patient(on_postgres)
    workers = [world.start_and_wait(), world.start_and_wait()]
    job_id = world.submit("toy", step_s=1.0)
    pid = world.worker_in("two")
    first, second = workers if workers[0].pid == pid else workers[::-1]
    first.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    assert world.worker_in("two", count=2) == second.pid
    assert time.monotonic() - asked < 8, "the lease is a minute here"
    assert first.wait(20) == 0
    assert_done_once(world, job_id)
    assert world.job(job_id).attempts == 1, "an orderly end is not held against the job"


def make_patient(world: World) -> World:
    """With leases so long that nothing in the test can come of one."""
    world.environment |= {"WIDTHWISE_LEASE_S": "60", "WIDTHWISE_HEARTBEAT_S": "5"}
    return world


def test_a_child_is_asked_to_end_before_the_worker_ends(on_sqlite: World) -> None:
    world = on_sqlite
    worker = world.start()
    job_id = world.submit("toy-train")
    world.wait(lambda: bool(world.entries("trainer")), "no child ran")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(20) == 0
    assert not is_running(world.entries("trainer")[0][1])
    assert world.job(job_id).state == "queued"
    world.start()
    world.wait(lambda: len(world.entries("trainer")) == 2, "nobody went on")


def test_passing_failures_are_tried_again_and_told(on_sqlite: World) -> None:
    world = on_sqlite
    world.start()
    job_id = world.submit("toy-flaky", failures=2, step_s=0.1)
    job = world.until(job_id, "succeeded", "failed")
    assert job.result == {"begun": 3}
    waits = [event for event in world.events(job_id, "step") if event["state"] == "waiting"]
    assert [event["attempt"] for event in waits] == [1, 2]
    assert "s3.internal" not in str(world.events(job_id, "step")), "hosts stay in the log"


def test_a_step_that_keeps_failing_fails_the_job(on_sqlite: World) -> None:
    world = on_sqlite
    world.start()
    job = world.until(world.submit("toy-flaky", failures=99, step_s=0.1), "succeeded", "failed")
    assert job.state == "failed"
    assert "object store did not answer" in str(job.error)
    assert len([step for step, _ in world.entries("begin") if step == "flaky"]) == 3
    assert world.entries("failed")


def test_a_failed_job_goes_on_at_the_step_that_failed(world: World, tmp_path: Path) -> None:
    world.start()
    (tmp_path / "broken").touch()
    job_id = world.submit("toy-flaky", broken=str(tmp_path / "broken"), step_s=0.1)
    job = world.until(job_id, "failed")
    assert job.error == "it is broken; mend it"
    assert len(world.entries("begin")) == 2, "what can never succeed is not tried again"
    (tmp_path / "broken").unlink()
    world.services.jobs.retry(job_id, COMMAND_LINE)
    job = world.until(job_id, "succeeded")
    assert job.error is None
    assert [step for step, _ in world.entries("begin")] == ["first", "flaky", "flaky"]


def test_a_failed_job_of_a_worker_that_died_with_its_last_word_is_tried_again(world: World, tmp_path: Path) -> None:
    """Our row says failed, but the engine was not told before the worker died."""
    world.start()
    (tmp_path / "broken").touch()
    job_id = world.submit("toy-flaky", broken=str(tmp_path / "broken"), step_s=0.1)
    world.until(job_id, "failed")
    time.sleep(0.5)
    schema = "dbos." if world.services.database.engine.dialect.name == "postgresql" else ""
    with world.services.database.transaction() as session:
        session.execute(text(f"UPDATE {schema}workflow_status SET status = 'PENDING', executor_id = 'dead'"))
    (tmp_path / "broken").unlink()
    world.services.jobs.retry(job_id, COMMAND_LINE)
    world.until(job_id, "succeeded")
    assert [step for step, _ in world.entries("begin")] == ["first", "flaky", "flaky"]


def test_jobs_of_higher_priority_begin_first(world: World) -> None:
    jobs = {priority: world.submit("toy", priority=priority, step_s=0.05) for priority in (-100, 0, 100, 5)}
    world.start()
    for job_id in jobs.values():
        world.until(job_id, "succeeded")
    begun = sorted(jobs, key=lambda priority: world.job(jobs[priority]).started_at)  # type: ignore[arg-type,return-value]
    assert begun == [100, 5, 0, -100]


def test_a_worker_runs_as_many_jobs_at_once_as_it_has_slots(make_world: Callable[..., World]) -> None:
    world = make_world(WIDTHWISE_WORKER_SLOTS="2")
    jobs = [world.submit("toy-hang", step_s=1.5) for _ in range(3)]
    world.start()
    world.wait(lambda: len(world.entries("begin")) == 2, "there were not two at once")
    assert not world.entries("end")
    for job_id in jobs:
        world.until(job_id, "succeeded")


def test_a_job_that_keeps_killing_workers_ends(make_world: Callable[..., World]) -> None:
    world = make_world(WIDTHWISE_JOB_TAKEOVERS="1")
    first = world.start()
    job_id = world.submit("toy", step_s=5)
    world.worker_in("one")
    world.kill(first.pid)
    world.start()
    job = world.until(job_id, "failed")
    assert "1 workers died" in str(job.error)
    assert "'one'" in str(job.error)


def test_a_worker_without_torch_says_what_to_install(on_sqlite: World) -> None:
    world = on_sqlite
    world.start("--without-torch")
    job = world.until(world.submit("toy-torch"), "failed")
    assert "widthwise[train]" in str(job.error)
    assert_done_once(world, world.submit("toy", step_s=0.05))


def test_a_job_cancelled_in_the_queue_never_begins_and_is_followed_up(on_sqlite: World) -> None:
    world = on_sqlite
    job_id = world.submit("toy")
    assert world.services.jobs.cancel(job_id, COMMAND_LINE).state == "cancelled"
    world.start()
    world.wait(lambda: bool(world.entries("failed")), "what follows a cancel was left out")
    assert world.entries("begin") == []
    assert world.job(job_id).state == "cancelled"


def test_a_queued_job_that_the_engine_forgot_is_found(world: World) -> None:
    """Its server died between the two halves of a retry, or its worker between two halves of giving it back."""
    job_id = world.submit("toy", step_s=0.05)
    schema = "dbos." if world.services.database.engine.dialect.name == "postgresql" else ""
    with world.services.database.transaction() as session:
        session.execute(text(f"DELETE FROM {schema}workflow_status"))
    world.start()
    assert_done_once(world, job_id)


def test_worker_health_tells_whether_a_worker_of_this_machine_lives(on_sqlite: World) -> None:
    world = on_sqlite

    def health() -> int:
        command = [sys.executable, "-m", "app.cli", "worker-health"]
        done = subprocess.run(command, env=world.environment, cwd=ROOT, capture_output=True, timeout=60, check=False)
        return done.returncode

    assert health() == 1
    worker = world.start_and_wait()
    assert health() == 0
    worker.terminate()
    assert worker.wait(20) == 0
    assert health() == 1


def test_a_job_dropped_while_the_database_was_away_is_given_back(on_sqlite: World) -> None:
    """By the books it is the living worker's, but nothing there runs it any more."""
    world = on_sqlite
    worker = world.start_and_wait()
    with world.services.database.transaction() as session:
        (row,) = Executors(session).living()
        job_id = world.services.jobs.submit_in(session, "toy", {"ledger": str(world.ledger), "step_s": 0.05}, WORKER).id
        assert JobRows(session).begin(job_id, row.id)
        session.execute(text("UPDATE workflow_status SET status = 'PENDING', executor_id = :id"), {"id": row.id})
    assert_done_once(world, job_id)
    assert worker.poll() is None


def test_serve_on_sqlite_runs_jobs_and_ends_in_good_order(on_sqlite: World) -> None:
    world = on_sqlite
    command = [sys.executable, "-u", "-m", "app.cli", "serve", "--port", "0"]
    with world.log.open("ab") as sink:
        server = subprocess.Popen(command, env=world.environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=sink)
    world.workers.append(server)
    job = world.until(world.submit("unheard-of"), "failed")
    assert "knows no jobs of kind 'unheard-of'" in str(job.error)
    server.terminate()
    assert server.wait(20) in (0, -signal.SIGTERM)
    assert "worker stopped" in world.log.read_text()
    assert "Traceback" not in world.log.read_text()


def test_jobs_outlive_a_database_that_goes_away_and_comes_back(
    on_postgres: World, postgres_server: str, postgres_url: str
) -> None:
    """Longer than a lease, and in the middle of a step: nobody is taken for dead, nothing fails, nothing is lost."""
    world = on_postgres
    for _ in range(2):
        world.start_and_wait()
    job_id = world.submit("toy", step_s=1.0)
    world.worker_in("two")
    name = make_url(postgres_url).database
    server = create_engine(postgres_server, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
        kill = text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name")
        connection.execute(kill, {"name": name})
        time.sleep(4)
        connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))
    server.dispose()
    assert_done_once(world, job_id)
    assert "taken for dead" not in world.log.read_text()
