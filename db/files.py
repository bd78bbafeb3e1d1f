"""Files in the ledger: whole for their readers, chunks of about a mebibyte for every statement here.

A file is seen once its last byte is stored. Until then it is a row without readers, which housekeeping
removes if its writer does not come back.
"""

import datetime
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from psycopg2.extras import execute_values

from db.session import Cursor, transaction
from db.states import BATCH_LIVE

CHUNK_BYTES = 2**20
_UNFINISHED_S = 6 * 3600
_LIVE = ", ".join(f"'{status}'" for status in BATCH_LIVE)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A whole file, without its bytes."""

    id: uuid.UUID
    tenant: str
    filename: str
    purpose: str
    num_bytes: int
    created_at: datetime.datetime
    expires_at: datetime.datetime | None


_COLUMNS = "id, tenant, filename, purpose, num_bytes, created_at, expires_at"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes of a file that a tenant is sending."""

    file_id: uuid.UUID
    tenant: str
    start: int
    data: bytes


def put(cursor: Cursor, chunks: Sequence[Chunk]) -> list[None]:
    """Store chunks of files that nobody sees yet. Repeating it changes nothing."""
    owners = {chunk.file_id: chunk.tenant for chunk in chunks}
    execute_values(
        cursor,
        "INSERT INTO files (id, tenant, filename, purpose) VALUES %s ON CONFLICT DO NOTHING",
        sorted(owners.items()),
        template="(%s::uuid, %s, '', '')",
    )
    for chunk in chunks:
        cursor.execute(
            "INSERT INTO file_chunks (file_id, start, data) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING",
            (chunk.file_id, chunk.start, chunk.data),
        )
    return [None] * len(chunks)


@dataclass(frozen=True, slots=True)
class Finished:
    """A file whose last byte has been put."""

    id: uuid.UUID
    filename: str
    purpose: str
    num_bytes: int
    ttl_s: int


def finish(cursor: Cursor, finished: Sequence[Finished]) -> list[StoredFile | None]:
    """Show files to their readers; None where housekeeping took the file for abandoned. The caller's commit
    is durable, and all earlier ones of the server reach the disk with it."""
    rows = execute_values(
        cursor,
        f"""
        UPDATE files f SET filename = w.filename, purpose = w.purpose, num_bytes = w.num_bytes, is_whole = true,
            created_at = CASE WHEN is_whole THEN created_at ELSE clock_timestamp() END,
            expires_at = CASE WHEN is_whole THEN expires_at ELSE clock_timestamp() + w.ttl_s * interval '1 s' END
        FROM (VALUES %s) w (wanted, filename, purpose, num_bytes, ttl_s) WHERE f.id = w.wanted
        RETURNING {", ".join(f"f.{name}" for name in _COLUMNS.split(", "))}
        """,  # noqa: S608 - column names from this file alone
        [(one.id, one.filename, one.purpose, one.num_bytes, one.ttl_s) for one in finished],
        template="(%s::uuid, %s, %s, %s::bigint, %s::int)",
        fetch=True,
    )
    found = {row[0]: StoredFile(*row) for row in rows}
    return [found.get(one.id) for one in finished]


def drop(cursor: Cursor, ids: Sequence[uuid.UUID]) -> list[None]:
    """Remove files that will never be whole."""
    cursor.execute("DELETE FROM files WHERE id = ANY(%s) AND NOT is_whole", (list(ids),))
    return [None] * len(ids)


def read(cursor: Cursor, wanted: Sequence[tuple[uuid.UUID, int]]) -> list[bytes]:
    """The bytes of each file from a chunk's start on: one chunk or several, less than two of full size.
    Empty at the end, and where the file is gone."""
    answers = []
    for file_id, start in wanted:
        cursor.execute(
            "SELECT data FROM file_chunks WHERE file_id = %s AND start >= %s AND start < %s ORDER BY start",
            (file_id, start, start + CHUNK_BYTES),
        )
        answers.append(b"".join(bytes(row[0]) for row in cursor.fetchall()))
    return answers


