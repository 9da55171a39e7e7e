"""The registry of published chains.

A chain is published in one transaction, after its file is stored, read back and verified; until then nobody sees it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from sqlalchemy.exc import IntegrityError

from app.db.repositories import Aliases, Chains
from app.db.session import Database
from app.db.tables import ChainRow, WidthRow
from app.errors import ChainNameTaken, InvalidPageToken, ReservedName, UnknownChain
from app.services.chain_cache import ChainCache
from app.storage.port import CHUNK_BYTES, ObjectStore, content_key, read_verified
from chains import artifact
from chains.artifact import StoredChain
from chains.chain import Chain, Frontier, Thresholds
from chains.onnxfile import EmitOptions, plan, require_finite
from chains.width import Width

STABLE = "stable"
RESERVED_NAMES = frozenset({STABLE, "canary"})  # they are aliases, and a chain of that name would hide one
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")  # as the chain file format has it
Found = TypeVar("Found")


@dataclass(frozen=True)
class Page:
    """Some chains in order of name, and the name to continue after (`None`: that was all)."""

    chains: Sequence[ChainRow]
    continue_after: str | None


class Registry:
    """Publishes chains, finds them, loads them."""

    def __init__(self, database: Database, store: ObjectStore, cache_bytes: int) -> None:
        self._database = database
        self._store = store
        self._cache = ChainCache(self._read, cache_bytes)

    def publish(self, content: bytes) -> ChainRow:
        """Publish a chain file; the first chain ever becomes `stable`. Publishing the same file again changes nothing.

        Raises the `ChainsError`s of a bad file, `NotCalibrated` when a width of the ladder has no statistics,
        `ChainNameTaken`, `ReservedName`, `StorageError` and `DatabaseUnavailable`.
        """
        stored = artifact.load(content)
        if stored.chain.name in RESERVED_NAMES:
            raise ReservedName(stored.chain.name)
        row = _row(stored)
        self._store.put(content_key(stored.digest), _slices(content), stored.digest)
        read_verified(self._store, stored.digest)
        try:
            return self._record(row)
        except IntegrityError:  # somebody else published under this name just now
            return self._record(_row(stored))

    def find(self, name: str) -> ChainRow:
        """The chain of that name or alias. Raises `UnknownChain`."""
        with self._database.transaction() as session:
            return _known(name, Chains(session).find)

    def load_named(self, name: str) -> StoredChain:
        """The chain of that name or alias, ready to expand. Raises `UnknownChain` and as `load`."""
        with self._database.transaction() as session:
            digest = _known(name, Chains(session).digest)
        return self.load(digest)

    def page(self, after: str, size: int) -> Page:
        """Up to `size` chains whose names follow `after` (empty: from the first). Raises `InvalidPageToken`."""
        if after and _NAME.fullmatch(after) is None:
            raise InvalidPageToken
        with self._database.transaction() as session:
            found = Chains(session).page(after, size + 1)
        return Page(found[:size], found[size - 1].name if len(found) > size else None)

    def is_empty(self) -> bool:
        with self._database.transaction() as session:
            return Chains(session).is_empty()

    def load(self, digest: str) -> StoredChain:
        """The chain with that digest, from memory or the object store. Raises `StorageError` or `ChainFileError`."""
        return self._cache.get(digest)

    def forget_loaded(self) -> None:
        """Drop every chain from memory; the next request reads its file again."""
        self._cache.clear()

    def prepare_storage(self) -> None:
        """Make the folder or bucket if it is not there yet. Raises `StorageError`."""
        self._store.prepare()

    def check_storage(self) -> None:
        """Raises `StorageError` when the object store does not answer."""
        next(self._store.list("sha256/00/"), None)

    def _read(self, digest: str) -> StoredChain:
        return artifact.load(read_verified(self._store, digest))

    def _record(self, row: ChainRow) -> ChainRow:
        with self._database.transaction() as session:
            chains, aliases = Chains(session), Aliases(session)
            if (known := chains.find(row.name)) is not None:
                return _same(known, row)
            chains.add(row)
            if not aliases.exists(STABLE):
                aliases.point(STABLE, row.name, row.published_at)
        return self.find(row.name)


def _known(name: str, find: Callable[[str], Found | None]) -> Found:
    """What `find` finds; names no chain can have are not even looked for. Raises `UnknownChain`."""
    found = find(name) if _NAME.fullmatch(name) else None
    if found is None:
        raise UnknownChain(name)
    return found


def _same(known: ChainRow, offered: ChainRow) -> ChainRow:
    if known.digest != offered.digest:
        raise ChainNameTaken(known.name, known.digest, offered.digest)
    return known


def _slices(content: bytes) -> Iterator[bytes]:
    return (content[start : start + CHUNK_BYTES] for start in range(0, len(content), CHUNK_BYTES))


def _row(stored: StoredChain) -> ChainRow:
    chain = stored.chain
    return ChainRow(
        name=chain.name,
        digest=stored.digest,
        size_bytes=stored.size_bytes,
        architecture=chain.architecture,
        mode=chain.mode,
        teacher_width=str(chain.teacher),
        embedding_dim=chain.embedding_dim,
        embedding_space=chain.embedding_space,
        license=chain.license,
        input=asdict(chain.input),
        measurement=_measurement(chain.frontier),
        provenance=dict(chain.provenance),
        published_at=datetime.now(UTC),
        widths=[_width_row(stored, width, position) for position, width in enumerate(chain.ladder)],
    )


def _width_row(stored: StoredChain, width: Width, position: int) -> WidthRow:
    require_finite(stored, width)
    costs = plan(stored, width, EmitOptions()).costs
    return WidthRow(
        position=position,
        width=str(width),
        macs=costs.macs,
        params=costs.params,
        artifact_bytes=costs.artifact_bytes,
        peak_activation_bytes=costs.peak_activation_bytes,
        **_accuracy(stored.chain, width),
    )


def _accuracy(chain: Chain, width: Width) -> dict[str, float | None]:
    measured = chain.frontier.of(width) if chain.frontier else None
    if measured is None:
        return {}
    low, high = measured.map_ci95
    return {
        "mean_ap": measured.map,
        "mean_ap_low": low,
        "mean_ap_high": high,
        "rank1": measured.rank1,
        "rank5": measured.rank5,
        "rank10": measured.rank10,
        "minp": measured.minp,
    }


def _measurement(frontier: Frontier | None) -> dict[str, Any] | None:
    """How the frontier was measured, and its matrices; the widths have rows of their own."""
    if frontier is None:
        return None
    return {
        "dataset": frontier.dataset,
        "protocol": frontier.protocol,
        "seed": frontier.seed,
        "queries": frontier.queries,
        "gallery": frontier.gallery,
        "trained_after_expansion": frontier.trained_after_expansion,
        "widths": [str(measured.width) for measured in frontier.widths],
        "cross_map": [list(row) for row in frontier.cross_map],
        "thresholds": [_thresholds(at_rate) for at_rate in frontier.thresholds],
    }


def _thresholds(at_rate: Thresholds) -> dict[str, Any]:
    return {
        "false_accept_rate": at_rate.false_accept_rate,
        "cosine": [[found and found.cosine for found in row] for row in at_rate.matrix],
        "true_accept": [[found and found.true_accept for found in row] for row in at_rate.matrix],
    }
