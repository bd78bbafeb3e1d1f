"""Batches in the ledger: a row a batch, and a row for each line of its input that has no answer yet.

A line is answered in one transaction: its row goes, its text is added to a file. Whoever finds the row gone
has been overtaken and writes nothing, so two runners, and one that comes back from the dead, do no harm.
"""

import datetime
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from psycopg2.extras import execute_values

from db import accept, files, webhooks
from db.accept import Idempotency, Reserved
from db.files import CHUNK_BYTES
from db.session import Cursor, transaction
from db.states import BATCH_LIVE, BatchStatus

_LIVE = ", ".join(f"'{status}'" for status in BATCH_LIVE)
_KEPT_DAYS = 30
MARK = "batch_id"
"""Metadata of a job that says that it runs for a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBatch:
    """A batch about to be made. JSON comes encoded."""

    id: uuid.UUID
    tenant: str
    api_key_id: uuid.UUID
    endpoint: str
    input_file_id: uuid.UUID
    completion_window: str
    window_s: int
    metadata: str | None
    output_ttl_s: int
    webhook: str | None = None
    idempotency: Idempotency | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch as it stands. Fields are columns, and whether its window is over."""

    id: uuid.UUID
    tenant: str
    api_key_id: uuid.UUID
    endpoint: str
    input_file_id: uuid.UUID
    completion_window: str
    metadata: dict[str, str] | None
    status: BatchStatus
    model: str | None
    errors: list[dict[str, Any]] | None
    output_file_id: uuid.UUID | None
    error_file_id: uuid.UUID | None
    num_total: int
    num_completed: int
    num_failed: int
    input_tokens: int
    output_tokens: int
    created_at: datetime.datetime
    expires_at: datetime.datetime
    in_progress_at: datetime.datetime | None
    finalizing_at: datetime.datetime | None
    completed_at: datetime.datetime | None
    failed_at: datetime.datetime | None
    expired_at: datetime.datetime | None
    cancelling_at: datetime.datetime | None
    cancelled_at: datetime.datetime | None
    is_late: bool


_VIEW = ", ".join(name for name in Batch.__slots__ if name != "is_late") + ", expires_at <= clock_timestamp()"


def _batches(cursor: Cursor) -> list[Batch]:
    return [Batch(*row) for row in cursor.fetchall()]


def output_id(batch_id: uuid.UUID) -> uuid.UUID:
    """Of the file of a batch's answers."""
    return uuid.uuid5(batch_id, "output")


def error_id(batch_id: uuid.UUID) -> uuid.UUID:
    """Of the file of a batch's failures."""
    return uuid.uuid5(batch_id, "errors")


def create(cursor: Cursor, wanted: Sequence[NewBatch]) -> list[Batch | Reserved | None]:
    """Make batches; None where the tenant has no such input file, and what its Idempotency-Key stands for where
    that is another. Repeating it changes nothing."""
    return [_create(cursor, one) for one in wanted]


def _create(cursor: Cursor, wanted: NewBatch) -> Batch | Reserved | None:
    key = wanted.idempotency
    with transaction(cursor):
        if key is not None:
            held_id, fingerprint = accept.hold_keys(cursor, [(key, wanted.id)])[key.api_key_id, key.key]
            if held_id != wanted.id:
                return Reserved(held_id, fingerprint, None)
        _insert(cursor, wanted)
        made = view(cursor, [(wanted.id, wanted.tenant)])[0]
        if made is None and key is not None:
            accept.release_key(cursor, key)
        return made


def _insert(cursor: Cursor, wanted: NewBatch) -> None:
    cursor.execute(
        """
        INSERT INTO batches (id, tenant, api_key_id, endpoint, input_file_id, completion_window, expires_at,
            metadata, output_ttl_s, webhook, output_file_id, error_file_id)
        SELECT %(id)s, %(tenant)s, %(key)s, %(endpoint)s, f.id, %(window)s,
            clock_timestamp() + %(window_s)s * interval '1 s', %(metadata)s, %(ttl)s, %(webhook)s, %(output)s,
            %(errors)s
        FROM files f WHERE f.id = %(input)s AND f.tenant = %(tenant)s AND f.is_whole AND f.purpose = 'batch'
            AND (f.expires_at IS NULL OR f.expires_at > clock_timestamp()) FOR SHARE
        ON CONFLICT DO NOTHING
        """,
        {
            "id": wanted.id,
            "tenant": wanted.tenant,
            "key": wanted.api_key_id,
            "endpoint": wanted.endpoint,
            "input": wanted.input_file_id,
            "window": wanted.completion_window,
            "window_s": wanted.window_s,
            "metadata": wanted.metadata,
            "ttl": wanted.output_ttl_s,
            "webhook": wanted.webhook,
            "output": output_id(wanted.id),
            "errors": error_id(wanted.id),
        },
    )


