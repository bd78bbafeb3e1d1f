"""webhooks, results kept for a time of their own

Only adds: the version before this one runs against this schema.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_TIMESTAMP = postgresql.TIMESTAMP(timezone=True)
_NOW = sa.text("clock_timestamp()")

_EMIT = """
CREATE FUNCTION webhook_emit(p_tenant text, p_webhook jsonb, p_type text, p_object_id text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_id uuid := gen_random_uuid();
    v_url text := p_webhook ->> 'url';
    v_now timestamptz := clock_timestamp();
BEGIN
    IF p_webhook ? 'events' AND NOT p_webhook -> 'events' ? p_type THEN
        RETURN;
    END IF;
    INSERT INTO webhook_deliveries (id, tenant, type, object_id, url, body, status, created_at, next_at)
    VALUES (v_id, p_tenant, p_type, p_object_id, v_url,
        json_build_object('id', 'evt_' || replace(v_id::text, '-', ''), 'object', 'event', 'type', p_type,
            'created_at', floor(extract(epoch FROM v_now))::bigint, 'data', json_build_object('id', p_object_id))::text,
        CASE WHEN EXISTS (SELECT FROM webhook_gone g WHERE g.tenant = p_tenant AND g.url = v_url)
            THEN 'disabled' ELSE 'pending' END, v_now, v_now);
END $$
"""

# In JSON text a quote inside a string has a backslash before it, so that the bytes looked for can only be the
# answer's own field.
_ON_END = """
CREATE FUNCTION jobs_webhook() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    v_type text := 'job.' || NEW.status;
    v_id text := NEW.id::text;
BEGIN
    IF NEW.endpoint = '/v1/responses' THEN
        v_id := 'resp_' || replace(v_id, '-', '');
        v_type := CASE NEW.status WHEN 'succeeded' THEN 'response.completed' WHEN 'cancelled' THEN 'response.cancelled'
            ELSE 'response.failed' END;
        IF NEW.status = 'succeeded' AND EXISTS (SELECT FROM job_results r
                WHERE r.job_id = coalesce(NEW.leader_id, NEW.id)
                  AND position('"finish_reason":"length"'::bytea IN r.body) > 0) THEN
            v_type := 'response.incomplete';
        END IF;
    END IF;
    PERFORM webhook_emit(NEW.tenant, NEW.webhook, v_type, v_id);
    RETURN NULL;
END $$
"""

_TRIGGER = """
CREATE TRIGGER jobs_webhook AFTER UPDATE OF status ON jobs FOR EACH ROW
WHEN (NEW.webhook IS NOT NULL AND OLD.status <> NEW.status
      AND NEW.status IN ('succeeded', 'failed', 'cancelled', 'expired'))
EXECUTE FUNCTION jobs_webhook()
"""


def upgrade() -> None:
    op.add_column("jobs", sa.Column("webhook", postgresql.JSONB(), nullable=True))
    op.add_column("jobs", sa.Column("result_ttl_s", sa.Integer(), nullable=True))
    op.create_index(
        "jobs_short_lived",
        "jobs",
        ["finished_at"],
        postgresql_where=sa.text("result_ttl_s IS NOT NULL AND finished_at IS NOT NULL"),
    )
    op.create_table(
        "webhook_secrets",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("secret", sa.Text(), nullable=False),
        sa.Column("created_at", _TIMESTAMP, server_default=_NOW, nullable=False),
        sa.Column("expires_at", _TIMESTAMP, nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("webhook_secrets_tenant", "webhook_secrets", ["tenant"])
    op.create_table(
        "webhook_gone",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("since", _TIMESTAMP, server_default=_NOW, nullable=False),
        sa.PrimaryKeyConstraint("tenant", "url"),
    )
    op.create_table(
        "webhook_deliveries",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("object_id", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("created_at", _TIMESTAMP, server_default=_NOW, nullable=False),
        sa.Column("next_at", _TIMESTAMP, server_default=_NOW, nullable=False),
        sa.Column("ended_at", _TIMESTAMP, nullable=True),
        sa.Column("last_status", sa.Integer(), nullable=True),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
        sa.CheckConstraint(
            "status IN ('pending', 'delivered', 'failed', 'disabled')", name="webhook_deliveries_status"
        ),
    )
    op.create_index(
        "webhook_deliveries_due",
        "webhook_deliveries",
        ["next_at"],
        postgresql_where=sa.text("status = 'pending'"),
    )
    op.create_index("webhook_deliveries_tenant", "webhook_deliveries", ["tenant", "created_at", "id"])
    for statement in (_EMIT, _ON_END, _TRIGGER):
        op.execute(statement)


def downgrade() -> None:
    op.execute("DROP TRIGGER jobs_webhook ON jobs")
    op.execute("DROP FUNCTION jobs_webhook")
    op.execute("DROP FUNCTION webhook_emit")
    for table in ("webhook_deliveries", "webhook_gone", "webhook_secrets"):
        op.drop_table(table)
    op.drop_index("jobs_short_lived", "jobs")
    for column in ("result_ttl_s", "webhook"):
        op.drop_column("jobs", column)
