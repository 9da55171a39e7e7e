"""What the jobs that train or measure share: the stages of `chains` in child processes, and files that travel.

A stage is told what to do by a file and answers by one (`chains.stages`); nothing here loads torch. A run directory is
whole on no machine: what must outlive a worker is kept with the job while the stage runs, and fetched where it goes on.
A stage writes in the job's scratch folder and nowhere else, so no data set is ever changed by a job.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.db.datasets import DatasetRows
from app.db.repositories import Chains
from app.db.tables import ChainRow, DatasetRow, TeacherRow
from app.db.teachers import TeacherRows
from app.errors import ChildFailed, JobPermanentlyFailed
from app.services.job_requests import SMALL_STEPS, WHOLE_SCHEDULES
from app.storage.port import fetch_to
from app.worker.context import StepContext
from app.worker.datasets import materialise
from app.worker.datasets import verify as verify_dataset

TICK_S = 2.0
SMALL_RATE = 2e-3
MOST_WARMUP = 100  # steps
FULL_LOG_STEPS = 200  # lines in the log of a training, however long it is
MOST_CHECKPOINT_STEPS, MOST_VALIDATE_STEPS = 500, 1000
RUN, METRICS, CHAIN, REPORT = "run", "metrics.jsonl", "chain.safetensors", "report.json"
_KILLED = re.compile(r"exitcode\s*:\s*-(\d+)")  # how torchrun tells that a signal ended one of its processes


def run_stage(
    context: StepContext, task: Mapping[str, Any], *, processes: int | None = None, watch: RunFiles | None = None
) -> dict[str, Any]:
    """Do `task` in a child and return its result. processes: under torchrun, so many. watch: its run directory.

    Raises `JobPermanentlyFailed` with the stage's own words when it refuses, `ChildFailed` when it broke off, and as
    `StepContext.run_child`."""
    task_file, result_file = context.folder / "task.json", context.folder / "result.json"
    result_file.unlink(missing_ok=True)
    task_file.write_text(json.dumps(task), encoding="utf-8")
    command = [*launcher(processes), "-m", "chains.stages", str(task_file), str(result_file)]
    signals: list[int] = []

    def on_line(line: str) -> None:
        signals.extend(int(number) for number in _KILLED.findall(line))
        context.log(without_folders(line, context))

    try:
        context.run_child(command, on_line=on_line, every_s=TICK_S, tick=None if watch is None else watch.tick)
    except ChildFailed as error:
        refusal = _result(result_file).get("refused")
        if isinstance(refusal, str):
            raise JobPermanentlyFailed(without_folders(refusal, context)) from error
        lines = [without_folders(line, context) for line in error.lines]
        raise ChildFailed(str(task["do"]), -signals[0] if signals else error.status, lines) from error
    return _result(result_file)


def launcher(processes: int | None) -> list[str]:
    """The command in front of `-m`: this Python, or torchrun with so many processes on this machine."""
    if processes is None:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def without_folders(text: str, context: StepContext) -> str:
    """`text` without the paths of this worker."""
    for folder in (context.folder, context.settings.work, context.settings.data_dir.absolute()):
        text = text.replace(f"{folder}/", "").replace(str(folder), ".")
    return text


def _result(path: Path) -> dict[str, Any]:
    """What a stage wrote; empty where it wrote nothing."""
    if not path.exists():
        return {}
    result: dict[str, Any] = json.loads(path.read_bytes())
    return result


@dataclass
class RunFiles:
    """A run directory whose files travel with the job.

    lasting: names of files that are kept whenever they change; they are fetched in this order, and kept in it, so that
    a log is never older than the checkpoint it goes with. trainings: whose progress is told.
    """

    context: StepContext
    folder: Path
    lasting: Sequence[str]
    trainings: Collection[str] = ()
    _kept: dict[str, tuple[int, int]] = field(default_factory=dict)
    _uploaded_at: float = field(default_factory=time.monotonic)
    _read_to: int = 0

    def fetch(self) -> None:
        """What the job keeps and this worker lacks. A directory without its first file was never begun."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in self.lasting:
            path = self.folder / name
            if not path.exists() and not self.context.fetch_file(name, path) and name == self.lasting[0]:
                _empty(self.folder)
                return
            self._remember(name)

    def keep(self, names: Sequence[str] | None = None) -> None:
        """Keep every file that is there and has changed. Raises as `StepContext.keep_file`."""
        for name in self.lasting if names is None else names:
            path = self.folder / name
            if path.exists() and self._kept.get(name) != _version(path):
                version = _version(path)
                self._keep_snapshot(path, name)
                self._kept[name] = version
        self._uploaded_at = time.monotonic()

    def tick(self) -> None:
        """While a stage runs: tell its progress, and now and then keep its files."""
        self.tell()
        if time.monotonic() - self._uploaded_at >= self.context.settings.checkpoint_upload_s:
            self.keep()

    def tell(self) -> None:
        """The last numbers in the run's log that have not been told."""
        path = self.folder / METRICS
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(max(0, self._read_to - 1))
            if self._read_to and file.read(1) != b"\n":
                file.seek(0)  # the run has rewound its log: other lines stand here
            *whole, half = file.read().split(b"\n")
            self._read_to = file.tell() - len(half)
        progress: dict[str, Any] = {}
        for line in whole:
            progress |= progress_of(json.loads(line), self.trainings)
        if progress:
            self.context.report(**progress)

    def _keep_snapshot(self, path: Path, name: str) -> None:
        """By another name for the same bytes: the run replaces its files, and one that changes under the reader is no
        file at all."""
        snapshot = self.context.folder / f"keep-{name}"
        snapshot.unlink(missing_ok=True)
        os.link(path, snapshot)
        try:
            self.context.keep_file(snapshot, name)
        finally:
            snapshot.unlink(missing_ok=True)

    def _remember(self, name: str) -> None:
        path = self.folder / name
        if path.exists():
            self._kept[name] = _version(path)


