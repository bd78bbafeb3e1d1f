"""priorities and predicted tokens of jobs

Only adds: the version before this one runs against this schema.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("priority", sa.SmallInteger(), server_default=sa.text("1"), nullable=False))
    op.add_column("jobs", sa.Column("predicted_tokens", sa.Integer(), server_default=sa.text("0"), nullable=False))


def downgrade() -> None:
    op.drop_column("jobs", "predicted_tokens")
    op.drop_column("jobs", "priority")
