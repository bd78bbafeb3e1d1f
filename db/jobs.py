"""The ledger: every statement that moves a job from one state to the next.

Each is set-based, guarded by the state it leaves, and safe to repeat. Time is Postgres's own, so no
process's clock matters. A worker owns a job while the row names the worker and the attempt; whoever is
not named updates nothing (the fence). Rows are locked in id order, so batches cannot deadlock.
"""

import datetime
import enum
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from psycopg2.extras import execute_values

from db.models import JobStatus
from db.session import Cursor


@dataclass(frozen=True, slots=True)
class Claimed:
    """A job that this worker now owns, and the attempt that proves it."""

    id: uuid.UUID
    attempt: int
    payload: bytes
    is_stream: bool
    backend: str
    task: str
    created: int
    """Unix seconds."""
    queue_ms: float
    run: int
    """How many attempts came before, counted or given back."""
    flight_id: uuid.UUID
    """Under whose name the run's events are kept: this job's, or that of the leader it took over from."""

    token: int
    """Grows with every claim of the run: readers ignore what earlier attempts still write (the fence of its events)."""

    @property
    def was_begun(self) -> bool:
        return self.run > 0


class Suspect(enum.Enum):
    """A job that was running when its worker died, twice already. Whether it was the cause shows when it runs
    with no other job beside it, which must not share its end."""

    SUSPECT = enum.auto()


_IS_SUSPECT = """
    attempts <> '[]' AND 2 <= (SELECT count(*) FROM jsonb_array_elements(attempts) a
        WHERE a ->> 'outcome' IN ('worker_died', 'backend_dead', 'backend_stalled'))
"""


def claim(cursor: Cursor, wanted: Sequence[tuple[uuid.UUID, int]]) -> list[Claimed | Suspect | None]:
    """Take queued jobs for a worker: (job id, worker id) → the job; Suspect where only `claim_alone` gets it;
    None if it is not to be had (a repeated message, a cancelled job, or this worker was declared dead)."""
    claimed = _claim(cursor, wanted, f"NOT ({_IS_SUSPECT})")
    missing = [job_id for job_id, _ in wanted if job_id not in claimed]
    suspects: set[uuid.UUID] = set()
    if missing:
        cursor.execute(
            f"SELECT id FROM jobs WHERE id = ANY(%s) AND status = 'queued' AND {_IS_SUSPECT}",  # noqa: S608
            (missing,),
        )
        suspects = {row[0] for row in cursor.fetchall()}
    # A message delivered twice inside one batch is claimed once.
    return [Suspect.SUSPECT if job_id in suspects else claimed.pop(job_id, None) for job_id, _ in wanted]


def claim_alone(cursor: Cursor, wanted: Sequence[tuple[uuid.UUID, int]]) -> list[Claimed | None]:
    """As `claim`, for a worker that runs nothing else until this job has ended."""
    claimed = _claim(cursor, wanted, "true")
    return [claimed.pop(job_id, None) for job_id, _ in wanted]


