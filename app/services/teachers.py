"""Teachers: registered with their rights and a digest, then uploaded, then checked by a worker, then used by jobs.

    awaiting-weights ──upload whole──> checking ──worker──> ready | refused

A teacher is never overwritten: other weights need another name, or the old teacher deleted first. Nothing here reads
weights; that happens in a worker, in a child without network and credentials (`app.worker.teachers`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.actor import Actor
from app.db.audit import Audit
from app.db.job_requests import OpenRequests
from app.db.session import Database
from app.db.tables import TeacherRow, UploadRow
from app.db.teachers import FUSE, TeacherRows
from app.errors import (
    InvalidPageToken,
    TeacherExists,
    TeacherInUse,
    TeacherNameTaken,
    TeacherNotReady,
    UnknownTeacher,
    UploadNotAwaited,
)
from app.services.jobs import Jobs
from app.services.names import NAME
from app.services.uploads import Uploads
from app.terms import Rights

KIND = "teacher"  # of its upload
CHECK = "check-teacher"  # the job
AWAITING, CHECKING, READY, REFUSED = "awaiting-weights", "checking", "ready", "refused"


@dataclass(frozen=True)
class NewTeacher:
    """What an admin says of a teacher. declared: `architecture` and `input`, where the admin knows them."""

    name: str
    sha256: str
    size_bytes: int
    rights: Rights
    declared: Mapping[str, Any]


@dataclass(frozen=True)
class TeacherPage:
    """Some teachers in order of name, and the name to continue after (`None`: that was all)."""

    teachers: Sequence[TeacherRow]
    continue_after: str | None


class Teachers:
    """Registers teachers, takes in their weights, hands them to jobs. An `UploadTarget`."""

    def __init__(self, database: Database, uploads: Uploads, jobs: Jobs) -> None:
        self._database = database
        self._uploads = uploads
        self._jobs = jobs

    def create(self, new: NewTeacher, by: Actor) -> tuple[TeacherRow, bool]:
        """Register a teacher and await its weights; False: it was registered with exactly this content before.

        Raises `TeacherNameTaken`, `TeacherExists`, `UploadTooLarge` and `TooManyUploads`."""
        try:
            return self._create(new, by)
        except IntegrityError:  # somebody else took the name just now
            return self._create(new, by)

    def find(self, name: str) -> TeacherRow:
        """Raises `UnknownTeacher`."""
        with self._database.transaction() as session:
            return _known(session, name)

    def require_ready(self, name: str) -> TeacherRow:
        """The teacher, checked. Raises `UnknownTeacher` and `TeacherNotReady`."""
        found = self.find(name)
        if found.state != READY:
            raise TeacherNotReady(found.name, found.state)
        return found

    def page(self, after: str, size: int) -> TeacherPage:
        """Up to `size` teachers whose names follow `after` (empty: from the first). Raises `InvalidPageToken`."""
        if after and NAME.fullmatch(after) is None:
            raise InvalidPageToken
        with self._database.transaction() as session:
            found = TeacherRows(session).page(after, size + 1)
        return TeacherPage(found[:size], found[size - 1].name if len(found) > size else None)

    def delete(self, name: str, by: Actor) -> None:
        """Forget the teacher and what has arrived of it; garbage collection removes its objects, unless something else
        names them. Chains made from it stay. Raises `UnknownTeacher`, and `TeacherInUse` while a job needs it."""
        with self._database.transaction() as session:
            rows = TeacherRows(session)
            rows.lock(name)  # of a job that is being asked for just now, one or the other
            teacher = _known(session, name)
            if (job := rows.open_job(name)) is not None:
                raise TeacherInUse(name, job)
            self._uploads.discard_in(session, KIND, name)
            rows.delete(teacher)
            Audit(session).add(by, "teacher.delete", name, sha256=teacher.sha256, state=teacher.state)

    def upload(self, name: str) -> UploadRow:
        with self._database.transaction() as session:
            teacher = _known(session, name)
            if teacher.state != AWAITING:
                raise UploadNotAwaited(KIND, name, teacher.state)
            return self._uploads.open_in(session, KIND, name, teacher.sha256, teacher.size_bytes)

    def arrived_bytes(self, name: str) -> tuple[int, int]:
        with self._database.transaction() as session:
            teacher, upload = _known(session, name), self._uploads.find_in(session, KIND, name)
        if teacher.state != AWAITING:
            return teacher.size_bytes, teacher.size_bytes
        return (upload.received_bytes if upload else 0), teacher.size_bytes

    def complete(self, name: str, by: Actor) -> str:
        upload = self._uploads.find(KIND, name)
        self._uploads.assemble(upload)
        with self._database.transaction() as session:
            self._uploads.finish_in(session, upload)
            if not TeacherRows(session).move(name, upload.sha256, [AWAITING], CHECKING, datetime.now(UTC)):
                raise UploadNotAwaited(KIND, name, "no longer waiting")
            job = self._jobs.submit_in(session, CHECK, {"teacher": name, "sha256": upload.sha256}, by)
            Audit(session).add(by, "teacher.upload", name, sha256=upload.sha256, job=job.id)
            return job.id

    def _create(self, new: NewTeacher, by: Actor) -> tuple[TeacherRow, bool]:
        with self._database.transaction() as session:
            rows = TeacherRows(session)
            if (known := rows.find(new.name)) is not None:
                return _same(known, new), False
            require_unclaimed(session, new.name)
            row = _row(new)
            rows.add(row)
            self._uploads.create_in(session, KIND, new.name, new.sha256, new.size_bytes)
            Audit(session).add(by, "teacher.create", new.name, sha256=new.sha256, terms=new.rights.terms)
            return row, True


def require_unclaimed(session: Session, name: str) -> None:
    """Raises `TeacherExists` while a job that has not ended makes a teacher of that name."""
    if (job := OpenRequests(session).naming(name, [FUSE])) is not None:
        raise TeacherExists(f"job {job} is making a teacher '{name}'; wait for it, cancel it, or choose another name")


def _known(session: Session, name: str) -> TeacherRow:
    """Raises `UnknownTeacher`; names no teacher can have are not even looked for."""
    found = TeacherRows(session).find(name) if NAME.fullmatch(name) else None
    if found is None:
        raise UnknownTeacher(name)
    return found


def _row(new: NewTeacher) -> TeacherRow:
    now = datetime.now(UTC)
    return TeacherRow(
        name=new.name,
        state=AWAITING,
        reason=None,
        sha256=new.sha256,
        size_bytes=new.size_bytes,
        report={"declared": dict(new.declared)},
        license=new.rights.license,
        terms=new.rights.terms,
        consent_basis=new.rights.consent_basis,
        created_at=now,
        updated_at=now,
    )


def _same(known: TeacherRow, new: NewTeacher) -> TeacherRow:
    """Raises `TeacherNameTaken` when `known` was registered with anything else than `new`."""
    pairs = {
        "sha256": (known.sha256, new.sha256),
        "size_bytes": (known.size_bytes, new.size_bytes),
        "license": (known.license, new.rights.license),
        "terms": (known.terms, new.rights.terms),
        "consent_basis": (known.consent_basis, new.rights.consent_basis),
        "architecture or input": ((known.report or {}).get("declared"), dict(new.declared)),
    }
    for what, (registered, offered) in pairs.items():
        if registered != offered:
            raise TeacherNameTaken(known.name, what)
    return known
