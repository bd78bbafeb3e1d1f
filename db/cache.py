"""The response cache: put by `jobs.finish` in the statement that stores the result, everything else here."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from psycopg2.extras import execute_values

from db.session import Cursor


@dataclass(frozen=True, slots=True)
class Hit:
    """A stored answer. `body` is byte for byte what was stored first."""

    key: bytes
    body: bytes
    age_s: int
    model: str
    backend: str
    job_id: uuid.UUID
    usage: dict[str, Any] | None


def lookup(cursor: Cursor, keys: Sequence[bytes]) -> list[Hit | None]:
    """The unexpired entry under each key."""
    cursor.execute(
        """
        SELECT key, body, extract(epoch FROM clock_timestamp() - created_at)::int, model, backend, job_id, usage
        FROM response_cache WHERE key = ANY(%s) AND expires_at > clock_timestamp()
        """,
        (list(keys),),
    )
    found = {bytes(row[0]): Hit(bytes(row[0]), bytes(row[1]), *row[2:]) for row in cursor.fetchall()}
    return [found.get(key) for key in keys]


def touch(cursor: Cursor, hits: Sequence[tuple[bytes, int]]) -> list[None]:
    """Count (key, number of hits) and mark the entries as recently used."""
    execute_values(
        cursor,
        """
        UPDATE response_cache c SET num_hits = num_hits + h.n, last_hit_at = clock_timestamp()
        FROM (SELECT key, sum(n) AS n FROM (VALUES %s) v (key, n) GROUP BY key ORDER BY key) h WHERE c.key = h.key
        """,
        hits,
        template="(%s::bytea, %s::int)",
        page_size=1000,
    )
    return [None] * len(hits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Purge:
    """What to remove: one key, a model's entries, or a tenant's. `tenant` None spans tenants."""

    tenant: str | None
    key: bytes | None = None
    model: str | None = None


def purge(cursor: Cursor, wanted: Sequence[Purge]) -> list[int]:
    """How many entries each purge removed."""
    removed = []
    for one in wanted:
        cursor.execute(
            """
            DELETE FROM response_cache WHERE (%(tenant)s IS NULL OR tenant = %(tenant)s)
              AND (%(key)s::bytea IS NULL OR key = %(key)s) AND (%(model)s IS NULL OR model = %(model)s)
            """,
            {"tenant": one.tenant, "key": one.key, "model": one.model},
        )
        removed.append(cursor.rowcount)
    return removed


def evict(cursor: Cursor, max_bytes: int) -> int:
    """Remove expired entries, then the least recently used ones until the bodies fit in `max_bytes`."""
    cursor.execute("DELETE FROM response_cache WHERE expires_at <= clock_timestamp()")
    removed = cursor.rowcount
    cursor.execute(
        """
        DELETE FROM response_cache WHERE key IN (
            SELECT key FROM (SELECT key, sum(num_bytes) OVER (ORDER BY last_hit_at DESC, key) AS total
                             FROM response_cache) ranked
            WHERE total > %s)
        """,
        (max_bytes,),
    )
    return removed + cursor.rowcount


def stats(cursor: Cursor, tenants: Sequence[str | None]) -> list[list[dict[str, Any]]]:
    """Per tenant (None: all), entries, bytes and hits by model."""
    return [_stats(cursor, tenant) for tenant in tenants]


def _stats(cursor: Cursor, tenant: str | None) -> list[dict[str, Any]]:
    cursor.execute(
        """
        SELECT model, count(*), sum(num_bytes), sum(num_hits) FROM response_cache
        WHERE (%(tenant)s IS NULL OR tenant = %(tenant)s) AND expires_at > clock_timestamp()
        GROUP BY model ORDER BY model
        """,
        {"tenant": tenant},
    )
    return [
        {"model": row[0], "entries": row[1], "bytes": int(row[2]), "hits": int(row[3])} for row in cursor.fetchall()
    ]
