"""What may be asked of the ledger: how a job stands, pages of jobs, the depth of the queues. No row changes here."""

import datetime
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from db.session import Cursor
from db.states import JobStatus


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job stands, for a waiter: its state and, once it has one, its answer."""

    tenant: str
    endpoint: str
    status: JobStatus
    body: bytes | None
    events: bytes | None
    """Of a streamed job, see `tasks.replay`."""
    error: dict[str, Any] | None
    usage: dict[str, Any] | None
    model: str
    backend: str
    attempt: int
    queue_ms: float | None
    run_ms: float | None
    ttft_ms: float | None
    finished: int | None
    """Unix seconds."""


def outcome(cursor: Cursor, ids: Sequence[uuid.UUID]) -> list[Outcome | None]:
    """The outcome of each job, None for an unknown id."""
    cursor.execute(
        """
        SELECT j.id, tenant, endpoint, status, body, events, error, usage, model, backend, attempt,
               extract(epoch FROM started_at - created_at)::float8 * 1000,
               extract(epoch FROM finished_at - started_at)::float8 * 1000,
               extract(epoch FROM first_token_at - started_at)::float8 * 1000,
               floor(extract(epoch FROM finished_at))::bigint
        FROM jobs j LEFT JOIN job_results r ON r.job_id = coalesce(leader_id, j.id) AND status = 'succeeded'
        WHERE j.id = ANY(%s)
        """,
        (list(ids),),
    )
    found = {row[0]: Outcome(row[1], row[2], JobStatus(row[3]), _bytes(row[4]), _bytes(row[5]), *row[6:])
             for row in cursor.fetchall()}  # fmt: skip
    return [found.get(job_id) for job_id in ids]


def _bytes(value: memoryview | None) -> bytes | None:
    return None if value is None else bytes(value)


_MOST_AHEAD = 10_000


def ahead(cursor: Cursor, ids: Sequence[uuid.UUID], levels: Sequence[str]) -> list[int]:
    """How many queued jobs of its backend go before each, in the order of the queue's levels; 10,000 at most."""
    cursor.execute(
        """
        SELECT j.id, (SELECT count(*) FROM (SELECT FROM jobs o
            WHERE o.backend = j.backend AND o.status = 'queued' AND o.leader_id IS NULL
              AND (coalesce(array_position(%(levels)s, o.decision ->> 'level'), 1), o.created_at, o.id)
                < (coalesce(array_position(%(levels)s, j.decision ->> 'level'), 1), j.created_at, j.id)
            LIMIT %(most)s) before)
        FROM jobs j WHERE j.id = ANY(%(ids)s)
        """,
        {"ids": list(ids), "levels": list(levels), "most": _MOST_AHEAD},
    )
    found = {row[0]: int(row[1]) for row in cursor.fetchall()}
    return [found.get(job_id, 0) for job_id in ids]


def payload(cursor: Cursor, ids: Sequence[uuid.UUID]) -> list[tuple[bytes, uuid.UUID] | None]:
    """The stored call of each job, and under whose name its run's events are kept."""
    cursor.execute("SELECT id, payload, coalesce(flight_id, id) FROM jobs WHERE id = ANY(%s)", (list(ids),))
    found = {row[0]: (bytes(row[1]), row[2]) for row in cursor.fetchall()}
    return [found.get(job_id) for job_id in ids]


def ended(cursor: Cursor, groups: Sequence[Sequence[uuid.UUID]]) -> list[list[uuid.UUID]]:
    """Of each group of ids, those whose job has ended or does not exist."""
    answers = []
    for ids in groups:
        cursor.execute("SELECT id FROM jobs WHERE id = ANY(%s) AND status IN ('queued', 'running')", (list(ids),))
        live = {row[0] for row in cursor.fetchall()}
        answers.append([job_id for job_id in ids if job_id not in live])
    return answers


_VIEW = """
    id, tenant, request_id, endpoint, requested_model, model, model_revision, backend, status, is_stream, metadata,
    decision, cache_verdict, encode(cache_key, 'hex') AS cache_key, attempt, attempts, prompt_tokens, usage, error,
    timings, priority, created_at, enqueued_at, started_at, first_token_at, finished_at, deadline_at,
    (SELECT name FROM workers w WHERE w.id = jobs.worker_id) AS worker, worker_id, leader_id,
    coalesce(flight_id, id), webhook, result_ttl_s
"""


@dataclass(frozen=True, slots=True)
class View:
    """A job as its owner sees it. Fields are the columns of `jobs`, without the payload."""

    id: uuid.UUID
    tenant: str
    request_id: str
    endpoint: str
    requested_model: str
    model: str
    model_revision: str
    backend: str
    status: JobStatus
    is_stream: bool
    metadata: dict[str, str] | None
    decision: dict[str, Any]
    cache_verdict: str
    cache_key: str | None
    attempt: int
    attempts: list[dict[str, Any]]
    prompt_tokens: int
    usage: dict[str, Any] | None
    error: dict[str, Any] | None
    timings: dict[str, float]
    priority: int
    created_at: datetime.datetime
    enqueued_at: datetime.datetime
    started_at: datetime.datetime | None
    first_token_at: datetime.datetime | None
    finished_at: datetime.datetime | None
    deadline_at: datetime.datetime | None
    worker: str | None
    """Its name, where `worker_id` is of this one life."""
    worker_id: int | None
    leader_id: uuid.UUID | None
    flight_id: uuid.UUID
    webhook: dict[str, Any] | None
    result_ttl_s: int | None


