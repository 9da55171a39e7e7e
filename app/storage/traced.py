"""An object store whose calls can be seen in traces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime

from app.storage.port import ObjectStat, ObjectStore
from app.tracing import span, traced_chunks


class TracedStore:
    """`store`, with a span around each call; keys are digests and say nothing of their content."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def prepare(self) -> None:
        with span("store.prepare"):
            self._store.prepare()

    def get(self, key: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        return traced_chunks("store.get", self._store.get(key, start, stop), key=key, start=start)

    def put(self, key: str, chunks: Iterable[bytes], sha256: str) -> bool:
        with span("store.put", key=key):
            return self._store.put(key, chunks, sha256)

    def stat(self, key: str) -> ObjectStat:
        with span("store.stat", key=key):
            return self._store.stat(key)

    def delete(self, key: str) -> None:
        with span("store.delete", key=key):
            self._store.delete(key)

    def list(self, prefix: str = "") -> Iterator[str]:
        return traced_chunks("store.list", self._store.list(prefix), prefix=prefix)

    def drop_drafts(self, before: datetime, *, dry_run: bool = False) -> int:
        with span("store.drop_drafts"):
            return self._store.drop_drafts(before, dry_run=dry_run)
