"""SQL of chains, aliases, offers and models. A repository works inside the transaction it is given and never commits.

Who decides by what a row holds locks it first, by a write that changes nothing: on PostgreSQL that locks the row, on
SQLite the whole database, and what is read afterwards stays true until the transaction ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from types import ModuleType
from typing import NamedTuple

from sqlalchemy import ColumnElement, and_, delete, func, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import InstrumentedAttribute, Session

from app.db.jobs import UNFINISHED
from app.db.tables import AliasChangeRow, AliasRow, ChainRow, JobRow, ModelRow, OfferRow, WidthRow


class ChainFile(NamedTuple):
    """What the rows of a chain say of its file. mean_ap: of the narrowest width, so of a terminal chain of its one."""

    name: str
    digest: str
    embedding_space: str
    mean_ap: float | None


class Chains:
    """Published chains."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def find(self, name: str) -> ChainRow | None:
        """The chain of that name, or the one an alias of that name points at."""
        return self._session.scalar(select(ChainRow).where(_is_called(name)))

    def files(self, name: str) -> tuple[ChainFile, Sequence[ChainFile]] | None:
        """As `find`, but only the chain's file, and the files of the terminal chains offered with it, by name: all that
        serving a model needs. One statement, because every request asks."""
        is_asked = _is_called(name)
        columns = (ChainRow.name, ChainRow.digest, ChainRow.embedding_space, WidthRow.mean_ap)
        files = (
            select(is_asked, *columns)
            .select_from(ChainRow)
            .join(WidthRow, and_(WidthRow.chain == ChainRow.name, WidthRow.position == 0))
            .outerjoin(OfferRow, OfferRow.terminal == ChainRow.name)
        )
        rows = self._session.execute(
            files.where(or_(is_asked, _is_called(name, OfferRow.chain))).order_by(ChainRow.name)
        ).all()
        found = [(is_it, ChainFile(own, digest, space, mean_ap)) for is_it, own, digest, space, mean_ap in rows]
        asked = next((file for is_it, file in found if is_it), None)
        return None if asked is None else (asked, [file for is_it, file in found if not is_it])

    def name(self, name: str) -> str | None:
        """As `find`, but only the chain's own name."""
        return self._session.scalar(select(ChainRow.name).where(_is_called(name)))

    def page(self, after: str, size: int) -> Sequence[ChainRow]:
        """Up to `size` chains whose names follow `after`, in order of name."""
        return self._session.scalars(
            select(ChainRow).where(ChainRow.name > after).order_by(ChainRow.name).limit(size)
        ).all()

    def is_empty(self) -> bool:
        return self._session.scalar(select(ChainRow.name).limit(1)) is None

    def add(self, chain: ChainRow) -> None:
        self._session.add(chain)
        self._session.flush()

    def lock(self, name: str) -> None:
        """Nobody else changes or deletes the chain of that very name until the transaction ends."""
        self._session.execute(update(ChainRow).where(ChainRow.name == name).values(name=ChainRow.name))

    def unfinished_jobs(self) -> Sequence[JobRow]:
        """The jobs that still need what their requests name, oldest first."""
        unfinished = select(JobRow).where(JobRow.state.in_(UNFINISHED)).order_by(JobRow.created_at)
        return self._session.scalars(unfinished).all()

    def delete(self, name: str) -> None:
        """Widths and models go with it. Raises SQLAlchemy's `IntegrityError` when an alias or an offer names it."""
        self._session.execute(
            delete(ChainRow).where(ChainRow.name == name).execution_options(synchronize_session=False)
        )


