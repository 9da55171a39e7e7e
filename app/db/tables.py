"""The tables.

Costs and accuracies of a chain's widths are stored when the chain is published, so that listing needs no chain file. A
model is a recipe: its bytes are made again whenever they are asked for. Whatever a row names by `sha256` or `digest`
lies in the object store under that digest; an object no row names is garbage.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    DateTime,
    Dialect,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
    false,
)
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
        bool: Boolean,
        datetime: UtcDateTime,
        dict[str, Any]: JSON,
    }


Serial = BigInteger().with_variant(Integer(), "sqlite")  # SQLite counts up only what it calls INTEGER


class ChainRow(Base):
    """A published chain; its file lies in the object store under `digest` (sha256, 64 hex).

    terms, consent_basis: the strictest of what it was made from, see `app.terms`. job: the refinement that made it, if
    one of this service did. is_terminal: it is one model, see `chains.chain.Chain.sizes`. offer: of a terminal chain,
    with which other it is offered; terminals: the offers of terminal chains with this one.
    """

    __tablename__ = "chains"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), index=True)
    size_bytes: Mapped[int]
    architecture: Mapped[str] = mapped_column(String(64))
    mode: Mapped[str] = mapped_column(String(16))
    teacher_width: Mapped[str] = mapped_column(String(32))
    embedding_dim: Mapped[int]
    embedding_space: Mapped[str] = mapped_column(String(128))
    is_terminal: Mapped[bool] = mapped_column(server_default=false())
    license: Mapped[str] = mapped_column(Text)
    terms: Mapped[str] = mapped_column(String(16), server_default="unknown")
    consent_basis: Mapped[str] = mapped_column(String(32), server_default="unknown")
    job: Mapped[str | None] = mapped_column(String(32))
    input: Mapped[dict[str, Any]]
    measurement: Mapped[dict[str, Any] | None]
    provenance: Mapped[dict[str, Any]]
    published_at: Mapped[datetime]
    widths: Mapped[list[WidthRow]] = relationship(order_by="WidthRow.position", lazy="selectin")
    aliases: Mapped[list[AliasRow]] = relationship(order_by="AliasRow.alias", lazy="selectin", viewonly=True)
    offer: Mapped[OfferRow | None] = relationship(foreign_keys="OfferRow.terminal", lazy="selectin", viewonly=True)
    terminals: Mapped[list[OfferRow]] = relationship(
        foreign_keys="OfferRow.chain", order_by="OfferRow.terminal", lazy="selectin", viewonly=True
    )


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


class OfferRow(Base):
    """A terminal chain that answers in place of a student of `chain` where it fits and measures better."""

    __tablename__ = "offers"

    terminal: Mapped[str] = mapped_column(ForeignKey("chains.name"), primary_key=True)
    chain: Mapped[str] = mapped_column(ForeignKey("chains.name"), index=True)


class AliasChangeRow(Base):
    """Every move of an alias, the first included; `chain` is null where it was removed. Outlives chains it names."""

    __tablename__ = "alias_history"

    id: Mapped[int] = mapped_column(Serial, primary_key=True)
    alias: Mapped[str] = mapped_column(String(64), index=True)
    chain: Mapped[str | None] = mapped_column(String(64))
    previous: Mapped[str | None] = mapped_column(String(64))
    changed_at: Mapped[datetime]
    changed_by: Mapped[str | None] = mapped_column(String(64))


class ModelRow(Base):
    """A model somebody asked for.

    `id` is the sha256 of the recipe's canonical JSON; `artifact_sha256` is known once the bytes were streamed in full.
    """

    __tablename__ = "models"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    chain: Mapped[str] = mapped_column(ForeignKey("chains.name", ondelete="CASCADE"), index=True)
    width: Mapped[str] = mapped_column(String(32))
    recipe: Mapped[dict[str, Any]]
    artifact_bytes: Mapped[int]
    artifact_sha256: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[datetime]


class UploadRow(Base):
    """A file on its way in, for the teacher or data set named `target`. Its bytes so far are the parts, in order."""

    __tablename__ = "uploads"
    __table_args__ = (UniqueConstraint("kind", "target"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    target: Mapped[str] = mapped_column(String(64))
    sha256: Mapped[str] = mapped_column(String(64))
    size_bytes: Mapped[int]
    received_bytes: Mapped[int]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]


class UploadPartRow(Base):
    """The bytes of an upload from `start` on."""

    __tablename__ = "upload_parts"

    upload: Mapped[str] = mapped_column(ForeignKey("uploads.id", ondelete="CASCADE"), primary_key=True)
    start: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    size_bytes: Mapped[int]
    sha256: Mapped[str] = mapped_column(String(64), index=True)


class TeacherRow(Base):
    """A teacher: `awaiting-weights`, `checking`, `ready` or `refused` (`reason`).

    What is recognised in the weights (architecture, width, format, input) is null until a worker has checked them.
    """

    __tablename__ = "teachers"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    state: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str | None] = mapped_column(Text)
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    size_bytes: Mapped[int]
    format: Mapped[str | None] = mapped_column(String(16))
    architecture: Mapped[str | None] = mapped_column(String(64))
    width: Mapped[str | None] = mapped_column(String(32))
    input: Mapped[dict[str, Any] | None]
    report: Mapped[dict[str, Any] | None]
    license: Mapped[str] = mapped_column(Text)
    terms: Mapped[str] = mapped_column(String(16))
    consent_basis: Mapped[str] = mapped_column(String(32))
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]


class DatasetRow(Base):
    """A data set: `awaiting-archive`, `checking`, `ready`, `refused` (`reason`) or `deleted`.

    source: `folder`, `s3` or `archive`; location: a path under an allowed root, an `s3://` prefix, or the archive's
    sha256. digest: sha256 over the sorted (path, sha256) of every file that was read.
    """

    __tablename__ = "datasets"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    state: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str | None] = mapped_column(Text)
    source: Mapped[str] = mapped_column(String(16))
    location: Mapped[str] = mapped_column(Text)
    size_bytes: Mapped[int | None]
    options: Mapped[dict[str, Any]]
    digest: Mapped[str | None] = mapped_column(String(64))
    report: Mapped[dict[str, Any] | None]
    license: Mapped[str] = mapped_column(Text)
    terms: Mapped[str] = mapped_column(String(16))
    consent_basis: Mapped[str] = mapped_column(String(32))
    retain_until: Mapped[datetime | None]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]


class JobRow(Base):
    """A job: `queued`, `running`, `succeeded`, `failed` (`error`) or `cancelled`. The engine's workflow has its id.

    request_sha256: of the request, so that an idempotency key with another request is noticed. executor: the worker
    that has it now.
    """

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    kind: Mapped[str] = mapped_column(String(32))
    state: Mapped[str] = mapped_column(String(16), index=True)
    priority: Mapped[int]
    request: Mapped[dict[str, Any]]
    request_sha256: Mapped[str] = mapped_column(String(64))
    idempotency_key: Mapped[str | None] = mapped_column(String(128), unique=True)
    step: Mapped[str | None] = mapped_column(String(32))
    progress: Mapped[dict[str, Any] | None]
    result: Mapped[dict[str, Any] | None]
    error: Mapped[str | None] = mapped_column(Text)
    attempts: Mapped[int]
    cancel_requested: Mapped[bool]
    executor: Mapped[str | None] = mapped_column(String(64), index=True)
    created_by: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(index=True)
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    updated_at: Mapped[datetime]


class JobEventRow(Base):
    """Something that happened to a job, for its event stream; `id` only grows."""

    __tablename__ = "job_events"

    id: Mapped[int] = mapped_column(Serial, primary_key=True)
    job: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    at: Mapped[datetime]
    kind: Mapped[str] = mapped_column(String(16))
    data: Mapped[dict[str, Any]]


class JobFileRow(Base):
    """A file a job keeps between its steps, and between workers: a checkpoint, a chain, a report."""

    __tablename__ = "job_files"

    job: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    size_bytes: Mapped[int]
    updated_at: Mapped[datetime]


class ExecutorRow(Base):
    """A worker process and its sign of life; the jobs of one that stopped giving it are taken over."""

    __tablename__ = "executors"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    started_at: Mapped[datetime]
    heartbeat_at: Mapped[datetime]
    stopped_at: Mapped[datetime | None]


class KeyRow(Base):
    """An API key, `ww_<id>_<secret>`: of the secret only the sha256 is kept."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    name: Mapped[str] = mapped_column(String(64))
    scope: Mapped[str] = mapped_column(String(16))
    secret_sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime]
    last_used_at: Mapped[datetime | None]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class AuditRow(Base):
    """What an admin did, in the transaction that did it."""

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(Serial, primary_key=True)
    at: Mapped[datetime] = mapped_column(index=True)
    actor: Mapped[str] = mapped_column(String(64))
    action: Mapped[str] = mapped_column(String(64))
    target: Mapped[str] = mapped_column(String(200))
    detail: Mapped[dict[str, Any]]
    request_id: Mapped[str | None] = mapped_column(String(64))
