"""Data sets: registered over HTTP, checked and put at a job's disposal by a worker's own code, deleted."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import sys
import threading
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import boto3
import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from app.actor import Actor
from app.api.datasets import Layout, State
from app.db.audit import Audit
from app.db.datasets import STATES, uses
from app.db.executors import Executors
from app.db.jobs import JobRows
from app.db.tables import DatasetRow
from app.errors import DatasetInUse, DatasetNotReady, DatasetSourceRefused, JobPermanentlyFailed, ObjectNotFound
from app.services.dataset_sources import SourceRules
from app.services.datasets import Datasets, NewDataset, Source
from app.settings import Settings
from app.storage import content_key, open_store
from app.terms import Rights
from app.worker import datasets as worker
from app.worker import landlock
from app.worker.context import StepContext
from app.worker.kinds import KINDS as JOB_KINDS
from app.worker.runner import Runner, Surroundings
from chains.config import DataConfig
from chains.data.readers import KINDS
from chains.sources import read_dataset

ME = Actor("me")
RIGHTS = {"license": "internal", "terms": "research", "consent_basis": "consent"}
OPTIONS = {"layout": "auto"}


@dataclass
class Service:
    """A service over a database and a folder, with a worker that does one job at a time when it is told to."""

    app: FastAPI
    settings: Settings
    folder: Path

    @property
    def datasets(self) -> Datasets:
        found: Datasets = self.app.state.services.datasets
        return found

    @property
    def sites(self) -> Path:
        return self.folder / "sites"

    def run(self, job_id: str) -> dict[str, Any]:
        """Do the job as a worker does; its row."""
        services = self.app.state.services
        store = open_store(self.settings.storage, self.settings.s3_endpoint_url)
        folder = self.folder / "work"
        around = Surroundings(
            self.settings, services.database, store, services.registry, "tester", folder, threading.Event()
        )
        Runner(around, JOB_KINDS, lambda name, step: step()).run(job_id)
        row = services.jobs.find(job_id)
        return {"state": row.state, "result": row.result, "error": row.error}

    def check(self, name: str) -> DatasetRow:
        """Run the check that waits, and return what became of the data set."""
        job = self.datasets.last_check(name)
        assert job is not None
        assert self.run(job)["state"] == "succeeded"
        return self.datasets.find(name)

    def context(self) -> StepContext:
        """That of a step of another job."""
        job_id = self.submit("refine", {"seed": 0})
        services = self.app.state.services
        with services.database.transaction() as session:
            assert JobRows(session).begin(job_id, "tester")
        return StepContext(
            job_id=job_id,
            request={},
            outputs={},
            folder=self.folder / "work" / job_id,
            settings=self.settings,
            database=services.database,
            store=open_store(self.settings.storage, self.settings.s3_endpoint_url),
            registry=services.registry,
            executor="tester",
        )

    def submit(self, kind: str, request: Mapping[str, Any]) -> str:
        job, _ = self.app.state.services.jobs.submit(kind, request, ME)
        return str(job.id)

    def audited(self) -> list[str]:
        with self.app.state.services.database.transaction() as session:
            return [entry.action for entry in reversed(Audit(session).page(None, 100))]


MakeService = Callable[..., Service]


@pytest.fixture
def make_service(make_app: Callable[..., FastAPI], tmp_path: Path) -> MakeService:
    def make(**given: Any) -> Service:
        (tmp_path / "sites").mkdir(exist_ok=True)
        settings = {"data_dir": tmp_path / "data", "dataset_roots": (tmp_path / "sites",), **given}
        service = Service(make_app(**settings), Settings(**settings), tmp_path)
        with service.app.state.services.database.transaction() as session:
            Executors(session).add("tester")
        return service

    return make


@pytest.fixture
def service(make_service: MakeService) -> Service:
    return make_service()


@pytest.fixture(params=["sqlite", "postgresql"])
def on_both(request: pytest.FixtureRequest, make_service: MakeService) -> Service:
    """The service on each database."""
    if request.param == "sqlite":
        return make_service()
    return make_service(database_url=request.getfixturevalue("postgres_url"))


@pytest.fixture
def http(service: Service) -> Iterator[TestClient]:
    with TestClient(service.app) as client:
        yield client


def jpeg(seed: int) -> bytes:
    """A crop of noise, another one for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 16, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def people(count: int = 4) -> dict[str, bytes]:
    """A folder per identity, two images each."""
    return {f"p{person}/{image}.jpg": jpeg(10 * person + image) for person in range(count) for image in range(2)}


