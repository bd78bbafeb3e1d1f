"""Worker lives: registration, heartbeat, and how the reconciler knows that one has ended.

A worker proves its life in two ways. Its session holds an advisory lock, which Postgres frees within
milliseconds of the process's death; and its row has a lease that heartbeats extend, which also runs
out when the process hangs or loses the network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from db.session import Cursor

_LOCK_CLASS = 0x5357
"""First half of the advisory lock key of every worker; the second is its id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """What a worker says of itself every `heartbeat_s`."""

    worker_id: int
    state: str
    lease_s: float
    stats: dict[str, Any]


def register(cursor: Cursor, name: str, backend: str, pid: int, slots: int, models: dict[str, str],
             lease_s: float) -> int:  # fmt: skip
    """A new life for the worker called `name`, state loading; any earlier life of that name ends."""
    cursor.execute("UPDATE workers SET state = 'dead' WHERE name = %s AND state <> 'dead'", (name,))
    cursor.execute(
        """
        INSERT INTO workers (name, backend, pid, state, slots, models, lease_until)
        VALUES (%s, %s, %s, 'loading', %s, %s, clock_timestamp() + %s * interval '1 s') RETURNING id
        """,
        (name, backend, pid, slots, orjson.dumps(models).decode(), lease_s),
    )
    row = cursor.fetchone()
    assert row is not None
    return int(row[0])


def hold_lock(cursor: Cursor, worker_id: int) -> None:
    """Hold this life's lock for as long as the session lives."""
    cursor.execute("SELECT pg_try_advisory_lock(%s, %s)", (_LOCK_CLASS, worker_id))


def heartbeat(cursor: Cursor, beats: Sequence[Heartbeat]) -> list[bool]:
    """Extend leases; False for a life that has been declared dead: the process must exit."""
    alive = []
    for beat in beats:
        cursor.execute(
            """
            UPDATE workers SET state = %(state)s, stats = %(stats)s, heartbeat_at = clock_timestamp(),
                lease_until = clock_timestamp() + %(lease)s * interval '1 s',
                ready_at = CASE WHEN %(state)s = 'ready' THEN coalesce(ready_at, clock_timestamp()) ELSE ready_at END
            WHERE id = %(id)s AND state <> 'dead'
            """,
            {
                "id": beat.worker_id,
                "state": beat.state,
                "lease": beat.lease_s,
                "stats": orjson.dumps(beat.stats).decode(),
            },
        )
        alive.append(cursor.rowcount == 1)
    return alive


def leave(cursor: Cursor, worker_id: int) -> None:
    """End this life in good order."""
    cursor.execute("UPDATE workers SET state = 'dead' WHERE id = %s", (worker_id,))


def bury(cursor: Cursor, heartbeat_s: float) -> list[int]:
    """Declare dead whoever lost its lease, or its lock for longer than a heartbeat; answers all dead
    workers that still own jobs.

    After a restart of Postgres nobody holds a lock until its session is back, so locks are not believed
    for the first 10 s.
    """
    cursor.execute(
        """
        UPDATE workers w SET state = 'dead' WHERE state <> 'dead' AND (
            lease_until < clock_timestamp()
            OR (heartbeat_at < clock_timestamp() - %(beat)s * interval '1 s'
                AND pg_postmaster_start_time() < clock_timestamp() - interval '10 s'
                AND NOT EXISTS (SELECT FROM pg_locks l WHERE l.locktype = 'advisory' AND l.classid = %(class)s
                    AND l.objid::bigint = w.id AND l.granted
                    AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()))))
        """,
        {"beat": heartbeat_s, "class": _LOCK_CLASS},
    )
    cursor.execute(
        """
        SELECT DISTINCT j.worker_id FROM jobs j JOIN workers w ON w.id = j.worker_id
        WHERE j.status = 'running' AND w.state = 'dead'
        """
    )
    return [row[0] for row in cursor.fetchall()]


@dataclass(frozen=True, slots=True)
class Life:
    """A living worker as the router sees it."""

    id: int
    name: str
    backend: str
    state: str
    slots: int
    models: dict[str, str]
    stats: dict[str, Any]
    pid: int
    heartbeat_age_s: float


def alive(cursor: Cursor) -> list[Life]:
    """Every worker whose lease holds."""
    cursor.execute(
        """
        SELECT id, name, backend, state, slots, models, stats, pid,
               extract(epoch FROM clock_timestamp() - heartbeat_at)::float8
        FROM workers WHERE state <> 'dead' AND lease_until > clock_timestamp() ORDER BY id
        """
    )
    return [Life(*row) for row in cursor.fetchall()]


def forget(cursor: Cursor, older_than_s: float) -> int:
    """Delete dead lives that no job names any more and that are older than that."""
    cursor.execute(
        """
        DELETE FROM workers w WHERE state = 'dead' AND heartbeat_at < clock_timestamp() - %s * interval '1 s'
          AND NOT EXISTS (SELECT FROM jobs j WHERE j.worker_id = w.id)
        """,
        (older_than_s,),
    )
    return cursor.rowcount
