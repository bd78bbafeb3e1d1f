"""Accepting: a call becomes a row, or joins the row that is already there.

Three ways to join. A request identical to one that is queued or running follows it: it gets a row of its
own, without a run of its own. A repeated Idempotency-Key, and a retry by an SDK, lead back to the job
they made the first time.
"""

import datetime
import itertools
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from psycopg2.extras import execute_values

from db.session import Cursor, transaction


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A job about to be accepted. JSON columns come encoded."""

    id: uuid.UUID
    tenant: str
    api_key_id: uuid.UUID | None
    request_id: str
    endpoint: str
    task: str
    requested_model: str
    model: str
    model_revision: str
    backend: str
    is_stream: bool
    payload: bytes
    metadata: str | None
    decision: str
    cache_verdict: str
    cache_key: bytes | None
    cache_ttl_s: int | None
    is_cache_refresh: bool
    prompt_tokens: int
    timings: str
    timeout_s: float | None = None
    deadline: float | None = None
    """Unix seconds. The earlier of the two counts."""
    priority: int = 1
    predicted_tokens: int = 0
    coalesce_key: bytes | None = None
    """Live jobs with the same key share one run. None: this one runs alone."""
    input_price: int = 0
    """Of one prompt token, in 1e-9 of the currency."""
    output_price: int = 0
    reserved_tokens: int | None = None
    """Held against budgets (`db.budgets`). None: there are none."""
    reserved_on: datetime.date | None = None
    webhook: str | None = None
    result_ttl_s: int | None = None


@dataclass(frozen=True, slots=True)
class Inserted:
    """A recorded job. One with a leader waits for that job's run and needs no message of its own."""

    id: uuid.UUID
    created_at: datetime.datetime
    backend: str
    cache_verdict: str
    leader_id: uuid.UUID | None
    flight_id: uuid.UUID
    """Under whose name the run's events are kept."""


_COLUMNS = """
    id, tenant, api_key_id, request_id, endpoint, task, requested_model, model, model_revision, backend, is_stream,
    payload, metadata, decision, cache_verdict, cache_key, cache_ttl_s, is_cache_refresh, prompt_tokens, timings,
    deadline_at, priority, predicted_tokens, coalesce_key, input_price, output_price, reserved_tokens, reserved_on,
    webhook, result_ttl_s
"""
_TYPES = (
    "(%s::uuid,%s,%s::uuid,%s,%s,%s,%s,%s,%s,%s,%s,%s::bytea,%s::jsonb,%s::jsonb,%s,%s::bytea,%s::int,%s,%s,"
    "%s::jsonb,least(clock_timestamp() + %s::float8 * interval '1 s', to_timestamp(%s::float8)),"
    "%s::smallint,%s::int,%s::bytea,%s::int,%s::int,%s::bigint,%s::date,%s::jsonb,%s::int)"
)
_INSERTED = "id, created_at, backend, cache_verdict, leader_id, coalesce(flight_id, id)"


def insert(cursor: Cursor, jobs: Sequence[NewJob]) -> list[Inserted]:
    """Record jobs as queued, or as followers of the live job with the same `coalesce_key`. Repeating an
    insert changes nothing."""
    # In key order, so that two batches with the same keys cannot wait for each other.
    left = sorted(jobs, key=lambda job: job.coalesce_key or b"")
    made: dict[uuid.UUID, Inserted] = {}
    for step in itertools.cycle((_lead, _follow)):
        made |= {row[0]: Inserted(*row) for row in step(cursor, left)}
        left = [job for job in left if job.id not in made]
        # Whoever is left after a whole round saw its leader end meanwhile, and leads in the next.
        if not left:
            break
    return [made[job.id] for job in jobs]


def _row(job: NewJob) -> tuple[Any, ...]:
    return (
        job.id, job.tenant, job.api_key_id, job.request_id, job.endpoint, job.task, job.requested_model, job.model,
        job.model_revision, job.backend, job.is_stream, job.payload, job.metadata, job.decision, job.cache_verdict,
        job.cache_key, job.cache_ttl_s, job.is_cache_refresh, job.prompt_tokens, job.timings, job.timeout_s,
        job.deadline, job.priority, job.predicted_tokens, job.coalesce_key, job.input_price, job.output_price,
        job.reserved_tokens, job.reserved_on, job.webhook, job.result_ttl_s,
    )  # fmt: skip