def view(cursor: Cursor, wanted: Sequence[tuple[uuid.UUID, str]]) -> list[Batch | None]:
    """The batches with these (id, tenant); None for an unknown id and for another tenant's alike."""
    cursor.execute(f"SELECT {_VIEW} FROM batches WHERE id = ANY(%s)", ([one[0] for one in wanted],))  # noqa: S608
    found = {(batch.id, batch.tenant): batch for batch in _batches(cursor)}
    return [found.get(pair) for pair in wanted]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFilter:
    """A page of a tenant's batches. `after` is the last id of the page before."""

    tenant: str
    after: uuid.UUID | None = None
    limit: int = 20


def find(cursor: Cursor, filters: Sequence[BatchFilter]) -> list[list[Batch]]:
    """Pages of batches, newest first; one row more than `limit` tells the caller that there is another page."""
    return [_page(cursor, wanted) for wanted in filters]


def _page(cursor: Cursor, wanted: BatchFilter) -> list[Batch]:
    cursor.execute(
        f"""
        SELECT {_VIEW} FROM batches WHERE tenant = %(tenant)s AND (%(after)s IS NULL OR (created_at, id) <
            (SELECT created_at, id FROM batches WHERE id = %(after)s AND tenant = %(tenant)s))
        ORDER BY created_at DESC, id DESC LIMIT %(limit)s + 1
        """,  # noqa: S608 - column names from this file alone
        {name: getattr(wanted, name) for name in BatchFilter.__slots__},
    )
    return _batches(cursor)


def cancel(cursor: Cursor, wanted: Sequence[tuple[uuid.UUID, str]]) -> list[Batch | None]:
    """Ask that batches (id, tenant) end early, where that is still possible; as they stand then."""
    cursor.execute(
        """
        UPDATE batches SET status = 'cancelling', cancelling_at = clock_timestamp()
        WHERE (id, tenant) IN (SELECT * FROM unnest(%s, %s::text[])) AND status IN ('validating', 'in_progress')
        """,
        ([one[0] for one in wanted], [one[1] for one in wanted]),
    )
    return view(cursor, wanted)


def live(cursor: Cursor) -> list[Batch]:
    """The batches that have not ended, oldest first."""
    cursor.execute(f"SELECT {_VIEW} FROM batches WHERE status IN ({_LIVE}) ORDER BY created_at, id")  # noqa: S608
    return _batches(cursor)


@dataclass(frozen=True, slots=True)
class NewItem:
    """A line that was found good, and where it lies in the input file."""

    batch_id: uuid.UUID
    line: int
    custom_id: str
    model: str
    start: int
    num_bytes: int


def add_items(cursor: Cursor, groups: Sequence[Sequence[NewItem]]) -> list[None]:
    """Record lines of batches that are being validated. Repeating it changes nothing."""
    execute_values(
        cursor,
        """
        INSERT INTO batch_items (batch_id, line, custom_id, model, start, num_bytes)
        SELECT i.* FROM (VALUES %s) i (batch_id, line, custom_id, model, start, num_bytes)
        JOIN batches b ON b.id = i.batch_id AND b.status = 'validating' ON CONFLICT DO NOTHING
        """,
        [(i.batch_id, i.line, i.custom_id, i.model, i.start, i.num_bytes) for group in groups for i in group],
        template="(%s::uuid, %s::int, %s, %s, %s::bigint, %s::int)",
        page_size=1000,
    )
    return [None] * len(groups)


@dataclass(frozen=True, slots=True)
class Valid:
    """A batch whose every line was found good."""

    id: uuid.UUID
    num_total: int
    model: str | None


def begin(cursor: Cursor, valid: Sequence[Valid]) -> list[None]:
    """From validating to in_progress."""
    for one in valid:
        cursor.execute(
            """
            UPDATE batches SET status = 'in_progress', in_progress_at = clock_timestamp(), num_total = %s, model = %s
            WHERE id = %s AND status = 'validating'
            """,
            (one.num_total, one.model, one.id),
        )
    return [None] * len(valid)


def fail(cursor: Cursor, failed: Sequence[tuple[uuid.UUID, list[dict[str, Any]]]]) -> list[None]:
    """From validating to failed, with what is wrong with the input."""
    for batch_id, errors in failed:
        with transaction(cursor):
            cursor.execute(
                """
                UPDATE batches SET status = 'failed', failed_at = clock_timestamp(), errors = %s,
                    output_file_id = NULL, error_file_id = NULL
                WHERE id = %s AND status = 'validating' RETURNING tenant, webhook::text
                """,
                (orjson.dumps(errors).decode(), batch_id),
            )
            if (row := cursor.fetchone()) is not None:
                cursor.execute("DELETE FROM batch_items WHERE batch_id = %s", (batch_id,))
                _tell(cursor, batch_id, BatchStatus.FAILED, *row)
    return [None] * len(failed)


