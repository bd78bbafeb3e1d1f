"""What the reconciler does to jobs. Every action is conditional on the state that it was decided for, so two
reconcilers, and one that acts late, do no harm."""

import uuid
from collections.abc import Sequence

from db.session import Cursor


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
    """Delete finished jobs older than that, or than they were to get themselves, results included; answers how many."""
    cursor.execute(
        """
        DELETE FROM jobs WHERE id IN (SELECT id FROM jobs
            WHERE finished_at < clock_timestamp() - %s * interval '1 s' AND (reserved_tokens IS NULL OR is_settled)
            ORDER BY finished_at LIMIT %s)
        """,
        (older_than_s, limit),
    )
    removed = cursor.rowcount
    cursor.execute(
        """
        DELETE FROM jobs WHERE id IN (SELECT id FROM jobs
            WHERE result_ttl_s IS NOT NULL AND finished_at < clock_timestamp() - result_ttl_s * interval '1 s'
              AND (reserved_tokens IS NULL OR is_settled) LIMIT %s)
        """,
        (limit,),
    )
    return removed + cursor.rowcount
