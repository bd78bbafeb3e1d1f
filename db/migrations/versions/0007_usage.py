"""usage by key, model and day

Only adds: the version before this one runs against this schema.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_COUNTS = ("succeeded", "failed", "cancelled", "expired", "shared", "cached")

# A row for each end, in the transaction that ends the job. Adding to a row of `usage_days` at once would make every
# worker wait for that row's lock, and marking the job would write it, and its entry in each index, once more.
_ON_END = """
CREATE FUNCTION jobs_usage() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    -- Who got the answer of another's run has used nothing.
    v_ran boolean := NEW.status = 'succeeded' AND NEW.leader_id IS NULL;
    v_prompt bigint := CASE WHEN v_ran THEN coalesce((NEW.usage ->> 'prompt_tokens')::bigint, 0) ELSE 0 END;
    v_completion bigint := CASE WHEN v_ran THEN coalesce((NEW.usage ->> 'completion_tokens')::bigint, 0) ELSE 0 END;
BEGIN
    INSERT INTO usage_entries (day, tenant, api_key_id, model, outcome, num, prompt_tokens, completion_tokens,
        cost_nano)
    VALUES ((NEW.created_at AT TIME ZONE 'UTC')::date, NEW.tenant,
        coalesce(NEW.api_key_id, '00000000-0000-0000-0000-000000000000'), NEW.model,
        CASE WHEN NEW.status = 'succeeded' AND NOT v_ran THEN 'shared' ELSE NEW.status END, 1,
        v_prompt, v_completion, v_prompt * NEW.input_price + v_completion * NEW.output_price);
    RETURN NULL;
END $$
"""
_TRIGGER = """
CREATE TRIGGER jobs_usage AFTER UPDATE OF status ON jobs FOR EACH ROW
WHEN (OLD.status IN ('queued', 'running') AND NEW.status IN ('succeeded', 'failed', 'cancelled', 'expired'))
EXECUTE FUNCTION jobs_usage()
"""


def _of_whom() -> "list[sa.Column[Any]]":
    kinds = (("day", sa.Date()), ("tenant", sa.Text()), ("api_key_id", sa.Uuid()), ("model", sa.Text()))
    return [sa.Column(name, kind, nullable=False) for name, kind in kinds]


def _sum(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), server_default=sa.text("0"), nullable=False)


def upgrade() -> None:
    tokens = ("prompt_tokens", "completion_tokens", "cost_nano")
    op.create_table(
        "usage_entries",
        *_of_whom(),
        sa.Column("outcome", sa.Text(), nullable=False),
        *(_sum(name) for name in ("num", *tokens)),
    )
    op.create_table(
        "usage_days",
        *_of_whom(),
        *(_sum(f"num_{name}") for name in _COUNTS),
        *(_sum(name) for name in tokens),
        sa.PrimaryKeyConstraint("tenant", "day", "api_key_id", "model"),
    )
    op.execute(_ON_END)
    op.execute(_TRIGGER)


def downgrade() -> None:
    op.execute("DROP TRIGGER jobs_usage ON jobs")
    op.execute("DROP FUNCTION jobs_usage")
    op.drop_table("usage_days")
    op.drop_table("usage_entries")