def progress_of(event: Mapping[str, Any], trainings: Collection[str]) -> dict[str, Any]:
    """What an event of a run's log says of how far one of `trainings` is.

    >>> progress_of({"stage": "refinement", "step": 9, "validation": {"map full": 40.0}}, ["refinement"])
    {'training': 'refinement', 'early_map': {'map full': 40.0}, 'early_map_step': 9}
    """
    if event.get("stage") not in trainings:
        return {}
    if "validation" in event:
        return {"training": event["stage"], "early_map": event["validation"], "early_map_step": event["step"]}
    told = ("step", "steps", "epoch", "losses", "eta_s", "images_per_s")
    return {"training": event["stage"], **{name: event[name] for name in told if name in event}}


def kept_chain(context: StepContext) -> Path:
    """The chain that earlier steps made, on this worker. Raises `JobPermanentlyFailed` when the job keeps none."""
    path = context.folder / RUN / CHAIN
    if not path.exists() and not context.fetch_file(CHAIN, path):
        raise JobPermanentlyFailed("the job's chain is not kept any more; start a new job")
    return path


def verified(context: StepContext, data: Mapping[str, Any], digest: str) -> dict[str, Any]:
    """The last look at the job's chain. Raises `JobPermanentlyFailed` for one that must not be published, and where the
    images are no longer those that the data set's digest names."""
    found = run_stage(context, {"do": "verify", "chain": str(kept_chain(context)), "data": data})
    if found["digest"] != digest:
        raise JobPermanentlyFailed("the chain's file is not the one that was measured; start a new job")
    verify_dataset(context, dataset_row(context))
    return {name: found[name] for name in ("digest", "images", "largest_difference")}


def cancelled(context: StepContext, reason: str) -> None:
    """After a job broke off: one that failed may be tried again and keeps its files, a cancelled one is over."""
    if reason == "cancelled":
        context.drop_files()


def data_of(context: StepContext, digest: str | None = None) -> dict[str, Any]:
    """The job's data set on this worker, as the values of a `chains.config.DataConfig`, under its registered name.
    digest: which it must have. Raises `JobPermanentlyFailed` when it has another, or may not be used any more."""
    dataset = dataset_row(context)
    if digest is not None and dataset.digest != digest:
        raise JobPermanentlyFailed(
            f"data set '{dataset.name}' is no longer the one this job began with; start a new job"
        )
    values = {name: value for name, value in materialise(context, dataset).items() if value is not None}
    return {**values, "root": str(values["root"]), "name": dataset.name}


def dataset_row(context: StepContext) -> DatasetRow:
    """Raises `JobPermanentlyFailed`."""
    name = context.request["dataset"]
    with context.database.transaction() as session:
        row = DatasetRows(session).find(name)
    if row is None or row.digest is None:
        raise JobPermanentlyFailed(f"data set '{name}' is not there any more, or was never checked")
    return row


def teacher_row(context: StepContext, name: str | None = None) -> TeacherRow:
    """The teacher of that name, by default the request's. Raises `JobPermanentlyFailed`."""
    name = name or context.request["teacher"]
    with context.database.transaction() as session:
        row = TeacherRows(session).find(name)
    if row is None or row.input is None:
        raise JobPermanentlyFailed(f"teacher '{name}' is not there any more, or was never checked")
    return row


def weights_of(teacher: TeacherRow) -> str:
    """The sha256 of the file that jobs read: what the check made of the upload, or an ONNX file as it came."""
    return str((teacher.report or {}).get("teacher_sha256") or teacher.sha256)


def chain_row(context: StepContext, field: str = "chain") -> ChainRow:
    """field: of the request, which names it. Raises `JobPermanentlyFailed`."""
    name = context.request[field]
    with context.database.transaction() as session:
        row = Chains(session).find(name)
    if row is None:
        raise JobPermanentlyFailed(f"chain '{name}' is not there any more")
    return row


def fetch_object(context: StepContext, sha256: str, path: Path) -> Path:
    """The stored object at `path`, which is whole or not there. Raises `StorageError` and `OSError`."""
    if not path.exists():
        fetch_to(context.store, sha256, path)
    return path


def recipe_of(request: Mapping[str, Any]) -> tuple[int | None, dict[str, Any]]:
    """(steps, other fields of the recipe) that a training's request asks for, on top of its preset: a whole schedule
    gives all that is not named here."""
    steps: int | None = request["steps"]
    changes: dict[str, Any] = {
        "precision": request["precision"],
        "micro_batches": request["micro_batches"] or request["processes"],
    }
    if request["preset"] not in WHOLE_SCHEDULES:
        steps = SMALL_STEPS if steps is None else steps
        changes |= {"lr": SMALL_RATE, "warmup_steps": min(MOST_WARMUP, steps // 10)}
    if request["learning_rate"] is not None:
        changes["lr"] = request["learning_rate"]
    if request["batch"] is not None:
        changes["batch"] = request["batch"]
    return steps, changes


def output_of(steps: int | None) -> dict[str, int]:
    """How often a training of so many steps tells, keeps and measures itself, as `chains.config` has it; `None`: of a
    whole schedule, whose length its images decide."""
    wanted = steps or MOST_VALIDATE_STEPS * FULL_LOG_STEPS
    return {
        "report_steps": max(1, min(50, wanted // FULL_LOG_STEPS)),
        "checkpoint_steps": max(1, min(MOST_CHECKPOINT_STEPS, wanted // 20)),
        "validate_steps": max(1, min(MOST_VALIDATE_STEPS, wanted // 4)),
    }


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()