def _claim(cursor: Cursor, wanted: Sequence[tuple[uuid.UUID, int]], condition: str) -> dict[uuid.UUID, Claimed]:
    cursor.execute(
        f"""
        UPDATE jobs SET status = 'running', attempt = attempt + 1, worker_id = %(worker)s,
            started_at = clock_timestamp(), first_token_at = NULL
        WHERE id IN (SELECT id FROM jobs WHERE id = ANY(%(ids)s) AND status = 'queued' AND leader_id IS NULL
                     AND (deadline_at IS NULL OR deadline_at > clock_timestamp()) AND {condition}
                     ORDER BY id FOR UPDATE)
          AND EXISTS (SELECT FROM workers w WHERE w.id = %(worker)s AND w.state <> 'dead')
        RETURNING id, attempt, payload, is_stream, backend, task, extract(epoch FROM created_at)::int,
                  extract(epoch FROM started_at - created_at)::float8 * 1000, jsonb_array_length(attempts),
                  coalesce(flight_id, id), (extract(epoch FROM started_at) * 1000)::bigint
        """,  # noqa: S608 - conditions from this file alone
        {"worker": wanted[0][1], "ids": [job_id for job_id, _ in wanted]},
    )
    return {row[0]: Claimed(row[0], row[1], bytes(row[2]), *row[3:]) for row in cursor.fetchall()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A successful attempt's outcome: the response body and what it cost."""

    id: uuid.UUID
    attempt: int
    worker_id: int
    body: bytes
    sha256: bytes
    usage: str
    ttft_ms: float | None
    timings: str
    events: bytes | None = None
    """Of a streamed job, see `tasks.replay`."""


def finish(cursor: Cursor, outcomes: Sequence[Finished]) -> list[int | None]:
    """Store results: state, body and cache entry in one statement, fenced by worker and attempt.

    The number of followers that wait for the result, where this attempt's is the stored one (now, or by
    an earlier try whose answer was lost); None where another attempt owns the job or it was cancelled:
    the output must be thrown away.
    """
    rows = execute_values(
        cursor,
        """
        WITH input (id, attempt, worker_id, body, sha256, usage, ttft_ms, timings, events) AS (VALUES %s),
        owned AS (SELECT i.* FROM input i JOIN jobs j USING (id)
            WHERE j.status = 'running' AND j.attempt = i.attempt AND j.worker_id = i.worker_id
            ORDER BY id FOR UPDATE OF j),
        done AS (UPDATE jobs j SET status = 'succeeded', finished_at = clock_timestamp(), usage = o.usage,
                first_token_at = j.started_at + o.ttft_ms * interval '1 ms', timings = j.timings || o.timings
            FROM owned o WHERE j.id = o.id
            RETURNING j.id, j.tenant, j.model, j.backend, j.cache_key, j.cache_ttl_s, j.is_cache_refresh,
                      j.num_followers, o.body, o.sha256, o.usage, o.events),
        stored AS (INSERT INTO job_results (job_id, body, sha256, events) SELECT id, body, sha256, events FROM done),
        cached AS (INSERT INTO response_cache
                (key, tenant, model, backend, job_id, body, sha256, num_bytes, usage, expires_at)
            SELECT DISTINCT ON (cache_key) cache_key, tenant, model, backend, id, body, sha256, length(body), usage,
                   clock_timestamp() + cache_ttl_s * interval '1 s'
            FROM done WHERE cache_ttl_s IS NOT NULL ORDER BY cache_key, id
            ON CONFLICT (key) DO UPDATE SET job_id = excluded.job_id, body = excluded.body, sha256 = excluded.sha256,
                num_bytes = excluded.num_bytes, usage = excluded.usage, backend = excluded.backend, num_hits = 0,
                created_at = clock_timestamp(), last_hit_at = clock_timestamp(), expires_at = excluded.expires_at
            WHERE response_cache.expires_at <= clock_timestamp()
               OR (SELECT is_cache_refresh FROM done d WHERE d.id = excluded.job_id))
        SELECT id, num_followers FROM done
        """,
        [
            (o.id, o.attempt, o.worker_id, o.body, o.sha256, o.usage, o.ttft_ms, o.timings,
             o.events)
            for o in outcomes
        ],
        template="(%s::uuid, %s::int, %s::bigint, %s::bytea, %s::bytea, %s::jsonb, %s::float8, %s::jsonb, %s::bytea)",
        page_size=1000,
        fetch=True,
    )  # fmt: skip
    mine = dict(rows)
    return [mine[outcome.id] if outcome.id in mine else _stored_before(cursor, outcome) for outcome in outcomes]


def _stored_before(cursor: Cursor, outcome: Finished) -> int | None:
    """A look of its own: the statement's would not see what an overlapping first try committed meanwhile."""
    cursor.execute(
        "SELECT num_followers FROM jobs WHERE id = %s AND status = 'succeeded' AND attempt = %s AND worker_id = %s",
        (outcome.id, outcome.attempt, outcome.worker_id),
    )
    row = cursor.fetchone()
    return None if row is None else row[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """An attempt that did not succeed."""

    id: uuid.UUID
    attempt: int
    worker_id: int
    code: str
    message: str
    param: str | None = None
    is_retryable: bool = False
    is_counted: bool = True
    """False gives the attempt back: the job was released by a draining worker, not failed."""
    max_attempts: int = 3


def end(cursor: Cursor, endings: Sequence[Ended]) -> list[JobStatus | None]:
    """End attempts without a result: failed for good, or queued again while attempts are left.

    Answers the new state, None where the fence shut this worker out.
    """
    rows = execute_values(
        cursor,
        """
        WITH input (id, attempt, worker_id, error, is_retryable, is_counted, max_attempts) AS (VALUES %s),
        owned AS (SELECT i.*, i.is_retryable AND (NOT i.is_counted OR i.attempt < i.max_attempts) AS is_requeued
            FROM input i JOIN jobs j USING (id)
            WHERE j.status = 'running' AND j.attempt = i.attempt AND j.worker_id = i.worker_id
            ORDER BY id FOR UPDATE OF j)
        UPDATE jobs j SET
            status = CASE WHEN is_requeued THEN 'queued' ELSE 'failed' END,
            attempt = CASE WHEN o.is_counted THEN j.attempt ELSE j.attempt - 1 END,
            worker_id = NULL,
            enqueued_at = CASE WHEN is_requeued THEN clock_timestamp() ELSE enqueued_at END,
            finished_at = CASE WHEN is_requeued THEN NULL ELSE clock_timestamp() END,
            error = CASE WHEN is_requeued THEN NULL
                         WHEN o.is_retryable THEN o.error || '{"code": "attempts_exhausted"}' ELSE o.error END,
            attempts = attempts || jsonb_build_object('attempt', o.attempt, 'worker_id', o.worker_id,
                'started_at', extract(epoch FROM started_at), 'ended_at', extract(epoch FROM clock_timestamp()),
                'outcome', o.error ->> 'code')
        FROM owned o WHERE j.id = o.id RETURNING j.id, j.status
        """,
        [
            (e.id, e.attempt, e.worker_id, orjson.dumps({"code": e.code, "message": e.message, "param": e.param})
             .decode(), e.is_retryable, e.is_counted, e.max_attempts)
            for e in endings
        ],
        template="(%s::uuid, %s::int, %s::bigint, %s::jsonb, %s::bool, %s::bool, %s::int)",
        page_size=1000,
        fetch=True,
    )  # fmt: skip
    states = dict(rows)
    return [JobStatus(states[e.id]) if e.id in states else None for e in endings]


def cancel(cursor: Cursor, wanted: Sequence[tuple[uuid.UUID, str]]) -> list[JobStatus | None]:
    """Cancel (job id, tenant): final at once, queued or running; a running worker's result is fenced out.

    Answers the state afterwards, so a job that had already ended shows how; None for an unknown job.
    """
    ids = [job_id for job_id, _ in wanted]
    cursor.execute(
        """
        WITH target AS (SELECT id, tenant, status FROM jobs WHERE (id, tenant) IN
                (SELECT * FROM unnest(%(ids)s, %(tenants)s::text[])) ORDER BY id FOR UPDATE),
        gone AS (UPDATE jobs j SET status = 'cancelled', finished_at = clock_timestamp()
            FROM target t WHERE j.id = t.id AND t.status IN ('queued', 'running') RETURNING j.id)
        SELECT t.id, t.tenant, CASE WHEN g.id IS NULL THEN t.status ELSE 'cancelled' END
        FROM target t LEFT JOIN gone g USING (id)
        """,
        {"ids": ids, "tenants": [tenant for _, tenant in wanted]},
    )
    states = {(row[0], row[1]): JobStatus(row[2]) for row in cursor.fetchall()}
    return [states.get(pair) for pair in wanted]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job stands, for a waiter: its state and, once it has one, its answer."""

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


def outcome(cursor: Cursor, ids: Sequence[uuid.UUID]) -> list[Outcome | None]:
    """The outcome of each job, None for an unknown id."""
    cursor.execute(
        """
        SELECT j.id, status, body, events, error, usage, model, backend, attempt,
               extract(epoch FROM started_at - created_at)::float8 * 1000,
               extract(epoch FROM finished_at - started_at)::float8 * 1000,
               extract(epoch FROM first_token_at - started_at)::float8 * 1000
        FROM jobs j LEFT JOIN job_results r ON r.job_id = coalesce(leader_id, j.id) AND status = 'succeeded'
        WHERE j.id = ANY(%s)
        """,
        (list(ids),),
    )
    found = {row[0]: Outcome(JobStatus(row[1]), _bytes(row[2]), _bytes(row[3]), *row[4:]) for row in cursor.fetchall()}
    return [found.get(job_id) for job_id in ids]


def _bytes(value: memoryview | None) -> bytes | None:
    return None if value is None else bytes(value)


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
    timings, created_at, enqueued_at, started_at, first_token_at, finished_at, deadline_at,
    (SELECT name FROM workers w WHERE w.id = jobs.worker_id) AS worker, leader_id, coalesce(flight_id, id)
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
    created_at: datetime.datetime
    enqueued_at: datetime.datetime
    started_at: datetime.datetime | None
    first_token_at: datetime.datetime | None
    finished_at: datetime.datetime | None
    deadline_at: datetime.datetime | None
    worker: str | None
    leader_id: uuid.UUID | None
    flight_id: uuid.UUID


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
    after: uuid.UUID | None = None
    limit: int = 20


def find(cursor: Cursor, filters: Sequence[Filter]) -> list[list[View]]:
    """Pages of jobs, newest first; one row more than `limit` tells the caller that there is another page."""
    return [_page(cursor, wanted) for wanted in filters]


def _page(cursor: Cursor, wanted: Filter) -> list[View]:
    columns = [name for name in ("tenant", "status", "model", "endpoint") if getattr(wanted, name) is not None]
    conditions = ["true", *(f"{name} = %({name})s" for name in columns)]
    if wanted.after is not None:
        conditions.append("(created_at, id) < (SELECT created_at, id FROM jobs WHERE id = %(after)s)")
    cursor.execute(
        f"SELECT {_VIEW} FROM jobs WHERE {' AND '.join(conditions)} "  # noqa: S608 - names from this file alone
        "ORDER BY created_at DESC, id DESC LIMIT %(limit)s + 1",
        {name: getattr(wanted, name) for name in Filter.__slots__},
    )
    return [View(*row) for row in cursor.fetchall()]


@dataclass(frozen=True, slots=True)
class Owned:
    """A job that the ledger says a worker is running."""

    id: uuid.UUID
    attempt: int
    backend: str
    task: str


def owned(cursor: Cursor, worker_ids: Sequence[int]) -> list[list[Owned]]:
    """What each worker runs, as the ledger sees it."""
    cursor.execute(
        "SELECT worker_id, id, attempt, backend, task FROM jobs WHERE status = 'running' AND worker_id = ANY(%s)",
        (list(worker_ids),),
    )
    rows = cursor.fetchall()
    return [[Owned(*row[1:]) for row in rows if row[0] == worker_id] for worker_id in worker_ids]


# What the reconciler does. Every action is conditional on the state it was decided for.


def rescue(cursor: Cursor, worker_ids: list[int], max_attempts: int) -> list[tuple[uuid.UUID, str, str, str]]:
    """Take the jobs of dead workers back: queued again, or failed once attempts are exhausted.
    Answers (id, backend, task, new status)."""
    cursor.execute(
        """
        WITH stalled AS (SELECT id FROM jobs WHERE status = 'running' AND worker_id = ANY(%(workers)s)
                         ORDER BY id FOR UPDATE)
        UPDATE jobs j SET
            status = CASE WHEN attempt < %(max)s THEN 'queued' ELSE 'failed' END,
            enqueued_at = clock_timestamp(),
            finished_at = CASE WHEN attempt < %(max)s THEN NULL ELSE clock_timestamp() END,
            error = CASE WHEN attempt < %(max)s THEN NULL ELSE
                jsonb_build_object('code', 'attempts_exhausted', 'message',
                    'every worker that ran this job died before it finished') END,
            attempts = attempts || jsonb_build_object('attempt', attempt, 'worker_id', worker_id,
                'started_at', extract(epoch FROM started_at), 'ended_at', extract(epoch FROM clock_timestamp()),
                'outcome', 'worker_died'),
            worker_id = NULL
        FROM stalled s WHERE j.id = s.id RETURNING j.id, backend, task, status
        """,
        {"workers": worker_ids, "max": max_attempts},
    )
    return [tuple(row) for row in cursor.fetchall()]


def find_unsent(
    cursor: Cursor, backend: str, older_than_s: float, limit: int = 1000
) -> list[tuple[uuid.UUID, str, str]]:
    """Queued jobs of a backend whose message was sent longer ago than that; marks them as sent now.
    Answers (id, backend, task), oldest first."""
    cursor.execute(
        """
        WITH unsent AS (SELECT id FROM jobs WHERE backend = %s AND status = 'queued' AND leader_id IS NULL
            AND enqueued_at < clock_timestamp() - %s * interval '1 s'
            ORDER BY created_at LIMIT %s FOR UPDATE SKIP LOCKED)
        UPDATE jobs j SET enqueued_at = clock_timestamp() FROM unsent u WHERE j.id = u.id
        RETURNING j.id, j.backend, j.task
        """,
        (backend, older_than_s, limit),
    )
    return [tuple(row) for row in cursor.fetchall()]


def stranded(cursor: Cursor, backends: Sequence[str], limit: int = 200) -> list[tuple[uuid.UUID, str, bytes]]:
    """Queued jobs of these backends, the oldest first: (id, backend, payload)."""
    cursor.execute(
        """
        SELECT id, backend, payload FROM jobs WHERE status = 'queued' AND leader_id IS NULL AND backend = ANY(%s)
        ORDER BY created_at LIMIT %s
        """,
        (list(backends), limit),
    )
    return [(row[0], row[1], bytes(row[2])) for row in cursor.fetchall()]


def reroute(cursor: Cursor, job_id: uuid.UUID, start: str, end: str, decision: str) -> str | None:
    """Move a queued job from one backend's queue to another's, with the decision that says why; answers its
    task, None if it is no longer there. Its followers go with it."""
    cursor.execute(
        """
        WITH moved AS (UPDATE jobs SET backend = %(end)s, enqueued_at = clock_timestamp(),
                decision = %(decision)s::jsonb || jsonb_build_object('before', decision)
            WHERE id = %(id)s AND backend = %(start)s AND status = 'queued' RETURNING id, task),
        others AS (UPDATE jobs j SET backend = %(end)s FROM moved m WHERE j.leader_id = m.id AND j.status = 'queued')
        SELECT task FROM moved
        """,
        {"id": job_id, "start": start, "end": end, "decision": decision},
    )
    row = cursor.fetchone()
    return None if row is None else row[0]


def expire(cursor: Cursor) -> list[uuid.UUID]:
    """End the jobs whose deadline has passed, queued or running."""
    cursor.execute(
        """
        WITH late AS (SELECT id FROM jobs WHERE status IN ('queued', 'running') AND deadline_at <= clock_timestamp()
                      ORDER BY id FOR UPDATE SKIP LOCKED)
        UPDATE jobs j SET status = 'expired', finished_at = clock_timestamp(),
            error = '{"code": "job_expired", "message": "the job''s deadline passed before it finished"}'
        FROM late l WHERE j.id = l.id RETURNING j.id
        """
    )
    return [row[0] for row in cursor.fetchall()]


def purge(cursor: Cursor, older_than_s: float, limit: int = 1000) -> int:
    """Delete finished jobs older than that, results included; answers how many."""
    cursor.execute(
        """
        DELETE FROM jobs WHERE id IN (SELECT id FROM jobs
            WHERE finished_at < clock_timestamp() - %s * interval '1 s' ORDER BY finished_at LIMIT %s)
        """,
        (older_than_s, limit),
    )
    return cursor.rowcount


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


def retry(cursor: Cursor, wanted: Sequence[tuple[uuid.UUID, str | None]]) -> list[tuple[str, str] | None]:
    """Queue failed and expired jobs again, under the same id and with all their attempts before them; answers
    (backend, task) of each. None for a job in any other state, and for one that the tenant does not have.
    Tenant None has every tenant's. A deadline starts anew."""
    cursor.execute(
        """
        UPDATE jobs j SET status = 'queued', attempt = 0, error = NULL, usage = NULL, finished_at = NULL,
            started_at = NULL, first_token_at = NULL, worker_id = NULL, enqueued_at = clock_timestamp(),
            leader_id = NULL, flight_id = NULL, coalesce_key = NULL,
            deadline_at = clock_timestamp() + (deadline_at - created_at),
            attempts = attempts || jsonb_build_object('attempt', 0, 'outcome', 'retried',
                'ended_at', extract(epoch FROM clock_timestamp()))
        WHERE id IN (SELECT j.id FROM jobs j
            JOIN unnest(%s::uuid[], %s::text[]) w (id, tenant)
                ON j.id = w.id AND j.tenant = coalesce(w.tenant, j.tenant)
            WHERE status IN ('failed', 'expired') ORDER BY j.id FOR UPDATE OF j)
        RETURNING id, backend, task
        """,
        ([job_id for job_id, _ in wanted], [tenant for _, tenant in wanted]),
    )
    found = {row[0]: (row[1], row[2]) for row in cursor.fetchall()}
    return [found.get(job_id) for job_id, _ in wanted]


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
