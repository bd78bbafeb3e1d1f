"""API keys: 256 random bits, shown once, kept as SHA-256."""

import datetime
import hashlib
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from db import tenants
from db.session import Cursor
from db.tenants import LIMITS, NO_LIMITS, Limits

PREFIX = "sk-sy-"
SCOPES = ("submit", "read", "cancel")
"""submit: ask for work. read: jobs, results, models. cancel: stop and delete. Administration is a property of
its own (`is_admin`)."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key without its secret, and what it may do."""

    id: uuid.UUID
    tenant: str
    name: str
    prefix: str
    is_admin: bool
    created_at: datetime.datetime
    expires_at: datetime.datetime | None
    revoked_at: datetime.datetime | None
    timeout_s: float | None
    """Deadline of its jobs where they name none."""
    scopes: tuple[str, ...]
    models: tuple[str, ...] | None
    """Names and aliases that it may use. None: every model."""
    previous_until: datetime.datetime | None
    """Until when the secret before the last rotation opens the door as well."""
    limits: Limits
    tenant_limits: Limits
    tenant_weight: float

    @property
    def has_rate_limit(self) -> bool:
        return self.limits.have_rate or self.tenant_limits.have_rate

    @property
    def has_budget(self) -> bool:
        return self.limits.have_budget or self.tenant_limits.have_budget


_OWN = (
    "id", "tenant", "name", "prefix", "is_admin", "created_at", "expires_at", "revoked_at", "timeout_s", "scopes",
    "models", "previous_until",
)  # fmt: skip
_COLUMNS = ", ".join([f"k.{name}" for name in (*_OWN, *LIMITS)] + [f"t.{name}" for name in (*LIMITS, "weight")])
_TABLES = "api_keys k LEFT JOIN tenants t ON t.name = k.tenant"
_LIVING = "k.revoked_at IS NULL AND (k.expires_at IS NULL OR k.expires_at > clock_timestamp())"


def _key(row: Sequence[Any]) -> ApiKey:
    own, rest = dict(zip(_OWN, row, strict=False)), row[len(_OWN) :]
    own["scopes"] = tuple(own["scopes"])
    own["models"] = None if own["models"] is None else tuple(own["models"])
    num = len(LIMITS)
    limits, tenant_limits = (Limits(**dict(zip(LIMITS, part, strict=True))) for part in (rest[:num], rest[num:-1]))
    return ApiKey(**own, limits=limits, tenant_limits=tenant_limits, tenant_weight=rest[-1] or 1.0)


