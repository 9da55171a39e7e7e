"""The object-store port: what the service asks of a store, in six verbs.

The one surprise: `put` is told the sha256 beforehand and nothing becomes visible unless the bytes have it. Stores are
not trusted to keep bytes intact either: `read_verified` hashes what comes back. Conditional writes of S3 servers differ
too much to build on, so uniqueness of anything but content-addressed keys belongs in the database.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from app.errors import InvalidKey, ObjectCorrupt

CHUNK_BYTES = 256 * 1024
MAX_KEY_CHARACTERS = 512
_KEY = re.compile(r"[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ObjectStat:
    """What a store knows of an object without reading it. modified_at: in UTC, by the store's clock."""

    key: str
    size_bytes: int
    modified_at: datetime


class Sink(Protocol):
    """Anything bytes can be written to."""

    def write(self, data: bytes, /) -> int: ...


class ObjectStore(Protocol):
    """Bytes under keys. All methods raise `InvalidKey` for a bad key and `StorageUnavailable` when the store fails.

    No key may be the beginning of another up to a `/`: a folder cannot hold both `a` and `a/b`.
    """

    def prepare(self) -> None:
        """Make the folder or bucket if it is not there yet."""

    def get(self, key: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Yield the bytes `[start:stop]` as slicing would give them. Raises `ObjectNotFound` at the first chunk."""

    def put(self, key: str, chunks: Iterable[bytes], sha256: str) -> bool:
        """Store the chunks; True when stored, False when the key was taken, which leaves the stored bytes as they are.

        A content-addressed object that was there is as good as stored just now: its age begins anew, so that garbage
        collection leaves it alone until the caller has recorded it. Raises `ObjectCorrupt`, and stores nothing, when
        the chunks do not have the digest `sha256` (64 hex).
        """

    def stat(self, key: str) -> ObjectStat:
        """Raises `ObjectNotFound`."""

    def delete(self, key: str) -> None:
        """Remove the object; nothing happens when there is none."""

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield the keys that begin with `prefix`, in ascending order."""

    def drop_drafts(self, before: datetime, *, dry_run: bool = False) -> int:
        """Remove what writers left that were killed in a `put` before that moment; how many such drafts there were."""


def content_key(sha256: str) -> str:
    """`sha256/ab/abcd…`: the key of the object whose content has this digest. Raises `InvalidKey`."""
    if _SHA256.fullmatch(sha256) is None:
        raise InvalidKey(f"'{sha256[:80]}' is no sha256 in 64 lower-case hex digits")
    return f"sha256/{sha256[:2]}/{sha256}"


def checked_key(key: str) -> str:
    """Return `key`, or raise `InvalidKey`: lower-case segments that begin with a letter or digit, so never `..`."""
    if len(key) > MAX_KEY_CHARACTERS or _KEY.fullmatch(key) is None:
        raise InvalidKey(f"'{key[:80]}' is no object key: use segments of a-z, 0-9, '.', '_' and '-', parted by '/'")
    return key


def read_verified(store: ObjectStore, sha256: str) -> bytes:
    """The whole content-addressed object. Raises `ObjectNotFound`, or `ObjectCorrupt` when it is not what it claims."""
    content = b"".join(store.get(content_key(sha256)))
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ObjectCorrupt(f"object {content_key(sha256)} has digest {found} after {len(content)} bytes")
    return content


def copy_hashed(chunks: Iterable[bytes], target: Sink, sha256: str) -> int:
    """Write the chunks to `target` and return their number of bytes. Raises `ObjectCorrupt` at the end."""
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        size += target.write(chunk)
    if digest.hexdigest() != sha256:
        raise ObjectCorrupt(f"{size} bytes were announced as sha256 {sha256} and have {digest.hexdigest()}")
    return size


def fetch_to(store: ObjectStore, sha256: str, path: Path) -> None:
    """Make the content-addressed object the file `path`, which until it is whole stays as it was.

    Raises `ObjectNotFound`, `ObjectCorrupt`, `StorageUnavailable` and `OSError`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("wb") as file:
            copy_hashed(store.get(content_key(sha256)), file, sha256)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
