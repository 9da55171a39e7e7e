"""The service beyond one machine, and what it survives: PostgreSQL, a real S3 server, two API processes, two workers.

Every fault ends with the right chain, exactly once. Right: the chain of an undisturbed run with the same request; the
names differ, so it is the embedding space, which is a digest of the trained weights, and every width's accuracy that
must be equal.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest

from tests.system.cluster import ADMIN_KEY, ROOT, Cluster, Member, cluster, until_up
from tests.system.conftest import short_lived_folder
from tests.system.holding import ENDED, STEPS, Held, events, held, published, publishing_held
from tests.system.postgres import Postgres, restartable_postgres
from tests.system.proxy import Mood, Proxy, moody_proxy

pytestmark = pytest.mark.timeout(1800)
TRAINING_STEPS = 32  # of a refinement: longer than a worker waits between two looks at it, also on a fast machine
LIMIT_S = 600  # of one wait: many times what it takes, since only what is broken waits so long


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("teacher_to_device", ROOT / "examples" / "teacher_to_device.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


example = load_example()


@dataclass
class World:
    """The running service, the servers under it, and what an undisturbed refinement gave."""

    cluster: Cluster
    postgres: Postgres
    store: Proxy
    undisturbed: dict[str, Any]

    def api(self, index: int = 0) -> Any:
        return example.Api(self.cluster.urls[index], ADMIN_KEY)


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A teacher file and an archive of people."""
    folder = tmp_path_factory.mktemp("material")
    return example.train_teacher(folder, 30), example.pack_people(folder)


@pytest.fixture(scope="session")
def world(real_s3_url: str, material: tuple[Path, Path]) -> Iterator[World]:
    with (
        short_lived_folder() as home,
        restartable_postgres(home) as postgres,
        moody_proxy(real_s3_url) as proxy,
        cluster(home, postgres.url, proxy.url, "widthwise-system") as running,
    ):
        made = World(running, postgres, proxy, {})
        try:
            example.bring(made.api(), "platform", *material)
            made.undisturbed = outcome(made, finished(made, submit(made, "undisturbed")))
            yield made
        finally:
            print(running.logs())


def submit(world: World, name: str, key: str | None = None, index: int = 0) -> str:
    """The id of a new refinement that makes the chain `name`."""
    request = {
        "name": name, "teacher": "platform", "dataset": "platform", "steps": TRAINING_STEPS,
        "narrowest": "4", "rungs": 3, "evaluation": {"calibration_images": 256, "validation_identities": 0},
    }  # fmt: skip
    headers = {"Idempotency-Key": key or name}
    return str(world.api(index).json("POST", "/jobs", {"kind": "refine", "request": request}, headers)["id"])


def look(world: World, job: str, index: int = 0) -> dict[str, Any]:
    return dict(world.api(index).json("GET", f"/jobs/{job}"))


