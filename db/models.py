"""The tables.

SQLAlchemy declares the schema here and Alembic migrates to it; the statements of the hot path are
plain SQL in `db.jobs`, `db.cache`, `db.workers` and `db.request_log`, run by `db.lanes`.
"""

import datetime
import uuid
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Date,
    ForeignKey,
    Identity,
    Index,
    LargeBinary,
    SmallInteger,
    Table,
    Text,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TIMESTAMP
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from db.states import BATCH_LIVE, BatchStatus, JobStatus

_TIMESTAMP = TIMESTAMP(timezone=True)
_NOW = text("clock_timestamp()")
_STATUSES = ", ".join(f"'{status}'" for status in JobStatus)
_BATCH_STATUSES = ", ".join(f"'{status}'" for status in BatchStatus)
_BATCH_LIVE = ", ".join(f"'{status}'" for status in BATCH_LIVE)


class Base(DeclarativeBase):
    pass


class Limits:
    """What a key, or all keys of a tenant together, may use. NULL: without limit."""

    requests_per_minute: Mapped[int | None]
    tokens_per_minute: Mapped[int | None]
    max_concurrent: Mapped[int | None]
    """Jobs queued or running at a time."""
    daily_tokens: Mapped[int | None] = mapped_column(BigInteger)
    daily_cost_nano: Mapped[int | None] = mapped_column(BigInteger)
    """In 1e-9 of the currency that the catalog's prices are in: sums of whole numbers have no drift."""


class Tenant(Limits, Base):
    """Who owns keys, jobs and cache entries."""

    __tablename__ = "tenants"

    name: Mapped[str] = mapped_column(Text, primary_key=True)
    weight: Mapped[float] = mapped_column(server_default=text("1"))
    """Its share where tenants compete."""
    created_at: Mapped[datetime.datetime] = mapped_column(_TIMESTAMP, server_default=_NOW)

    __table_args__ = (CheckConstraint("weight > 0", name="tenants_weight"),)


class ApiKey(Limits, Base):
    """A caller's key. Only its SHA-256 is kept: 256 random bits need no slow hash."""

    __tablename__ = "api_keys"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(Text)
    name: Mapped[str] = mapped_column(Text)
    prefix: Mapped[str] = mapped_column(Text)
    hash: Mapped[bytes] = mapped_column(LargeBinary, unique=True)
    is_admin: Mapped[bool] = mapped_column(server_default=text("false"))
    created_at: Mapped[datetime.datetime] = mapped_column(_TIMESTAMP, server_default=_NOW)
    timeout_s: Mapped[float | None]
    """Deadline of its jobs where they name none."""
    scopes: Mapped[list[str]] = mapped_column(ARRAY(Text), server_default=text("'{submit,read,cancel}'"))
    models: Mapped[list[str] | None] = mapped_column(ARRAY(Text))
    """Names and aliases that it may use. NULL: every model."""
    expires_at: Mapped[datetime.datetime | None] = mapped_column(_TIMESTAMP)
    revoked_at: Mapped[datetime.datetime | None] = mapped_column(_TIMESTAMP)
    previous_hash: Mapped[bytes | None] = mapped_column(LargeBinary)
    """Of the secret before the last rotation."""
    previous_until: Mapped[datetime.datetime | None] = mapped_column(_TIMESTAMP)
    """Until when that one opens the door as well."""

    __table_args__ = (Index("api_keys_previous", "previous_hash", postgresql_where=text("previous_hash IS NOT NULL")),)


class Worker(Base):
    """One life of one worker process. Its lease covers every job it runs; a dead row never comes back."""

    __tablename__ = "workers"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    name: Mapped[str] = mapped_column(Text)
    backend: Mapped[str] = mapped_column(Text)
    pid: Mapped[int]
    state: Mapped[str] = mapped_column(Text)
    slots: Mapped[int]
    models: Mapped[dict[str, Any]] = mapped_column(JSONB)
    stats: Mapped[dict[str, Any]] = mapped_column(JSONB, server_default=text("'{}'"))
    started_at: Mapped[datetime.datetime] = mapped_column(_TIMESTAMP, server_default=_NOW)
    ready_at: Mapped[datetime.datetime | None] = mapped_column(_TIMESTAMP)
    heartbeat_at: Mapped[datetime.datetime] = mapped_column(_TIMESTAMP, server_default=_NOW)
    lease_until: Mapped[datetime.datetime] = mapped_column(_TIMESTAMP)

    __table_args__ = (
        CheckConstraint("state IN ('loading', 'ready', 'draining', 'dead')", name="workers_state"),
        Index("workers_alive", "backend", postgresql_where=text("state <> 'dead'")),
        {"postgresql_with": {"fillfactor": "50"}},
    )