def _lead(cursor: Cursor, jobs: Sequence[NewJob]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = execute_values(
        cursor,
        f"INSERT INTO jobs ({_COLUMNS}) VALUES %s ON CONFLICT DO NOTHING RETURNING {_INSERTED}",  # noqa: S608
        [_row(job) for job in jobs],
        template=_TYPES,
        page_size=1000,
        fetch=True,
    )
    return rows


def _follow(cursor: Cursor, jobs: Sequence[NewJob]) -> list[tuple[Any, ...]]:
    """Record followers; their rows, and those that an earlier try has inserted already. Counting the followers locks
    their leader's row: it cannot end between this statement's look and its commit, so whoever ends it sees them."""
    rows: list[tuple[Any, ...]] = execute_values(
        cursor,
        f"""
        WITH input ({_COLUMNS}) AS (VALUES %s),
        known AS (SELECT {_INSERTED} FROM jobs WHERE id IN (SELECT id FROM input)),
        fresh AS (SELECT *, row_number() OVER () AS place FROM input WHERE id NOT IN (SELECT id FROM known)),
        live AS (SELECT j.id FROM jobs j WHERE status IN ('queued', 'running')
            AND coalesce_key IN (SELECT coalesce_key FROM fresh) ORDER BY id FOR UPDATE),
        leader AS (UPDATE jobs j SET num_followers = num_followers +
                (SELECT count(*) FROM fresh f WHERE f.coalesce_key = j.coalesce_key)
            FROM live WHERE j.id = live.id RETURNING j.id, j.backend, coalesce(j.flight_id, j.id) AS flight_id,
                j.coalesce_key),
        following AS (INSERT INTO jobs ({_COLUMNS}, leader_id, flight_id)
        SELECT f.id, tenant, api_key_id, request_id, endpoint, task, requested_model, model, model_revision, l.backend,
            is_stream, payload, metadata, decision, 'COALESCED; joined ' || l.id, cache_key, cache_ttl_s,
            is_cache_refresh, prompt_tokens, timings, deadline_at, priority, predicted_tokens, NULL, input_price,
            output_price, reserved_tokens, reserved_on, webhook, result_ttl_s, l.id, l.flight_id
        FROM fresh f JOIN leader l ON l.coalesce_key = f.coalesce_key ORDER BY place RETURNING {_INSERTED})
        SELECT * FROM known UNION ALL SELECT * FROM following
        """,  # noqa: S608 - column names from this file alone
        [_row(job) for job in jobs],
        template=_TYPES,
        page_size=1000,
        fetch=True,
    )
    return rows


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A caller's key, and the SHA-256 of what was asked under it."""

    api_key_id: uuid.UUID
    key: str
    fingerprint: bytes


@dataclass(frozen=True, slots=True)
class Reserved:
    """What a key stands for by now."""

    job_id: uuid.UUID
    fingerprint: bytes
    inserted: Inserted | None
    """Where this very request made the job."""


def insert_once(cursor: Cursor, wanted: Sequence[tuple[Idempotency, NewJob]]) -> list[Reserved]:
    """Record each job unless its key already stands for another; key and job in one transaction, so there
    is never one without the other. Keys are kept for 24 h. A lost answer may be asked for again."""
    with transaction(cursor):
        return insert_keyed(cursor, wanted)


def insert_keyed(cursor: Cursor, wanted: Sequence[tuple[Idempotency, NewJob]]) -> list[Reserved]:
    """`insert_once` inside the transaction of whoever calls."""
    first = {(one.api_key_id, one.key): (one, job) for one, job in reversed(wanted)}
    held = hold_keys(cursor, [(one, job.id) for one, job in first.values()])
    mine = [job for one, job in wanted if held[one.api_key_id, one.key][0] == job.id]
    made = {one.id: one for one in insert(cursor, mine)}
    answers = []
    for one, job in wanted:
        job_id, fingerprint = held[one.api_key_id, one.key]
        answers.append(Reserved(job_id, fingerprint, made.get(job_id) if job_id == job.id else None))
    return answers


def hold_keys(
    cursor: Cursor, wanted: Sequence[tuple[Idempotency, uuid.UUID]]
) -> dict[tuple[uuid.UUID, str], tuple[uuid.UUID, bytes]]:
    """Let each key, named once, stand for an id unless it stands for another: what each (API key, key) stands for
    then, and the fingerprint that came with it."""
    rows = execute_values(
        cursor,
        """
        INSERT INTO idempotency_keys AS k (api_key_id, key, fingerprint, job_id, expires_at) VALUES %s
        ON CONFLICT (api_key_id, key) DO UPDATE SET
            fingerprint = CASE WHEN k.expires_at > clock_timestamp() THEN k.fingerprint
                               ELSE excluded.fingerprint END,
            job_id = CASE WHEN k.expires_at > clock_timestamp() THEN k.job_id ELSE excluded.job_id END,
            expires_at = CASE WHEN k.expires_at > clock_timestamp() THEN k.expires_at ELSE excluded.expires_at END
        RETURNING api_key_id, key, job_id, fingerprint
        """,
        sorted((one.api_key_id, one.key, one.fingerprint, made_id) for one, made_id in wanted),
        template="(%s::uuid, %s, %s::bytea, %s::uuid, clock_timestamp() + interval '24 h')",
        page_size=1000,
        fetch=True,
    )
    return {(row[0], row[1]): (row[2], bytes(row[3])) for row in rows}


def release_key(cursor: Cursor, one: Idempotency) -> None:
    """Free a key in the transaction that held it: what it was to stand for was refused."""
    cursor.execute("DELETE FROM idempotency_keys WHERE api_key_id = %s AND key = %s", (one.api_key_id, one.key))


def find_key(cursor: Cursor, wanted: Sequence[tuple[uuid.UUID, str]]) -> list[Reserved | None]:
    """What each (API key, Idempotency-Key) stands for; None for an unknown or expired one."""
    rows = execute_values(
        cursor,
        """
        SELECT k.api_key_id, k.key, job_id, fingerprint FROM idempotency_keys k
        JOIN (VALUES %s) w (api_key_id, key) ON k.api_key_id = w.api_key_id AND k.key = w.key
        WHERE expires_at > clock_timestamp()
        """,
        wanted,
        template="(%s::uuid, %s)",
        page_size=1000,
        fetch=True,
    )
    found = {(row[0], row[1]): Reserved(row[2], bytes(row[3]), None) for row in rows}
    return [found.get(one) for one in wanted]


@dataclass(frozen=True, slots=True)
class Retry:
    """A request that an SDK says it has sent before."""

    api_key_id: uuid.UUID
    cache_keys: tuple[bytes, ...]
    """One per model that may answer."""
    is_stream: bool


_ADOPTION_S = 600


def find_live(cursor: Cursor, retries: Sequence[Retry]) -> list[uuid.UUID | None]:
    """The newest live job of the last ten minutes that each retried request made."""
    return [_find_live(cursor, retry) for retry in retries]


def _find_live(cursor: Cursor, retry: Retry) -> uuid.UUID | None:
    cursor.execute(
        """
        SELECT id FROM jobs WHERE status IN ('queued', 'running') AND api_key_id = %s AND cache_key = ANY(%s)
            AND is_stream = %s AND created_at > clock_timestamp() - %s * interval '1 s'
        ORDER BY created_at DESC LIMIT 1
        """,
        (retry.api_key_id, list(retry.cache_keys), retry.is_stream, _ADOPTION_S),
    )
    row = cursor.fetchone()
    return row[0] if row else None


def forget_keys(cursor: Cursor) -> int:
    """Delete the keys whose time is over; answers how many."""
    cursor.execute("DELETE FROM idempotency_keys WHERE expires_at <= clock_timestamp()")
    return cursor.rowcount
