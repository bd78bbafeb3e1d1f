"""API keys: 256 random bits, shown once, kept as SHA-256."""

import datetime
import hashlib
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from db.session import Cursor

PREFIX = "sk-sy-"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key without its secret."""

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


_COLUMNS = "id, tenant, name, prefix, is_admin, created_at, expires_at, revoked_at, timeout_s"


def hash_of(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def create(cursor: Cursor, name: str, tenant: str, *, is_admin: bool = False, expires_in_s: float | None = None,
           timeout_s: float | None = None, is_replacing: bool = False) -> tuple[str, ApiKey]:  # fmt: skip
    """A new key: (secret, record). The secret cannot be had again. `is_replacing` revokes living keys
    of the same name and tenant."""
    secret = PREFIX + secrets.token_urlsafe(32)
    if is_replacing:
        cursor.execute(
            "UPDATE api_keys SET revoked_at = clock_timestamp() WHERE name = %s AND tenant = %s AND revoked_at IS NULL",
            (name, tenant),
        )
    cursor.execute(
        f"""
        INSERT INTO api_keys (id, tenant, name, prefix, hash, is_admin, timeout_s, expires_at)
        VALUES (%s, %s, %s, %s, %s, %s, %s, clock_timestamp() + %s * interval '1 s') RETURNING {_COLUMNS}
        """,  # noqa: S608
        (uuid.uuid4(), tenant, name, secret[: len(PREFIX) + 6], hash_of(secret), is_admin, timeout_s, expires_in_s),
    )
    row = cursor.fetchone()
    assert row is not None
    return secret, ApiKey(*row)


def verify(cursor: Cursor, hashes: Sequence[bytes]) -> list[ApiKey | None]:
    """The living key behind each hash."""
    cursor.execute(
        f"""
        SELECT hash, {_COLUMNS} FROM api_keys WHERE hash = ANY(%s) AND revoked_at IS NULL
          AND (expires_at IS NULL OR expires_at > clock_timestamp())
        """,  # noqa: S608
        (list(hashes),),
    )
    found = {bytes(row[0]): ApiKey(*row[1:]) for row in cursor.fetchall()}
    return [found.get(value) for value in hashes]


def by_id(cursor: Cursor, ids: Sequence[uuid.UUID]) -> list[ApiKey | None]:
    """The key with each id, living or not."""
    cursor.execute(f"SELECT {_COLUMNS} FROM api_keys WHERE id = ANY(%s)", (list(ids),))  # noqa: S608
    found = {row[0]: ApiKey(*row) for row in cursor.fetchall()}
    return [found.get(key_id) for key_id in ids]


def find(cursor: Cursor) -> list[ApiKey]:
    """Every key, newest first."""
    cursor.execute(f"SELECT {_COLUMNS} FROM api_keys ORDER BY created_at DESC")  # noqa: S608
    return [ApiKey(*row) for row in cursor.fetchall()]


def revoke(cursor: Cursor, id_or_prefix: str) -> int:
    """Revoke the living key with this id or prefix; answers how many that were. An ambiguous prefix
    revokes nothing and answers 0."""
    cursor.execute(
        """
        UPDATE api_keys SET revoked_at = clock_timestamp() WHERE revoked_at IS NULL AND id IN (
            SELECT min(id::text)::uuid FROM api_keys WHERE revoked_at IS NULL AND (id::text = %(x)s OR prefix = %(x)s)
            HAVING count(*) = 1)
        """,
        {"x": id_or_prefix},
    )
    return cursor.rowcount
