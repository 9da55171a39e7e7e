"""All SQL of the service. A repository works inside the transaction it is given and never commits."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import ColumnElement, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from app.db.tables import AliasChangeRow, AliasRow, ChainRow, ModelRow


class Chains:
    """Published chains."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def find(self, name: str) -> ChainRow | None:
        """The chain of that name, or the one an alias of that name points at."""
        return self._session.scalar(select(ChainRow).where(_is_called(name)))

    def digest(self, name: str) -> str | None:
        """As `find`, but only the digest of the chain's file: all that serving a model needs."""
        return self._session.scalar(select(ChainRow.digest).where(_is_called(name)))

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


class Aliases:
    """Movable names of chains."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def exists(self, alias: str) -> bool:
        return self._session.get(AliasRow, alias) is not None

    def point(self, alias: str, chain: str, at: datetime) -> None:
        """Make `alias` point at `chain`, and remember the move."""
        row = self._session.get(AliasRow, alias)
        previous = row.chain if row else None
        if row is None:
            self._session.add(AliasRow(alias=alias, chain=chain))
        else:
            row.chain = chain
        self._session.add(AliasChangeRow(alias=alias, chain=chain, previous=previous, changed_at=at))


class Models:
    """Models that were asked for."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def find(self, model_id: str) -> ModelRow | None:
        return self._session.get(ModelRow, model_id)

    def add_if_absent(self, model: ModelRow) -> bool:
        """True when it was not there. One statement, so that of two servers asked at once exactly one is told so."""
        dialect = postgresql if self._session.get_bind().dialect.name == "postgresql" else sqlite
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


def _is_called(name: str) -> ColumnElement[bool]:
    """No chain is named like an alias, so at most one chain is called so."""
    return or_(ChainRow.name == name, ChainRow.name.in_(select(AliasRow.chain).where(AliasRow.alias == name)))
