"""Resumable uploads: a file of many gigabytes arrives in parts, and what has arrived survives whatever happens next.

Each part of `part_bytes` is an object of the store before the database counts it, so any process can go on where
another died. The count moves by compare-and-set: of two clients that send the same bytes, one gets `OffsetMismatch`.
The one surprise: parts are never deleted here. They are content-addressed, so two uploads may share one; the rows go,
and garbage collection removes the objects that no row names any more.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from sqlalchemy.orm import Session

from app.actor import Actor
from app.db.session import Database
from app.db.tables import UploadPartRow, UploadRow
from app.db.uploads import UploadRows
from app.errors import (
    ObjectCorrupt,
    ObjectNotFound,
    OffsetMismatch,
    TooManyUploads,
    UnknownUpload,
    UploadCorrupt,
    UploadIncomplete,
    UploadTooLarge,
    UploadTooLong,
)
from app.services.stored import put_and_name, require_stored
from app.storage.port import ObjectStore, content_key


class UploadTarget(Protocol):
    """What a file can be uploaded for: a teacher, a data set. `app.api.uploads` speaks HTTP for all of them."""

    def upload(self, name: str) -> UploadRow:
        """The open upload of `name`, opened again where it was dropped as stale. Raises what says that there is no such
        target, and `UploadNotAwaited` when its file is there already."""

    def arrived_bytes(self, name: str) -> tuple[int, int]:
        """(bytes received, bytes announced); equal once the file is there. Raises as there is no such target."""

    def complete(self, name: str, by: Actor) -> str:
        """Put the whole file to use and return the id of the job that checks it. Raises `UploadIncomplete`,
        `UploadCorrupt` and as `upload`."""


class Uploads:
    """Files on their way in. One upload per kind and target."""

    def __init__(
        self,
        database: Database,
        store: ObjectStore,
        *,
        part_bytes: int,
        max_bytes: int,
        max_open: int,
        retention: timedelta,
    ) -> None:
        self._database = database
        self._store = store
        self.part_bytes = part_bytes
        self._max_bytes = max_bytes
        self._max_open = max_open
        self._retention = retention

    def create_in(self, session: Session, kind: str, target: str, sha256: str, size_bytes: int) -> UploadRow:
        """Open an upload in the caller's transaction. Raises `UploadTooLarge` and `TooManyUploads`."""
        rows = UploadRows(session)
        if size_bytes > self._max_bytes:
            raise UploadTooLarge(size_bytes, self._max_bytes)
        if rows.count() >= self._max_open:
            raise TooManyUploads(self._max_open)
        upload = _fresh(kind, target, sha256, size_bytes)
        rows.add(upload)
        return upload

    def open_in(self, session: Session, kind: str, target: str, sha256: str, size_bytes: int) -> UploadRow:
        """The upload of this target, opened if there is none (any more). Raises as `create_in`."""
        found = UploadRows(session).find(kind, target)
        return self.create_in(session, kind, target, sha256, size_bytes) if found is None else found

    def find_in(self, session: Session, kind: str, target: str) -> UploadRow | None:
        return UploadRows(session).find(kind, target)

    def find(self, kind: str, target: str) -> UploadRow:
        """Raises `UnknownUpload`."""
        with self._database.transaction() as session:
            found = UploadRows(session).find(kind, target)
        if found is None:
            raise UnknownUpload(kind, target)
        return found

    def append(self, kind: str, target: str, offset: int, chunks: Iterable[bytes]) -> UploadRow:
        """Add bytes from `offset` on, part by part, each committed. When `chunks` fails, what came before is kept.

        Raises `UnknownUpload`, `OffsetMismatch`, `UploadTooLong` and `StorageError`.
        """
        upload = self.at_offset(self.find(kind, target), offset)
        for part in _parts(chunks, self.part_bytes):
            upload = self.add_part(upload, part)
        return upload

    def at_offset(self, upload: UploadRow, offset: int) -> UploadRow:
        """The upload itself. Raises `OffsetMismatch` when it has another number of bytes."""
        if offset != upload.received_bytes:
            raise OffsetMismatch(offset, upload.received_bytes)
        return upload

    def add_part(self, upload: UploadRow, part: bytes) -> UploadRow:
        """Store the next bytes of `upload` as `upload` has it, and return it as it is then; a new value.

        Raises `UploadTooLong`, `OffsetMismatch` when somebody else was faster, and `StorageError`.
        """
        start, stop = upload.received_bytes, upload.received_bytes + len(part)
        if stop > upload.size_bytes:
            raise UploadTooLong(upload.size_bytes)
        if not part:
            return upload
        sha256, now = hashlib.sha256(part).hexdigest(), datetime.now(UTC)

        def count() -> None:
            with self._database.transaction() as session:
                rows = UploadRows(session)
                row = UploadPartRow(upload=upload.id, start=start, size_bytes=len(part), sha256=sha256)
                if not rows.add_part(row, now):
                    raise _mismatch(rows, upload, start)
                require_stored(session, self._store, sha256)

        put_and_name(lambda: self._store.put(content_key(sha256), [part], sha256), count)
        return _copy(upload, received_bytes=stop, updated_at=now)

    def restart(self, upload: UploadRow) -> UploadRow:
        """Forget every byte. The upload gets a new id, so that a client still sending to the old one is refused."""
        fresh = _fresh(upload.kind, upload.target, upload.sha256, upload.size_bytes)
        with self._database.transaction() as session:
            rows = UploadRows(session)
            if not rows.delete(upload.id):
                raise _mismatch(rows, upload, 0)
            rows.add(fresh)
        return fresh

    def assemble(self, upload: UploadRow) -> None:
        """Make the whole file one object, `content_key(upload.sha256)`; streamed, and not yet recorded anywhere.

        Doing it twice is safe. Raises `UploadIncomplete`, `StorageError`, and `UploadCorrupt` when the bytes do not
        have the digest that was announced: the upload has started over then.
        """
        if upload.received_bytes != upload.size_bytes:
            raise UploadIncomplete(upload.received_bytes, upload.size_bytes)
        with self._database.transaction() as session:
            parts = [part.sha256 for part in UploadRows(session).parts(upload.id)]
        try:
            self._store.put(content_key(upload.sha256), self._bytes_of(parts), upload.sha256)
        except (ObjectCorrupt, ObjectNotFound) as error:  # a part may be gone where somebody removed objects by hand
            self.restart(upload)
            raise UploadCorrupt(upload.size_bytes, upload.sha256) from error

    def finish_in(self, session: Session, upload: UploadRow) -> None:
        """Close an assembled upload, in the transaction that puts its file to use. Raises `UnknownUpload` when somebody
        else closed it meanwhile."""
        if not UploadRows(session).delete(upload.id):
            raise UnknownUpload(upload.kind, upload.target)

    def discard_in(self, session: Session, kind: str, target: str) -> None:
        """Close the upload of this target unfinished; nothing happens when there is none."""
        rows = UploadRows(session)
        if (found := rows.find(kind, target)) is not None:
            rows.delete(found.id)

    def drop_stale(self, now: datetime) -> int:
        """Close the uploads that have received nothing for the retention time; how many there were.

        What they were for still waits for its file: the next upload of it begins at 0.
        """
        with self._database.transaction() as session:
            return UploadRows(session).delete_older(now - self._retention)

    def _bytes_of(self, parts: Iterable[str]) -> Iterator[bytes]:
        for sha256 in parts:
            yield from self._store.get(content_key(sha256))


