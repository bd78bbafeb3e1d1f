"""Webhooks: secrets, and the deliveries that the end of a job (or of a batch) leaves behind.

A delivery is a row written in the transaction that ends what it tells of: for jobs by a trigger, so that
no way of ending a job can forget it, and for anything else by `emit`. From there it is claimed, tried and
recorded until somebody took it or its tries are used up.
"""

import base64
import datetime
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from db.session import Cursor

PREFIX = "whsec_"
_SECRET_BYTES = 32
OVERLAP_S = 86_400.0
"""How long the secret before the newest still signs."""
_CLAIM_S = 45.0
"""Within this a claimed delivery is tried and recorded, or somebody else claims it."""


def emit(cursor: Cursor, tenant: str, webhook: str, kind: str, object_id: str) -> None:
    """Leave a delivery. Call in the transaction that ends the object. `webhook` is JSON: {"url", "events"?}."""
    cursor.execute("SELECT webhook_emit(%s, %s::jsonb, %s, %s)", (tenant, webhook, kind, object_id))


@dataclass(frozen=True, slots=True)
class Secret:
    """A signing secret. Its text is shown when it is made, and never again."""

    id: uuid.UUID
    tenant: str
    created_at: datetime.datetime
    expires_at: datetime.datetime | None


def create_secret(cursor: Cursor, tenants: Sequence[str]) -> list[tuple[Secret, str]]:
    """A new secret for each tenant. The newest until then signs beside it for a day; older ones end now."""
    return [_create_secret(cursor, tenant) for tenant in tenants]


def _create_secret(cursor: Cursor, tenant: str) -> tuple[Secret, str]:
    text = PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()
    cursor.execute(
        """
        WITH newest AS (SELECT id FROM webhook_secrets WHERE tenant = %(tenant)s ORDER BY created_at DESC LIMIT 1),
        ending AS (UPDATE webhook_secrets s SET expires_at = least(expires_at, clock_timestamp() +
                CASE WHEN s.id = newest.id THEN %(overlap)s ELSE 0 END * interval '1 s')
            FROM newest WHERE s.tenant = %(tenant)s AND (expires_at IS NULL OR expires_at > clock_timestamp()))
        INSERT INTO webhook_secrets (id, tenant, secret) VALUES (%(id)s, %(tenant)s, %(secret)s)
        RETURNING id, tenant, created_at, expires_at
        """,
        {"id": uuid.uuid4(), "tenant": tenant, "secret": text, "overlap": OVERLAP_S},
    )
    row = cursor.fetchone()
    assert row is not None
    return Secret(*row), text


def list_secrets(cursor: Cursor, tenants: Sequence[str]) -> list[list[Secret]]:
    """The living secrets of each tenant, the newest first."""
    cursor.execute(
        """
        SELECT id, tenant, created_at, expires_at FROM webhook_secrets
        WHERE tenant = ANY(%s) AND (expires_at IS NULL OR expires_at > clock_timestamp()) ORDER BY created_at DESC
        """,
        (list(tenants),),
    )
    rows = [Secret(*row) for row in cursor.fetchall()]
    return [[one for one in rows if one.tenant == tenant] for tenant in tenants]


@dataclass(frozen=True, slots=True)
class Due:
    """A delivery that its claimer may try once."""

    id: uuid.UUID
    url: str
    body: str
    attempt: int
    secrets: list[str]
    """What to sign it with, the newest first."""


def claim(cursor: Cursor, limits: Sequence[int]) -> list[list[Due]]:
    """Deliveries whose time has come, at most as many as each limit. Who dies with one loses it to the next."""
    return [_claim(cursor, limit) for limit in limits]


