"""Loaded chains, kept while they are in use.

Loading a chain reads, hashes and parses its whole file. However many requests ask for a chain that is not in memory,
one of them loads it and the others wait for that one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock

from chains.artifact import StoredChain


class ChainCache:
    """Chains by digest; the least recently used leave when their files sum to more than `max_bytes`."""

    def __init__(self, load: Callable[[str], StoredChain], max_bytes: int) -> None:
        self._load = load
        self._max_bytes = max_bytes
        self._lock = Lock()
        self.hits = self.misses = 0  # since the process started
        self._chains: OrderedDict[str, Future[StoredChain]] = OrderedDict()

    def get(self, digest: str) -> StoredChain:
        """The chain of that digest. Raises what `load` raises; a failure is not kept."""
        with self._lock:
            known = self._chains.get(digest)
            wanted = self._chains.setdefault(digest, Future()) if known is None else known
            self._chains.move_to_end(digest)
            self.hits += known is not None
            self.misses += known is None
        if known is None:
            self._fill(digest, wanted)
        return wanted.result()

    def clear(self) -> None:
        with self._lock:
            self._chains.clear()

    def _fill(self, digest: str, wanted: Future[StoredChain]) -> None:
        try:
            wanted.set_result(self._load(digest))
        except BaseException as error:
            with self._lock:
                self._chains.pop(digest, None)
            wanted.set_exception(error)
        else:
            self._evict()

    def _evict(self) -> None:
        """The newest stays even when it alone is too large: it is being served."""
        with self._lock:
            loaded = {key: held.result().size_bytes for key, held in self._chains.items() if held.done()}
            excess = sum(loaded.values()) - self._max_bytes
            for key in list(loaded)[:-1]:
                if excess <= 0:
                    return
                del self._chains[key]
                excess -= loaded[key]
