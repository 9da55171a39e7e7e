"""A folder as object store: one file per object, created whole or not at all.

An object is written beside its place under a name no key can have (it begins with a dot), flushed to the disk, and
then hard-linked to its name: `link` fails when the name is taken, so of two writers exactly one stores and no reader
ever sees half a file, also after a power cut. The age of an object is the age of its file.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from stat import S_ISREG

from app.errors import ObjectNotFound, StorageUnavailable
from app.storage.port import CHUNK_BYTES, ObjectStat, checked_key, copy_hashed

_DRAFT = ".put-"


class LocalStore:
    """Objects as files under `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def prepare(self) -> None:
        with _storage_errors():
            self._root.mkdir(parents=True, exist_ok=True)

    def get(self, key: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        path, left = self._path(key), None if stop is None else max(0, stop - start)
        with _storage_errors(), path.open("rb") as file:
            file.seek(start)
            while chunk := file.read(CHUNK_BYTES if left is None else min(left, CHUNK_BYTES)):
                left = None if left is None else left - len(chunk)
                yield chunk

    def put(self, key: str, chunks: Iterable[bytes], sha256: str) -> bool:
        path = self._path(key)
        with _storage_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=_DRAFT) as file:
                copy_hashed(chunks, file, sha256)
                file.flush()
                os.fsync(file.fileno())
                return _link_or_touch(Path(file.name), path)

    def stat(self, key: str) -> ObjectStat:
        path = self._path(key)
        with _storage_errors():
            found = path.stat()
        if not S_ISREG(found.st_mode):
            raise ObjectNotFound(f"no object at {path}")
        return ObjectStat(key, found.st_size, datetime.fromtimestamp(found.st_mtime, UTC))

    def delete(self, key: str) -> None:
        path = self._path(key)
        with suppress(ObjectNotFound), _storage_errors():
            path.unlink()

    def list(self, prefix: str = "") -> Iterator[str]:
        if not self._root.is_dir():
            raise StorageUnavailable(f"the storage folder {self._root} is not there")
        folder = prefix.rpartition("/")[0]
        top = self._path(folder) if folder else self._root  # a prefix inside one folder need not walk the others
        with _storage_errors():
            files = (Path(folder) / name for folder, _, names in os.walk(top) for name in names)
            keys = sorted(file.relative_to(self._root).as_posix() for file in files if not file.name.startswith("."))
        return (key for key in keys if key.startswith(prefix))

    def drop_drafts(self, before: datetime, *, dry_run: bool = False) -> int:
        with _storage_errors():
            drafts = [path for path in self._root.rglob(f"{_DRAFT}*") if _is_older(path, before)]
            for path in drafts if not dry_run else ():
                path.unlink(missing_ok=True)
        return len(drafts)

    def _path(self, key: str) -> Path:
        return self._root / checked_key(key)


def _link_or_touch(source: Path, target: Path) -> bool:
    """True when `target` was not there; else its age begins anew. Tries again when it is deleted between the two."""
    while True:
        try:
            os.link(source, target)
        except FileExistsError:
            with suppress(FileNotFoundError):
                os.utime(target)
                return False
        else:
            _sync_folder(target.parent)
            return True


def _is_older(path: Path, than: datetime) -> bool:
    try:
        return path.stat().st_mtime < than.timestamp()
    except FileNotFoundError:  # its writer has just finished
        return False


def _sync_folder(folder: Path) -> None:
    """The new name itself must reach the disk, not only the bytes."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _storage_errors() -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise ObjectNotFound(f"no object at {error.filename}") from error
    except OSError as error:
        raise StorageUnavailable(f"the storage folder failed: {error}") from error