def append(cursor: Cursor, file_id: uuid.UUID, tenant: str, data: bytes) -> None:
    """Add to the end of a file that nobody sees yet. Part of the caller's transaction."""
    cursor.execute(
        """
        INSERT INTO files AS f (id, tenant, filename, purpose, num_bytes) VALUES (%(id)s, %(tenant)s, '', '', %(size)s)
        ON CONFLICT (id) DO UPDATE SET num_bytes = f.num_bytes + %(size)s RETURNING num_bytes - %(size)s
        """,
        {"id": file_id, "tenant": tenant, "size": len(data)},
    )
    row = cursor.fetchone()
    assert row is not None
    for place in range(0, len(data), CHUNK_BYTES):
        cursor.execute(
            "INSERT INTO file_chunks (file_id, start, data) VALUES (%s, %s, %s)",
            (file_id, row[0] + place, data[place : place + CHUNK_BYTES]),
        )


def view(cursor: Cursor, wanted: Sequence[tuple[uuid.UUID, str]]) -> list[StoredFile | None]:
    """The files with these (id, tenant); None for an unknown id and for another tenant's alike."""
    cursor.execute(
        f"SELECT {_COLUMNS} FROM files WHERE id = ANY(%s) AND is_whole AND "  # noqa: S608
        "(expires_at IS NULL OR expires_at > clock_timestamp())",
        ([file_id for file_id, _ in wanted],),
    )
    found = {(row[0], row[1]): StoredFile(*row) for row in cursor.fetchall()}
    return [found.get(pair) for pair in wanted]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFilter:
    """What a list of files is narrowed by. `after` is the last id of the page before."""

    tenant: str
    purpose: str | None = None
    after: uuid.UUID | None = None
    limit: int = 100
    is_ascending: bool = False


def find(cursor: Cursor, filters: Sequence[FileFilter]) -> list[list[StoredFile]]:
    """Pages of files; one row more than `limit` tells the caller that there is another page."""
    return [_page(cursor, wanted) for wanted in filters]


def _page(cursor: Cursor, wanted: FileFilter) -> list[StoredFile]:
    beyond, order = (">", "ASC") if wanted.is_ascending else ("<", "DESC")
    cursor.execute(
        f"""
        SELECT {_COLUMNS} FROM files WHERE tenant = %(tenant)s AND is_whole
            AND (expires_at IS NULL OR expires_at > clock_timestamp())
            AND (%(purpose)s IS NULL OR purpose = %(purpose)s)
            AND (%(after)s IS NULL OR (created_at, id) {beyond}
                (SELECT created_at, id FROM files WHERE id = %(after)s AND tenant = %(tenant)s))
        ORDER BY created_at {order}, id {order} LIMIT %(limit)s + 1
        """,  # noqa: S608 - words from this function alone
        {name: getattr(wanted, name) for name in FileFilter.__slots__},
    )
    return [StoredFile(*row) for row in cursor.fetchall()]


def delete(cursor: Cursor, wanted: Sequence[tuple[uuid.UUID, str]]) -> list[bool | None]:
    """Delete (id, tenant): True once it is gone, False while a batch reads it, None for an unknown one."""
    return [_delete(cursor, file_id, tenant) for file_id, tenant in wanted]


def _delete(cursor: Cursor, file_id: uuid.UUID, tenant: str) -> bool | None:
    with transaction(cursor):
        # The lock first: a batch that is being made on this file is then either seen by the next statement,
        # or finds no file.
        cursor.execute("SELECT FROM files WHERE id = %s AND tenant = %s AND is_whole FOR UPDATE", (file_id, tenant))
        is_known = cursor.rowcount == 1
        if is_known:
            cursor.execute(
                f"""
                DELETE FROM files WHERE id = %(id)s AND NOT EXISTS
                    (SELECT FROM batches WHERE input_file_id = %(id)s AND status IN ({_LIVE}))
                """,  # noqa: S608 - words from db.models
                {"id": file_id},
            )
        is_gone = cursor.rowcount == 1
    return is_gone if is_known else None


def purge(cursor: Cursor, limit: int = 20) -> int:
    """Delete files that are past their time, and those whose writer went away; answers how many. No file that
    a live batch reads or writes."""
    cursor.execute(
        f"""
        DELETE FROM files WHERE id IN (SELECT id FROM files f WHERE
            (expires_at < clock_timestamp() OR (NOT is_whole AND created_at < clock_timestamp() - %s * interval '1 s'))
            AND NOT EXISTS (SELECT FROM batches b WHERE b.status IN ({_LIVE})
                AND f.id IN (b.input_file_id, b.output_file_id, b.error_file_id))
            LIMIT %s)
        """,  # noqa: S608 - words from db.models
        (_UNFINISHED_S, limit),
    )
    return cursor.rowcount