class Job(Base):
    """The durable record of one call."""

    __tablename__ = "jobs"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(Text)
    api_key_id: Mapped[uuid.UUID | None]
    request_id: Mapped[str] = mapped_column(Text)
    endpoint: Mapped[str] = mapped_column(Text)
    task: Mapped[str] = mapped_column(Text)
    requested_model: Mapped[str] = mapped_column(Text)
    model: Mapped[str] = mapped_column(Text)
    model_revision: Mapped[str] = mapped_column(Text)
    backend: Mapped[str] = mapped_column(Text)
    status: Mapped[str] = mapped_column(Text, server_default=text("'queued'"))
    is_stream: Mapped[bool] = mapped_column(server_default=text("false"))
    payload: Mapped[bytes] = mapped_column(LargeBinary)
    metadata_: Mapped[dict[str, str] | None] = mapped_column("metadata", JSONB)
    decision: Mapped[dict[str, Any]] = mapped_column(JSONB)
    cache_verdict: Mapped[str] = mapped_column(Text)
    cache_key: Mapped[bytes | None] = mapped_column(LargeBinary)
    cache_ttl_s: Mapped[int | None]
    is_cache_refresh: Mapped[bool] = mapped_column(server_default=text("false"))
    coalesce_key: Mapped[bytes | None] = mapped_column(LargeBinary)
    """Identical requests share one live job with this key. NULL: not to be shared, or a follower."""
    leader_id: Mapped[uuid.UUID | None]
    """The job whose run this one waits for and whose result is its own. NULL: it runs itself."""
    flight_id: Mapped[uuid.UUID | None]
    """The job under whose name the shared run's events are kept. NULL: its own."""
    num_followers: Mapped[int] = mapped_column(server_default=text("0"))
    attempt: Mapped[int] = mapped_column(server_default=text("0"))
    worker_id: Mapped[int | None] = mapped_column(BigInteger)
    attempts: Mapped[list[dict[str, Any]]] = mapped_column(JSONB, server_default=text("'[]'"))
    prompt_tokens: Mapped[int] = mapped_column(server_default=text("0"))
    predicted_tokens: Mapped[int] = mapped_column(server_default=text("0"))
    """Prompt and expected output: the size of the job in its tenant's backlog."""
    priority: Mapped[int] = mapped_column(SmallInteger, server_default=text("1"))
    """See `tasks.fair_share.Priority`."""
    input_price: Mapped[int] = mapped_column(server_default=text("0"))
    """Of one prompt token, in 1e-9 of the currency, as it was when the job was accepted."""
    output_price: Mapped[int] = mapped_column(server_default=text("0"))
    reserved_tokens: Mapped[int | None] = mapped_column(BigInteger)
    """The most tokens that it can use, held against its key's and tenant's budgets. NULL: these have none."""
    reserved_on: Mapped[datetime.date | None]
    """The day (UTC) whose budget it counts against."""
    is_settled: Mapped[bool] = mapped_column(server_default=text("false"))
    """Its reservation has become what it really used."""
    usage: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    timings: Mapped[dict[str, float]] = mapped_column(JSONB, server_default=text("'{}'"))
    created_at: Mapped[datetime.datetime] = mapped_column(_TIMESTAMP, server_default=_NOW)
    enqueued_at: Mapped[datetime.datetime] = mapped_column(_TIMESTAMP, server_default=_NOW)
    started_at: Mapped[datetime.datetime | None] = mapped_column(_TIMESTAMP)
    first_token_at: Mapped[datetime.datetime | None] = mapped_column(_TIMESTAMP)
    finished_at: Mapped[datetime.datetime | None] = mapped_column(_TIMESTAMP)
    deadline_at: Mapped[datetime.datetime | None] = mapped_column(_TIMESTAMP)
    webhook: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    """{"url", "events"?}. A trigger leaves a delivery for it when the job ends."""
    result_ttl_s: Mapped[int | None]
    """Seconds it is kept after its end, where that is less than for others."""

    __table_args__ = (
        CheckConstraint(f"status IN ({_STATUSES})", name="jobs_status"),
        Index("jobs_live", "backend", "created_at", postgresql_where=text("status IN ('queued', 'running')")),
        Index(
            "jobs_flights",
            "coalesce_key",
            unique=True,
            postgresql_where=text("coalesce_key IS NOT NULL AND status IN ('queued', 'running')"),
        ),
        Index("jobs_followers", "leader_id", postgresql_where=text("leader_id IS NOT NULL AND status = 'queued'")),
        Index("jobs_failed", "finished_at", postgresql_where=text("status = 'failed'")),
        Index(
            "jobs_unsettled",
            "tenant",
            postgresql_where=text("reserved_tokens IS NOT NULL AND NOT is_settled AND finished_at IS NOT NULL"),
        ),
        Index("jobs_running", "worker_id", postgresql_where=text("status = 'running'")),
        Index("jobs_by_tenant", "tenant", "created_at", "id"),
        Index("jobs_finished", "finished_at", postgresql_where=text("finished_at IS NOT NULL")),
        Index(
            "jobs_short_lived",
            "finished_at",
            postgresql_where=text("result_ttl_s IS NOT NULL AND finished_at IS NOT NULL"),
        ),
    )


