"""Batches as rows: made once, ended once, with word to whoever asked for it in the same transaction."""

import contextlib
import uuid
from collections.abc import Iterator
from typing import Any

import psycopg2
import pytest

from db import accept, batches, files, session
from db.accept import Idempotency, Reserved
from db.batches import Answer, Batch, NewBatch, NewItem, Valid
from db.files import Chunk, Finished
from db.session import Cursor
from db.states import BatchStatus
from tests.db.test_jobs import new

KEY_ID = uuid.uuid4()
HOOK = '{"url": "http://receiver/"}'


@pytest.fixture
def cursor(database_url: str) -> Iterator[Cursor]:
    connection = session.connect(database_url, "tests")
    with contextlib.closing(connection), connection.cursor() as opened:
        opened.execute(
            "TRUNCATE jobs, job_results, idempotency_keys, files, file_chunks, batches, batch_items, webhook_deliveries"
        )
        yield opened


def uploaded(cursor: Cursor) -> uuid.UUID:
    file_id = uuid.uuid4()
    files.put(cursor, [Chunk(file_id, "t", 0, b"{}\n{}\n")])
    files.finish(cursor, [Finished(file_id, "x", "batch", 6, 3600)])
    return file_id


def wanted(file_id: uuid.UUID, key: str | None = None, fingerprint: bytes = b"f", **fields: Any) -> NewBatch:
    held = None if key is None else Idempotency(KEY_ID, key, fingerprint)
    defaults: dict[str, Any] = {
        "id": uuid.uuid4(), "tenant": "t", "api_key_id": KEY_ID, "endpoint": "/v1/completions", "input_file_id": file_id,
        "completion_window": "24h", "window_s": 86_400, "metadata": None, "output_ttl_s": 3600, "webhook": HOOK,
        "idempotency": held,
    }  # fmt: skip
    return NewBatch(**defaults | fields)


def made(cursor: Cursor, **fields: Any) -> Batch:
    found = batches.create(cursor, [wanted(uploaded(cursor), **fields)])[0]
    assert isinstance(found, Batch)
    return found


def begun(cursor: Cursor, num_lines: int = 2) -> Batch:
    batch = made(cursor)
    batches.add_items(cursor, [[NewItem(batch.id, n, f"id-{n}", "m", 0, 2) for n in range(1, num_lines + 1)]])
    batches.begin(cursor, [Valid(batch.id, num_lines, "m")])
    return batch


def answer(cursor: Cursor, batch: Batch, *lines: int) -> None:
    batches.settle(cursor, [Answer(batch.id, line, b"{}\n", is_error=False) for line in lines])


def deliveries(cursor: Cursor) -> list[Any]:
    cursor.execute("SELECT tenant, type, object_id, body::jsonb -> 'data' FROM webhook_deliveries ORDER BY created_at")
    return cursor.fetchall()


def status(cursor: Cursor, batch: Batch) -> BatchStatus:
    found = batches.view(cursor, [(batch.id, "t")])[0]
    assert found is not None
    return found.status


def test_a_key_makes_one_batch(cursor: Cursor) -> None:
    file_id = uploaded(cursor)
    first, again, other = wanted(file_id, "k"), wanted(file_id, "k"), wanted(file_id, "k", b"other")
    batch = batches.create(cursor, [first])[0]
    assert isinstance(batch, Batch)
    assert batches.create(cursor, [first]) == [batch], "a lost answer may be asked for again"
    held = Reserved(first.id, b"f", None)
    assert batches.create(cursor, [again, other]) == [held, held]
    cursor.execute("SELECT count(*) FROM batches")
    assert cursor.fetchall() == [(1,)]


def test_a_refused_batch_leaves_its_key_free(cursor: Cursor) -> None:
    assert batches.create(cursor, [wanted(uuid.uuid4(), "k")]) == [None]
    assert accept.find_key(cursor, [(KEY_ID, "k")]) == [None]
    assert isinstance(batches.create(cursor, [wanted(uploaded(cursor), "k")])[0], Batch)


def test_a_key_is_of_a_job_or_of_a_batch(cursor: Cursor) -> None:
    job, file_id = new(), uploaded(cursor)
    accept.insert_once(cursor, [(Idempotency(KEY_ID, "job", b"j"), job)])
    assert batches.create(cursor, [wanted(file_id, "job")]) == [Reserved(job.id, b"j", None)]
    asked = wanted(file_id, "batch")
    batches.create(cursor, [asked])
    found = accept.insert_once(cursor, [(Idempotency(KEY_ID, "batch", b"j"), new())])
    assert found == [Reserved(asked.id, b"f", None)]
    cursor.execute("SELECT count(*) FROM jobs")
    assert cursor.fetchall() == [(1,)]


def test_a_batch_that_fails_tells_so_once(cursor: Cursor) -> None:
    batch = made(cursor)
    for _ in range(2):
        batches.fail(cursor, [(batch.id, [{"code": "empty_file"}])])
    name = f"batch_{batch.id.hex}"
    assert deliveries(cursor) == [("t", "batch.failed", name, {"id": name})]


@pytest.mark.parametrize("ending", [BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED])
def test_a_batch_tells_once_how_it_ended(cursor: Cursor, ending: BatchStatus) -> None:
    batch = begun(cursor)
    answer(cursor, batch, 1)
    batches.end(cursor, [(batch.id, ending)])
    assert (status(cursor, batch), deliveries(cursor)) == (BatchStatus.IN_PROGRESS, []), "a line has no answer yet"
    answer(cursor, batch, 2)
    for late in (ending, BatchStatus.CANCELLED):
        batches.end(cursor, [(batch.id, late)])
    assert status(cursor, batch) == ending
    assert [row[1] for row in deliveries(cursor)] == [f"batch.{ending}"]


def test_only_the_events_that_are_asked_for_are_told(cursor: Cursor) -> None:
    batch = made(cursor, webhook='{"url": "http://receiver/", "events": ["batch.completed"]}')
    batches.fail(cursor, [(batch.id, [])])
    silent = made(cursor, webhook=None)
    batches.fail(cursor, [(silent.id, [])])
    assert deliveries(cursor) == []


@pytest.mark.parametrize("ending", [BatchStatus.FAILED, BatchStatus.COMPLETED])
def test_no_end_without_word_of_it(cursor: Cursor, ending: BatchStatus) -> None:
    batch = made(cursor) if ending == BatchStatus.FAILED else begun(cursor)
    answer(cursor, batch, 1, 2)
    before = status(cursor, batch)
    cursor.execute("ALTER TABLE webhook_deliveries ADD CONSTRAINT refused CHECK (object_id = '')")
    try:
        with pytest.raises(psycopg2.errors.CheckViolation):
            if ending == BatchStatus.FAILED:
                batches.fail(cursor, [(batch.id, [])])
            else:
                batches.end(cursor, [(batch.id, ending)])
    finally:
        cursor.execute("ALTER TABLE webhook_deliveries DROP CONSTRAINT refused")
    assert status(cursor, batch) == before


def test_others_are_those_who_go_before(cursor: Cursor) -> None:
    def job(backend: str, priority: int) -> uuid.UUID:
        return accept.insert(cursor, [new(backend=backend, priority=priority)])[0].id

    for backend, priority in (("a", 0), ("a", 1), ("a", 2), ("a", 3), ("b", 3), ("c", 1)):
        job(backend, priority)
    ended = job("c", 1)
    cursor.execute("UPDATE jobs SET status = 'cancelled', finished_at = clock_timestamp() WHERE id = %s", (ended,))
    assert batches.others(cursor, [3, 1]) == [{"a": 3, "c": 1}, {"a": 1}]
