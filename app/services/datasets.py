"""Data sets: registered, checked by a worker, used by jobs, deleted with all that shows their people.

A data set is a folder that the workers see, a prefix in a bucket, or an uploaded archive. It is `ready` once a worker
has read every file of it; jobs use it only as it was then, by its digest. Deleting leaves the row, as `deleted`, so
that the provenance of a chain can still be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import structlog
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.actor import Actor
from app.db.audit import Audit
from app.db.datasets import ARCHIVE, AWAITING, CHECK, CHECKING, DELETED, READY, REFUSED, STATES, DatasetRows
from app.db.references import References
from app.db.session import Database
from app.db.tables import DatasetRow, UploadRow
from app.errors import (
    DatabaseUnavailable,
    DatasetInUse,
    DatasetNameTaken,
    DatasetNotReady,
    InvalidPageToken,
    StorageError,
    UnknownDataset,
    UploadNotAwaited,
)
from app.services.dataset_sources import SourceRules
from app.services.jobs import Jobs
from app.services.names import NAME
from app.services.uploads import Uploads
from app.storage.port import ObjectStore, content_key
from app.terms import Rights

KIND = "dataset"  # of its uploads
RETENTION = Actor("retention")
SHOWS_PEOPLE = ("evaluate",)  # kinds of jobs whose files hold embeddings and tables of single images
_KEPT_OF_REPORT = ("layout", "splits", "files")  # of a deleted data set: counts, and no name of a file
PATIENCE = timedelta(milliseconds=500)  # as long as writers are made to wait
_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Source:
    """kind: `folder`, `s3` or `archive`; location: an absolute path, an `s3://` URL, or a sha256. size_bytes: of an
    archive."""

    kind: str
    location: str
    size_bytes: int | None = None


@dataclass(frozen=True)
class NewDataset:
    """What is registered. options: `layout`, and fields of `chains.config.DataConfig`. retention_days: `None` for
    ever."""

    name: str
    source: Source
    options: Mapping[str, Any]
    rights: Rights
    retention_days: int | None = None


@dataclass(frozen=True)
class DatasetPage:
    """Some data sets in order of name, and the name to continue after (`None`: that was all)."""

    datasets: Sequence[DatasetRow]
    continue_after: str | None


class Datasets:
    """Registers data sets, hands them to workers, deletes them."""

    def __init__(
        self, database: Database, store: ObjectStore, uploads: Uploads, jobs: Jobs, sources: SourceRules
    ) -> None:
        self._database = database
        self._store = store
        self._uploads = uploads
        self._jobs = jobs
        self._sources = sources

    def create(self, new: NewDataset, by: Actor) -> tuple[DatasetRow, bool]:
        """Register a data set; True when it is new. An archive is then awaited; anything else is checked by a job.

        Raises `DatasetSourceRefused`, `DatasetNameTaken`, `UploadTooLarge` and `TooManyUploads`.
        """
        row = self._row(new)
        try:
            return self._record(row, by)
        except IntegrityError:  # somebody else took the name just now
            return self._record(self._row(new), by)

    def find(self, name: str) -> DatasetRow:
        """Raises `UnknownDataset`."""
        with self._database.transaction() as session:
            return _known(DatasetRows(session), name)

    def require_ready_in(self, session: Session, name: str) -> DatasetRow:
        """A data set that a job may use, in the transaction that queues the job: until that ends it cannot be deleted.

        Raises `UnknownDataset` and `DatasetNotReady`.
        """
        row = DatasetRows(session).find_kept(name) if NAME.fullmatch(name) else None
        if row is None:
            raise UnknownDataset(name)
        if row.state != READY:
            raise DatasetNotReady(name, row.state)
        return row

    def last_check(self, name: str) -> str | None:
        """The id of the job that checks, or checked last, this data set."""
        with self._database.transaction() as session:
            return DatasetRows(session).last_check(name)

    def page(self, after: str, size: int, state: str | None = None) -> DatasetPage:
        """Up to `size` data sets whose names follow `after`; `state` None: all but the deleted. Raises
        `InvalidPageToken`."""
        if after and NAME.fullmatch(after) is None:
            raise InvalidPageToken
        with self._database.transaction() as session:
            found = DatasetRows(session).page(after, size + 1, state)
        return DatasetPage(found[:size], found[size - 1].name if len(found) > size else None)

    def upload(self, name: str) -> UploadRow:
        """The open upload of its archive. Raises `UnknownDataset`, and `UploadNotAwaited` when none is awaited."""
        with self._database.transaction() as session:
            row = _known(DatasetRows(session), name)
            if row.state != AWAITING:
                raise UploadNotAwaited(KIND, name, row.state)
            return self._uploads.open_in(session, KIND, name, row.location, row.size_bytes or 0)

    def arrived_bytes(self, name: str) -> tuple[int, int]:
        """(bytes of its archive received, bytes announced). Raises `UnknownDataset` and `UploadNotAwaited`."""
        with self._database.transaction() as session:
            row = _known(DatasetRows(session), name)
            if row.source != ARCHIVE or row.size_bytes is None or row.state == DELETED:
                raise UploadNotAwaited(KIND, name, row.state)
            if row.state != AWAITING:
                return row.size_bytes, row.size_bytes
            upload = self._uploads.find_in(session, KIND, name)
            return (upload.received_bytes if upload else 0), row.size_bytes

    def complete(self, name: str, by: Actor) -> str:
        """Put the whole archive to use and return the id of the job that checks it.

        Raises `UnknownDataset`, `UploadNotAwaited`, `UploadIncomplete`, `UploadCorrupt` and `StorageError`.
        """
        upload = self.upload(name)
        self._uploads.assemble(upload)
        with self._database.transaction() as session:
            self._uploads.finish_in(session, upload)
            if not DatasetRows(session).move(name, (AWAITING,), CHECKING, datetime.now(UTC)):
                raise UploadNotAwaited(KIND, name, _known(DatasetRows(session), name).state)
            Audit(session).add(by, "dataset.upload", name, sha256=upload.sha256, size_bytes=upload.size_bytes)
            return self._check_in(session, name, by)

    def recheck(self, name: str, by: Actor) -> str:
        """Have the files read again, because they changed or the check failed; returns the id of the job.

        Raises `UnknownDataset`, `DatasetInUse`, and `DatasetNotReady` when there is nothing to read.
        """
        with self._database.transaction() as session:
            rows = DatasetRows(session)
            state = _known(rows, name).state
            if not rows.move(name, (READY, REFUSED, CHECKING), CHECKING, datetime.now(UTC), reason=None):
                raise DatasetNotReady(name, state)
            if (job := rows.open_job(name)) is not None:
                raise DatasetInUse(name, job)
            Audit(session).add(by, "dataset.recheck", name)
            return self._check_in(session, name, by)

    def delete(self, name: str, by: Actor) -> None:
        """Delete its archive and the embeddings and tables that jobs keep of it; nothing happens when that was done.

        A folder or bucket is left as it is: it belongs to somebody else. Raises `UnknownDataset` and `DatasetInUse`.
        """
        with self._database.transaction() as session:
            rows = DatasetRows(session)
            row = _known(rows, name)
            kept = {field: value for field, value in (row.report or {}).items() if field in _KEPT_OF_REPORT}
            now = datetime.now(UTC)
            if not rows.move(name, [state for state in STATES if state != DELETED], DELETED, now, report=kept or None):
                return
            if (job := rows.open_job(name)) is not None:
                raise DatasetInUse(name, job)
            self._uploads.discard_in(session, KIND, name)
            dropped = rows.drop_job_files(name, SHOWS_PEOPLE)
            Audit(session).add(
                by, "dataset.delete", name, digest=row.digest, jobs=rows.jobs(name)[-100:], job_files=len(dropped)
            )
        self._remove({row.location, *dropped} if row.source == ARCHIVE else set(dropped))

    def expire(self, now: datetime) -> list[str]:
        """Delete the data sets whose retention time is over, and return their names. One that a job still uses waits
        for the next time."""
        with self._database.transaction() as session:
            due = DatasetRows(session).due(now)
        return [name for name in due if self._expired(name)]

    def _expired(self, name: str) -> bool:
        try:
            self.delete(name, RETENTION)
        except DatasetInUse as error:
            _log.warning("data set kept beyond its retention time", dataset=name, reason=str(error))
            return False
        return True

    def _remove(self, digests: set[str]) -> None:
        """Delete those of these objects that no row names any more, as garbage collection does, but at once.

        The rows are gone already: what cannot be deleted now, that collection finds later.
        """
        try:
            with self._database.transaction() as session:
                references = References(session)
                references.freeze(PATIENCE)
                for digest in digests - references.digests():
                    self._store.delete(content_key(digest))
        except (StorageError, DatabaseUnavailable) as error:
            _log.warning("objects left for garbage collection", reason=str(error))

    def _check_in(self, session: Session, name: str, by: Actor) -> str:
        return self._jobs.submit_in(session, CHECK, {KIND: name}, by).id

    def _record(self, row: DatasetRow, by: Actor) -> tuple[DatasetRow, bool]:
        with self._database.transaction() as session:
            rows = DatasetRows(session)
            if (known := rows.find(row.name)) is not None:
                return _same(known, row), False
            rows.add(row)
            Audit(session).add(by, "dataset.create", row.name, source=row.source, location=row.location)
            if row.source == ARCHIVE:
                self._uploads.create_in(session, KIND, row.name, row.location, row.size_bytes or 0)
            else:
                self._check_in(session, row.name, by)
        return row, True

    def _row(self, new: NewDataset) -> DatasetRow:
        self._check_source(new.source)
        now = datetime.now(UTC)
        return DatasetRow(
            name=new.name,
            state=AWAITING if new.source.kind == ARCHIVE else CHECKING,
            reason=None,
            source=new.source.kind,
            location=new.source.location,
            size_bytes=new.source.size_bytes,
            options=dict(new.options),
            digest=None,
            report=None,
            license=new.rights.license,
            terms=new.rights.terms,
            consent_basis=new.rights.consent_basis,
            retain_until=None if new.retention_days is None else now + timedelta(days=new.retention_days),
            created_at=now,
            updated_at=now,
        )

    def _check_source(self, source: Source) -> None:
        """Raises `DatasetSourceRefused`."""
        if source.kind == "folder":
            self._sources.folder(source.location)
        elif source.kind == "s3":
            self._sources.prefix(source.location)


def _known(rows: DatasetRows, name: str) -> DatasetRow:
    """Names no data set can have are not even looked for. Raises `UnknownDataset`."""
    found = rows.find(name) if NAME.fullmatch(name) else None
    if found is None:
        raise UnknownDataset(name)
    return found


def _same(known: DatasetRow, offered: DatasetRow) -> DatasetRow:
    """Raises `DatasetNameTaken` unless both were registered in the same words."""
    if known.state == DELETED:
        raise DatasetNameTaken(known.name, "was deleted, and its name stays with what was made from it")
    fields = ("source", "location", "options", "license", "terms", "consent_basis")
    differing = [field for field in fields if getattr(known, field) != getattr(offered, field)]
    if _retention(known) != _retention(offered):
        differing.append("retention_days")
    if known.source == ARCHIVE == offered.source and known.size_bytes != offered.size_bytes:
        differing.append("size_bytes")
    if differing:
        raise DatasetNameTaken(known.name, f"is already registered with another {' and another '.join(differing)}")
    return known


def _retention(row: DatasetRow) -> timedelta | None:
    return row.retain_until - row.created_at if row.retain_until else None