class JobResult(Base):
    """The one answer of a succeeded job: the bytes the caller gets."""

    __tablename__ = "job_results"

    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    body: Mapped[bytes] = mapped_column(LargeBinary)
    sha256: Mapped[bytes] = mapped_column(LargeBinary)
    events: Mapped[bytes | None] = mapped_column(LargeBinary)
    """Of a streamed job: where each event of its stream ended (`tasks.replay`)."""


class BudgetDay(Base):
    """What a key's jobs of one day (UTC) hold and have used. Only of keys that have budgets, or whose tenant has."""

    __tablename__ = "budget_days"

    api_key_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    day: Mapped[datetime.date] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(Text)
    num_live: Mapped[int] = mapped_column(server_default=text("0"))
    reserved_tokens: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    reserved_cost: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    spent_tokens: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    spent_cost: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))

    __table_args__ = (
        Index("budget_days_tenant", "tenant", "day"),
        {"postgresql_with": {"fillfactor": "50"}},
    )


class UsageDay(Base):
    """What a key asked of a model on one day (UTC), by how it ended. The nil key stands for jobs without one."""

    __tablename__ = "usage_days"

    tenant: Mapped[str] = mapped_column(Text, primary_key=True)
    day: Mapped[datetime.date] = mapped_column(primary_key=True)
    api_key_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    model: Mapped[str] = mapped_column(Text, primary_key=True)
    num_succeeded: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    num_failed: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    num_cancelled: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    num_expired: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    num_shared: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    """Succeeded with the answer of another job's run."""
    num_cached: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    """Answered from the cache."""
    prompt_tokens: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    completion_tokens: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    cost_nano: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    """In 1e-9 of the currency that the catalog's prices are in."""