class Aliases:
    """Movable names of chains."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def exists(self, alias: str) -> bool:
        return self._session.get(AliasRow, alias) is not None

    def lock(self, alias: str) -> str | None:
        """The chain the alias points at, if it points at any; nobody else moves it until the transaction ends.

        Of an alias that points at none, PostgreSQL has no row to lock: `point` may find that somebody else set it.
        """
        return self._session.scalar(
            update(AliasRow).where(AliasRow.alias == alias).values(chain=AliasRow.chain).returning(AliasRow.chain)
        )

    def point(self, alias: str, chain: str, previous: str | None, at: datetime, by: str) -> AliasChangeRow | None:
        """Make `alias`, which points at `previous`, point at `chain`, and remember the move.

        `None` when `previous` is `None` and somebody else set the alias meanwhile. Raises SQLAlchemy's `IntegrityError`
        when there is no such chain.
        """
        if previous is not None:
            self._session.execute(update(AliasRow).where(AliasRow.alias == alias).values(chain=chain))
        elif not self._set(alias, chain):
            return None
        return self._remember(alias, chain, previous, at, by)

    def remove(self, alias: str, previous: str, at: datetime, by: str) -> None:
        """Make `alias`, which points at `previous`, point at nothing."""
        self._session.execute(delete(AliasRow).where(AliasRow.alias == alias))
        self._remember(alias, None, previous, at, by)

    def current(self) -> Sequence[AliasChangeRow]:
        """The last move of every alias that points at a chain, by alias."""
        last = select(func.max(AliasChangeRow.id)).group_by(AliasChangeRow.alias)
        moves = select(AliasChangeRow).join(AliasRow, AliasRow.alias == AliasChangeRow.alias)
        return self._session.scalars(moves.where(AliasChangeRow.id.in_(last)).order_by(AliasChangeRow.alias)).all()

    def history(self, alias: str) -> Sequence[AliasChangeRow]:
        """Every move of the alias, oldest first."""
        moves = select(AliasChangeRow).where(AliasChangeRow.alias == alias)
        return self._session.scalars(moves.order_by(AliasChangeRow.id)).all()

    def history_page(self, alias: str, before: int | None, size: int) -> Sequence[AliasChangeRow]:
        """Up to `size` moves of the alias, newest first, from before the move of that id."""
        moves = select(AliasChangeRow).where(AliasChangeRow.alias == alias)
        moves = moves if before is None else moves.where(AliasChangeRow.id < before)
        return self._session.scalars(moves.order_by(AliasChangeRow.id.desc()).limit(size)).all()

    def _set(self, alias: str, chain: str) -> bool:
        """True when the alias pointed at nothing; one statement, so that of two who try at once one is told so."""
        values = {"alias": alias, "chain": chain}
        insert = _dialect(self._session).insert(AliasRow).values(values)
        return self._session.scalar(insert.on_conflict_do_nothing().returning(AliasRow.alias)) is not None

    def _remember(self, alias: str, chain: str | None, previous: str | None, at: datetime, by: str) -> AliasChangeRow:
        move = AliasChangeRow(alias=alias, chain=chain, previous=previous, changed_at=at, changed_by=by)
        self._session.add(move)
        self._session.flush()
        return move


class Offers:
    """Terminal chains that are offered with others. Lock both chains before an offer is set or removed."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def set(self, terminal: str, chain: str) -> None:
        """Offer `terminal` with `chain` and with no other."""
        self._session.merge(OfferRow(terminal=terminal, chain=chain))

    def remove(self, terminal: str) -> None:
        self._session.execute(delete(OfferRow).where(OfferRow.terminal == terminal))


class Models:
    """Models that were asked for."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def find(self, model_id: str) -> ModelRow | None:
        return self._session.get(ModelRow, model_id)

    def add_if_absent(self, model: ModelRow) -> bool:
        """True when it was not there. One statement, so that of two servers asked at once exactly one is told so."""
        dialect = _dialect(self._session)
        values = {column.key: getattr(model, column.key) for column in ModelRow.__table__.columns}
        added = self._session.scalars(
            dialect.insert(ModelRow).values(values).on_conflict_do_nothing().returning(ModelRow.id)
        )
        return added.one_or_none() is not None

    def set_artifact_digest(self, model_id: str, sha256: str) -> None:
        self._session.execute(
            update(ModelRow)
            .where(ModelRow.id == model_id, ModelRow.artifact_sha256.is_(None))
            .values(artifact_sha256=sha256)
        )


def _dialect(session: Session) -> ModuleType:
    """Where this database's INSERT … ON CONFLICT is."""
    return postgresql if session.get_bind().dialect.name == "postgresql" else sqlite


def _is_called(name: str, chain: InstrumentedAttribute[str] = ChainRow.name) -> ColumnElement[bool]:
    """No chain is named like an alias, so at most one chain is called so."""
    return or_(chain == name, chain.in_(select(AliasRow.chain).where(AliasRow.alias == name)))
