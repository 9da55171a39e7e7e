"""The registry of published chains.

A chain is published in one transaction, after its file is stored, read back and verified; until then nobody sees it.
Before that transaction ends the file is looked for once more: see `app.services.stored` for why it could be gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar, get_args

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.actor import COMMAND_LINE, WORKER, Actor
from app.db.audit import Audit
from app.db.repositories import Aliases, ChainFile, Chains
from app.db.session import Database
from app.db.tables import ChainRow, WidthRow
from app.errors import (
    ChainInUse,
    ChainNameTaken,
    ChainRightsDiffer,
    InvalidPageToken,
    ReservedName,
    StorageError,
    UnknownChain,
)
from app.services.chain_cache import ChainCache
from app.services.names import NAME
from app.services.stored import put_and_name, require_stored
from app.storage.port import CHUNK_BYTES, ObjectStore, content_key, read_verified
from app.terms import UNKNOWN, ConsentBasis, Rights, Terms
from chains import artifact
from chains.artifact import StoredChain
from chains.budget import Declined, Reason
from chains.chain import Chain, Frontier, Thresholds
from chains.errors import ChainFileError
from chains.onnxfile import EmitOptions, plan, require_finite
from chains.width import Width

STABLE, CANARY = "stable", "canary"
RESERVED_NAMES = frozenset({STABLE, CANARY})  # they are aliases, and a chain of that name would hide one
Found = TypeVar("Found")


@dataclass(frozen=True)
class Page:
    """Some chains in order of name, and the name to continue after (`None`: that was all)."""

    chains: Sequence[ChainRow]
    continue_after: str | None


@dataclass(frozen=True, eq=False)
class Offered:
    """A chain that was asked for, and the terminal chains that are offered with it; all ready to expand.

    terminals: those that take part, by name. left_out: the others, by name. failures: by name, why those of them that
    should take part could not be loaded.
    """

    asked: StoredChain
    terminals: Sequence[StoredChain]
    left_out: Sequence[Declined]
    failures: Mapping[str, StorageError | ChainFileError]


class Registry:
    """Publishes chains, finds them, loads them."""

    def __init__(self, database: Database, store: ObjectStore, cache_bytes: int) -> None:
        self._database = database
        self._store = store
        self.cache = ChainCache(self._read, cache_bytes)

    def publish(
        self,
        content: bytes,
        *,
        rights: Rights | None = None,
        job: str | None = None,
        become_stable: bool = True,
        by: Actor | None = None,
    ) -> ChainRow:
        """Publish a chain file. Publishing the same file again changes nothing, but that `rights` fill in what is
        still unknown of a chain no job made.

        rights: without them those the chain states itself, see `stated_rights`. become_stable: the alias `stable` goes
        to this chain if it points at none yet; never to one that a job made.
        Raises the `ChainsError`s of a bad file, `NotCalibrated` when a width of the ladder has no statistics,
        `ChainNameTaken`, `ChainRightsDiffer`, `ReservedName`, `StorageError` and `DatabaseUnavailable`.
        """
        stored = artifact.load(content)
        if stored.chain.name in RESERVED_NAMES:
            raise ReservedName(stored.chain.name)
        by = by or (COMMAND_LINE if job is None else WORKER)

        def put() -> None:
            self._store.put(content_key(stored.digest), _slices(content), stored.digest)
            read_verified(self._store, stored.digest)

        def record() -> None:
            row = _row(stored, rights or stated_rights(stored.chain), job)
            self._record(row, rights, by, become_stable=become_stable and job is None)

        put_and_name(put, record, again=(IntegrityError,))  # somebody else published just now
        return self.find(stored.chain.name)

    def delete(self, name: str, by: Actor) -> None:
        """Delete a chain and its models. Its file goes with the next collection of garbage; history and audit stay.

        Raises `UnknownChain`, and `ChainInUse` when an alias points at it, an offer is of it or with it, or a job that
        has not ended names it.
        """
        try:
            self._delete(name, by)
        except IntegrityError:  # an alias came to point at it just now: the second look sees it
            self._delete(name, by)

    def find(self, name: str) -> ChainRow:
        """The chain of that name or alias. Raises `UnknownChain`."""
        with self._database.transaction() as session:
            return known_chain(session, name)

    def load_offered(self, name: str, *, any_space: bool = False) -> Offered:
        """The chain of that name or alias, and the terminal chains that are offered with it.

        any_space: those of other embedding spaces take part too. Only what takes part is loaded; one that cannot be is
        left out, so that it does not take the chain with it. Raises `UnknownChain`, and as `load` of the chain itself.
        """
        with self._database.transaction() as session:
            asked, beside = _known(name, Chains(session).files)
        chain = self.load(asked.digest)
        terminals: list[StoredChain] = []
        left_out: list[Declined] = []
        failures: dict[str, StorageError | ChainFileError] = {}
        for file in beside:
            if not any_space and file.embedding_space != asked.embedding_space:
                left_out.append(_declined(file, "other-embedding-space"))
                continue
            try:
                terminals.append(self.load(file.digest))
            except (StorageError, ChainFileError) as error:
                left_out.append(_declined(file, "cannot-be-loaded"))
                failures[file.name] = error
        return Offered(chain, terminals, left_out, failures)

    def page(self, after: str, size: int) -> Page:
        """Up to `size` chains whose names follow `after` (empty: from the first). Raises `InvalidPageToken`."""
        if after and NAME.fullmatch(after) is None:
            raise InvalidPageToken
        with self._database.transaction() as session:
            found = Chains(session).page(after, size + 1)
        return Page(found[:size], found[size - 1].name if len(found) > size else None)

    def is_empty(self) -> bool:
        with self._database.transaction() as session:
            return Chains(session).is_empty()

    def load(self, digest: str) -> StoredChain:
        """The chain with that digest, from memory or the object store. Raises `StorageError` or `ChainFileError`."""
        return self.cache.get(digest)

    def forget_loaded(self) -> None:
        """Drop every chain from memory; the next request reads its file again."""
        self.cache.clear()

    def prepare_storage(self) -> None:
        """Make the folder or bucket if it is not there yet. Raises `StorageError`."""
        self._store.prepare()

    def check_storage(self) -> None:
        """Raises `StorageError` when the object store does not answer."""
        next(self._store.list("sha256/00/"), None)

    def _read(self, digest: str) -> StoredChain:
        return artifact.load(read_verified(self._store, digest))

    def _record(self, row: ChainRow, rights: Rights | None, by: Actor, *, become_stable: bool) -> None:
        """Raises `ObjectNotFound` when the file was taken for garbage before its row could protect it."""
        with self._database.transaction() as session:
            chains, aliases = Chains(session), Aliases(session)
            if (known := chains.find(row.name)) is not None:
                _agree(session, known, row, by if rights else None)
                return
            chains.add(row)
            require_stored(session, self._store, row.digest)
            if become_stable and not aliases.exists(STABLE):
                aliases.point(STABLE, row.name, None, row.published_at, by.id)
            Audit(session).add(by, "chain.publish", row.name, digest=row.digest, job=row.job, **_said(row))

    def _delete(self, name: str, by: Actor) -> None:
        with self._database.transaction() as session:
            chains = Chains(session)
            if NAME.fullmatch(name):
                chains.lock(name)
            row = known_chain(session, name)
            if row.aliases:
                raise ChainInUse(
                    row.name, f"the alias '{row.aliases[0].alias}' points at it; promote another chain first"
                )
            if row.offer is not None:
                raise ChainInUse(row.name, f"it is offered with chain '{row.offer.chain}'; {_take_back(row.name)}")
            if row.terminals:
                terminal = row.terminals[0].terminal
                raise ChainInUse(row.name, f"terminal chain '{terminal}' is offered with it; {_take_back(terminal)}")
            for job in chains.unfinished_jobs():
                if row.name in _texts(job.request):
                    raise ChainInUse(row.name, f"job {job.id} is {job.state} and names it; wait for it or cancel it")
            chains.delete(row.name)
            Audit(session).add(by, "chain.delete", row.name, digest=row.digest, **_said(row))


def stated_rights(chain: Chain) -> Rights:
    """The chain's own licence, and `terms` and `consent_basis` where its provenance states them; else unknown."""
    terms, basis = chain.provenance.get("terms"), chain.provenance.get("consent_basis")
    return Rights(chain.license, _one_of(get_args(Terms), terms), _one_of(get_args(ConsentBasis), basis))