def _tell(cursor: Cursor, batch_id: uuid.UUID, status: BatchStatus, tenant: str, webhook: str | None) -> None:
    if webhook is not None:
        webhooks.emit(cursor, tenant, webhook, f"batch.{status}", f"batch_{batch_id.hex}")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A page of a batch's unanswered lines of one model, after a line."""

    batch_id: uuid.UUID
    model: str
    after: int


@dataclass(frozen=True, slots=True)
class Item:
    """An unanswered line, as it stands in the input."""

    line: int
    custom_id: str
    text: bytes


_PAGE_ITEMS = 512


def items(cursor: Cursor, wanted: Sequence[Wanted]) -> list[list[Item]]:
    """Pages of unanswered lines: at most 512, and of more than one at most a mebibyte."""
    return [_items(cursor, one) for one in wanted]


def _items(cursor: Cursor, wanted: Wanted) -> list[Item]:
    cursor.execute(
        """
        WITH ahead AS (SELECT line, custom_id, start, num_bytes FROM batch_items
            WHERE batch_id = %(batch)s AND model = %(model)s AND line > %(after)s ORDER BY line LIMIT %(limit)s),
        page AS (SELECT *, sum(num_bytes) OVER (ORDER BY line) - num_bytes AS before FROM ahead)
        SELECT p.line, p.custom_id, string_agg(substring(c.data FROM greatest(p.start - c.start, 0)::int + 1
                FOR (p.start + p.num_bytes - greatest(p.start, c.start))::int), ''::bytea ORDER BY c.start)
        FROM page p JOIN batches b ON b.id = %(batch)s
        JOIN file_chunks c ON c.file_id = b.input_file_id
            AND c.start >= p.start / %(chunk)s * %(chunk)s AND c.start < p.start + p.num_bytes
        WHERE p.before + p.num_bytes <= %(chunk)s OR p.before = 0 GROUP BY p.line, p.custom_id ORDER BY p.line
        """,
        {
            "batch": wanted.batch_id,
            "model": wanted.model,
            "after": wanted.after,
            "limit": _PAGE_ITEMS,
            "chunk": CHUNK_BYTES,
        },
    )
    return [Item(row[0], row[1], bytes(row[2])) for row in cursor.fetchall()]


def models(cursor: Cursor, ids: Sequence[uuid.UUID]) -> list[list[str]]:
    """The models that each batch's unanswered lines name."""
    cursor.execute("SELECT DISTINCT batch_id, model FROM batch_items WHERE batch_id = ANY(%s)", (list(ids),))
    rows = cursor.fetchall()
    return [sorted(row[1] for row in rows if row[0] == batch_id) for batch_id in ids]


def left(cursor: Cursor, ids: Sequence[uuid.UUID]) -> list[list[tuple[int, str]]]:
    """The first unanswered lines of each batch: (line, custom_id)."""
    answers = []
    for batch_id in ids:
        cursor.execute(
            "SELECT line, custom_id FROM batch_items WHERE batch_id = %s ORDER BY line LIMIT %s",
            (batch_id, _PAGE_ITEMS),
        )
        answers.append([(row[0], row[1]) for row in cursor.fetchall()])
    return answers


@dataclass(frozen=True, slots=True)
class Answer:
    """What a line of the input comes to: a line of the output, or of the errors."""

    batch_id: uuid.UUID
    line: int
    text: bytes
    is_error: bool
    input_tokens: int = 0
    output_tokens: int = 0


