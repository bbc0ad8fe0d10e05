"""Claims: which builder works on which record that is not there yet."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table of claims."""
    op.create_table(
        "claim",
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("until", sa.Float(53), nullable=False),
    )
