"""Eviction, purging and API keys, against a real Postgres."""

import contextlib
import hashlib
import uuid
from collections.abc import Iterator

import pytest

from db import api_keys, cache, session
from db.cache import Purge
from db.session import Cursor


@pytest.fixture
def cursor(database_url: str) -> Iterator[Cursor]:
    connection = session.connect(database_url, "tests")
    with contextlib.closing(connection), connection.cursor() as opened:
        opened.execute("TRUNCATE response_cache, api_keys")
        yield opened


def put(cursor: Cursor, key: bytes, *, size: int = 10, used_s_ago: int = 0, ttl_s: int = 60, tenant: str = "t") -> None:
    cursor.execute(
        """
        INSERT INTO response_cache (key, tenant, model, backend, job_id, body, sha256, num_bytes, last_hit_at, expires_at)
        VALUES (%s, %s, 'm', 'b', %s, %s, '', %s, now() - %s * interval '1 s', now() + %s * interval '1 s')
        """,
        (key, tenant, uuid.uuid4(), b"x" * size, size, used_s_ago, ttl_s),
    )


def keys(cursor: Cursor) -> set[bytes]:
    cursor.execute("SELECT key FROM response_cache")
    return {bytes(row[0]) for row in cursor.fetchall()}


def test_eviction_takes_the_expired_then_the_least_recently_used(cursor: Cursor) -> None:
    put(cursor, b"old", used_s_ago=100)
    put(cursor, b"new", used_s_ago=1)
    put(cursor, b"middle", used_s_ago=50)
    put(cursor, b"expired", ttl_s=-1)
    assert cache.evict(cursor, 20) == 2
    assert keys(cursor) == {b"new", b"middle"}
    cache.touch(cursor, [(b"middle", 3), (b"middle", 2)])
    assert cache.evict(cursor, 10) == 1
    assert keys(cursor) == {b"middle"}
    assert cache.stats(cursor, [None, "nobody"]) == [[{"model": "m", "entries": 1, "bytes": 10, "hits": 5}], []]


def test_an_expired_entry_is_no_hit(cursor: Cursor) -> None:
    put(cursor, b"a")
    put(cursor, b"b", ttl_s=-1)
    found = cache.lookup(cursor, [b"b", b"a", b"c"])
    assert [hit is not None for hit in found] == [False, True, False]


def test_purging_stays_inside_its_tenant(cursor: Cursor) -> None:
    put(cursor, b"mine", tenant="mine")
    put(cursor, b"theirs", tenant="theirs")
    assert cache.purge(cursor, [Purge(tenant="mine", key=b"theirs"), Purge(tenant="mine")]) == [0, 1]
    assert keys(cursor) == {b"theirs"}


def test_a_key_is_kept_as_its_hash_only(cursor: Cursor) -> None:
    secret, key = api_keys.create(cursor, "name", "tenant")
    assert secret.startswith(key.prefix)
    assert len(secret) > 40
    cursor.execute("SELECT * FROM api_keys")
    assert secret not in str(cursor.fetchall())
    digest = hashlib.sha256(secret.encode()).digest()
    assert api_keys.verify(cursor, [digest, b"other"]) == [key, None]


def test_revoked_expired_and_replaced_keys_open_nothing(cursor: Cursor) -> None:
    revoked, key = api_keys.create(cursor, "a", "t")
    expired, _ = api_keys.create(cursor, "b", "t", expires_in_s=-1)
    replaced, _ = api_keys.create(cursor, "c", "t")
    kept, _ = api_keys.create(cursor, "c", "t", is_replacing=True)
    assert api_keys.revoke(cursor, key.prefix) == 1
    assert api_keys.revoke(cursor, "sk-sy-nobody") == 0
    found = api_keys.verify(cursor, [api_keys.hash_of(secret) for secret in (revoked, expired, replaced, kept)])
    assert [one is not None for one in found] == [False, False, False, True]