usage_entries = Table(
    "usage_entries",
    Base.metadata,
    Column("day", Date, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("api_key_id", Uuid, nullable=False),
    Column("model", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    *(
        Column(name, BigInteger, server_default=text("0"), nullable=False)
        for name in ("num", "prompt_tokens", "completion_tokens", "cost_nano")
    ),
)
"""Ends that are not in `usage_days` yet: a trigger writes one with each. Without an index, hence without a key."""


class IdempotencyKey(Base):
    """A caller's promise that requests under this key are one request."""

    __tablename__ = "idempotency_keys"

    api_key_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(Text, primary_key=True)
    fingerprint: Mapped[bytes] = mapped_column(LargeBinary)
    """SHA-256 of what was asked."""
    job_id: Mapped[uuid.UUID]
    """Or the batch's."""
    expires_at: Mapped[datetime.datetime] = mapped_column(_TIMESTAMP)

    __table_args__ = (Index("idempotency_keys_expiry", "expires_at"),)


class CacheEntry(Base):
    """A stored answer under its request's key, as bytes: jsonb would rewrite numbers and spacing."""

    __tablename__ = "response_cache"

    key: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
    tenant: Mapped[str] = mapped_column(Text)
    model: Mapped[str] = mapped_column(Text)
    backend: Mapped[str] = mapped_column(Text)
    job_id: Mapped[uuid.UUID]
    body: Mapped[bytes] = mapped_column(LargeBinary)
    sha256: Mapped[bytes] = mapped_column(LargeBinary)
    num_bytes: Mapped[int]
    usage: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    num_hits: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    created_at: Mapped[datetime.datetime] = mapped_column(_TIMESTAMP, server_default=_NOW)
    last_hit_at: Mapped[datetime.datetime] = mapped_column(_TIMESTAMP, server_default=_NOW)
    expires_at: Mapped[datetime.datetime] = mapped_column(_TIMESTAMP)

    __table_args__ = (
        Index("response_cache_expiry", "expires_at"),
        Index("response_cache_model", "model"),
        Index("response_cache_lru", "last_hit_at"),
    )


class WebhookSecret(Base):
    """What a tenant's webhooks are signed with. Kept as it is: a signature needs the secret itself."""

    __tablename__ = "webhook_secrets"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(Text)
    secret: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime.datetime] = mapped_column(_TIMESTAMP, server_default=_NOW)
    expires_at: Mapped[datetime.datetime | None] = mapped_column(_TIMESTAMP)

    __table_args__ = (Index("webhook_secrets_tenant", "tenant"),)


class WebhookGone(Base):
    """A URL that answered 410 Gone: nothing is sent there."""

    __tablename__ = "webhook_gone"

    tenant: Mapped[str] = mapped_column(Text, primary_key=True)
    url: Mapped[str] = mapped_column(Text, primary_key=True)
    since: Mapped[datetime.datetime] = mapped_column(_TIMESTAMP, server_default=_NOW)


class WebhookDelivery(Base):
    """One event on its way to one receiver, written in the transaction that ended what it tells of."""

    __tablename__ = "webhook_deliveries"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(Text)
    type: Mapped[str] = mapped_column(Text)
    object_id: Mapped[str] = mapped_column(Text)
    url: Mapped[str] = mapped_column(Text)
    body: Mapped[str] = mapped_column(Text)
    status: Mapped[str] = mapped_column(Text)
    attempts: Mapped[int] = mapped_column(server_default=text("0"))
    created_at: Mapped[datetime.datetime] = mapped_column(_TIMESTAMP, server_default=_NOW)
    next_at: Mapped[datetime.datetime] = mapped_column(_TIMESTAMP, server_default=_NOW)
    ended_at: Mapped[datetime.datetime | None] = mapped_column(_TIMESTAMP)
    last_status: Mapped[int | None]
    last_error: Mapped[str | None] = mapped_column(Text)

    __table_args__ = (
        CheckConstraint("status IN ('pending', 'delivered', 'failed', 'disabled')", name="webhook_deliveries_status"),
        Index("webhook_deliveries_due", "next_at", postgresql_where=text("status = 'pending'")),
        Index("webhook_deliveries_tenant", "tenant", "created_at", "id"),
    )


class RequestLog(Base):
    """One line per answered request: who asked what of which model, and how it went. No prompt text
    unless SWITCHYARD_LOG_PROMPTS is on."""

    __tablename__ = "request_log"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    created_at: Mapped[datetime.datetime] = mapped_column(_TIMESTAMP, server_default=_NOW)
    request_id: Mapped[str] = mapped_column(Text)
    job_id: Mapped[uuid.UUID | None]
    tenant: Mapped[str | None] = mapped_column(Text)
    api_key_id: Mapped[uuid.UUID | None]
    endpoint: Mapped[str] = mapped_column(Text)
    requested_model: Mapped[str | None] = mapped_column(Text)
    model: Mapped[str | None] = mapped_column(Text)
    backend: Mapped[str | None] = mapped_column(Text)
    cache_verdict: Mapped[str | None] = mapped_column(Text)
    is_stream: Mapped[bool] = mapped_column(server_default=text("false"))
    status_code: Mapped[int]
    error_code: Mapped[str | None] = mapped_column(Text)
    duration_ms: Mapped[float]
    queue_ms: Mapped[float | None]
    ttft_ms: Mapped[float | None]
    prompt_tokens: Mapped[int | None]
    completion_tokens: Mapped[int | None]
    prompt: Mapped[str | None] = mapped_column(Text)

    __table_args__ = (Index("request_log_time", "created_at"), Index("request_log_tenant", "tenant", "created_at"))


class File(Base):
    """What a caller uploaded, or what a batch answered. Its bytes lie in `file_chunks`."""

    __tablename__ = "files"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(Text)
    filename: Mapped[str] = mapped_column(Text)
    purpose: Mapped[str] = mapped_column(Text)
    num_bytes: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    is_whole: Mapped[bool] = mapped_column(server_default=text("false"))
    """Until then nobody sees it."""
    created_at: Mapped[datetime.datetime] = mapped_column(_TIMESTAMP, server_default=_NOW)
    expires_at: Mapped[datetime.datetime | None] = mapped_column(_TIMESTAMP)

    __table_args__ = (
        Index("files_by_tenant", "tenant", "created_at", "id"),
        Index("files_expiry", "expires_at"),
        Index("files_unfinished", "created_at", postgresql_where=text("NOT is_whole")),
    )


class FileChunk(Base):
    """A piece of a file, by its first byte's place in it."""

    __tablename__ = "file_chunks"

    file_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("files.id", ondelete="CASCADE"), primary_key=True)
    start: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    data: Mapped[bytes] = mapped_column(LargeBinary)


