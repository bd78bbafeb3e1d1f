"""Flights: what becomes of the followers once their leader's run is over.

A leader succeeds or fails for all. One that was cancelled or ran out of its own time hands over: its
oldest follower goes on with the run, events and all.
"""

import uuid
from collections.abc import Sequence

from db.session import Cursor


def land(cursor: Cursor, leader_ids: Sequence[uuid.UUID] | None = None) -> list[tuple[uuid.UUID, str]]:
    """End the followers whose leader (of these, or any) succeeded or failed, as it did; answers their ids
    and states. The result is not copied: `job_results` has it under the leader's id."""
    cursor.execute(
        """
        WITH landed AS (SELECT f.id FROM jobs f JOIN jobs l ON l.id = f.leader_id
            WHERE f.status = 'queued' AND f.leader_id IS NOT NULL AND l.status IN ('succeeded', 'failed')
              AND (%(ids)s::uuid[] IS NULL OR f.leader_id = ANY(%(ids)s::uuid[])) ORDER BY f.id FOR UPDATE OF f)
        UPDATE jobs f SET status = l.status, finished_at = clock_timestamp(), usage = l.usage, error = l.error,
            attempt = l.attempt, worker_id = l.worker_id, timings = f.timings || l.timings,
            started_at = greatest(l.started_at, f.created_at),
            first_token_at = greatest(l.first_token_at, f.created_at)
        FROM landed, jobs l WHERE f.id = landed.id AND l.id = f.leader_id RETURNING f.id, f.status
        """,
        {"ids": None if leader_ids is None else list(leader_ids)},
    )
    return [(row[0], row[1]) for row in cursor.fetchall()]


def hand_over(cursor: Cursor) -> list[tuple[uuid.UUID, str, str]]:
    """Let the oldest follower of each cancelled or expired leader lead the others; answers their
    (id, backend, task), to be sent."""
    cursor.execute(
        """
        SELECT DISTINCT f.leader_id FROM jobs f JOIN jobs l ON l.id = f.leader_id
        WHERE f.status = 'queued' AND f.leader_id IS NOT NULL AND l.status IN ('cancelled', 'expired')
        """
    )
    promoted = []
    for (gone,) in cursor.fetchall():
        # With its leader's attempts and the marker its run is above every run of the flight before it: the next
        # worker knows that events may exist, and where they are lost begins above all numbers seen. So the leader's
        # deaths count against it too, which runs the same request.
        cursor.execute(
            """
            WITH oldest AS (SELECT id FROM jobs WHERE leader_id = %(gone)s AND status = 'queued'
                            ORDER BY created_at, id LIMIT 1 FOR UPDATE),
            led AS (UPDATE jobs j SET leader_id = NULL, enqueued_at = clock_timestamp(),
                    num_followers = (SELECT count(*) - 1 FROM jobs WHERE leader_id = %(gone)s AND status = 'queued'),
                    attempts = attempts || (SELECT attempts FROM jobs WHERE id = %(gone)s)
                        || jsonb_build_object('attempt', 0, 'outcome', 'took_over',
                            'ended_at', extract(epoch FROM clock_timestamp()))
                FROM oldest o WHERE j.id = o.id RETURNING j.id, backend, task),
            others AS (UPDATE jobs j SET leader_id = led.id FROM led
                WHERE j.leader_id = %(gone)s AND j.status = 'queued' AND j.id <> led.id)
            SELECT id, backend, task FROM led
            """,
            {"gone": gone},
        )
        promoted += [tuple(row) for row in cursor.fetchall()]
    return promoted
