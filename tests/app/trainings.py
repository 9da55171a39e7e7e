"""What the tests of the jobs that train share: a service with a toy teacher and a toy data set, and steps that are run
as a worker runs them, with real child processes. The fixtures are in `conftest.py`."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from app.db.jobs import JobRows
from app.db.migrate import migrate
from app.db.session import Database
from app.db.tables import DatasetRow, JobRow, TeacherRow
from app.services.job_requests import parse
from app.services.jobs import request_sha256
from app.services.registry import Registry
from app.settings import Settings
from app.storage.factory import open_store
from app.storage.port import ObjectStore, content_key
from app.worker.archives import Limits
from app.worker.context import StepContext
from app.worker.file_tree import digest_of, list_tree
from app.worker.kinds import KINDS
from chains.chain import InputSpec
from chains.data.synthetic import PeopleSettings

ROOT = Path(__file__).parents[2]
INPUT = InputSpec(32, 16, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SITE = PeopleSettings(train_identities=40, test_identities=12, height=32, width=16)
JOB = "0123456789abcdef0123456789abcdef"


@dataclass
class World:
    """A service's database and store with the toy teacher and data set in it."""

    settings: Settings
    database: Database
    store: ObjectStore
    registry: Registry

    def context(self, kind: str, body: Mapping[str, Any], folder: Path) -> StepContext:
        """The job's, on a worker with this scratch folder."""
        request = parse(kind, body).model_dump(mode="json")
        with self.database.transaction() as session:
            if session.get(JobRow, JOB) is None:
                session.add(job_row(kind, request))
        folder.mkdir(parents=True, exist_ok=True)
        return StepContext(
            JOB, request, {}, folder, self.settings, self.database, self.store, self.registry, executor="me"
        )

    def files(self) -> set[str]:
        with self.database.transaction() as session:
            return {row.name for row in JobRows(session).files(JOB)}


def job_row(kind: str, request: Mapping[str, Any]) -> JobRow:
    now = datetime.now(UTC)
    return JobRow(
        id=JOB, kind=kind, state="running", priority=0, request=dict(request),
        request_sha256=request_sha256(kind, request), attempts=1, cancel_requested=False, executor="me",
        created_by="test", created_at=now, updated_at=now,
    )  # fmt: skip


def make_world(folder: Path, site: Path, teacher_file: Path) -> World:
    """A service in `folder`, migrated."""
    settings = Settings(data_dir=folder, dataset_roots=(site.parent,), checkpoint_upload_s=0.01)
    database, store = Database(settings.database), open_store(settings.storage, settings.s3_endpoint_url)
    migrate(database)
    registry = Registry(database, store, 10**8)
    registry.prepare_storage()
    content = teacher_file.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    store.put(content_key(sha256), [content], sha256)
    digest = digest_of(list_tree(site, Limits(10**5, 10**9)))
    with database.transaction() as session:
        session.add(teacher_row(sha256, len(content)))
        session.add(dataset_row(site, digest))
    return World(settings, database, store, registry)


def teacher_row(sha256: str, size_bytes: int) -> TeacherRow:
    now = datetime.now(UTC)
    return TeacherRow(
        name="toy", state="ready", sha256=sha256, size_bytes=size_bytes, format="safetensors", architecture="resnet18",
        width="4x2-4-8", input={"height": 32, "width": 16, "mean": list(INPUT.mean), "std": list(INPUT.std)},
        report={"teacher_sha256": sha256}, license="MIT", terms="any", consent_basis="synthetic",
        created_at=now, updated_at=now,
    )  # fmt: skip


def dataset_row(site: Path, digest: str) -> DatasetRow:
    now = datetime.now(UTC)
    return DatasetRow(
        name="site", state="ready", source="folder", location=str(site), options={}, digest=digest,
        report={"layout": "market1501", "place": "."}, license="CC-BY-NC-4.0", terms="research",
        consent_basis="synthetic", created_at=now, updated_at=now,
    )  # fmt: skip


def run(context: StepContext, kind: str, steps: Sequence[str] | None = None) -> dict[str, Any]:
    """The named steps, all by default, as a worker runs them; the output of the last."""
    output: dict[str, Any] = {}
    for name, step in KINDS[kind].steps:
        if steps is None or name in steps:
            output = json.loads(json.dumps(step(context)))
            context.outputs[name] = output
    return output


class KilledOnce(StepContext):
    """A context whose training loses a process to SIGKILL once it has told of a step behind a checkpoint: `line`."""

    kills = 1
    line = "refinement: step 6/12"

    def run_child(self, command: Sequence[str], *, on_line: Callable[[str], None], **options: Any) -> None:
        def killing(line: str) -> None:
            on_line(line)
            if self.line in line and self.kills:
                self.kills -= 1
                for pid in training_processes(self.folder):
                    os.kill(pid, signal.SIGKILL)

        super().run_child(command, on_line=killing, **options)


def training_processes(folder: Path) -> list[int]:
    """The processes that torchrun started for the task in `folder`."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = place.read_bytes().split(b"\0")
        except OSError:
            continue
        is_launcher = b"torch.distributed.run" in words or any(word.endswith(b"guard.py") for word in words)
        if str(folder / "task.json").encode() in words and not is_launcher:
            found.append(int(place.parent.name))
    return found


def told(world: World) -> dict[str, Any]:
    """The job's progress as its row has it."""
    with world.database.transaction() as session:
        return dict(session.get_one(JobRow, JOB).progress or {})
