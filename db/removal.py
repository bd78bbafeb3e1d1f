"""Removing a job at its owner's wish: the row, its answer, and the cache entry made of that answer."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from db import budgets, flights
from db.session import Cursor, transaction
from db.states import TERMINAL, JobStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletion:
    """Which jobs are to go, of those that have ended: a tenant's (None: all), in a state, of a model, of an endpoint,
    that ended before a Unix second; the oldest `limit`."""

    tenant: str | None
    status: str | None = None
    model: str | None = None
    endpoint: str | None = None
    before: int | None = None
    limit: int = 1000


def find(cursor: Cursor, wanted: Sequence[Deletion]) -> list[list[tuple[uuid.UUID, str]]]:
    """(id, tenant) of the jobs that match, for `delete`."""
    return [_find(cursor, one) for one in wanted]


def _find(cursor: Cursor, wanted: Deletion) -> list[tuple[uuid.UUID, str]]:
    columns = [name for name in ("tenant", "status", "model", "endpoint") if getattr(wanted, name) is not None]
    conditions = ["finished_at IS NOT NULL", *(f"{name} = %({name})s" for name in columns)]
    if wanted.before is not None:
        conditions.append("finished_at < to_timestamp(%(before)s)")
    cursor.execute(
        f"SELECT id, tenant FROM jobs WHERE {' AND '.join(conditions)} "  # noqa: S608 - names from this file alone
        "ORDER BY finished_at LIMIT %(limit)s",
        {name: getattr(wanted, name) for name in Deletion.__slots__},
    )
    return [(row[0], row[1]) for row in cursor.fetchall()]


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
