"""Offers: which terminal chains answer beside which chain.

An admin's decision, like a promotion: what a fleet gets changes by it, and a job never does that. The choice among what
is offered is made for each request (`chains.budget.choose`) by measured mAP. So a terminal chain is offered only where
its mAP and the chain's can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from app.actor import Actor
from app.db import repositories
from app.db.audit import Audit
from app.db.repositories import Chains
from app.db.session import Database
from app.db.tables import ChainRow
from app.errors import OfferRefused, PromotionRefused, UnknownOffer
from app.services.promotion import unknowns
from app.services.registry import known_chain, known_name

MAX_TERMINALS = 64  # offered with one chain: a request loads all that take part, and each takes memory of the cache
EVALUATION_SET = ("dataset", "protocol", "seed", "queries", "gallery")  # of `chains.chain.Frontier`


@dataclass(frozen=True)
class Offer:
    """Terminal chain `terminal` is offered with `chain`. previous: with which it was before, if with any."""

    terminal: str
    chain: str
    previous: str | None
    same_embedding_space: bool


class Offers:
    """Offers terminal chains with others, and takes that back."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def offer(self, terminal: str, chain: str, by: Actor, *, accept_unknown: bool = False) -> Offer:
        """Offer one chain with another, both by name or alias, and with no other any more. Where it is offered with
        that one already, nothing changes.

        Raises `UnknownChain`; `OfferRefused` where it is not terminal, the other one is, the two do not see the same
        images or were not measured on the same, or `MAX_TERMINALS` are offered with the other one already; and
        `PromotionRefused` for one whose terms or consent basis are not known, unless that is accepted.
        """
        with self._database.transaction() as session:
            own, other = _locked(session, terminal, chain)
            same_space = own.embedding_space == other.embedding_space
            previous = own.offer.chain if own.offer else None
            if previous == other.name:
                return Offer(own.name, other.name, previous, same_space)
            require_comparable(own, other)
            if (there := len(other.terminals)) >= MAX_TERMINALS:
                raise OfferRefused(
                    own.name,
                    other.name,
                    f"{there} terminal chains are, and no more than {MAX_TERMINALS} can be; take one back first",
                )
            unknown = unknowns(own)
            if unknown and not accept_unknown:
                raise PromotionRefused(own.name, f"offered with '{other.name}'", unknown)
            repositories.Offers(session).set(own.name, other.name)
            detail = {"chain": other.name, "previous": previous, "accepted_unknown": unknown}
            Audit(session).add(by, "offer.set", own.name, **detail)
            return Offer(own.name, other.name, previous, same_space)

    def withdraw(self, terminal: str, by: Actor) -> None:
        """Offer that chain with no other any more. Raises `UnknownChain` and `UnknownOffer`."""
        with self._database.transaction() as session:
            name = known_name(session, terminal)
            Chains(session).lock(name)
            offer = known_chain(session, name).offer
            if offer is None:
                raise UnknownOffer(name)
            repositories.Offers(session).remove(name)
            Audit(session).add(by, "offer.remove", name, previous=offer.chain)


def require_comparable(terminal: ChainRow, chain: ChainRow) -> None:
    """Raises `OfferRefused` unless the first is a terminal chain, the second is not, and the figures of both mean the
    same: equal input, one evaluation set, and in one embedding space embeddings of one length."""

    def refuse(why: str) -> OfferRefused:
        return OfferRefused(terminal.name, chain.name, why)

    if not terminal.is_terminal:
        older = ", or publish its file again, if it was published by an older version" * (len(terminal.widths) == 1)
        raise refuse(
            f"'{terminal.name}' is no terminal chain, and of those alone each is one model; promote it, or ask for it "
            f"by its name{older}"
        )
    if chain.is_terminal:
        raise refuse(f"'{chain.name}' is a terminal chain itself, and has no students")
    if differ := _differences(terminal.input, chain.input):
        raise refuse(f"they do not see the same images: {differ}")
    for row in (terminal, chain):
        if row.measurement is None or any(width.mean_ap is None for width in row.widths):
            raise refuse(f"'{row.name}' was not measured at every width; a job of kind 'evaluate' can do that")
    if differ := _differences(_evaluation_set(terminal), _evaluation_set(chain)):
        raise refuse(
            f"they were not measured on the same: {differ}. Jobs of kind 'evaluate' with one data set and one seed "
            "measure both alike"
        )
    if terminal.embedding_space == chain.embedding_space and terminal.embedding_dim != chain.embedding_dim:
        raise refuse(
            f"both name the embedding space '{chain.embedding_space}', with embeddings of {terminal.embedding_dim} and "
            f"of {chain.embedding_dim} numbers"
        )


def _locked(session: Session, terminal: str, chain: str) -> tuple[ChainRow, ChainRow]:
    """Both chains, which nobody changes or deletes until the transaction ends. Raises `UnknownChain`."""
    own, other = (known_name(session, name) for name in (terminal, chain))
    for name in sorted((own, other)):  # in one order, so that nobody waits for somebody who waits
        Chains(session).lock(name)
    return known_chain(session, own), known_chain(session, other)


def _evaluation_set(chain: ChainRow) -> dict[str, Any]:
    """What the chain was measured on; `dataset_digest` where a job of this service measured it."""
    measured = chain.measurement or {}
    made_from = chain.provenance.get("made_from")
    digest = made_from.get("dataset_digest") if isinstance(made_from, Mapping) else None
    return {name: measured[name] for name in EVALUATION_SET} | {"dataset_digest": digest}


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Where both say something, and not the same; empty where they agree."""
    both = [name for name in one if one[name] is not None and other[name] is not None]
    return ", ".join(f"{name} {one[name]} and {other[name]}" for name in both if one[name] != other[name])