def write(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def zipped(files: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def of_folder(path: Path, name: str = "site", **more: Any) -> NewDataset:
    return NewDataset(name, Source("folder", str(path)), {**OPTIONS, **more}, Rights(**RIGHTS))


def of_archive(content: bytes, name: str = "packed", days: int | None = None) -> NewDataset:
    source = Source("archive", hashlib.sha256(content).hexdigest(), len(content))
    return NewDataset(name, source, OPTIONS, Rights(**RIGHTS), days)


def uploaded(service: Service, content: bytes, name: str = "packed", days: int | None = None) -> DatasetRow:
    """A data set whose archive has arrived and was checked."""
    service.datasets.create(of_archive(content, name, days), ME)
    services = service.app.state.services
    services.uploads.append("dataset", name, 0, [content])
    service.datasets.complete(name, ME)
    return service.check(name)


def registered(service: Service, name: str = "site") -> DatasetRow:
    """A folder that was checked."""
    service.datasets.create(of_folder(write(service.sites / name, people()), name), ME)
    return service.check(name)


def body(source: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": "site", "source": source, **RIGHTS, **more}


# Over HTTP ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_registered_checked_and_counted(service: Service, http: TestClient) -> None:
    write(service.sites / "a", people())
    answer = http.post("/datasets", json=body({"kind": "folder", "path": str(service.sites / "a")}))
    assert (answer.status_code, answer.headers["location"]) == (202, "/datasets/site")
    assert (answer.json()["state"], answer.json()["digest"]) == ("checking", None)
    service.check("site")
    found = http.get("/datasets/site").json()
    assert found["state"] == "ready"
    assert found["report"]["layout"] == "folder"
    assert found["report"]["splits"]["train"]["identities"] == 2
    assert (found["report"]["files"], found["report"]["broken"]) == (8, 0)
    assert (found["license"], found["terms"], found["consent_basis"]) == ("internal", "research", "consent")


def test_an_archive_is_sent_in_two_pieces_and_checked(service: Service, http: TestClient) -> None:
    content = zipped(people())
    digest = hashlib.sha256(content).hexdigest()
    answer = http.post("/datasets", json=body({"kind": "archive", "sha256": digest, "size_bytes": len(content)}))
    assert (answer.status_code, answer.json()["archive"]) == (201, "/datasets/site/archive")
    stream = {"content-type": "application/offset+octet-stream"}
    half = len(content) // 2
    sent = http.patch("/datasets/site/archive", content=content[:half], headers={**stream, "upload-offset": "0"})
    assert sent.status_code == 204
    head = http.head("/datasets/site/archive")
    assert (head.headers["upload-offset"], head.headers["upload-length"]) == (str(half), str(len(content)))
    rest = http.patch("/datasets/site/archive", content=content[half:], headers={**stream, "upload-offset": str(half)})
    assert rest.status_code == 202
    assert service.run(rest.headers["location"].removeprefix("/jobs/"))["result"] == {"state": "ready", "reason": None}
    assert http.get("/datasets/site").json()["state"] == "ready"
    assert http.put("/datasets/site/archive", content=content).status_code == 409


def test_the_same_registration_twice_is_one_and_another_is_refused(service: Service, http: TestClient) -> None:
    write(service.sites / "a", people())
    first = body({"kind": "folder", "path": str(service.sites / "a")}, retention_days=30)
    assert http.post("/datasets", json=first).status_code == 202
    assert http.post("/datasets", json=first).status_code == 200
    for change in ({"terms": "any"}, {"retention_days": 31}, {"layout": "folder"}, {"options": {"seed": 1}}):
        again = http.post("/datasets", json={**first, **change})
        assert (again.status_code, again.json()["code"]) == (409, "dataset-name-taken")
    assert service.audited().count("dataset.create") == 1


@pytest.mark.parametrize("field", ["license", "terms", "consent_basis"])
def test_rights_must_be_stated(service: Service, http: TestClient, field: str) -> None:
    given = body({"kind": "folder", "path": str(service.sites)})
    del given[field]
    assert http.post("/datasets", json=given).status_code == 422
    given[field] = "unknown"
    assert http.post("/datasets", json=given).status_code == 202


@pytest.mark.parametrize("path", ["/etc", "relative", "/data/../etc", "{sites}/../secret", "{sites}/out", "{sites}x"])
def test_a_folder_outside_of_the_roots_is_refused(service: Service, http: TestClient, path: str) -> None:
    (service.folder / "secret").mkdir()
    (service.sites / "out").symlink_to(service.folder / "secret")
    answer = http.post("/datasets", json=body({"kind": "folder", "path": path.format(sites=service.sites)}))
    assert (answer.status_code, answer.json()["code"]) == (422, "dataset-source-refused")


def test_without_roots_no_folder_is_allowed_and_the_message_says_how(make_service: MakeService) -> None:
    with TestClient(make_service(dataset_roots=()).app) as http:
        answer = http.post("/datasets", json=body({"kind": "folder", "path": "/data"}))
    assert answer.status_code == 422
    assert "WIDTHWISE_DATASET_ROOTS" in answer.json()["detail"]


def test_data_sets_are_listed_by_name_and_state(service: Service, http: TestClient) -> None:
    for name in ("a", "b", "c"):
        service.datasets.create(of_folder(service.sites, name), ME)
    page = http.get("/datasets", params={"page_size": 2}).json()
    rest = http.get("/datasets", params={"page_token": page["next_page_token"]}).json()
    assert [found["name"] for found in page["datasets"] + rest["datasets"]] == ["a", "b", "c"]
    assert http.get("/datasets", params={"state": "ready"}).json()["datasets"] == []
    assert http.get("/datasets", params={"state": "lost"}).status_code == 422


@pytest.mark.parametrize("call", ["get", "delete", "post", "head", "put"])
def test_what_is_not_there_is_unknown(service: Service, http: TestClient, call: str) -> None:
    path = {"post": "/datasets/nobody/recheck", "head": "/datasets/nobody/archive", "put": "/datasets/nobody/archive"}
    assert http.request(call, path.get(call, "/datasets/nobody")).status_code == 404


def test_a_deleted_data_set_is_told_and_its_name_stays_taken(service: Service, http: TestClient) -> None:
    registered(service)
    assert http.delete("/datasets/site").status_code == 204
    assert http.delete("/datasets/site").status_code == 204
    assert http.get("/datasets/site").json()["state"] == "deleted"
    assert http.get("/datasets").json()["datasets"] == []
    assert http.post("/datasets/site/recheck").json()["code"] == "dataset-not-ready"
    again = http.post("/datasets", json=body({"kind": "folder", "path": str(service.sites / "site")}))
    assert (again.status_code, "was deleted" in again.json()["detail"]) == (409, True)
    assert service.audited().count("dataset.delete") == 1


def test_the_documented_layouts_and_states_are_those_there_are() -> None:
    assert get_args(Layout) == ("auto", *KINDS)
    assert get_args(State) == STATES


# Sources ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("s3://people", ("people", "")),
        ("s3://people/", ("people", "")),
        ("s3://people/a//b", ("people", "a/b/")),
        ("s3://shared/site/day", ("shared", "site/day/")),
    ],
)
def test_an_allowed_prefix_is_taken_apart(url: str, found: tuple[str, str]) -> None:
    assert SourceRules((), ("people", "shared/site")).prefix(url) == found


@pytest.mark.parametrize(
    "url",
    [
        "s3://other",
        "s3://shared",
        "s3://shared/site2",
        "s3://shared/site/../other",
        "s3://people@evil.example/x",
        "s3://people:80/x",
        "s3:///people",
        "http://people/x",
        "s3://people/a?versionId=1",
        "file:///etc",
    ],
)
def test_another_bucket_or_server_is_refused(url: str) -> None:
    with pytest.raises(DatasetSourceRefused):
        SourceRules((), ("people", "shared/site")).prefix(url)


@pytest.fixture
def bucket(s3_url: str, s3_credentials: None) -> tuple[str, Any]:
    client = boto3.client("s3", endpoint_url=s3_url)
    name = f"people-{uuid.uuid4().hex}"
    client.create_bucket(Bucket=name)
    return name, client


def in_bucket(make_service: MakeService, s3_url: str, bucket: str) -> Service:
    service = make_service(dataset_buckets=(bucket,), s3_endpoint_url=s3_url)
    source = Source("s3", f"s3://{bucket}/site")
    service.datasets.create(NewDataset("cloud", source, OPTIONS, Rights(**RIGHTS)), ME)
    return service


def test_a_prefix_is_read_and_has_the_digest_of_the_same_folder(
    make_service: MakeService, s3_url: str, bucket: tuple[str, Any]
) -> None:
    name, client = bucket
    for key, content in {**people(), "": b"", "notes.md": b"x", "../site2/p9/1.jpg": b"another prefix"}.items():
        client.put_object(Bucket=name, Key=f"site/{key}" if ".." not in key else "site2/p9/1.jpg", Body=content)
    service = in_bucket(make_service, s3_url, name)
    row = service.check("cloud")
    assert (row.state, row.reason) == ("ready", None)
    assert row.digest == registered(service).digest
    config = worker.materialise(service.context(), row)
    assert len(read_dataset(DataConfig(**config)).train) == 4
    client.put_object(Bucket=name, Key="site/p0/0.jpg", Body=jpeg(99))
    worker.drop_cached(service.settings, str(row.digest))
    with pytest.raises(JobPermanentlyFailed, match=r"have digest .* when they were checked"):
        worker.materialise(service.context(), row)


@pytest.mark.parametrize("key", ["site/../../evil.jpg", "site//etc/evil.jpg", "site/a\\..\\evil.jpg", "site/P0/0.jpg"])
def test_an_object_of_a_harmful_name_is_refused(
    make_service: MakeService, s3_url: str, bucket: tuple[str, Any], key: str
) -> None:
    name, client = bucket
    for good in ("p0/0.jpg", "p1/0.jpg"):
        client.put_object(Bucket=name, Key=f"site/{good}", Body=jpeg(1))
    client.put_object(Bucket=name, Key=key, Body=jpeg(2))
    row = in_bucket(make_service, s3_url, name).check("cloud")
    assert row.state == "refused"
    assert (
        "data set" in str(row.reason)
        or "called" in str(row.reason)
        or "absolute" in str(row.reason)
        or "characters" in str(row.reason)
    )


def test_an_empty_prefix_is_refused(make_service: MakeService, s3_url: str, bucket: tuple[str, Any]) -> None:
    row = in_bucket(make_service, s3_url, bucket[0]).check("cloud")
    assert (row.state, row.reason) == ("refused", "there is no image, list or table under this prefix")


# What the check finds -----------------------------------------------------------------------------------------------


def test_an_archive_may_hold_the_data_set_one_folder_down(service: Service) -> None:
    row = uploaded(service, zipped({f"top/{name}": content for name, content in people().items()}))
    assert (row.state, row.report and row.report["place"]) == ("ready", "top")
    config = worker.materialise(service.context(), row)
    assert config == {"kind": "folder", "root": str(service.settings.data_dir / "datasets" / str(row.digest) / "top")}


def test_a_table_is_found_beside_its_images(service: Service) -> None:
    files = people()
    table = "path,pid,camid\n" + "".join(f"{name},{name.split('/')[0]},c{name[-5]}\n" for name in files)
    row = uploaded(
        service, zipped({"top/" + name: content for name, content in {**files, "people.csv": table.encode()}.items()})
    )
    assert row.state == "ready"
    service.datasets.create(
        of_folder(write(service.sites / "t", {**files, "people.csv": table.encode()}), layout="csv"), ME
    )
    checked = service.check("site")
    assert checked.report is not None
    assert (checked.report["layout"], checked.report["place"]) == ("csv", "people.csv")
    assert checked.report["splits"]["train"]["cameras"] == 2
    assert read_dataset(DataConfig(**worker.materialise(service.context(), checked))).people


def test_broken_files_are_named_and_make_it_unusable(service: Service) -> None:
    files = {**people(), "p0/9.jpg": b"no image", "p1/9.jpg": jpeg(3)[:200], "p2/9.png": b""}
    row = uploaded(service, zipped(files))
    assert row.state == "refused"
    assert row.report is not None
    assert row.report["broken"] == 3
    assert {entry.split(":")[0] for entry in row.report["broken_files"]} == {"p0/9.jpg", "p1/9.jpg", "p2/9.png"}
    assert "3 files cannot be decoded" in str(row.reason)
    assert str(service.folder) not in json.dumps(row.report) + str(row.reason)


def png_of(width: int, height: int) -> bytes:
    """A PNG of one colour, as small as its header is a lie."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("side", "words"), [(60_000, "decompression bomb"), (8_000, "8000 x 8000 pixels are no crop")])
def test_an_image_bomb_is_refused_by_its_header(service: Service, side: int, words: str) -> None:
    row = uploaded(service, zipped({**people(), "p0/bomb.png": png_of(side, side)}))
    assert row.state == "refused"
    assert "p0/bomb.png: " in str(row.reason)
    assert words in str(row.reason)


def test_a_harmful_archive_is_refused_with_the_reason(service: Service) -> None:
    row = uploaded(service, zipped({**people(), "../evil.jpg": jpeg(1)}))
    assert (row.state, row.digest) == ("refused", None)
    assert row.reason == "the name '../evil.jpg' leads out of the data set"
    assert not list(service.folder.rglob("evil.jpg"))


def test_a_folder_that_is_not_on_this_worker_is_refused(service: Service) -> None:
    service.datasets.create(of_folder(service.sites / "elsewhere"), ME)
    assert "mount it on every worker" in str(service.check("site").reason)


def test_a_folder_whose_links_lead_out_is_refused(service: Service) -> None:
    write(service.sites / "a", people())
    (service.folder / "secret.jpg").write_bytes(jpeg(5))
    (service.sites / "a" / "p0" / "7.jpg").symlink_to(service.folder / "secret.jpg")
    service.datasets.create(of_folder(service.sites / "a"), ME)
    assert service.check("site").reason == "'p0/7.jpg' is a link that leads out of the data set; put a copy there"


def test_a_folder_moved_behind_a_link_after_it_was_registered_is_refused(service: Service) -> None:
    """The worker looks again: what the API saw may be something else by now."""
    service.datasets.create(of_folder(write(service.sites / "a", people())), ME)
    (service.sites / "a").rename(service.folder / "outside")
    (service.sites / "a").symlink_to(service.folder / "outside")
    assert "leads to no folder below" in str(service.check("site").reason)


def test_what_is_no_data_set_is_refused_with_reasons(service: Service) -> None:
    row = uploaded(service, zipped({"readme.txt": b"hello"}))
    assert row.state == "refused"
    assert "no known layout" in str(row.reason)


def test_a_check_that_needs_too_long_is_ended(make_service: MakeService) -> None:
    service = make_service(dataset_check_timeout_s=0.01)
    service.datasets.create(of_folder(write(service.sites / "site", people())), ME)
    assert "took too long" in str(service.check("site").reason)


def test_more_files_than_allowed_are_refused(make_service: MakeService) -> None:
    service = make_service(dataset_max_files=7)
    assert "more than 7 files" in str(uploaded(service, zipped(people())).reason)


def test_checking_again_finds_what_changed(service: Service) -> None:
    before = registered(service)
    write(service.sites / "site", {"p0/5.jpg": jpeg(77)})
    service.datasets.recheck("site", ME)
    assert service.datasets.find("site").state == "checking"
    after = service.check("site")
    assert (after.state, after.digest != before.digest) == ("ready", True)
    assert "dataset.recheck" in service.audited()


def test_a_check_done_twice_records_once(service: Service) -> None:
    """A worker that was declared dead and comes back must not overwrite what happened since."""
    registered(service)
    context = service.context()
    context.request, context.outputs = {"dataset": "site"}, {"inspect": {"refused": "an old verdict"}}
    worker.record(context)
    assert service.datasets.find("site").state == "ready"


def test_a_check_that_breaks_off_leaves_a_reason_and_can_be_repeated(service: Service) -> None:
    content = zipped(people())
    service.datasets.create(of_archive(content), ME)
    service.app.state.services.uploads.append("dataset", "packed", 0, [content])
    job = service.datasets.complete("packed", ME)
    store = open_store(service.settings.storage)
    key = content_key(hashlib.sha256(content).hexdigest())
    store.delete(key)
    assert service.run(job)["state"] == "failed"
    row = service.datasets.find("packed")
    assert (row.state, str(row.reason).startswith("the check did not finish")) == ("refused", True)
    store.put(key, [content], hashlib.sha256(content).hexdigest())
    service.datasets.recheck("packed", ME)
    assert service.check("packed").state == "ready"


# At a job's disposal ------------------------------------------------------------------------------------------------


def test_files_are_put_at_a_jobs_disposal_read_only_and_as_they_were_checked(service: Service) -> None:
    content = people()
    row = uploaded(service, zipped(content))
    config = worker.materialise(service.context(), row)
    root = Path(config["root"])
    assert {name: (root / name).read_bytes() for name in content} == content
    assert {oct(path.stat().st_mode & 0o777) for path in root.rglob("*.jpg")} == {"0o444"}
    assert {oct(path.stat().st_mode & 0o777) for path in (root, *root.glob("p*"))} == {"0o555"}
    assert not list((service.folder / "work").rglob("*.jpg"))


def test_another_worker_makes_the_same_files_anew(service: Service) -> None:
    row = uploaded(service, zipped(people()))
    worker.drop_cached(service.settings, str(row.digest))
    assert not (service.settings.data_dir / "datasets" / str(row.digest)).exists()
    root = Path(worker.materialise(service.context(), row)["root"])
    assert len(list(root.rglob("*.jpg"))) == 8


def test_damaged_files_are_made_again(service: Service) -> None:
    row = uploaded(service, zipped(people()))
    context = service.context()
    victim = Path(worker.materialise(context, row)["root"]) / "p0" / "0.jpg"
    good = victim.read_bytes()
    victim.chmod(0o644)
    victim.write_bytes(b"changed")
    with pytest.raises(JobPermanentlyFailed, match=r"have digest .* when they were checked"):
        worker.verify(context, row)
    assert (Path(worker.materialise(context, row)["root"]) / "p0" / "0.jpg").read_bytes() == good
    worker.verify(context, row)


def test_a_folder_is_used_in_place_and_not_when_it_changed(service: Service) -> None:
    row = registered(service)
    context = service.context()
    assert worker.materialise(context, row)["root"] == str(service.sites / "site")
    assert not (service.settings.data_dir / "datasets").exists()
    write(service.sites / "site", {"p0/0.jpg": jpeg(1234)})
    for use in (worker.materialise, worker.verify):
        with pytest.raises(JobPermanentlyFailed, match="POST /datasets/site/recheck"):
            use(context, row)


def test_options_reach_the_reader(service: Service) -> None:
    options = {"layout": "folder", "seed": 5, "queries_per_identity": 1, "boxes": "labeled"}
    write(service.sites / "site", people())
    service.datasets.create(
        NewDataset("site", Source("folder", str(service.sites / "site")), options, Rights(**RIGHTS)), ME
    )
    config = worker.materialise(service.context(), service.check("site"))
    assert (config["kind"], config["seed"], config["boxes"]) == ("folder", 5, "labeled")


def test_a_deleted_data_set_is_at_nobodys_disposal(service: Service) -> None:
    row = uploaded(service, zipped(people()))
    service.datasets.delete("packed", ME)
    with pytest.raises(JobPermanentlyFailed, match="is deleted"):
        worker.materialise(service.context(), row)


def test_what_nobody_owns_goes_from_the_worker(service: Service) -> None:
    row = uploaded(service, zipped(people()))
    other = uploaded(service, zipped(people(5)), "other")
    service.datasets.delete("packed", ME)
    half_made = service.settings.data_dir / "datasets" / ".part-old"
    half_made.mkdir()
    os.utime(half_made, (0, 0))
    assert sorted(worker.drop_unowned(service.settings, service.app.state.services.database)) == [
        ".part-old",
        row.digest,
    ]
    assert [path.name for path in (service.settings.data_dir / "datasets").iterdir()] == [other.digest]


@pytest.mark.skipif(landlock.version() == 0, reason="this kernel has no Landlock")
def test_a_child_cannot_write_the_data_set_whoever_it_runs_as(service: Service) -> None:
    root = Path(worker.materialise(service.context(), uploaded(service, zipped(people())))["root"])
    mine = service.folder / "mine"
    mine.mkdir()
    root.chmod(0o777)  # modes alone would let it
    program = f"""
from pathlib import Path
root, mine = Path({str(root)!r}), Path({str(mine)!r})
(mine / "allowed").write_text("x")
print(len((root / "p0/0.jpg").read_bytes()) > 0)
for attempt in (
    lambda: (root / "new.jpg").write_text("x"),
    lambda: (root / "p0").rename(mine / "p0"),
    lambda: (root / "p0/0.jpg").unlink(),
    lambda: (root / "p0/0.jpg").open("r+b"),
):
    try:
        attempt()
        print("done")
    except OSError as error:
        print(type(error).__name__)
"""
    said: list[str] = []
    context = service.context()
    context.folder = mine
    context.run_child([sys.executable, "-c", program], on_line=said.append)
    assert said == ["True", *["PermissionError"] * 4]
    assert (mine / "allowed").exists()


def test_where_the_kernel_has_no_landlock_nothing_is_guarded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(landlock, "version", lambda: 0)
    assert landlock.write_only_below([tmp_path]) is None


# Deleting, on both databases ----------------------------------------------------------------------------------------


def keep_a_file(service: Service, kind: str, name: str, content: bytes, state: str = "succeeded") -> str:
    """A job of that kind that used the data set and keeps a file; returns the sha256."""
    job_id = service.submit(kind, {"dataset": name, "n": uuid.uuid4().hex})
    services = service.app.state.services
    sha256 = hashlib.sha256(content).hexdigest()
    open_store(service.settings.storage).put(content_key(sha256), [content], sha256)
    with services.database.transaction() as session:
        rows = JobRows(session)
        assert rows.begin(job_id, "tester")
        assert rows.keep_file(job_id, "tester", "embeddings.npz", sha256, len(content))
        if state != "running":
            assert rows.end(job_id, "tester", state, result=None, error=None)  # type: ignore[arg-type]
    return sha256


def is_stored(service: Service, sha256: str) -> bool:
    try:
        open_store(service.settings.storage).stat(content_key(sha256))
    except ObjectNotFound:
        return False
    return True


def test_deleting_removes_the_archive_and_the_embeddings_made_from_it(on_both: Service) -> None:
    row = uploaded(on_both, zipped(people()))
    other = uploaded(on_both, zipped(people(5)), "other")
    embeddings = keep_a_file(on_both, "evaluate", "packed", b"embeddings of packed")
    weights = keep_a_file(on_both, "refine", "packed", b"a checkpoint")
    of_other = keep_a_file(on_both, "evaluate", "other", b"embeddings of other")
    on_both.datasets.delete("packed", ME)
    stored = {
        name: is_stored(on_both, sha256)
        for name, sha256 in (
            ("archive", row.location),
            ("embeddings", embeddings),
            ("weights", weights),
            ("other archive", other.location),
            ("other embeddings", of_other),
        )
    }
    assert stored == {
        "archive": False,
        "embeddings": False,
        "weights": True,
        "other archive": True,
        "other embeddings": True,
    }
    left = on_both.datasets.find("packed")
    assert (left.state, left.digest, left.terms) == ("deleted", row.digest, "research")
    assert left.report is not None
    assert sorted(left.report) == ["files", "layout", "splits"]
    with on_both.app.state.services.database.transaction() as session:
        entry = Audit(session).page(None, 1)[0]
    assert (entry.action, entry.target, len(entry.detail["jobs"]), entry.detail["job_files"]) == (
        "dataset.delete",
        "packed",
        2,
        1,
    )


def test_an_archive_that_another_data_set_shares_stays(on_both: Service) -> None:
    content = zipped(people())
    row = uploaded(on_both, content)
    uploaded(on_both, content, "twin")
    on_both.datasets.delete("packed", ME)
    assert is_stored(on_both, row.location)
    on_both.datasets.delete("twin", ME)
    assert not is_stored(on_both, row.location)


@pytest.mark.parametrize("state", ["queued", "running"])
def test_a_data_set_that_a_job_needs_is_not_deleted(on_both: Service, state: str) -> None:
    registered(on_both)
    if state == "queued":
        job = on_both.submit("refine", {"dataset": "site", "preset": "small"})
    else:
        keep_a_file(on_both, "evaluate", "site", b"x", "running")
        job = ""
    for attempt in (on_both.datasets.delete, on_both.datasets.recheck):
        with pytest.raises(DatasetInUse, match=f"job {job}"):
            attempt("site", ME)
    assert on_both.datasets.find("site").state == "ready"
    assert on_both.audited()[-1] != "dataset.delete"


def test_a_job_and_a_deletion_at_once_never_both_succeed(on_both: Service) -> None:
    registered(on_both)
    services = on_both.app.state.services
    barrier = threading.Barrier(2)

    def submit() -> bool:
        barrier.wait()
        try:
            with services.database.transaction() as session:
                on_both.datasets.require_ready_in(session, "site")
                services.jobs.submit_in(session, "refine", {"dataset": "site"}, ME)
        except DatasetNotReady:
            return False
        return True

    def delete() -> bool:
        barrier.wait()
        try:
            on_both.datasets.delete("site", ME)
        except DatasetInUse:
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        outcomes = [found.result() for found in [pool.submit(submit), pool.submit(delete)]]
    assert sorted(outcomes) == [False, True]


def test_of_ten_registrations_at_once_one_is_new(on_both: Service) -> None:
    write(on_both.sites / "a", people())
    with ThreadPoolExecutor(10) as pool:
        made = list(pool.map(lambda _: on_both.datasets.create(of_folder(on_both.sites / "a"), ME), range(10)))
    assert [is_new for _, is_new in made].count(True) == 1
    assert on_both.audited().count("dataset.create") == 1


def test_data_sets_go_when_their_time_is_over(on_both: Service) -> None:
    uploaded(on_both, zipped(people()), "short", days=1)
    uploaded(on_both, zipped(people(5)), "long", days=10)
    uploaded(on_both, zipped(people(6)), "used", days=1)
    job = on_both.submit("refine", {"dataset": "used"})
    registered(on_both, "forever")
    assert on_both.datasets.expire(datetime.now(UTC)) == []
    later = datetime.now(UTC) + timedelta(days=2)
    assert on_both.datasets.expire(later) == ["short"]
    on_both.app.state.services.jobs.cancel(job, ME)
    assert on_both.datasets.expire(later) == ["used"]
    states = {name: on_both.datasets.find(name).state for name in ("short", "long", "used", "forever")}
    assert states == {"short": "deleted", "long": "ready", "used": "deleted", "forever": "ready"}


def test_a_store_that_fails_leaves_garbage_and_not_a_data_set(
    on_both: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.errors import StorageUnavailable

    def fail(_key: str) -> None:
        raise StorageUnavailable("away")

    uploaded(on_both, zipped(people()))
    monkeypatch.setattr(on_both.datasets._store, "delete", fail, raising=False)
    on_both.datasets.delete("packed", ME)
    assert on_both.datasets.find("packed").state == "deleted"


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({"dataset": "a"}, True),
        ({"data": {"datasets": ["b", "a"]}}, True),
        ({"teacher": "a"}, False),
        ({"dataset": "ab", "chain": "a"}, False),
        ({"runs": [{"dataset": "a"}]}, True),
    ],
)
def test_a_request_names_a_data_set_by_its_field(request_: dict[str, Any], expected: bool) -> None:
    assert uses(request_, "a") is expected
