"""First tables: chains, their widths, aliases with history, models.

Revision ID: 0001
Revises: nothing
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "chains",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("architecture", sa.String(64), nullable=False),
        sa.Column("mode", sa.String(16), nullable=False),
        sa.Column("teacher_width", sa.String(32), nullable=False),
        sa.Column("embedding_dim", sa.BigInteger(), nullable=False),
        sa.Column("embedding_space", sa.String(128), nullable=False),
        sa.Column("license", sa.Text(), nullable=False),
        sa.Column("input", sa.JSON(), nullable=False),
        sa.Column("measurement", sa.JSON(), nullable=True),
        sa.Column("provenance", sa.JSON(), nullable=False),
        sa.Column("published_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_chains"),
    )
    op.create_index("ix_chains_digest", "chains", ["digest"])
    op.create_table(
        "widths",
        sa.Column("chain", sa.String(64), nullable=False),
        sa.Column("position", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("width", sa.String(32), nullable=False),
        sa.Column("macs", sa.BigInteger(), nullable=False),
        sa.Column("params", sa.BigInteger(), nullable=False),
        sa.Column("artifact_bytes", sa.BigInteger(), nullable=False),
        sa.Column("peak_activation_bytes", sa.BigInteger(), nullable=False),
        sa.Column("mean_ap", sa.Double(), nullable=True),
        sa.Column("mean_ap_low", sa.Double(), nullable=True),
        sa.Column("mean_ap_high", sa.Double(), nullable=True),
        sa.Column("rank1", sa.Double(), nullable=True),
        sa.Column("rank5", sa.Double(), nullable=True),
        sa.Column("rank10", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("chain", "position", name="pk_widths"),
        sa.ForeignKeyConstraint(["chain"], ["chains.name"], name="fk_widths_chain", ondelete="CASCADE"),
    )
    op.create_table(
        "aliases",
        sa.Column("alias", sa.String(64), nullable=False),
        sa.Column("chain", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("alias", name="pk_aliases"),
        sa.ForeignKeyConstraint(["chain"], ["chains.name"], name="fk_aliases_chain"),
    )
    op.create_index("ix_aliases_chain", "aliases", ["chain"])
    op.create_table(
        "alias_history",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("alias", sa.String(64), nullable=False),
        sa.Column("chain", sa.String(64), nullable=False),
        sa.Column("previous", sa.String(64), nullable=True),
        sa.Column("changed_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_alias_history"),
        sa.ForeignKeyConstraint(["chain"], ["chains.name"], name="fk_alias_history_chain"),
    )
    op.create_index("ix_alias_history_alias", "alias_history", ["alias"])
    op.create_table(
        "models",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("chain", sa.String(64), nullable=False),
        sa.Column("width", sa.String(32), nullable=False),
        sa.Column("recipe", sa.JSON(), nullable=False),
        sa.Column("artifact_bytes", sa.BigInteger(), nullable=False),
        sa.Column("artifact_sha256", sa.String(64), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_models"),
        sa.ForeignKeyConstraint(["chain"], ["chains.name"], name="fk_models_chain"),
    )
    op.create_index("ix_models_chain", "models", ["chain"])


def downgrade() -> None:
    for table in ("models", "alias_history", "aliases", "widths", "chains"):
        op.drop_table(table)