def _one_of(known: tuple[Any, ...], stated: object) -> Any:
    return stated if stated in known else UNKNOWN


def known_chain(session: Session, name: str) -> ChainRow:
    """The chain of that name or alias. Raises `UnknownChain`."""
    return _known(name, Chains(session).find)


def known_name(session: Session, name: str) -> str:
    """The own name of the chain of that name or alias. Raises `UnknownChain`."""
    return _known(name, Chains(session).name)


def _known(name: str, find: Callable[[str], Found | None]) -> Found:
    """What `find` finds; names no chain can have are not even looked for. Raises `UnknownChain`."""
    found = find(name) if NAME.fullmatch(name) else None
    if found is None:
        raise UnknownChain(name)
    return found


def _take_back(terminal: str) -> str:
    return f"take that back first, by DELETE /chains/{terminal}/offer"


def _declined(file: ChainFile, reason: Reason) -> Declined:
    return Declined(file.name, file.embedding_space, file.mean_ap, reason)


def _agree(session: Session, known: ChainRow, offered: ChainRow, by: Actor | None) -> None:
    """Fill in rights that `by` states and that are still unknown of `known`, and what its file alone says. Raises
    `ChainNameTaken` for another file and `ChainRightsDiffer` for other rights."""
    if known.digest != offered.digest:
        raise ChainNameTaken(known.name, known.digest, offered.digest)
    known.is_terminal = offered.is_terminal  # a server that knew of no terminal chains may have published it
    before = _said(known)
    for name, stated in _said(offered).items() if by else ():
        if stated in (UNKNOWN, before[name]):
            continue
        if before[name] != UNKNOWN or known.job is not None:
            raise ChainRightsDiffer(known.name, name, before[name], stated)
        setattr(known, name, stated)
    if by and _said(known) != before:
        Audit(session).add(by, "chain.state-rights", known.name, **_said(known))


def _said(row: ChainRow) -> dict[str, str]:
    return {"terms": row.terms, "consent_basis": row.consent_basis}


def _texts(value: object) -> Iterator[str]:
    """Every text in a JSON value: requests name chains under many fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)


def _slices(content: bytes) -> Iterator[bytes]:
    return (content[start : start + CHUNK_BYTES] for start in range(0, len(content), CHUNK_BYTES))


def _row(stored: StoredChain, rights: Rights, job: str | None) -> ChainRow:
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
        is_terminal=chain.sizes is not None,
        license=rights.license,
        terms=rights.terms,
        consent_basis=rights.consent_basis,
        job=job,
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
