"""Whether the object store has what the database names: for restored backups, and before relying on one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from app.db.session import Database
from app.db.stats import Named, Stats
from app.errors import ObjectNotFound
from app.storage.port import ObjectStore, content_key


@dataclass(frozen=True)
class Finding:
    """An object that was looked at; `damage` in words, `None` when it is as it should be."""

    named: Named
    damage: str | None


def look(database: Database, store: ObjectStore, *, read: bool = False) -> Iterator[Finding]:
    """Look at every object that some row names, each once. read: read and hash it too, instead of its size alone.

    Raises `DatabaseUnavailable` and `StorageUnavailable`.
    """
    with database.transaction() as session:
        named = {one.sha256: one for one in reversed(Stats(session).named())}
    for one in reversed(named.values()):
        yield Finding(one, _damage(store, one, read=read))


def _damage(store: ObjectStore, named: Named, *, read: bool) -> str | None:
    key = content_key(named.sha256)
    try:
        size_bytes = store.stat(key).size_bytes
        if named.size_bytes is not None and size_bytes != named.size_bytes:
            return f"has {size_bytes:,} bytes instead of {named.size_bytes:,}"
        if read and (found := _sha256(store, key)) != named.sha256:
            return f"has sha256 {found[:12]}… instead of {named.sha256[:12]}…"
    except ObjectNotFound:
        return "is missing"
    return None


def _sha256(store: ObjectStore, key: str) -> str:
    digest = hashlib.sha256()
    for chunk in store.get(key):
        digest.update(chunk)
    return digest.hexdigest()
