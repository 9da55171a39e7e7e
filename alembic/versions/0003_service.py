"""The whole service: uploads, teachers, data sets, jobs, executors, API keys, audit.

Everything is added and nothing renamed, so that servers of the version before go on while this runs: new columns have
defaults, and the three constraints that change only get looser.

Revision ID: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

MOMENT = sa.DateTime(timezone=True)
SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TABLES = (
    "audit",
    "api_keys",
    "executors",
    "job_files",
    "job_events",
    "jobs",
    "datasets",
    "teachers",
    "upload_parts",
    "uploads",
)


def upgrade() -> None:
    # Never by a batch: on SQLite that makes the table anew, and dropping the old one takes its widths along.
    op.add_column("chains", sa.Column("terms", sa.String(16), nullable=False, server_default="unknown"))
    op.add_column("chains", sa.Column("consent_basis", sa.String(32), nullable=False, server_default="unknown"))
    op.add_column("chains", sa.Column("job", sa.String(32), nullable=True))
    with op.batch_alter_table("alias_history") as history:
        history.drop_constraint("fk_alias_history_chain", type_="foreignkey")
        history.add_column(sa.Column("changed_by", sa.String(64), nullable=True))
        history.alter_column("chain", existing_type=sa.String(64), nullable=True)
    with op.batch_alter_table("models") as models:
        models.drop_constraint("fk_models_chain", type_="foreignkey")
        models.create_foreign_key("fk_models_chain", "chains", ["chain"], ["name"], ondelete="CASCADE")
    _uploads()
    _teachers()
    _datasets()
    _jobs()
    _operations()


def downgrade() -> None:
    for table in TABLES:
        op.drop_table(table)
    with op.batch_alter_table("models") as models:
        models.drop_constraint("fk_models_chain", type_="foreignkey")
        models.create_foreign_key("fk_models_chain", "chains", ["chain"], ["name"])
    # removals of an alias, and moves of it to a chain that is gone, have no place in the older table
    op.execute("DELETE FROM alias_history WHERE chain IS NULL OR chain NOT IN (SELECT name FROM chains)")
    with op.batch_alter_table("alias_history") as history:
        history.alter_column("chain", existing_type=sa.String(64), nullable=False)
        history.drop_column("changed_by")
        history.create_foreign_key("fk_alias_history_chain", "chains", ["chain"], ["name"])
    for column in ("job", "consent_basis", "terms"):
        op.drop_column("chains", column)


def _uploads() -> None:
    op.create_table(
        "uploads",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("target", sa.String(64), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("received_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("updated_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_uploads"),
        sa.UniqueConstraint("kind", "target", name="uq_uploads_kind_target"),
    )
    op.create_table(
        "upload_parts",
        sa.Column("upload", sa.String(32), nullable=False),
        sa.Column("start", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("upload", "start", name="pk_upload_parts"),
        sa.ForeignKeyConstraint(["upload"], ["uploads.id"], name="fk_upload_parts_upload", ondelete="CASCADE"),
    )
    op.create_index("ix_upload_parts_sha256", "upload_parts", ["sha256"])


def _teachers() -> None:
    op.create_table(
        "teachers",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("format", sa.String(16), nullable=True),
        sa.Column("architecture", sa.String(64), nullable=True),
        sa.Column("width", sa.String(32), nullable=True),
        sa.Column("input", sa.JSON(), nullable=True),
        sa.Column("report", sa.JSON(), nullable=True),
        *_rights(),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("updated_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_teachers"),
    )
    op.create_index("ix_teachers_sha256", "teachers", ["sha256"])


def _datasets() -> None:
    op.create_table(
        "datasets",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("source", sa.String(16), nullable=False),
        sa.Column("location", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=True),
        sa.Column("options", sa.JSON(), nullable=False),
        sa.Column("digest", sa.String(64), nullable=True),
        sa.Column("report", sa.JSON(), nullable=True),
        *_rights(),
        sa.Column("retain_until", MOMENT, nullable=True),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("updated_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_datasets"),
    )


def _rights() -> tuple[sa.Column, ...]:
    return (
        sa.Column("license", sa.Text(), nullable=False),
        sa.Column("terms", sa.String(16), nullable=False),
        sa.Column("consent_basis", sa.String(32), nullable=False),
    )


def _jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("priority", sa.BigInteger(), nullable=False),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("request_sha256", sa.String(64), nullable=False),
        sa.Column("idempotency_key", sa.String(128), nullable=True),
        sa.Column("step", sa.String(32), nullable=True),
        sa.Column("progress", sa.JSON(), nullable=True),
        sa.Column("result", sa.JSON(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("attempts", sa.BigInteger(), nullable=False),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("executor", sa.String(64), nullable=True),
        sa.Column("created_by", sa.String(64), nullable=True),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("started_at", MOMENT, nullable=True),
        sa.Column("finished_at", MOMENT, nullable=True),
        sa.Column("updated_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
        sa.UniqueConstraint("idempotency_key", name="uq_jobs_idempotency_key"),
    )
    for column in ("state", "executor", "created_at"):
        op.create_index(f"ix_jobs_{column}", "jobs", [column])
    op.create_table(
        "job_events",
        sa.Column("id", SERIAL, nullable=False),
        sa.Column("job", sa.String(32), nullable=False),
        sa.Column("at", MOMENT, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_job_events"),
        sa.ForeignKeyConstraint(["job"], ["jobs.id"], name="fk_job_events_job", ondelete="CASCADE"),
    )
    op.create_index("ix_job_events_job", "job_events", ["job"])
    op.create_table(
        "job_files",
        sa.Column("job", sa.String(32), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("job", "name", name="pk_job_files"),
        sa.ForeignKeyConstraint(["job"], ["jobs.id"], name="fk_job_files_job", ondelete="CASCADE"),
    )
    op.create_index("ix_job_files_sha256", "job_files", ["sha256"])
    op.create_table(
        "executors",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("started_at", MOMENT, nullable=False),
        sa.Column("heartbeat_at", MOMENT, nullable=False),
        sa.Column("stopped_at", MOMENT, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_executors"),
    )


def _operations() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(16), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("scope", sa.String(16), nullable=False),
        sa.Column("secret_sha256", sa.String(64), nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("last_used_at", MOMENT, nullable=True),
        sa.Column("expires_at", MOMENT, nullable=True),
        sa.Column("revoked_at", MOMENT, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
    )
    op.create_table(
        "audit",
        sa.Column("id", SERIAL, nullable=False),
        sa.Column("at", MOMENT, nullable=False),
        sa.Column("actor", sa.String(64), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("target", sa.String(200), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.Column("request_id", sa.String(64), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )
    op.create_index("ix_audit_at", "audit", ["at"])