def settle(cursor: Cursor, answers: Sequence[Answer]) -> list[None]:
    """Write answers, each once: those whose line has been answered before are passed over."""
    groups: dict[uuid.UUID, dict[int, Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.batch_id, {})[answer.line] = answer
    for batch_id, group in sorted(groups.items()):
        with transaction(cursor):
            _settle(cursor, batch_id, group)
    return [None] * len(answers)


def _settle(cursor: Cursor, batch_id: uuid.UUID, group: dict[int, Answer]) -> None:
    cursor.execute("SELECT tenant FROM batches WHERE id = %s FOR NO KEY UPDATE", (batch_id,))
    row = cursor.fetchone()
    cursor.execute(
        "DELETE FROM batch_items WHERE batch_id = %s AND line = ANY(%s) RETURNING line", (batch_id, list(group))
    )
    first = [group[line] for line in sorted(found[0] for found in cursor.fetchall())]
    if row is None or not first:
        return
    done, failed = [one for one in first if not one.is_error], [one for one in first if one.is_error]
    for file_id, part in ((output_id(batch_id), done), (error_id(batch_id), failed)):
        if part:
            files.append(cursor, file_id, row[0], b"".join(one.text for one in part))
    cursor.execute(
        """
        UPDATE batches SET num_completed = num_completed + %s, num_failed = num_failed + %s,
            input_tokens = input_tokens + %s, output_tokens = output_tokens + %s WHERE id = %s
        """,
        (len(done), len(failed), sum(one.input_tokens for one in first), sum(one.output_tokens for one in first),
         batch_id),
    )  # fmt: skip


def finalize(cursor: Cursor, ids: Sequence[uuid.UUID]) -> list[bool]:
    """From in_progress to finalizing, where every line has its answer; whether that is so by now."""
    cursor.execute(
        """
        UPDATE batches b SET status = 'finalizing', finalizing_at = clock_timestamp()
        WHERE id = ANY(%s) AND status = 'in_progress' AND NOT EXISTS (SELECT FROM batch_items WHERE batch_id = b.id)
        """,
        (list(ids),),
    )
    cursor.execute("SELECT id FROM batches WHERE id = ANY(%s) AND status = 'finalizing'", (list(ids),))
    final = {row[0] for row in cursor.fetchall()}
    return [batch_id in final for batch_id in ids]


def end(cursor: Cursor, endings: Sequence[tuple[uuid.UUID, BatchStatus]]) -> list[None]:
    """End batches that have no unanswered lines, and show their files."""
    for batch_id, status in endings:
        with transaction(cursor):
            _end(cursor, batch_id, status)
    return [None] * len(endings)


def _end(cursor: Cursor, batch_id: uuid.UUID, status: BatchStatus) -> None:
    assert status in (BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED)
    cursor.execute(
        f"""
        UPDATE batches b SET status = %(status)s, {status}_at = clock_timestamp(),
            output_file_id = (SELECT id FROM files f WHERE f.id = b.output_file_id),
            error_file_id = (SELECT id FROM files f WHERE f.id = b.error_file_id)
        WHERE id = %(id)s AND status IN ({_LIVE}) AND NOT EXISTS (SELECT FROM batch_items WHERE batch_id = b.id)
        RETURNING output_ttl_s, tenant, webhook::text
        """,  # noqa: S608 - words from db.models
        {"id": batch_id, "status": str(status)},
    )
    row = cursor.fetchone()
    if row is None:
        return
    for file_id, what in ((output_id(batch_id), "output"), (error_id(batch_id), "error")):
        cursor.execute(
            """
            UPDATE files SET is_whole = true, filename = %s, purpose = 'batch_output', created_at = clock_timestamp(),
                expires_at = clock_timestamp() + %s * interval '1 s' WHERE id = %s
            """,
            (f"batch_{batch_id.hex}_{what}.jsonl", row[0], file_id),
        )
    _tell(cursor, batch_id, status, *row[1:])


def forget_items(cursor: Cursor, ids: Sequence[uuid.UUID]) -> list[None]:
    """Drop the lines of batches that were cancelled before all of them were known."""
    cursor.execute(
        """
        DELETE FROM batch_items WHERE batch_id IN
            (SELECT id FROM batches WHERE id = ANY(%s) AND in_progress_at IS NULL AND status = 'cancelling')
        """,
        (list(ids),),
    )
    return [None] * len(ids)


def others(cursor: Cursor, priorities: Sequence[int]) -> list[dict[str, int]]:
    """How many live jobs each backend has that go before those of this priority."""
    cursor.execute(
        """
        SELECT backend, priority, count(*) FROM jobs
        WHERE status IN ('queued', 'running') AND leader_id IS NULL GROUP BY backend, priority
        """
    )
    rows = cursor.fetchall()
    return [_before(priority, rows) for priority in priorities]


def _before(priority: int, rows: Sequence[tuple[Any, ...]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for backend, number, num_live in rows:
        if number < priority:
            found[backend] = found.get(backend, 0) + num_live
    return found


def purge(cursor: Cursor, limit: int = 20) -> int:
    """Delete batches that ended long ago; their files go by their own time. Answers how many."""
    cursor.execute(
        f"""
        DELETE FROM batches WHERE id IN (SELECT id FROM batches WHERE status NOT IN ({_LIVE})
            AND coalesce(completed_at, failed_at, expired_at, cancelled_at)
                < clock_timestamp() - %s * interval '1 day' LIMIT %s)
        """,  # noqa: S608 - words from db.models
        (_KEPT_DAYS, limit),
    )
    return cursor.rowcount
