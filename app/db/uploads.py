"""SQL of uploads: files on their way in, and the parts that have arrived."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from app.db.tables import UploadPartRow, UploadRow


class UploadRows:
    """Uploads and their parts."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def find(self, kind: str, target: str) -> UploadRow | None:
        return self._session.scalar(select(UploadRow).where(UploadRow.kind == kind, UploadRow.target == target))

    def count(self) -> int:
        return self._session.scalar(select(func.count()).select_from(UploadRow)) or 0

    def add(self, upload: UploadRow) -> None:
        self._session.add(upload)
        self._session.flush()

    def parts(self, upload: str) -> Sequence[UploadPartRow]:
        """The parts of an upload in the order of their bytes."""
        return self._session.scalars(
            select(UploadPartRow).where(UploadPartRow.upload == upload).order_by(UploadPartRow.start)
        ).all()

    def add_part(self, part: UploadPartRow, at: datetime) -> bool:
        """True when the part continues the upload; False when the upload is gone or has another number of bytes.

        One conditional update, so that of two clients who send the same bytes exactly one is told so.
        """
        moved = self._session.scalars(
            update(UploadRow)
            .where(UploadRow.id == part.upload, UploadRow.received_bytes == part.start)
            .values(received_bytes=part.start + part.size_bytes, updated_at=at)
            .returning(UploadRow.id)
            .execution_options(synchronize_session=False)
        ).one_or_none()
        if moved is None:
            return False
        self._session.add(part)
        return True

    def delete(self, upload: str) -> bool:
        """True when there was one; its parts go with it."""
        gone = self._session.scalars(
            delete(UploadRow)
            .where(UploadRow.id == upload)
            .returning(UploadRow.id)
            .execution_options(synchronize_session=False)
        )
        return gone.one_or_none() is not None

    def delete_older(self, than: datetime) -> int:
        """How many uploads there were that received their last bytes before that; they are gone now."""
        gone = self._session.scalars(
            delete(UploadRow)
            .where(UploadRow.updated_at < than)
            .returning(UploadRow.id)
            .execution_options(synchronize_session=False)
        )
        return len(gone.all())
