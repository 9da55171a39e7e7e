"""The tables.

Costs and accuracies of a chain's widths are stored when the chain is published, so that listing needs no chain file. A
model is a recipe: its bytes are made again whenever they are asked for.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, DateTime, Dialect, ForeignKey, Integer, MetaData, String, Text, TypeDecorator
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

# Named constraints can be dropped by a later migration on every database.
NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}


class UtcDateTime(TypeDecorator[datetime]):
    """A moment in UTC. SQLite forgets time zones; here they come back."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


class Base(DeclarativeBase):
    """Base of all tables."""

    metadata = MetaData(naming_convention=NAMES)
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy reads it from the class
        int: BigInteger,
        datetime: UtcDateTime,
        dict[str, Any]: JSON,
    }


class ChainRow(Base):
    """A published chain; its file lies in the object store under `digest` (sha256, 64 hex)."""

    __tablename__ = "chains"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), index=True)
    size_bytes: Mapped[int]
    architecture: Mapped[str] = mapped_column(String(64))
    mode: Mapped[str] = mapped_column(String(16))
    teacher_width: Mapped[str] = mapped_column(String(32))
    embedding_dim: Mapped[int]
    embedding_space: Mapped[str] = mapped_column(String(128))
    license: Mapped[str] = mapped_column(Text)
    input: Mapped[dict[str, Any]]
    measurement: Mapped[dict[str, Any] | None]
    provenance: Mapped[dict[str, Any]]
    published_at: Mapped[datetime]
    widths: Mapped[list[WidthRow]] = relationship(order_by="WidthRow.position", lazy="selectin")
    aliases: Mapped[list[AliasRow]] = relationship(order_by="AliasRow.alias", lazy="selectin", viewonly=True)


class WidthRow(Base):
    """One width of a chain, narrow to wide by `position`: costs of the default model, and accuracy in percent."""

    __tablename__ = "widths"

    chain: Mapped[str] = mapped_column(ForeignKey("chains.name", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    width: Mapped[str] = mapped_column(String(32))
    macs: Mapped[int]
    params: Mapped[int]
    artifact_bytes: Mapped[int]
    peak_activation_bytes: Mapped[int]
    mean_ap: Mapped[float | None]
    mean_ap_low: Mapped[float | None]
    mean_ap_high: Mapped[float | None]
    rank1: Mapped[float | None]
    rank5: Mapped[float | None]
    rank10: Mapped[float | None]
    minp: Mapped[float | None]


class AliasRow(Base):
    """A name that points at a chain and can be moved: `stable` answers when no chain is asked for."""

    __tablename__ = "aliases"

    alias: Mapped[str] = mapped_column(String(64), primary_key=True)
    chain: Mapped[str] = mapped_column(ForeignKey("chains.name"), index=True)


class AliasChangeRow(Base):
    """Every move of an alias, the first included."""

    __tablename__ = "alias_history"

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer(), "sqlite"), primary_key=True)
    alias: Mapped[str] = mapped_column(String(64), index=True)
    chain: Mapped[str] = mapped_column(ForeignKey("chains.name"))
    previous: Mapped[str | None] = mapped_column(String(64))
    changed_at: Mapped[datetime]


class ModelRow(Base):
    """A model somebody asked for.

    `id` is the sha256 of the recipe's canonical JSON; `artifact_sha256` is known once the bytes were streamed in full.
    """

    __tablename__ = "models"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    chain: Mapped[str] = mapped_column(ForeignKey("chains.name"), index=True)
    width: Mapped[str] = mapped_column(String(32))
    recipe: Mapped[dict[str, Any]]
    artifact_bytes: Mapped[int]
    artifact_sha256: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[datetime]
