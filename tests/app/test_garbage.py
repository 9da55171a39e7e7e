"""Garbage collection: what nothing names goes, and what somebody is about to name stays."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import select

from app.actor import COMMAND_LINE, WORKER
from app.cli import main
from app.db.migrate import migrate
from app.db.session import Database
from app.db.tables import (
    AuditRow,
    DatasetRow,
    ExecutorRow,
    JobEventRow,
    JobFileRow,
    JobRow,
    TeacherRow,
    UploadPartRow,
    UploadRow,
)
from app.errors import DatabaseUnavailable, ObjectNotFound, StorageUnavailable
from app.services import garbage as garbage_module
from app.services.garbage import Garbage
from app.services.registry import Registry
from app.services.uploads import Uploads
from app.settings import Settings
from app.storage.local import LocalStore
from app.storage.port import ObjectStat, content_key
from app.worker.context import StepContext
from chains import artifact
from chains.testing import pico_chain

NOW = datetime.now(UTC)
OLD = NOW - timedelta(days=2)
NO_GRACE = timedelta(0)


class Scripted(LocalStore):
    """A folder whose calls can be made to do something else first, or to do something afterwards."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.root = root
        self.after: dict[str, Callable[[str], None]] = {}
        self.before: dict[str, Callable[[str], None]] = {}
        self.puts: list[str] = []

    def get(self, key: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        yield from super().get(key, start, stop)
        self._run(self.after, "get", key)

    def put(self, key: str, chunks: Iterable[bytes], sha256: str) -> bool:
        self.puts.append(key)
        stored = super().put(key, chunks, sha256)
        self._run(self.after, "put", key)
        return stored

    def stat(self, key: str) -> ObjectStat:
        found = super().stat(key)
        self._run(self.after, "stat", key)
        return found

    def delete(self, key: str) -> None:
        self._run(self.before, "delete", key)
        super().delete(key)

    def make_old(self, key: str) -> None:
        os.utime(self.root / key, (OLD.timestamp(), OLD.timestamp()))

    def has(self, key: str) -> bool:
        return (self.root / key).exists()

    def _run(self, hooks: dict[str, Callable[[str], None]], call: str, key: str) -> None:
        """Each hook runs once."""
        if (hook := hooks.pop(call, None)) is not None:
            hook(key)


@pytest.fixture
def store(tmp_path: Path) -> Scripted:
    store = Scripted(tmp_path / "objects")
    store.prepare()
    return store


@pytest.fixture
def registry(database: Database, store: Scripted) -> Registry:
    return Registry(database, store, 10**9)


@pytest.fixture
def garbage(database: Database, store: Scripted) -> Garbage:
    return collector(database, store)


def collector(database: Database, store: Scripted, **retention: Callable[[datetime], int]) -> Garbage:
    day = timedelta(days=1)
    return Garbage(database, store, grace=day, job_retention=30 * day, retention=retention)


def put(store: Scripted, content: bytes, *, old: bool = True) -> str:
    """The sha256 of an object made of this content."""
    sha256 = hashlib.sha256(content).hexdigest()
    store.put(content_key(sha256), [content], sha256)
    if old:
        store.make_old(content_key(sha256))
    return sha256


def job(job_id: str, finished_at: datetime | None) -> JobRow:
    return JobRow(
        id=job_id,
        kind="refine",
        state="succeeded" if finished_at else "running",
        priority=0,
        request={},
        request_sha256="0" * 64,
        attempts=1,
        cancel_requested=False,
        executor=f"of-{job_id}",
        created_at=OLD,
        finished_at=finished_at,
        updated_at=OLD,
    )


def job_file(job_id: str, sha256: str) -> JobFileRow:
    return JobFileRow(job=job_id, name="checkpoint", sha256=sha256, size_bytes=1, updated_at=OLD)


def teacher(name: str, sha256: str, report: dict[str, object] | None = None) -> TeacherRow:
    return TeacherRow(
        name=name,
        state="ready",
        sha256=sha256,
        size_bytes=1,
        report=report,
        license="l",
        terms="any",
        consent_basis="synthetic",
        created_at=OLD,
        updated_at=OLD,
    )


def dataset(name: str, sha256: str, state: str = "ready", source: str = "archive") -> DatasetRow:
    return DatasetRow(
        name=name,
        state=state,
        source=source,
        location=sha256,
        options={},
        license="l",
        terms="any",
        consent_basis="synthetic",
        created_at=OLD,
        updated_at=OLD,
    )


def upload(sha256: str) -> UploadRow:
    return UploadRow(
        id="u",
        kind="teacher",
        target="t",
        sha256=sha256,
        size_bytes=1,
        received_bytes=1,
        created_at=OLD,
        updated_at=OLD,
    )


def audited(database: Database) -> list[AuditRow]:
    with database.transaction() as session:
        return list(session.scalars(select(AuditRow).where(AuditRow.action == "garbage.collect")))


def test_what_no_row_names_goes_once_it_is_old(garbage: Garbage, store: Scripted, database: Database) -> None:
    old, young = put(store, b"old"), put(store, b"young", old=False)
    collected = garbage.collect(COMMAND_LINE)
    assert [found.key for found in collected.objects] == [content_key(old)]
    assert (collected.size_bytes, collected.dry_run) == (3, False)
    assert not store.has(content_key(old))
    assert store.has(content_key(young))
    (entry,) = audited(database)
    assert (entry.actor, entry.detail["objects"], entry.detail["size_bytes"]) == ("command-line", 1, 3)


def test_the_grace_time_can_be_another(garbage: Garbage, store: Scripted) -> None:
    put(store, b"two days old")
    assert garbage.collect(COMMAND_LINE, grace=timedelta(days=3)).objects == ()
    assert len(garbage.collect(COMMAND_LINE, grace=timedelta(days=1)).objects) == 1


def test_what_any_row_names_stays(garbage: Garbage, registry: Registry, store: Scripted, database: Database) -> None:
    named = [put(store, bytes([number])) for number in range(6)]
    chain = registry.publish(artifact.dump(pico_chain()))
    store.make_old(content_key(chain.digest))
    with database.transaction() as session:
        session.add_all([job("1", None), upload(named[0])])
        session.flush()
        session.add_all(
            [
                UploadPartRow(upload="u", start=0, size_bytes=1, sha256=named[1]),
                teacher("t", named[2], {"teacher_sha256": named[3]}),
                teacher("unchecked", named[2]),
                dataset("d", named[4]),
                job_file("1", named[5]),
            ]
        )
    orphan = put(store, b"orphan")
    assert [found.key for found in garbage.collect(COMMAND_LINE).objects] == [content_key(orphan)]
    assert all(store.has(content_key(sha256)) for sha256 in [*named, chain.digest])


def test_the_images_of_a_deleted_data_set_go(garbage: Garbage, store: Scripted, database: Database) -> None:
    archive = put(store, b"images of people")
    with database.transaction() as session:
        session.add(dataset("d", archive, state="deleted"))
    assert len(garbage.collect(COMMAND_LINE).objects) == 1


def test_the_file_of_a_deleted_chain_goes(garbage: Garbage, registry: Registry, store: Scripted) -> None:
    for number, name in enumerate(("kept", "gone")):
        store.make_old(content_key(registry.publish(artifact.dump(pico_chain(name=name, seed=number))).digest))
    digest = registry.find("gone").digest
    registry.delete("gone", COMMAND_LINE)
    assert [found.key for found in garbage.collect(COMMAND_LINE).objects] == [content_key(digest)]
    registry.forget_loaded()
    assert registry.load(registry.find("kept").digest).chain.name == "kept"


def test_keys_that_are_not_ours_are_left_alone(garbage: Garbage, store: Scripted) -> None:
    keys = ["other/thing", "sha256/ab/readme", f"sha256/00/{'ab' * 32}"]
    for key in keys:
        store.put(key, [b"x"], hashlib.sha256(b"x").hexdigest())
        store.make_old(key)
    assert garbage.collect(COMMAND_LINE).objects == ()
    assert list(store.list()) == sorted(keys)


def test_a_dry_run_says_what_would_go_and_leaves_everything(
    garbage: Garbage, store: Scripted, database: Database
) -> None:
    orphan, kept_by_job = put(store, b"orphan"), put(store, b"checkpoint")
    with database.transaction() as session:
        session.add(job("1", NOW - timedelta(days=31)))
        session.flush()
        session.add(job_file("1", kept_by_job))
    dry = garbage.collect(COMMAND_LINE, dry_run=True)
    assert {found.key for found in dry.objects} == {content_key(orphan), content_key(kept_by_job)}
    assert dry.rows == {"job_events": 0, "job_files": 1, "executors": 0}
    assert store.has(content_key(orphan))
    assert audited(database) == []
    with database.transaction() as session:
        assert session.get(JobFileRow, ("1", "checkpoint")) is not None
    wet = garbage.collect(COMMAND_LINE)
    assert {found.key for found in wet.objects} == {found.key for found in dry.objects}
    assert wet.rows == dry.rows


def test_finished_jobs_lose_their_events_and_files_in_time(garbage: Garbage, database: Database) -> None:
    with database.transaction() as session:
        long_ago = NOW - timedelta(days=31)
        session.add_all([job("old", long_ago), job("new", NOW), job("running", None)])
        session.flush()
        for name in ("old", "new", "running"):
            session.add_all([job_file(name, "0" * 64), JobEventRow(job=name, at=OLD, kind="log", data={})])
        for name, seen, stopped in (
            ("of-old", long_ago, long_ago),
            ("of-running", long_ago, None),
            ("died", long_ago, None),
            ("alive", NOW, None),
            ("stopped-just-now", long_ago, NOW),
        ):
            session.add(ExecutorRow(id=name, started_at=long_ago, heartbeat_at=seen, stopped_at=stopped))
    assert garbage.collect(COMMAND_LINE).rows == {"job_events": 1, "job_files": 1, "executors": 2}
    with database.transaction() as session:
        assert set(session.scalars(select(JobFileRow.job))) == {"new", "running"}
        assert set(session.scalars(select(JobEventRow.job))) == {"new", "running"}
        assert set(session.scalars(select(ExecutorRow.id))) == {"of-running", "alive", "stopped-just-now"}
        assert set(session.scalars(select(JobRow.id))) == {"old", "new", "running"}


def test_other_retention_runs_before_objects_are_looked_for(database: Database, store: Scripted) -> None:
    sha256 = put(store, b"part")
    with database.transaction() as session:
        session.add(upload(sha256))

    def drop(now: datetime) -> int:
        with database.transaction() as session:
            session.delete(session.get_one(UploadRow, "u"))
        return 1

    collected = collector(database, store, uploads=drop).collect(COMMAND_LINE)
    assert collected.rows["uploads"] == 1
    assert len(collected.objects) == 1


def test_of_workers_that_ask_one_collects_within_the_time(garbage: Garbage) -> None:
    assert garbage.collect_if_due(WORKER, timedelta(days=1)) is not None
    assert garbage.collect_if_due(WORKER, timedelta(days=1)) is None
    assert garbage.collect_if_due(WORKER, timedelta(0)) is not None


def test_what_went_before_the_store_failed_is_audited(
    garbage: Garbage, store: Scripted, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, b"one")
    put(store, b"two")
    delete = LocalStore.delete

    def fail_later(self: LocalStore, key: str) -> None:
        monkeypatch.setattr(LocalStore, "delete", refuse)
        delete(self, key)

    def refuse(self: LocalStore, key: str) -> None:
        raise StorageUnavailable("no")

    monkeypatch.setattr(LocalStore, "delete", fail_later)
    with pytest.raises(StorageUnavailable):
        garbage.collect(COMMAND_LINE)
    (entry,) = audited(database)
    assert entry.detail["objects"] == 1


# Somebody stores and records while garbage is collected


def test_an_object_put_anew_after_it_was_found_old_stays(garbage: Garbage, store: Scripted) -> None:
    key = content_key(put(store, b"again"))
    store.after["stat"] = lambda _: put(store, b"again", old=False)
    assert garbage.collect(COMMAND_LINE).objects == ()
    assert store.has(key)


def test_an_object_named_after_it_was_found_stays(garbage: Garbage, registry: Registry, store: Scripted) -> None:
    """Also on a server where putting it again does not make it young."""
    content = artifact.dump(pico_chain())
    key = content_key(put(store, content))

    def publish(_: str) -> None:
        registry.publish(content)
        store.make_old(key)

    store.after["stat"] = publish
    assert garbage.collect(COMMAND_LINE).objects == ()
    assert store.has(key)


def test_a_file_that_goes_between_its_put_and_its_row_is_put_again(
    garbage: Garbage, registry: Registry, store: Scripted
) -> None:
    content = artifact.dump(pico_chain())

    def collect(key: str) -> None:
        store.make_old(key)
        assert len(garbage.collect(COMMAND_LINE).objects) == 1

    store.after["get"] = collect  # the file was read back, its row is not written yet
    digest = registry.publish(content).digest
    assert len(store.puts) == 2
    assert registry.load(digest).digest == digest


def test_a_job_s_file_that_goes_between_its_put_and_its_row_is_put_again(
    garbage: Garbage, registry: Registry, store: Scripted, database: Database, tmp_path: Path
) -> None:
    context = StepContext("j", {}, {}, tmp_path, Settings(), database, store, registry, executor="of-j")
    with database.transaction() as session:
        session.add(job("j", None))
    (tmp_path / "checkpoint").write_bytes(b"weights")
    store.after["put"] = lambda key: collect_now(garbage, store, key)
    key = content_key(context.keep_file(tmp_path / "checkpoint", "checkpoint"))
    assert store.puts == [key, key]
    assert store.has(key)
    assert context.fetch_file("checkpoint", tmp_path / "again")


def test_a_part_that_goes_between_its_put_and_its_row_is_put_again(
    garbage: Garbage, store: Scripted, database: Database
) -> None:
    uploads = uploading(database, store, b"bytes")
    store.after["put"] = lambda key: collect_now(garbage, store, key)
    part = uploads.append("teacher", "t", 0, [b"by"])
    assert part.received_bytes == 2
    assert len(store.puts) == 2
    assert store.has(store.puts[0])


def test_a_file_that_goes_again_and_again_is_not_recorded(
    garbage: Garbage, store: Scripted, database: Database
) -> None:
    uploads = uploading(database, store, b"bytes")

    def collect(key: str) -> None:
        collect_now(garbage, store, key)
        store.after["put"] = collect

    store.after["put"] = collect
    with pytest.raises(ObjectNotFound):
        uploads.append("teacher", "t", 0, [b"by"])
    assert len(store.puts) == 3
    assert uploads.find("teacher", "t").received_bytes == 0


def test_an_upload_is_not_collected_while_it_is_put_to_use(
    garbage: Garbage, store: Scripted, database: Database
) -> None:
    """Its row names the whole file before that is there."""
    uploads = uploading(database, store, b"bytes")
    uploads.append("teacher", "t", 0, [b"bytes"])
    uploads.assemble(uploads.find("teacher", "t"))
    whole = content_key(hashlib.sha256(b"bytes").hexdigest())
    store.make_old(whole)
    assert garbage.collect(COMMAND_LINE).objects == ()
    assert store.has(whole)


def collect_now(garbage: Garbage, store: Scripted, key: str) -> None:
    store.make_old(key)
    assert [found.key for found in garbage.collect(COMMAND_LINE).objects] == [key]


def uploading(database: Database, store: Scripted, content: bytes) -> Uploads:
    """An upload of this content is open."""
    day = timedelta(days=1)
    uploads = Uploads(database, store, part_bytes=64 * 1024, max_bytes=10**6, max_open=1, retention=day)
    with database.transaction() as session:
        uploads.create_in(session, "teacher", "t", hashlib.sha256(content).hexdigest(), len(content))
    return uploads


def test_a_row_waits_for_deletions_that_were_decided_before_it(
    garbage: Garbage, registry: Registry, store: Scripted
) -> None:
    deleting, may_delete = threading.Event(), threading.Event()
    content = artifact.dump(pico_chain())

    def hold(_: str) -> None:
        deleting.set()
        assert may_delete.wait(20)

    def collect_meanwhile(key: str) -> None:
        store.make_old(key)
        store.before["delete"] = hold
        collecting.append(pool.submit(garbage.collect, COMMAND_LINE))
        assert deleting.wait(20)

    collecting = []
    with ThreadPoolExecutor(2) as pool:
        store.after["get"] = collect_meanwhile
        publishing = pool.submit(registry.publish, content)
        assert deleting.wait(20)
        with pytest.raises(TimeoutError):
            publishing.result(0.5)
        may_delete.set()
        digest = publishing.result(20).digest
        assert len(collecting[0].result(20).objects) == 1
    assert len(store.puts) == 2
    assert store.has(content_key(digest))


def test_publishing_deleting_and_collecting_at_once_never_loses_a_published_file(
    database: Database, store: Scripted, registry: Registry
) -> None:
    contents = [artifact.dump(pico_chain(name=f"c{number}", seed=number, rungs=2)) for number in range(2)]
    registry.publish(artifact.dump(pico_chain(name="stable-one", seed=9, rungs=2)))
    stop = threading.Event()

    def collect() -> int:
        gone = 0
        while not stop.is_set():
            gone += len(collector(database, store).collect(WORKER, grace=NO_GRACE).objects)
        return gone

    def publish_and_delete(number: int) -> int:
        lost = 0
        for _ in range(6):
            try:
                row = registry.publish(contents[number])
            except ObjectNotFound:  # without a grace time it may be collected as often as it is put
                continue
            lost += not store.has(content_key(row.digest))
            registry.delete(row.name, COMMAND_LINE)
        return lost

    with ThreadPoolExecutor(3) as pool:
        collecting = pool.submit(collect)
        losses = [future.result() for future in [pool.submit(publish_and_delete, number) for number in range(2)]]
        stop.set()
        assert collecting.result(60) > 0
    assert losses == [0, 0]
    registry.forget_loaded()
    assert registry.load(registry.find("stable").digest).chain.name == "stable-one"


def test_writers_go_first(store: Scripted, monkeypatch: pytest.MonkeyPatch, postgres_url: str) -> None:
    """On PostgreSQL collection gives way to whoever is writing, and says so when they never end; SQLite has a queue."""
    database = Database(postgres_url)
    migrate(database)
    garbage = collector(database, store)
    monkeypatch.setattr(garbage_module, "_ATTEMPTS", 2)
    monkeypatch.setattr(garbage_module, "_PAUSE_S", 0.01)
    key = content_key(put(store, b"orphan"))
    with database.transaction() as session:
        session.add(teacher("t", "0" * 64))
        session.flush()
        with pytest.raises(DatabaseUnavailable):
            garbage.collect(COMMAND_LINE)
    assert store.has(key)
    assert len(garbage.collect(COMMAND_LINE).objects) == 1
    database.dispose()


# From outside


def orphaned(app_folder: Path) -> Path:
    store = Scripted(app_folder / "objects")
    return store.root / content_key(put(store, b"orphan"))


def test_an_admin_collects_over_http(app: FastAPI, client: TestClient, tmp_path: Path) -> None:
    file = orphaned(tmp_path / "data")
    dry = client.post("/garbage-collection", json={"dry_run": True}).json()
    assert (dry["object_count"], dry["size_bytes"], dry["objects"][0]["size_bytes"]) == (1, 6, 6)
    assert file.exists()
    assert client.post("/garbage-collection", json={}).status_code == 422
    assert client.post("/garbage-collection", json={"dry_run": False}).json()["object_count"] == 1
    assert not file.exists()
    assert client.get("/chains/pico").status_code == 200
    assert client.post("/models", json={"limits": {"max_macs": 10**9}}).status_code == 200


def test_an_operator_collects_from_the_command_line(
    app: FastAPI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WIDTHWISE_DATA_DIR", str(tmp_path / "data"))
    file = orphaned(tmp_path / "data")

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["widthwise", "gc", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code in (0, None)
        return capsys.readouterr().out

    assert "would delete 1 objects of 6 bytes" in run("--dry-run")
    assert "would delete 0 objects" in run("--dry-run", "--grace-hours", "72")
    assert file.exists()
    assert "deleted 1 objects of 6 bytes" in run()
    assert not file.exists()