def _mismatch(rows: UploadRows, upload: UploadRow, offset: int) -> OffsetMismatch | UnknownUpload:
    """What to raise when the upload is not as it was when its row was read."""
    found = rows.find(upload.kind, upload.target)
    return OffsetMismatch(offset, found.received_bytes) if found else UnknownUpload(upload.kind, upload.target)


def _fresh(kind: str, target: str, sha256: str, size_bytes: int) -> UploadRow:
    now = datetime.now(UTC)
    return UploadRow(
        id=uuid.uuid4().hex,
        kind=kind,
        target=target,
        sha256=sha256,
        size_bytes=size_bytes,
        received_bytes=0,
        created_at=now,
        updated_at=now,
    )


def _copy(upload: UploadRow, **changes: Any) -> UploadRow:
    values = {column.key: getattr(upload, column.key) for column in UploadRow.__table__.columns}
    return UploadRow(**{**values, **changes})


def _parts(chunks: Iterable[bytes], part_bytes: int) -> Iterator[bytes]:
    """The same bytes in pieces of `part_bytes`. When `chunks` fails, first what had arrived, then its error."""
    held = bytearray()
    try:
        for chunk in chunks:
            held += chunk
            while len(held) >= part_bytes:
                yield bytes(held[:part_bytes])
                del held[:part_bytes]
    except Exception:
        if held:
            yield bytes(held)
        raise
    if held:
        yield bytes(held)
