"""Data sets on a worker: checked once, and put at the disposal of jobs, read-only and exactly as they were checked.

    data_dir/datasets/<digest>/      files of an archive or a bucket; shared by jobs, modes 0444 and 0555

They are made in the job's own folder and get that name by renaming, so they are whole or not there.
A folder of the server is read where it is and never copied. Everything that parses what others have written runs in the
sandbox (`app.worker.inspection`); the digest is computed here, from bytes alone. File modes do not stop a job that runs
as the same user: `app.worker.landlock` does where the kernel has it, and `verify` finds what was changed all the same.
"""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

import structlog
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from app.db.datasets import CHECKING, READY, REFUSED, DatasetRows
from app.db.session import Database
from app.db.tables import DatasetRow
from app.errors import (
    DatasetChanged,
    DatasetNotReady,
    DatasetRefused,
    DatasetSourceRefused,
    JobPermanentlyFailed,
    UnknownDataset,
)
from app.redaction import redact
from app.services.dataset_sources import SourceRules
from app.settings import Settings
from app.storage.port import content_key, copy_hashed
from app.worker.archives import SLACK_BYTES, Limits, Names, check_file_size, too_large, why_not_read
from app.worker.context import StepContext
from app.worker.file_tree import Tree, digest_of, list_tree, remove, seal
from app.worker.inspection import READ_OPTIONS
from app.worker.sandbox import CompletedSandbox, run_sandboxed
from chains.data.readers import KINDS

if TYPE_CHECKING:
    from app.storage.s3_prefix import S3Object, S3Prefix

S3_READERS = 8  # objects fetched at once: crops are small, and each costs a round trip
MAX_RESULT_BYTES = 1024**2
STALE_S = 24 * 3600
REPORT_EVERY_FILES = 200
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PART = ".part-"
_log = structlog.get_logger(__name__)


def printable(text: str) -> str:
    """What any database, log and terminal can take; names of files may hold any bytes."""
    return "".join(character if character.isprintable() else "?" for character in text)


Text = Annotated[str, Field(max_length=600), AfterValidator(printable)]
Texts = Annotated[list[Text], Field(max_length=100)]
Count = Annotated[int, Field(ge=0, lt=2**53)]