def hash_of(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _new_secret() -> tuple[str, str, bytes]:
    """(secret, its prefix, its hash)."""
    secret = PREFIX + secrets.token_urlsafe(32)
    return secret, secret[: len(PREFIX) + 6], hash_of(secret)


def create(cursor: Cursor, name: str, tenant: str, *, is_admin: bool = False, expires_in_s: float | None = None,
           timeout_s: float | None = None, is_replacing: bool = False, scopes: Sequence[str] = SCOPES,
           models: Sequence[str] | None = None, limits: Limits = NO_LIMITS) -> tuple[str, ApiKey]:  # fmt: skip
    """A new key: (secret, record). The secret cannot be had again. `is_replacing` revokes living keys
    of the same name and tenant."""
    secret, prefix, digest = _new_secret()
    tenants.ensure(cursor, tenant)
    if is_replacing:
        cursor.execute(
            "UPDATE api_keys SET revoked_at = clock_timestamp() WHERE name = %s AND tenant = %s AND revoked_at IS NULL",
            (name, tenant),
        )
    key_id = uuid.uuid4()
    cursor.execute(
        f"""
        INSERT INTO api_keys (id, tenant, name, prefix, hash, is_admin, timeout_s, expires_at, scopes, models,
            {", ".join(LIMITS)})
        VALUES (%s, %s, %s, %s, %s, %s, %s, clock_timestamp() + %s * interval '1 s', %s::text[], %s::text[],
            {", ".join(["%s"] * len(LIMITS))})
        """,  # noqa: S608 - column names from this package alone
        (key_id, tenant, name, prefix, digest, is_admin, timeout_s, expires_in_s, list(scopes),
         None if models is None else list(models), *(getattr(limits, limit) for limit in LIMITS)),
    )  # fmt: skip
    key = get(cursor, key_id)
    assert key is not None
    return secret, key


def verify(cursor: Cursor, hashes: Sequence[bytes]) -> list[ApiKey | None]:
    """The living key behind each hash: of its secret, or of the one before while that is still valid."""
    cursor.execute(
        f"""
        SELECT k.hash, {_COLUMNS} FROM {_TABLES} WHERE k.hash = ANY(%(hashes)s) AND {_LIVING}
        UNION ALL
        SELECT k.previous_hash, {_COLUMNS} FROM {_TABLES}
        WHERE k.previous_hash = ANY(%(hashes)s) AND k.previous_until > clock_timestamp() AND {_LIVING}
        """,  # noqa: S608
        {"hashes": list(hashes)},
    )
    found = {bytes(row[0]): _key(row[1:]) for row in cursor.fetchall()}
    return [found.get(value) for value in hashes]


def by_id(cursor: Cursor, ids: Sequence[uuid.UUID]) -> list[ApiKey | None]:
    """The key with each id, living or not."""
    cursor.execute(f"SELECT {_COLUMNS} FROM {_TABLES} WHERE k.id = ANY(%s)", (list(ids),))  # noqa: S608
    found = {key.id: key for key in map(_key, cursor.fetchall())}
    return [found.get(key_id) for key_id in ids]


def find(cursor: Cursor, tenant: str | None = None) -> list[ApiKey]:
    """Every key, or a tenant's, newest first."""
    cursor.execute(
        f"SELECT {_COLUMNS} FROM {_TABLES} WHERE %(tenant)s IS NULL OR k.tenant = %(tenant)s "  # noqa: S608
        "ORDER BY k.created_at DESC",
        {"tenant": tenant},
    )
    return [_key(row) for row in cursor.fetchall()]


def get(cursor: Cursor, key_id: uuid.UUID) -> ApiKey | None:
    """The key with this id, living or not."""
    return by_id(cursor, [key_id])[0]


def resolve(cursor: Cursor, id_or_prefix: str) -> uuid.UUID | None:
    """The id of the living key with this id or prefix; None for an unknown one and an ambiguous prefix."""
    cursor.execute(
        """
        SELECT min(id::text)::uuid FROM api_keys WHERE revoked_at IS NULL AND (id::text = %(x)s OR prefix = %(x)s)
        HAVING count(*) = 1
        """,
        {"x": id_or_prefix},
    )
    row = cursor.fetchone()
    return None if row is None else row[0]


def revoke(cursor: Cursor, id_or_prefix: str) -> int:
    """Revoke the living key with this id or prefix, old secrets included; answers how many that were. An
    ambiguous prefix revokes nothing and answers 0."""
    cursor.execute(
        "UPDATE api_keys SET revoked_at = clock_timestamp() WHERE revoked_at IS NULL AND id = %s",
        (resolve(cursor, id_or_prefix),),
    )
    return cursor.rowcount


def rotate(cursor: Cursor, key_id: uuid.UUID, grace_s: float) -> tuple[str, ApiKey] | None:
    """Give a living key a new secret: (secret, record). The old one opens the door for `grace_s` more; one
    that was still in an earlier rotation's grace no longer does. None for any other key."""
    secret, prefix, digest = _new_secret()
    cursor.execute(
        f"""
        UPDATE api_keys k SET previous_hash = hash, previous_until = clock_timestamp() + %s * interval '1 s',
            hash = %s, prefix = %s WHERE id = %s AND {_LIVING}
        """,  # noqa: S608
        (grace_s, digest, prefix, key_id),
    )
    if not cursor.rowcount:
        return None
    key = get(cursor, key_id)
    assert key is not None
    return secret, key


_CHANGEABLE = frozenset({*LIMITS, "name", "timeout_s", "scopes", "models", "expires_at", "is_admin"})


def change(cursor: Cursor, key_id: uuid.UUID, changes: dict[str, Any]) -> ApiKey | None:
    """Set these columns of a living key. Gateways follow within two seconds. None for any other key."""
    assert changes.keys() <= _CHANGEABLE
    assignments = ", ".join(["id = id", *(f"{column} = %({column})s" for column in changes)])
    cursor.execute(
        f"UPDATE api_keys k SET {assignments} WHERE id = %(key_id)s AND {_LIVING}",  # noqa: S608
        {**changes, "key_id": key_id},
    )
    return get(cursor, key_id) if cursor.rowcount else None