class Batch(Base):
    """Many requests in one file, answered into files within a window of hours."""

    __tablename__ = "batches"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(Text)
    api_key_id: Mapped[uuid.UUID]
    endpoint: Mapped[str] = mapped_column(Text)
    input_file_id: Mapped[uuid.UUID]
    completion_window: Mapped[str] = mapped_column(Text)
    metadata_: Mapped[dict[str, str] | None] = mapped_column("metadata", JSONB)
    output_ttl_s: Mapped[int]
    """Seconds that its output files are kept."""
    webhook: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    status: Mapped[str] = mapped_column(Text, server_default=text("'validating'"))
    model: Mapped[str | None] = mapped_column(Text)
    """Where all its lines name the same."""
    errors: Mapped[list[dict[str, Any]] | None] = mapped_column(JSONB)
    output_file_id: Mapped[uuid.UUID | None]
    error_file_id: Mapped[uuid.UUID | None]
    num_total: Mapped[int] = mapped_column(server_default=text("0"))
    num_completed: Mapped[int] = mapped_column(server_default=text("0"))
    num_failed: Mapped[int] = mapped_column(server_default=text("0"))
    input_tokens: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    output_tokens: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    created_at: Mapped[datetime.datetime] = mapped_column(_TIMESTAMP, server_default=_NOW)
    expires_at: Mapped[datetime.datetime] = mapped_column(_TIMESTAMP)
    in_progress_at: Mapped[datetime.datetime | None] = mapped_column(_TIMESTAMP)
    finalizing_at: Mapped[datetime.datetime | None] = mapped_column(_TIMESTAMP)
    completed_at: Mapped[datetime.datetime | None] = mapped_column(_TIMESTAMP)
    failed_at: Mapped[datetime.datetime | None] = mapped_column(_TIMESTAMP)
    expired_at: Mapped[datetime.datetime | None] = mapped_column(_TIMESTAMP)
    cancelling_at: Mapped[datetime.datetime | None] = mapped_column(_TIMESTAMP)
    cancelled_at: Mapped[datetime.datetime | None] = mapped_column(_TIMESTAMP)

    __table_args__ = (
        CheckConstraint(f"status IN ({_BATCH_STATUSES})", name="batches_status"),
        Index("batches_by_tenant", "tenant", "created_at", "id"),
        Index("batches_live", "created_at", postgresql_where=text(f"status IN ({_BATCH_LIVE})")),
        Index("batches_input", "input_file_id"),
    )


class BatchItem(Base):
    """A line of a batch's input that has no line in its output yet."""

    __tablename__ = "batch_items"

    batch_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True)
    line: Mapped[int] = mapped_column(primary_key=True)
    custom_id: Mapped[str] = mapped_column(Text)
    model: Mapped[str] = mapped_column(Text)
    start: Mapped[int] = mapped_column(BigInteger)
    """Of its first byte in the input file."""
    num_bytes: Mapped[int]