class _FromSandbox(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Split(_FromSandbox):
    """One of train, query and gallery."""

    images: Count
    identities: Count
    cameras: Count
    single_image_identities: Count
    unknown_camera: Count


class Findings(_FromSandbox):
    """What the sandbox says of a data set. place: the folder or table that is read, relative to the data set."""

    layout: Text
    place: Text
    title: Text
    splits: Annotated[dict[Text, Split], Field(max_length=3)]
    broken: Count
    broken_files: Texts
    left_out: Annotated[dict[Text, Count], Field(max_length=100)]
    errors: Texts
    warnings: Texts
    notes: Texts

    @model_validator(mode="after")
    def _check(self) -> Findings:
        if self.layout not in KINDS or ".." in PurePosixPath(self.place).parts or self.place.startswith("/"):
            raise ValueError("no layout and place that the readers of data sets could have found")
        return self


class Unpacked(_FromSandbox):
    """What the sandbox says of an archive."""

    files: Count
    size_bytes: Count
    left_out: Annotated[dict[Text, Count], Field(max_length=100)]


# The job `check-dataset` -------------------------------------------------------------------------------------------


def fetch(context: StepContext) -> dict[str, Any]:
    """First step: the archive, or the objects of the bucket, onto this worker."""
    dataset = _being_checked(context)
    return _or_refusal(lambda: {"bytes": _fetch(context, dataset)})


def inspect(context: StepContext) -> dict[str, Any]:
    """Second step: unpack, list, hash and read every file. What is wrong with the data is a result, not an error."""
    if "refused" in context.outputs["fetch"]:
        return {"refused": context.outputs["fetch"]["refused"]}
    dataset = _being_checked(context)
    return _or_refusal(lambda: _inspected(context, dataset))


def record(context: StepContext) -> dict[str, Any]:
    """Third step: the verdict into the data set's row; the files into this worker's cache."""
    found = context.outputs["inspect"]
    name = context.request["dataset"]
    values = _verdict(found)
    if values["state"] == READY:
        _keep(context, values["digest"])
    with context.database.transaction() as session:
        DatasetRows(session).move(name, (CHECKING,), values.pop("state"), datetime.now(UTC), **values)
    remove(_workshop(context))
    drop_unowned(context.settings, context.database)
    return {"state": READY if values["reason"] is None else REFUSED, "reason": values["reason"]}


STEPS = (("fetch", fetch), ("inspect", inspect), ("record", record))


def failed(context: StepContext, reason: str) -> None:
    """The check broke off: the data set says why, and can be checked again."""
    remove(_workshop(context))
    with context.database.transaction() as session:
        why = f"the check did not finish: {reason}"[:2000]
        name = context.request["dataset"]
        DatasetRows(session).move(name, (CHECKING,), REFUSED, datetime.now(UTC), reason=why)


# For the steps of other jobs ----------------------------------------------------------------------------------------


def materialise(context: StepContext, dataset: DatasetRow) -> dict[str, Any]:
    """The files of a data set on this worker, read-only and with the digest that was checked, as the values of a
    `chains.config.DataConfig`. Hashes every file, so call it once per step.

    Raises `JobPermanentlyFailed` when the data set was deleted, changed, or may not be read any more, and
    `StorageError` and `OSError` when it may work another time.
    """
    with _permanent():
        current = _ready(context, dataset.name)
        drop_unowned(context.settings, context.database)
        root = _verified(context, current)
        return _config(current, root)


def verify(context: StepContext, dataset: DatasetRow) -> None:
    """Hash the files again, after a job that may have been able to write them. A changed cache is dropped.

    Raises `JobPermanentlyFailed`: what the job made is not from the data set that it names.
    """
    digest = _digest_of(dataset)
    with _permanent():
        root = _in_place(context, dataset) if dataset.source == "folder" else _cache(context.settings) / digest
        found = _digest(context, list_tree(root, _limits(context.settings)))
        if found != digest:
            if dataset.source != "folder":
                drop_cached(context.settings, digest)
            raise DatasetChanged(dataset.name, digest, found)


def drop_cached(settings: Settings, digest: str) -> None:
    """Remove the files of a deleted data set from this worker."""
    if _DIGEST.fullmatch(digest):
        remove(_cache(settings) / digest)


def drop_unowned(settings: Settings, database: Database) -> list[str]:
    """Remove what no data set owns any more, and what a worker that died has left half made; returns the names.

    Several may do it at once on one machine. Raises `DatabaseUnavailable`.
    """
    cache = _cache(settings)
    if not cache.is_dir():
        return []
    names = sorted(path.name for path in cache.iterdir())
    with database.transaction() as session:
        owned = DatasetRows(session).digests()
    long_ago = time.time() - STALE_S
    gone = [name for name in names if _DIGEST.fullmatch(name) and name not in owned]
    gone += [name for name in names if name.startswith(_PART) and _modified_at(cache / name) < long_ago]
    for name in gone:
        with suppress(FileNotFoundError):  # somebody else is removing it too
            remove(cache / name)
    return gone


# Parts of both ------------------------------------------------------------------------------------------------------


def _fetch(context: StepContext, dataset: DatasetRow) -> int:
    """Bytes fetched; nothing is fetched again that this worker has. Raises `DatasetRefused`."""
    rules = _rules(context.settings)
    workshop = _workshop(context)
    workshop.mkdir(parents=True, exist_ok=True)
    if dataset.source == "folder":
        rules.folder(dataset.location)
        return 0
    if dataset.source == "archive":
        return _fetch_archive(context, dataset.location, workshop / "archive")
    if (workshop / "files").is_dir():
        return 0
    from app.storage.s3_prefix import S3Prefix  # boto3 takes a third of a second to import

    bucket, prefix = rules.prefix(dataset.location)
    source = S3Prefix(bucket, prefix, context.settings.s3_endpoint_url)
    fetched = _fetch_objects(context, source, _emptied(workshop / "files.part"))
    (workshop / "files.part").rename(workshop / "files")
    return fetched


def _fetch_archive(context: StepContext, sha256: str, place: Path) -> int:
    if not place.is_file():
        beside = place.with_name("archive.part")
        with beside.open("wb") as file:
            copy_hashed(_watched(context, context.store.get(content_key(sha256))), file, sha256)
        beside.rename(place)
    return place.stat().st_size


def _fetch_objects(context: StepContext, source: S3Prefix, target: Path) -> int:
    """Every object that readers could read, under its own name once that is known to be harmless."""
    wanted = _wanted(context, source.objects(), _limits(context.settings))
    if not wanted:
        raise DatasetRefused("there is no image, list or table under this prefix")
    total = sum(found.size_bytes for _, found in wanted)
    done = 0
    with ThreadPoolExecutor(S3_READERS, thread_name_prefix="widthwise-s3") as pool:
        for start in range(0, len(wanted), REPORT_EVERY_FILES):
            context.check_cancelled()
            piece = wanted[start : start + REPORT_EVERY_FILES]
            done += sum(pool.map(lambda one: _fetch_object(source, one[1], target / one[0]), piece))
            context.report(fetched_bytes=done, total_bytes=total)
    return done


def _wanted(context: StepContext, objects: Iterator[S3Object], limits: Limits) -> list[tuple[PurePosixPath, S3Object]]:
    names, wanted, size_bytes = Names(limits), [], 0
    for found in objects:
        context.check_cancelled()
        path = names.take(found.name)
        if why_not_read(path) is not None:
            continue
        check_file_size(path, found.size_bytes)
        size_bytes += found.size_bytes
        if size_bytes > limits.max_bytes:
            raise too_large(limits)
        wanted.append((path, found))
    return wanted


def _fetch_object(source: S3Prefix, found: S3Object, place: Path) -> int:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("xb") as file:
            size = sum(file.write(chunk) for chunk in source.read(found))
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise DatasetRefused(f"{found.name[:200]!a} is a file and a folder at once") from error
    if size != found.size_bytes:
        raise DatasetRefused(f"{found.name[:200]!a} was listed with {found.size_bytes:,} bytes and has {size:,}")
    return size


def _inspected(context: StepContext, dataset: DatasetRow) -> dict[str, Any]:
    root, left_out = _files(context, dataset)
    tree = list_tree(root, _limits(context.settings))
    digest = _digest(context, tree)
    found = _look(context, root, dataset)
    report = found.model_dump() | {
        "files": len(tree.files),
        "size_bytes": tree.size_bytes,
        "left_out": left_out | tree.left_out | found.left_out,
    }
    return {"digest": digest, "report": report}


def _files(context: StepContext, dataset: DatasetRow) -> tuple[Path, dict[str, int]]:
    """The folder of the files on this worker, and what was left out of an archive. Fetches what is not here."""
    if dataset.source == "folder":
        return _in_place(context, dataset), {}
    _fetch(context, dataset)
    files, counted = _workshop(context) / "files", _workshop(context) / "left-out.json"
    if dataset.source == "archive" and not files.is_dir():
        unpacked = _unpack(context, _workshop(context))
        counted.write_text(json.dumps(unpacked.left_out), encoding="utf-8")
        (_workshop(context) / "files.part").rename(files)
    return files, json.loads(counted.read_text(encoding="utf-8")) if counted.is_file() else {}


def _in_place(context: StepContext, dataset: DatasetRow) -> Path:
    """Raises `DatasetSourceRefused`, and `DatasetRefused` when there is no such folder here."""
    found = _rules(context.settings).folder(dataset.location)
    if not found.is_dir():
        raise DatasetRefused(
            f"{dataset.location[:200]} is no folder on this worker; mount it on every worker under the same path"
        )
    return found


def _unpack(context: StepContext, workshop: Path) -> Unpacked:
    archive, limits = workshop / "archive", _limits(context.settings)
    target, result = _emptied(workshop / "files.part"), workshop / "unpacked.json"
    command = [str(archive), str(target), str(limits.max_files), str(limits.max_bytes), str(result)]
    most_bytes = limits.max_bytes + archive.stat().st_size + 2 * SLACK_BYTES
    said = _in_sandbox(context, ["unpack", *command], workshop, (), most_bytes, _ignore)
    try:
        return Unpacked.model_validate(_outcome(result, said))
    except ValidationError as error:
        raise DatasetRefused("unpacking the archive gave no readable result") from error


def _look(context: StepContext, root: Path, dataset: DatasetRow) -> Findings:
    """Raises `DatasetRefused` when no reader can read it."""
    scratch = _emptied(_workshop(context) / "scratch")
    result = scratch / "findings.json"

    def tell(line: str) -> None:
        done, slash, total = line.partition("/")
        if slash and done.isdecimal() and total.isdecimal():
            context.report(files_done=int(done[:12]), files_total=int(total[:12]))

    command = ["look", str(root), json.dumps(dataset.options), str(result)]
    said = _in_sandbox(context, command, scratch, (root,), 64 * 1024**2, tell)
    try:
        return Findings.model_validate(_outcome(result, said))
    except ValidationError as error:
        raise DatasetRefused("reading the images gave no readable result") from error


def _in_sandbox(
    context: StepContext,
    arguments: list[str],
    folder: Path,
    readable: tuple[Path, ...],
    disk_bytes: int,
    on_line: Callable[[str], None],
) -> CompletedSandbox:
    return run_sandboxed(
        [sys.executable, "-m", "app.worker.inspection", *arguments],
        folder=folder,
        memory_bytes=context.settings.dataset_check_memory_bytes,
        seconds=context.settings.dataset_check_timeout_s,
        readable=readable,
        disk_bytes=disk_bytes,
        on_line=on_line,
        tick=context.check_cancelled,
    )


def _outcome(result: Path, ended: CompletedSandbox) -> Any:
    """What the sandbox found. Raises `DatasetRefused`, and `OSError` when the worker's disk and not the data is at
    fault."""
    said = redact(printable(" ".join(ended.lines)))[-300:]
    if ended.stopped == "time":
        raise DatasetRefused("the check took too long; raise WIDTHWISE_DATASET_CHECK_TIMEOUT_S if that is meant")
    if ended.stopped == "disk":
        raise DatasetRefused("the check wrote more than WIDTHWISE_DATASET_MAX_BYTES")
    if ended.returncode != 0 and "No space left on device" in said:
        raise OSError(errno.ENOSPC, "the disk of this worker is full")
    if ended.returncode != 0:
        raise DatasetRefused(
            f"the check ended with status {ended.returncode}, as it does for files made to break decoders, or when it "
            f"needs more than WIDTHWISE_DATASET_CHECK_MEMORY_BYTES: {said}"
        )
    if not result.is_file() or result.is_symlink() or result.stat().st_size > MAX_RESULT_BYTES:
        raise DatasetRefused("the check left no readable result")
    try:
        outcome = json.loads(result.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DatasetRefused("the check left no readable result") from error
    if not isinstance(outcome, dict) or "refused" in outcome:
        raise DatasetRefused(printable(str(outcome["refused"] if isinstance(outcome, dict) else "no result"))[:600])
    return outcome.get("found")


def _verdict(found: dict[str, Any]) -> dict[str, Any]:
    """The new values of the row."""
    if "refused" in found:
        return {"state": REFUSED, "reason": found["refused"], "digest": None, "report": None}
    report = found["report"]
    if report["errors"]:
        reason = " ".join(["; ".join(report["errors"]), "; ".join(report["broken_files"][:3])]).strip()[:2000]
        return {"state": REFUSED, "reason": reason, "digest": found["digest"], "report": report}
    return {"state": READY, "reason": None, "digest": found["digest"], "report": report}


def _verified(context: StepContext, dataset: DatasetRow) -> Path:
    """The root of files that have the digest. Raises `DatasetChanged`."""
    digest = _digest_of(dataset)
    if dataset.source == "folder":
        root = _in_place(context, dataset)
        found = _digest(context, list_tree(root, _limits(context.settings)))
        if found != digest:
            raise DatasetChanged(dataset.name, digest, found)
        return root
    kept = _cache(context.settings) / digest
    if kept.is_dir():
        if _digest(context, list_tree(kept, _limits(context.settings))) == digest:
            return kept
        _log.warning("cached data set is damaged and made again", dataset=dataset.name, digest=digest)
        remove(kept)
    files, _ = _files(context, dataset)
    found = _digest(context, list_tree(files, _limits(context.settings)))
    if found != digest:
        remove(_workshop(context))
        raise DatasetChanged(dataset.name, digest, found)
    _keep(context, digest)
    remove(_workshop(context))
    return kept


def _keep(context: StepContext, digest: str) -> None:
    """The files that this job has made become the cached ones, whole or not at all. Somebody may have been faster."""
    files, cache = _workshop(context) / "files", _cache(context.settings)
    if not files.is_dir() or (cache / digest).exists():
        return
    cache.mkdir(parents=True, exist_ok=True)
    part = cache / f"{_PART}{uuid.uuid4().hex}"
    try:
        shutil.move(files, part)  # a copy, where the job's folder lies on another disk
        seal(part)
        part.rename(cache / digest)
    except OSError:
        remove(part)
        if not (cache / digest).is_dir():
            raise


def _config(dataset: DatasetRow, root: Path) -> dict[str, Any]:
    report = dataset.report or {}
    options = {name: dataset.options[name] for name in READ_OPTIONS if name in dataset.options}
    return {"kind": report["layout"], "root": str(root / report["place"]), **options}


def _digest(context: StepContext, tree: Tree) -> str:
    def tick(done: int, total: int) -> None:
        context.check_cancelled()
        context.report(hashed_bytes=done, total_bytes=total)

    return digest_of(tree, tick)


def _watched(context: StepContext, chunks: Iterator[bytes]) -> Iterator[bytes]:
    done = 0
    for chunk in chunks:
        context.check_cancelled()
        done += len(chunk)
        context.report(fetched_bytes=done)
        yield chunk


def _or_refusal(do: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `do` returns, or the reason why the data set is refused; the outputs of steps are JSON."""
    try:
        return do()
    except (DatasetRefused, DatasetSourceRefused) as error:
        return {"refused": str(error)}
    except (FileNotFoundError, PermissionError) as error:
        return {"refused": printable(f"a file cannot be read: {error.strerror}: {error.filename}")}


@contextmanager
def _permanent() -> Iterator[None]:
    """What no repetition mends, in the words that the job engine knows."""
    try:
        yield
    except (DatasetRefused, DatasetSourceRefused, DatasetNotReady, UnknownDataset) as error:
        raise JobPermanentlyFailed(str(error)) from error


def _being_checked(context: StepContext) -> DatasetRow:
    """Raises `JobPermanentlyFailed` when nobody awaits this check any more."""
    with _permanent(), context.database.transaction() as session:
        return _in_state(DatasetRows(session), context.request["dataset"], CHECKING)


def _ready(context: StepContext, name: str) -> DatasetRow:
    with context.database.transaction() as session:
        return _in_state(DatasetRows(session), name, READY)


def _in_state(rows: DatasetRows, name: str, state: str) -> DatasetRow:
    row = rows.find(name)
    if row is None:
        raise UnknownDataset(name)
    if row.state != state:
        raise DatasetNotReady(name, row.state)
    return row


def _digest_of(dataset: DatasetRow) -> str:
    if dataset.digest is None or _DIGEST.fullmatch(dataset.digest) is None:
        raise DatasetNotReady(dataset.name, dataset.state)
    return dataset.digest


def _rules(settings: Settings) -> SourceRules:
    return SourceRules(settings.dataset_roots, settings.dataset_buckets)


def _limits(settings: Settings) -> Limits:
    return Limits(settings.dataset_max_files, settings.dataset_max_bytes)


def _cache(settings: Settings) -> Path:
    return settings.data_dir.absolute() / "datasets"


def _modified_at(path: Path) -> float:
    """In seconds since 1970; of what has just gone, endlessly far ahead."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return math.inf


def _workshop(context: StepContext) -> Path:
    return context.folder / "dataset"


def _emptied(folder: Path) -> Path:
    remove(folder)
    folder.mkdir(parents=True)
    return folder


def _ignore(_line: str) -> None:
    """Unpacking says nothing on the way."""
