"""Terminal chains, and with which chain each is offered.

One table is added, and one column with a default, so that servers of the version before go on while this runs. Offers
are no column of the chains, because SQLite drops one that refers to a table only by making its own table anew.

Revision ID: 0004
Revises: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("chains", sa.Column("is_terminal", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_table(
        "offers",
        sa.Column("terminal", sa.String(64), nullable=False),
        sa.Column("chain", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("terminal", name="pk_offers"),
        sa.ForeignKeyConstraint(["terminal"], ["chains.name"], name="fk_offers_terminal"),
        sa.ForeignKeyConstraint(["chain"], ["chains.name"], name="fk_offers_chain"),
    )
    op.create_index("ix_offers_chain", "offers", ["chain"])


def downgrade() -> None:
    op.drop_table("offers")
    op.drop_column("chains", "is_terminal")
