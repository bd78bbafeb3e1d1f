"""Removing a job at its owner's wish: the row, its answer, and the cache entry made of that answer."""

import uuid
from collections.abc import Sequence

from db import budgets, flights
from db.models import TERMINAL, JobStatus
from db.session import Cursor, transaction


def delete(cursor: Cursor, wanted: Sequence[tuple[uuid.UUID, str]]) -> list[JobStatus | None]:
    """Delete the ended jobs with these (id, tenant). Answers the state each was in: one that had not ended is
    still there; None for an unknown job. May be repeated."""
    return [_delete(cursor, job_id, tenant) for job_id, tenant in wanted]


def _delete(cursor: Cursor, job_id: uuid.UUID, tenant: str) -> JobStatus | None:
    with transaction(cursor):
        # What a row that is gone used could no longer be settled; and who inherits a run has not used it.
        budgets.settle_tenant(cursor, tenant)
        cursor.execute(
            """
            SELECT status, num_followers, reserved_tokens IS NULL OR is_settled FROM jobs
            WHERE id = %s AND tenant = %s FOR UPDATE
            """,
            (job_id, tenant),
        )
        row = cursor.fetchone()
        if row is None:
            return None
        status, num_followers, is_settled = row
        if status in TERMINAL and is_settled:
            if num_followers:
                _hand_on(cursor, job_id, tenant)
            cursor.execute(
                """
                WITH gone AS (DELETE FROM jobs WHERE id = %s RETURNING id, cache_key)
                DELETE FROM response_cache c USING gone g WHERE c.key = g.cache_key AND c.job_id = g.id
                """,
                (job_id,),
            )
            return JobStatus(status)
    # It has ended since its tenant's jobs were settled.
    return _delete(cursor, job_id, tenant) if status in TERMINAL else JobStatus(status)


def _hand_on(cursor: Cursor, leader_id: uuid.UUID, tenant: str) -> None:
    """The answer of a shared run lies under its leader's id: it becomes the oldest follower's. Followers that
    still wait end with their leader, or go on without it; the reconciler sends the heir's message."""
    flights.land(cursor, [leader_id])
    flights.hand_over(cursor)
    budgets.settle_tenant(cursor, tenant)
    cursor.execute(
        """
        WITH heir AS (SELECT id FROM jobs WHERE leader_id = %(gone)s AND status = 'succeeded'
                      ORDER BY created_at, id LIMIT 1 FOR UPDATE),
        led AS (UPDATE jobs j SET leader_id = NULL, num_followers =
                    (SELECT count(*) - 1 FROM jobs WHERE leader_id = %(gone)s AND status = 'succeeded')
                FROM heir WHERE j.id = heir.id),
        others AS (UPDATE jobs j SET leader_id = heir.id FROM heir
                WHERE j.leader_id = %(gone)s AND j.status = 'succeeded' AND j.id <> heir.id)
        UPDATE job_results r SET job_id = heir.id FROM heir WHERE r.job_id = %(gone)s
        """,
        {"gone": leader_id},
    )
