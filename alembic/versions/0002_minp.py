"""mINP of a width; unknown for chains published before it was measured.

Revision ID: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("widths", sa.Column("minp", sa.Double(), nullable=True))


def downgrade() -> None:
    op.drop_column("widths", "minp")