def view(cursor: Cursor, wanted: Sequence[tuple[uuid.UUID, str | None]]) -> list[View | None]:
    """The jobs with these (id, tenant); None for an unknown id and for another tenant's alike.
    Tenant None sees every tenant's."""
    cursor.execute(f"SELECT {_VIEW} FROM jobs WHERE id = ANY(%s)", ([job_id for job_id, _ in wanted],))  # noqa: S608
    found = {row[0]: View(*row) for row in cursor.fetchall()}
    return [
        job if (job := found.get(job_id)) is not None and tenant in (None, job.tenant) else None
        for job_id, tenant in wanted
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """What a list of jobs is narrowed by. `after` is the last id of the page before."""

    tenant: str | None
    status: str | None = None
    model: str | None = None
    endpoint: str | None = None
    metadata: str | None = None
    """JSON: an object whose pairs the job's metadata must have."""
    after: uuid.UUID | None = None
    limit: int = 20


def find(cursor: Cursor, filters: Sequence[Filter]) -> list[list[View]]:
    """Pages of jobs, newest first; one row more than `limit` tells the caller that there is another page."""
    return [_page(cursor, wanted) for wanted in filters]


def _page(cursor: Cursor, wanted: Filter) -> list[View]:
    columns = [name for name in ("tenant", "status", "model", "endpoint") if getattr(wanted, name) is not None]
    conditions = ["true", *(f"{name} = %({name})s" for name in columns)]
    if wanted.metadata is not None:
        conditions.append("metadata @> %(metadata)s::jsonb")
    if wanted.after is not None:
        conditions.append("(created_at, id) < (SELECT created_at, id FROM jobs WHERE id = %(after)s)")
    cursor.execute(
        f"SELECT {_VIEW} FROM jobs WHERE {' AND '.join(conditions)} "  # noqa: S608 - names from this file alone
        "ORDER BY created_at DESC, id DESC LIMIT %(limit)s + 1",
        {name: getattr(wanted, name) for name in Filter.__slots__},
    )
    return [View(*row) for row in cursor.fetchall()]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetters:
    """Failed jobs: a tenant's (None: all), of a model, that ended with an error code; the oldest `limit`."""

    tenant: str | None
    model: str | None = None
    code: str | None = None
    limit: int = 1000


def dead_letters(cursor: Cursor, wanted: Sequence[DeadLetters]) -> list[list[uuid.UUID]]:
    """Ids of the failed jobs that match."""
    return [_dead_letters(cursor, one) for one in wanted]


def _dead_letters(cursor: Cursor, wanted: DeadLetters) -> list[uuid.UUID]:
    cursor.execute(
        """
        SELECT id FROM jobs WHERE status = 'failed' AND (%(tenant)s IS NULL OR tenant = %(tenant)s)
            AND (%(model)s IS NULL OR model = %(model)s) AND (%(code)s IS NULL OR error ->> 'code' = %(code)s)
        ORDER BY finished_at LIMIT %(limit)s
        """,
        {name: getattr(wanted, name) for name in DeadLetters.__slots__},
    )
    return [row[0] for row in cursor.fetchall()]


@dataclass(frozen=True, slots=True)
class Depth:
    """A queue as the ledger sees it."""

    num_queued: int
    num_running: int
    queued_tokens: int
    oldest_queued_s: float


def depths(cursor: Cursor) -> dict[str, Depth]:
    """Depth of every backend that has live jobs."""
    cursor.execute(
        """
        SELECT backend, count(*) FILTER (WHERE status = 'queued'), count(*) FILTER (WHERE status = 'running'),
               coalesce(sum(prompt_tokens) FILTER (WHERE status = 'queued'), 0),
               coalesce(extract(epoch FROM clock_timestamp() - min(created_at) FILTER (WHERE status = 'queued')), 0)
        FROM jobs WHERE status IN ('queued', 'running') AND leader_id IS NULL GROUP BY backend
        """
    )
    return {row[0]: Depth(int(row[1]), int(row[2]), int(row[3]), float(row[4])) for row in cursor.fetchall()}


@dataclass(frozen=True, slots=True)
class Backlog:
    """What one tenant has queued at one backend."""

    backend: str
    tenant: str
    num_queued: int
    tokens: int
    """Predicted, prompt and output."""


def backlogs(cursor: Cursor) -> list[Backlog]:
    """Of every tenant that has queued jobs."""
    cursor.execute(
        """
        SELECT backend, tenant, count(*), sum(greatest(predicted_tokens, prompt_tokens, 1))
        FROM jobs WHERE status = 'queued' AND leader_id IS NULL GROUP BY backend, tenant
        """
    )
    return [Backlog(*row) for row in cursor.fetchall()]


def quarantined(cursor: Cursor, within_s: float) -> frozenset[bytes]:
    """Cache keys of the requests whose every attempt took its worker down, within that time."""
    cursor.execute(
        """
        SELECT cache_key FROM jobs WHERE status = 'failed' AND finished_at > clock_timestamp() - %s * interval '1 s'
            AND error ->> 'code' = 'attempts_exhausted' AND leader_id IS NULL AND cache_key IS NOT NULL
            AND attempts -> -1 ->> 'outcome' IN ('worker_died', 'backend_dead', 'backend_stalled') LIMIT 10000
        """,
        (within_s,),
    )
    return frozenset(bytes(row[0]) for row in cursor.fetchall())
