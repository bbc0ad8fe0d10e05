"""The first schema: a bank's header, its records, and apart from them their probes and units."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "bank",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("header", sa.Text, nullable=False),
        sa.Column("store", sa.Text, nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
        sa.Column("seal", sa.String(64), nullable=False),
    )
    op.create_table(
        "record",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("key", sa.String(64), nullable=False, unique=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("classes", sa.Text, nullable=False),
        sa.Column("dense", sa.Float(53), nullable=False),
        sa.Column("start", sa.Float(53), nullable=False),
        sa.Column("final", sa.Float(53), nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
        sa.Column("weights", sa.String(64), nullable=False, index=True),
        sa.Column("weight_bytes", sa.Integer, nullable=False),
        sa.Column("details", sa.Text, nullable=False),
        sa.Column("seal", sa.String(64), nullable=False),
        sqlite_autoincrement=True,
    )
    for name, more in (
        ("probe", (sa.Column("key", sa.String(64), nullable=False), sa.Column("classes", sa.Integer, nullable=False))),
        ("units", ()),
    ):
        op.create_table(
            name,
            sa.Column("record", sa.Integer, sa.ForeignKey("record.id", ondelete="CASCADE"), primary_key=True),
            *more,
            sa.Column("content", sa.LargeBinary, nullable=False),
            sa.Column("seal", sa.String(64), nullable=False),
        )
