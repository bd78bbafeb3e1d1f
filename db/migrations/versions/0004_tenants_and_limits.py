"""tenants, scopes, limits, budgets

Only adds: the version before this one runs against this schema.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_TIMESTAMP = postgresql.TIMESTAMP(timezone=True)


def _limits() -> list[sa.Column[int]]:
    whole = ("requests_per_minute", "tokens_per_minute", "max_concurrent")
    large = ("daily_tokens", "daily_cost_nano")
    return [
        *(sa.Column(name, sa.Integer(), nullable=True) for name in whole),
        *(sa.Column(name, sa.BigInteger(), nullable=True) for name in large),
    ]


def _count(name: str, kind: type[sa.Integer] = sa.BigInteger) -> sa.Column[int]:
    return sa.Column(name, kind(), server_default=sa.text("0"), nullable=False)


def upgrade() -> None:
    op.create_table(
        "tenants",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("weight", sa.Float(), server_default=sa.text("1"), nullable=False),
        sa.Column("created_at", _TIMESTAMP, server_default=sa.text("clock_timestamp()"), nullable=False),
        *_limits(),
        sa.PrimaryKeyConstraint("name"),
        sa.CheckConstraint("weight > 0", name="tenants_weight"),
    )
    op.execute("INSERT INTO tenants (name) SELECT DISTINCT tenant FROM api_keys")
    for column in _limits():
        op.add_column("api_keys", column)
    op.add_column(
        "api_keys",
        sa.Column(
            "scopes",
            postgresql.ARRAY(sa.Text()),
            server_default=sa.text("'{submit,read,cancel}'"),
            nullable=False,
        ),
    )
    op.add_column("api_keys", sa.Column("models", postgresql.ARRAY(sa.Text()), nullable=True))
    op.add_column("api_keys", sa.Column("previous_hash", sa.LargeBinary(), nullable=True))
    op.add_column("api_keys", sa.Column("previous_until", _TIMESTAMP, nullable=True))
    op.create_index(
        "api_keys_previous", "api_keys", ["previous_hash"], postgresql_where=sa.text("previous_hash IS NOT NULL")
    )
    op.add_column("jobs", _count("input_price", sa.Integer))
    op.add_column("jobs", _count("output_price", sa.Integer))
    op.add_column("jobs", sa.Column("reserved_tokens", sa.BigInteger(), nullable=True))
    op.add_column("jobs", sa.Column("reserved_on", sa.Date(), nullable=True))
    op.add_column("jobs", sa.Column("is_settled", sa.Boolean(), server_default=sa.text("false"), nullable=False))
    op.create_index(
        "jobs_unsettled",
        "jobs",
        ["tenant"],
        postgresql_where=sa.text("reserved_tokens IS NOT NULL AND NOT is_settled AND finished_at IS NOT NULL"),
    )
    op.create_table(
        "budget_days",
        sa.Column("api_key_id", sa.Uuid(), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        _count("num_live", sa.Integer),
        *(_count(name) for name in ("reserved_tokens", "reserved_cost", "spent_tokens", "spent_cost")),
        sa.PrimaryKeyConstraint("api_key_id", "day"),
        postgresql_with={"fillfactor": "50"},
    )
    op.create_index("budget_days_tenant", "budget_days", ["tenant", "day"])


def downgrade() -> None:
    op.drop_table("budget_days")
    op.drop_index("jobs_unsettled", "jobs")
    for column in ("is_settled", "reserved_on", "reserved_tokens", "output_price", "input_price"):
        op.drop_column("jobs", column)
    op.drop_index("api_keys_previous", "api_keys")
    for column in ("previous_until", "previous_hash", "models", "scopes"):
        op.drop_column("api_keys", column)
    for limit in _limits():
        op.drop_column("api_keys", limit.name)
    op.drop_table("tenants")