def _claim(cursor: Cursor, limit: int) -> list[Due]:
    cursor.execute(
        """
        WITH due AS (SELECT id FROM webhook_deliveries WHERE status = 'pending' AND next_at <= clock_timestamp()
                     ORDER BY next_at LIMIT %s FOR UPDATE SKIP LOCKED)
        UPDATE webhook_deliveries d SET attempts = attempts + 1, next_at = clock_timestamp() + %s * interval '1 s'
        FROM due WHERE d.id = due.id
        RETURNING d.id, url, body, attempts, ARRAY(SELECT secret FROM webhook_secrets s WHERE s.tenant = d.tenant
            AND (expires_at IS NULL OR expires_at > clock_timestamp()) ORDER BY created_at DESC)
        """,
        (limit, _CLAIM_S),
    )
    return [Due(*row) for row in cursor.fetchall()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """How one attempt at a delivery went."""

    id: uuid.UUID
    attempt: int
    status: str
    """delivered, failed (no more tries), disabled (the receiver is gone), or pending (again, `after_s` later)."""
    after_s: float = 0.0
    last_status: int | None = None
    last_error: str | None = None


def record(cursor: Cursor, tries: Sequence[Tried]) -> list[None]:
    """Record attempts; one that somebody else has claimed since is not. A receiver that is gone gets nothing
    more under that URL, until a delivery to it is asked for again."""
    for one in tries:
        cursor.execute(
            """
            WITH tried AS (UPDATE webhook_deliveries SET status = %(status)s, last_status = %(last_status)s,
                    last_error = %(last_error)s, next_at = clock_timestamp() + %(after_s)s * interval '1 s',
                    ended_at = CASE WHEN %(status)s = 'pending' THEN NULL ELSE clock_timestamp() END
                WHERE id = %(id)s AND attempts = %(attempt)s AND status = 'pending' RETURNING id, tenant, url, status),
            gone AS (INSERT INTO webhook_gone (tenant, url) SELECT tenant, url FROM tried WHERE status = 'disabled'
                ON CONFLICT DO NOTHING)
            UPDATE webhook_deliveries d SET status = 'disabled', ended_at = clock_timestamp()
            FROM tried t WHERE t.status = 'disabled' AND d.status = 'pending' AND d.tenant = t.tenant
              AND d.url = t.url AND d.id <> t.id
            """,
            {name: getattr(one, name) for name in Tried.__slots__},
        )
    return [None] * len(tries)


@dataclass(frozen=True, slots=True)
class Delivery:
    """A delivery as its owner sees it."""

    id: uuid.UUID
    type: str
    object_id: str
    url: str
    status: str
    attempts: int
    created_at: datetime.datetime
    next_at: datetime.datetime
    ended_at: datetime.datetime | None
    last_status: int | None
    last_error: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """What a list of deliveries is narrowed by. Tenant None sees every tenant's."""

    tenant: str | None
    status: str | None = None
    object_id: str | None = None
    after: uuid.UUID | None = None
    limit: int = 20


_DELIVERY = "id, type, object_id, url, status, attempts, created_at, next_at, ended_at, last_status, last_error"


def find(cursor: Cursor, filters: Sequence[Filter]) -> list[list[Delivery]]:
    """Pages of deliveries, the newest first, with one more than `limit` where there is another page."""
    return [_find(cursor, wanted) for wanted in filters]


def _find(cursor: Cursor, wanted: Filter) -> list[Delivery]:
    columns = [name for name in ("tenant", "status", "object_id") if getattr(wanted, name) is not None]
    conditions = ["true", *(f"{name} = %({name})s" for name in columns)]
    if wanted.after is not None:
        conditions.append("(created_at, id) < (SELECT created_at, id FROM webhook_deliveries WHERE id = %(after)s)")
    cursor.execute(
        f"SELECT {_DELIVERY} FROM webhook_deliveries WHERE {' AND '.join(conditions)} "  # noqa: S608 - names from this file alone
        "ORDER BY created_at DESC, id DESC LIMIT %(limit)s + 1",
        {name: getattr(wanted, name) for name in Filter.__slots__},
    )
    return [Delivery(*row) for row in cursor.fetchall()]


def redeliver(cursor: Cursor, wanted: Sequence[tuple[uuid.UUID, str | None]]) -> list[Delivery | None]:
    """Try these (id, tenant) again from the start, under their old ids; None for an unknown one."""
    return [_redeliver(cursor, delivery_id, tenant) for delivery_id, tenant in wanted]


def _redeliver(cursor: Cursor, delivery_id: uuid.UUID, tenant: str | None) -> Delivery | None:
    cursor.execute(
        f"""
        WITH again AS (UPDATE webhook_deliveries SET status = 'pending', attempts = 0, ended_at = NULL,
                next_at = clock_timestamp()
            WHERE id = %s AND tenant = coalesce(%s, tenant) RETURNING tenant, {_DELIVERY}),
        back AS (DELETE FROM webhook_gone g USING again a WHERE g.tenant = a.tenant AND g.url = a.url)
        SELECT {_DELIVERY} FROM again
        """,  # noqa: S608 - names from this file alone
        (delivery_id, tenant),
    )
    row = cursor.fetchone()
    return None if row is None else Delivery(*row)


def purge(cursor: Cursor, older_than_s: float, limit: int = 1000) -> int:
    """Delete deliveries that ended longer ago than that, and secrets whose time is over."""
    cursor.execute("DELETE FROM webhook_secrets WHERE expires_at <= clock_timestamp()")
    cursor.execute(
        """
        DELETE FROM webhook_deliveries WHERE id IN (SELECT id FROM webhook_deliveries
            WHERE ended_at < clock_timestamp() - %s * interval '1 s' LIMIT %s)
        """,
        (older_than_s, limit),
    )
    return cursor.rowcount
