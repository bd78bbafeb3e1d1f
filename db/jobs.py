"""The ledger: the statements by which workers and callers move a job from one state to the next.

Each is set-based, guarded by the state it leaves, and safe to repeat. Time is Postgres's own, so no
process's clock matters. A worker owns a job while the row names its life, and the run that it claimed is still
the last; whoever is not the owner updates nothing (the fence). Rows are locked in id order, so batches cannot
deadlock.
"""

import enum
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import orjson
from psycopg2.extras import execute_values

from db.session import Cursor
from db.states import JobStatus


@dataclass(frozen=True, slots=True)
class Claimed:
    """A job that this worker now owns, and the run that proves it."""

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
    """How many attempts came before, counted or given back, and how many retries. No two claims of a job have the
    same, unlike `attempt`, which a release and a retry take back."""
    flight_id: uuid.UUID
    """Under whose name the run's events are kept: this job's, or that of the leader it took over from."""

    token: int
    """Grows with every claim of the run: readers ignore what earlier attempts still write (the fence of its events)."""

    eta_p50_ms: float | None = None
    """From acceptance to the answer, as the router expected it then. None: it had measured too little."""
    eta_p90_ms: float | None = None

    @property
    def was_begun(self) -> bool:
        return self.run > 0


_OWNS = "j.status = 'running' AND j.worker_id = i.worker_id AND jsonb_array_length(j.attempts) = i.run"
"""The fence. Whatever takes a job from running to queued, and every retry, adds to `attempts`; nothing else does
while it runs."""


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
    None if it is not to be had (a repeated message, a cancelled job, one of another backend, or this worker was
    declared dead)."""
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
    """A claim that a crash of Postgres takes back is made again with the same run. A stream's run may have published
    events by then, which the next would number anew: a batch with a stream in it waits for the disk, whatever the
    session does."""
    cursor.execute(
        f"""
        UPDATE jobs SET status = 'running', attempt = attempt + 1, worker_id = %(worker)s,
            started_at = clock_timestamp(), first_token_at = NULL
        WHERE id IN (SELECT id FROM jobs WHERE id = ANY(%(ids)s) AND status = 'queued' AND leader_id IS NULL
                     AND (deadline_at IS NULL OR deadline_at > clock_timestamp()) AND {condition}
                     AND backend = (SELECT w.backend FROM workers w WHERE w.id = %(worker)s AND w.state <> 'dead')
                     ORDER BY id FOR UPDATE)
        RETURNING id, attempt, payload, is_stream, backend, task, extract(epoch FROM created_at)::int,
                  extract(epoch FROM started_at - created_at)::float8 * 1000, jsonb_array_length(attempts),
                  coalesce(flight_id, id), (extract(epoch FROM started_at) * 1000)::bigint,
                  (decision #>> '{{chosen,facts,eta_p50_ms}}')::float8,
                  (decision #>> '{{chosen,facts,eta_p90_ms}}')::float8,
                  CASE WHEN is_stream THEN set_config('synchronous_commit', 'on', true) END
        """,  # noqa: S608 - conditions from this file alone
        {"worker": wanted[0][1], "ids": [job_id for job_id, _ in wanted]},
    )
    return {row[0]: Claimed(row[0], row[1], bytes(row[2]), *row[3:-1]) for row in cursor.fetchall()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A successful attempt's outcome: the response body and what it cost."""

    id: uuid.UUID
    run: int
    worker_id: int
    body: bytes
    sha256: bytes
    usage: str
    ttft_ms: float | None
    timings: str
    events: bytes | None = None
    """Of a streamed job, see `tasks.replay`."""


def finish(cursor: Cursor, outcomes: Sequence[Finished]) -> list[int | None]:
    """Store results: state, body and cache entry in one statement, fenced by worker and run.

    The number of followers that wait for the result, where this attempt's is the stored one (now, or by
    an earlier try whose answer was lost); None where another attempt owns the job or it was cancelled:
    the output must be thrown away.
    """
    rows = execute_values(
        cursor,
        f"""
        WITH input (id, run, worker_id, body, sha256, usage, ttft_ms, timings, events) AS (VALUES %s),
        owned AS (SELECT i.* FROM input i JOIN jobs j USING (id)
            WHERE {_OWNS}
            ORDER BY id FOR UPDATE OF j),
        done AS (UPDATE jobs j SET status = 'succeeded', finished_at = clock_timestamp(), usage = o.usage,
                first_token_at = j.started_at + o.ttft_ms * interval '1 ms', timings = j.timings || o.timings
            FROM owned o WHERE j.id = o.id
            RETURNING j.id, j.tenant, j.model, j.backend, j.cache_key, j.cache_ttl_s, j.is_cache_refresh,
                      j.num_followers, o.run, o.body, o.sha256, o.usage, o.events),
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
        SELECT id, run, num_followers FROM done
        """,  # noqa: S608 - a condition from this file alone
        [
            (o.id, o.run, o.worker_id, o.body, o.sha256, o.usage, o.ttft_ms, o.timings,
             o.events)
            for o in outcomes
        ],
        template="(%s::uuid, %s::int, %s::bigint, %s::bytea, %s::bytea, %s::jsonb, %s::float8, %s::jsonb, %s::bytea)",
        page_size=1000,
        fetch=True,
    )  # fmt: skip
    mine = {(job_id, run): num_followers for job_id, run, num_followers in rows}
    return [
        mine[one.id, one.run] if (one.id, one.run) in mine else _stored_before(cursor, one) for one in outcomes
    ]  # fmt: skip


def _stored_before(cursor: Cursor, outcome: Finished) -> int | None:
    """A look of its own: the statement's would not see what an overlapping first try committed meanwhile."""
    cursor.execute(
        """
        SELECT num_followers FROM jobs
        WHERE id = %s AND status = 'succeeded' AND worker_id = %s AND jsonb_array_length(attempts) = %s
        """,
        (outcome.id, outcome.worker_id, outcome.run),
    )
    row = cursor.fetchone()
    return None if row is None else row[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """An attempt that did not succeed."""

    id: uuid.UUID
    run: int
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
        f"""
        WITH input (id, run, worker_id, error, is_retryable, is_counted, max_attempts) AS (VALUES %s),
        owned AS (SELECT i.*, i.is_retryable AND (NOT i.is_counted OR j.attempt < i.max_attempts) AS is_requeued
            FROM input i JOIN jobs j USING (id)
            WHERE {_OWNS}
            ORDER BY id FOR UPDATE OF j)
        UPDATE jobs j SET
            status = CASE WHEN is_requeued THEN 'queued' ELSE 'failed' END,
            attempt = CASE WHEN o.is_counted THEN j.attempt ELSE j.attempt - 1 END,
            worker_id = NULL,
            enqueued_at = CASE WHEN is_requeued THEN clock_timestamp() ELSE enqueued_at END,
            finished_at = CASE WHEN is_requeued THEN NULL ELSE clock_timestamp() END,
            error = CASE WHEN is_requeued THEN NULL
                         WHEN o.is_retryable THEN o.error || '{{"code": "attempts_exhausted"}}' ELSE o.error END,
            attempts = attempts || jsonb_build_object('attempt', j.attempt, 'worker_id', j.worker_id,
                'started_at', extract(epoch FROM started_at), 'ended_at', extract(epoch FROM clock_timestamp()),
                'outcome', o.error ->> 'code')
        FROM owned o WHERE j.id = o.id RETURNING j.id, o.run, j.status
        """,  # noqa: S608 - a condition from this file alone
        [
            (e.id, e.run, e.worker_id, orjson.dumps({"code": e.code, "message": e.message, "param": e.param})
             .decode(), e.is_retryable, e.is_counted, e.max_attempts)
            for e in endings
        ],
        template="(%s::uuid, %s::int, %s::bigint, %s::jsonb, %s::bool, %s::bool, %s::int)",
        page_size=1000,
        fetch=True,
    )  # fmt: skip
    states = {(job_id, run): JobStatus(status) for job_id, run, status in rows}
    return [states.get((one.id, one.run)) for one in endings]


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
class Owned:
    """A job that the ledger says a worker is running."""

    id: uuid.UUID
    run: int
    backend: str
    task: str


def owned(cursor: Cursor, worker_ids: Sequence[int]) -> list[list[Owned]]:
    """What each worker runs, as the ledger sees it."""
    cursor.execute(
        """
        SELECT worker_id, id, jsonb_array_length(attempts), backend, task FROM jobs
        WHERE status = 'running' AND worker_id = ANY(%s)
        """,
        (list(worker_ids),),
    )
    rows = cursor.fetchall()
    return [[Owned(*row[1:]) for row in rows if row[0] == worker_id] for worker_id in worker_ids]


def retry(cursor: Cursor, wanted: Sequence[tuple[uuid.UUID, str | None]]) -> list[tuple[str, str] | None]:
    """Queue failed and expired jobs again, under the same id and with all their attempts before them; answers
    (backend, task) of each. None for a job in any other state, and for one that the tenant does not have.
    Tenant None has every tenant's. A deadline starts anew, and so do the events, in a place of their own: those there
    were may have ended, or go on under another job that has taken the flight over."""
    cursor.execute(
        """
        UPDATE jobs j SET status = 'queued', attempt = 0, error = NULL, usage = NULL, finished_at = NULL,
            started_at = NULL, first_token_at = NULL, worker_id = NULL, enqueued_at = clock_timestamp(),
            leader_id = NULL, coalesce_key = NULL,
            flight_id = md5(id::text || jsonb_array_length(attempts))::uuid,
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
