"""shared runs, idempotency keys, replayable streams

Only adds: the version before this one runs against this schema.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("api_keys", sa.Column("timeout_s", sa.Float(), nullable=True))
    op.add_column("jobs", sa.Column("coalesce_key", sa.LargeBinary(), nullable=True))
    op.add_column("jobs", sa.Column("leader_id", sa.Uuid(), nullable=True))
    op.add_column("jobs", sa.Column("flight_id", sa.Uuid(), nullable=True))
    op.add_column("jobs", sa.Column("num_followers", sa.Integer(), server_default=sa.text("0"), nullable=False))
    op.add_column("job_results", sa.Column("events", sa.LargeBinary(), nullable=True))
    op.create_index(
        "jobs_flights",
        "jobs",
        ["coalesce_key"],
        unique=True,
        postgresql_where=sa.text("coalesce_key IS NOT NULL AND status IN ('queued', 'running')"),
    )
    op.create_index(
        "jobs_followers",
        "jobs",
        ["leader_id"],
        postgresql_where=sa.text("leader_id IS NOT NULL AND status = 'queued'"),
    )
    op.create_index("jobs_failed", "jobs", ["finished_at"], postgresql_where=sa.text("status = 'failed'"))
    op.create_table(
        "idempotency_keys",
        sa.Column("api_key_id", sa.Uuid(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("expires_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("api_key_id", "key"),
    )
    op.create_index("idempotency_keys_expiry", "idempotency_keys", ["expires_at"])


def downgrade() -> None:
    op.drop_table("idempotency_keys")
    for index in ("jobs_failed", "jobs_followers", "jobs_flights"):
        op.drop_index(index, "jobs")
    op.drop_column("job_results", "events")
    for column in ("num_followers", "flight_id", "leader_id", "coalesce_key"):
        op.drop_column("jobs", column)
    op.drop_column("api_keys", "timeout_s")
