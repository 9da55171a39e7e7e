"""Aliases: which chain devices get that name none.

Every move is decided under a lock and remembered with who made it. The one surprise: going back is not undone by going
back again. Rolling back twice goes back two chains, and never forth to the chain that was bad enough to leave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.actor import Actor
from app.db.audit import Audit
from app.db.repositories import Aliases, Chains
from app.db.session import Database
from app.db.tables import AliasChangeRow, ChainRow
from app.errors import (
    AliasMoved,
    AliasNotRemovable,
    NothingToRollBack,
    PromotionRefused,
    UnknownAlias,
)
from app.services.registry import RESERVED_NAMES, STABLE, known_chain
from app.terms import UNKNOWN

_ATTEMPTS = 4  # one loses a race only to somebody who got something done


@dataclass(frozen=True)
class Expected:
    """The chain an alias should point at now; `None`: at none."""

    chain: str | None


class Promotion:
    """Moves the aliases `stable` and `canary`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def promote(
        self, alias: str, chain: str, by: Actor, *, accept_unknown: bool = False, expected: Expected | None = None
    ) -> AliasChangeRow:
        """Make `alias` point at the chain of that name or alias. Where it does already, nothing changes.

        Raises `UnknownAlias`, `UnknownChain`, `AliasMoved` when it points at another chain than expected, and
        `PromotionRefused` for a chain whose terms, consent basis or accuracy are not known, unless that is accepted.
        """

        def move(session: Session) -> AliasChangeRow | None:
            aliases = Aliases(session)
            current = _locked(aliases, alias, expected)
            target = known_chain(session, chain)
            if target.name == current:
                return aliases.history_page(alias, None, 1)[0]
            unknown = unknowns(target)
            if unknown and not accept_unknown:
                raise PromotionRefused(target.name, f"promoted to '{alias}'", unknown)
            moved = aliases.point(alias, target.name, current, datetime.now(UTC), by.id)
            if moved is not None:
                detail = {"chain": target.name, "previous": current, "accepted_unknown": unknown}
                Audit(session).add(by, "alias.move", alias, **detail)
            return moved

        return self._retried(alias, move)

    def roll_back(self, alias: str, by: Actor, *, expected: Expected | None = None) -> AliasChangeRow:
        """Make `alias` point at the chain before. What was accepted of that chain when it was promoted stays accepted.

        Raises `UnknownAlias`, `AliasMoved`, and `NothingToRollBack` when there is no chain before or it was deleted.
        """

        def move(session: Session) -> AliasChangeRow | None:
            aliases = Aliases(session)
            current = _locked(aliases, alias, expected)
            if current is None:
                raise UnknownAlias(alias)
            before = _chain_before(session, alias, current, aliases.history(alias))
            moved = aliases.point(alias, before.name, current, datetime.now(UTC), by.id)
            Audit(session).add(by, "alias.roll-back", alias, chain=before.name, previous=current)
            return moved

        return self._retried(alias, move)

    def remove(self, alias: str, by: Actor) -> None:
        """Make the alias point at nothing. Raises `AliasNotRemovable` for `stable`, and `UnknownAlias`."""
        if alias == STABLE:
            raise AliasNotRemovable(alias)
        with self._database.transaction() as session:
            aliases = Aliases(session)
            current = _locked(aliases, alias, None)
            if current is None:
                raise UnknownAlias(alias)
            aliases.remove(alias, current, datetime.now(UTC), by.id)
            Audit(session).add(by, "alias.remove", alias, previous=current)

    def aliases(self) -> Sequence[AliasChangeRow]:
        """The last move of every alias that points at a chain."""
        with self._database.transaction() as session:
            return Aliases(session).current()

    def history(self, alias: str, before: int | None, size: int) -> Sequence[AliasChangeRow]:
        """Up to `size` moves, newest first, from before the move of that id. Raises `UnknownAlias`."""
        _require_alias(alias)
        with self._database.transaction() as session:
            return Aliases(session).history_page(alias, before, size)

    def _retried(self, alias: str, move: Callable[[Session], AliasChangeRow | None]) -> AliasChangeRow:
        """Lost races show as a broken reference to a chain just deleted, or as `None` from an alias just set."""
        for _ in range(_ATTEMPTS):
            try:
                with self._database.transaction() as session:
                    moved = move(session)
            except IntegrityError:
                continue
            if moved is not None:
                return moved
        raise AliasMoved(alias, None)


def unknowns(chain: ChainRow) -> list[str]:
    """What nobody knows of the chain and should before devices get it.

    Without measured accuracy a device gets the widest student that fits and no cut-off for same or different: nobody
    can say what it is worth.
    """
    rights = [name for name in ("terms", "consent_basis") if getattr(chain, name) == UNKNOWN]
    return rights if chain.measurement is not None else [*rights, "accuracy"]


def _locked(aliases: Aliases, alias: str, expected: Expected | None) -> str | None:
    """The chain the alias points at, locked. Raises `UnknownAlias` and `AliasMoved`."""
    _require_alias(alias)
    current = aliases.lock(alias)
    if expected is not None and expected.chain != current:
        last = aliases.history_page(alias, None, 1)
        raise AliasMoved(alias, current, last[0].changed_at, last[0].changed_by) if last else AliasMoved(alias, current)
    return current


def _require_alias(alias: str) -> None:
    if alias not in RESERVED_NAMES:
        raise UnknownAlias(alias)


def _chain_before(session: Session, alias: str, current: str, moves: Sequence[AliasChangeRow]) -> ChainRow:
    """The chain the alias came from. One that was published after the alias last came to its name is another chain."""
    trail = _trail(moves)
    if len(trail) < 2:
        raise NothingToRollBack(alias, current, None)
    before = trail[-2]
    found = Chains(session).find(str(before.chain))
    if found is None or found.published_at > before.changed_at:
        raise NothingToRollBack(alias, current, before.chain)
    return found


def _trail(moves: Sequence[AliasChangeRow]) -> list[AliasChangeRow]:
    """The way the alias came, the last step being where it is: a move to the chain before takes the last step back."""
    trail: list[AliasChangeRow] = []
    for move in moves:
        if move.chain is None:
            trail.clear()
        elif len(trail) > 1 and trail[-2].chain == move.chain:
            trail.pop()
        else:
            trail.append(move)
    return trail