def wait_for(condition: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> Any:
    deadline = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {limit_s} s for {what}"
        time.sleep(0.1)
    return found


def finished(world: World, job: str) -> dict[str, Any]:
    """The job once it has ended, which it must have done well."""
    row = wait_for(lambda: (found := look(world, job))["state"] in ENDED and found, f"job {job}")
    assert row["state"] == "succeeded", row
    return dict(row)


def strike(world: World, job: str, blow: Callable[[Member], None], *steps: str) -> Member:
    """Deal the worker that has the job a blow in the middle of one of `steps`; which worker it was. A training has
    begun to make steps by then."""

    def struck() -> Member | None:
        with held(world.postgres.url, job) as now:
            assert not now.is_past(steps[-1]), f"step {steps[-1]} of job {job} was over before it was seen: {now}"
            if now.step not in steps or (now.step == "refine" and now.training_step < 2):
                return None
            worker = worker_of(world, now)
            if worker is not None:
                blow(worker)
            return worker

    return cast("Member", wait_for(struck, f"a worker in step {' or '.join(steps)} of job {job}"))


def worker_of(world: World, now: Held) -> Member | None:
    """The worker that has the job, if that one is alive."""
    return next((w for w in world.cluster.workers if w.is_alive and w.process and w.process.pid == now.pid), None)


def unharmed(member: Member) -> None:
    """The blow that only looks."""
    assert member.is_alive


def outcome(world: World, row: dict[str, Any]) -> dict[str, Any]:
    """What must be the same however a refinement went: weights and accuracies of the published chain."""
    name = row["request"]["name"]
    chain = world.api().json("GET", f"/chains/{name}")
    frontier = world.api().json("GET", f"/chains/{name}/frontier")
    assert chain["job"] == row["id"]
    return {"space": chain["embedding_space"], "maps": [w["accuracy"]["map"] for w in frontier["widths"]]}


def assert_right(world: World, job: str) -> None:
    """The job ended once, with the chain that an undisturbed one makes."""
    assert outcome(world, finished(world, job)) == world.undisturbed
    ends = [data["state"] for kind, data in example.follow(world.api(), job) if kind == "state"]
    assert ends.count("succeeded") == 1, ends
    assert ends[-1] == "succeeded"


@contextlib.contextmanager
def started_again(*members: Member) -> Iterator[None]:
    """Whatever the test does to them, the cluster is whole afterwards."""
    try:
        yield
    finally:
        for member in members:
            if not member.is_alive:
                member.start()


def test_a_teacher_s_whole_way_to_three_devices(world: World, material: tuple[Path, Path]) -> None:
    command = [
        *(sys.executable, str(ROOT / "examples" / "teacher_to_device.py"), "--url", world.cluster.urls[1]),
        *("--key", ADMIN_KEY, "--name", "example", "--teacher", str(material[0]), "--steps", "20", "--processes", "2"),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=2 * LIMIT_S, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert run.stdout.count("device with") == 3
    assert "mAP of the three devices" in run.stdout


def test_a_worker_killed_in_every_step(world: World) -> None:
    job = submit(world, "killed")
    with started_again(*world.cluster.workers):
        for step in ("cluster", "refine", "calibrate", "evaluate"):
            strike(world, job, Member.kill, step).start()
        with publishing_held(world.postgres.url) as somebody_publishes:
            strike(world, job, Member.kill, "verify").start()
            wait_for(somebody_publishes, f"job {job} to publish")
            strike(world, job, Member.kill, "publish").start()
            assert look(world, job)["step"] == "publish"
            assert look(world, job)["state"] not in ENDED
            assert [row["name"] for row in world.api().json("GET", "/chains")["chains"]].count("killed") == 0
        assert_right(world, job)
    told = [data for kind, data in events(world.postgres.url, job) if kind == "step"]
    begun = [data["step"] for data in told if data["state"] == "started"]
    assert all(begun.count(step) >= 2 for step in STEPS), begun
    assert published(world.postgres.url, "killed") == 1
    assert look(world, job)["attempts"] >= 7


def test_an_api_killed_during_an_upload_which_goes_on_elsewhere(world: World, material: tuple[Path, Path]) -> None:
    content = material[1].read_bytes()
    described = {"kind": "archive", **example.announce(content)}
    body = {"name": "cut-off", "source": described, "layout": "market1501", **example.RIGHTS}
    world.api().json("POST", "/datasets", body)
    api, path = world.cluster.apis[0], "/datasets/cut-off/archive"
    with started_again(api):
        killed = threading.Event()
        sender = threading.Thread(target=send_most, args=(world, path, content, killed), daemon=True)
        sender.start()
        try:
            wait_for(lambda: offset_of(world, path) >= 512 * 1024, "two parts of the upload")
            assert sender.is_alive()
            api.kill()
        finally:
            killed.set()
        sender.join(LIMIT_S)
        assert not sender.is_alive()
        there = offset_of(world, path)
        assert 512 * 1024 <= there < len(content)
        example.upload(world.api(1), path, content)
        example.upload(world.api(1), path, content)  # as a client whose last answer was lost: it ends, too
        assert example.wait_until_checked(world.api(1), "/datasets/cut-off")["report"]
    until_up(api, world.cluster.urls[0])


def send_most(world: World, path: str, content: bytes, killed: threading.Event) -> None:
    """Three quarters of the content; the rest only once the server was killed, as a client that knows nothing of it."""
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", world.cluster.ports[0], timeout=LIMIT_S)

    def pieces() -> Iterator[bytes]:
        yield content[: len(content) * 3 // 4]
        killed.wait(LIMIT_S)
        yield content[len(content) * 3 // 4 :]

    headers = {
        "Authorization": f"Bearer {ADMIN_KEY}", "Upload-Offset": "0", "Content-Length": str(len(content)),
        "Content-Type": "application/offset+octet-stream",
    }  # fmt: skip
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("PATCH", path, pieces(), headers)
        connection.getresponse()


def offset_of(world: World, path: str) -> int:
    return int(world.api(1).call("HEAD", path)[0].headers["Upload-Offset"])


def test_a_worker_that_stops_and_continues_as_a_zombie(world: World) -> None:
    job = submit(world, "zombie")
    zombie = strike(world, job, Member.pause, *STEPS[1:5])
    try:  # stopped inside a transaction it keeps what it has locked, until the database ends that
        wait_for(lambda: has_another(world, job, zombie), "the other worker to take the job over")
    finally:
        zombie.signal(signal.SIGCONT)
    assert_right(world, job)
    assert look(world, job)["attempts"] >= 2
    assert zombie.is_alive


def has_another(world: World, job: str, than: Member) -> bool:
    """Whether a worker other than that one has the job."""
    with held(world.postgres.url, job) as now:
        return now.pid is not None and than.process is not None and now.pid != than.process.pid


def test_postgresql_restarted_in_the_middle_of_a_job(world: World) -> None:
    job = submit(world, "database-restarted")
    strike(world, job, unharmed, "refine")
    stopped_at = datetime.now(UTC)
    world.postgres.restart()
    assert_right(world, job)
    assert datetime.fromisoformat(look(world, job)["finished_at"]) > stopped_at


def test_an_object_store_that_fails_and_is_slow_for_a_while(world: World) -> None:
    job = submit(world, "store-trouble")
    strike(world, job, unharmed, "cluster")
    moods: tuple[tuple[Mood, int], ...] = (("errors", 6), ("away", 4), ("slow", 8))
    try:
        for mood, seconds in moods:
            world.store.met.clear()
            world.store.mood = mood
            time.sleep(seconds)
            wait_for(lambda: mood in world.store.met, f"a worker to meet a store that is {mood}")  # noqa: B023
    finally:
        world.store.mood = "well"
    assert_right(world, job)


def test_a_disk_that_is_full_on_the_worker(world: World) -> None:
    folder = world.cluster.home / "worker-small"
    folder.mkdir()
    small = world.cluster.member("worker-small", "worker")
    mount = f"mount -t tmpfs -o size=64m tmpfs {folder} && head -c 64m /dev/zero > {folder}/filler; exec "
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this kernel lets nobody mount a small disk")
    small.command = [unshare, "-rm", "--propagation", "private", "sh", "-c", mount + " ".join(small.command)]
    with started_again(*world.cluster.workers):
        for worker in world.cluster.workers:
            worker.stop()
        small.start()
        try:
            job = submit(world, "disk-full")
            wait_for(
                lambda: any("space" in json.dumps(data).lower() for _, data in events(world.postgres.url, job)),
                "the worker to notice its full disk",
            )
            assert small.process is not None
            os.truncate(f"/proc/{small.process.pid}/root{folder}/filler", 0)
            assert_right(world, job)
        finally:
            small.stop()


def test_two_admins_who_promote_at_once(world: World) -> None:
    first = finished(world, submit(world, "first"))["request"]["name"]
    api = world.api()
    before = {row["alias"]: row["chain"] for row in api.json("GET", "/aliases")["aliases"]}.get("canary")
    answers = {}

    def promote(index: int, name: str) -> None:
        body = json.dumps({"expected": before}).encode()
        headers = {"Content-Type": "application/json"}
        answer = world.api(index).open("PUT", f"/chains/{name}/aliases/canary", body, headers)
        answers[name] = (answer.status, json.loads(answer.read()))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(promote, (0, 1), (first, "undisturbed")))
    assert sorted(status for status, _ in answers.values()) == [200, 409], answers
    winner = next(name for name, (status, _) in answers.items() if status == 200)
    assert {"alias": "canary", "chain": winner}.items() <= api.json("GET", "/aliases")["aliases"][0].items()
    moves = api.json("GET", "/aliases/canary/history")["moves"]
    assert [move["chain"] for move in moves] == [winner]


def test_a_job_posted_ten_times_with_one_key(world: World) -> None:
    with ThreadPoolExecutor(10) as pool:
        ids = set(pool.map(lambda index: submit(world, "posted-often", "one-key", index % 2), range(10)))
    assert len(ids) == 1
    assert_right(world, ids.pop())
    listed = world.api().json("GET", "/jobs?kind=refine&page_size=100")["jobs"]
    assert [job["request"]["name"] for job in listed].count("posted-often") == 1
