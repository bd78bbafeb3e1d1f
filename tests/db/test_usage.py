"""Usage against a real Postgres: every end counted once, whatever ended it and whatever becomes of the job."""

import contextlib
import datetime
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from db import accept, flights, jobs, recovery, removal, request_log, session, usage
from db.jobs import Claimed, Ended, Finished
from db.request_log import Entry
from db.session import Cursor
from db.usage import Usage, Wanted
from tests.db.test_jobs import new, worker

TODAY = datetime.datetime.now(datetime.UTC).date()
KEY = uuid.uuid4()


@pytest.fixture
def cursor(database_url: str) -> Iterator[Cursor]:
    connection = session.connect(database_url, "tests")
    with contextlib.closing(connection), connection.cursor() as opened:
        opened.execute("TRUNCATE jobs, job_results, workers, usage_entries, usage_days")
        yield opened


def accepted(cursor: Cursor, **fields: Any) -> uuid.UUID:
    job = new(**{"api_key_id": KEY, "input_price": 2, "output_price": 5, **fields})
    return accept.insert(cursor, [job])[0].id


def run(cursor: Cursor, job_id: uuid.UUID, **ending: Any) -> None:
    life = worker(cursor)
    claimed = jobs.claim(cursor, [(job_id, life)])[0]
    assert isinstance(claimed, Claimed)
    if ending:
        error = Ended(id=job_id, run=claimed.run, worker_id=life, code="backend_error", message="", **ending)
        assert jobs.end(cursor, [error]) != [None]
        return
    done = Finished(id=job_id, run=claimed.run, worker_id=life, body=b"", sha256=b"", ttft_ms=1.0, timings="{}",
                    usage='{"prompt_tokens": 3, "completion_tokens": 4}')  # fmt: skip
    assert jobs.finish(cursor, [done]) != [None]


def found(cursor: Cursor, **fields: Any) -> list[Usage]:
    wanted = Wanted(**{"start": TODAY - datetime.timedelta(1), "end": TODAY, "by": ("model",), **fields})
    return usage.find(cursor, [wanted])[0]


def counts(one: Usage) -> dict[str, int]:
    return {name: number for name, number in one.num.items() if number}


def test_every_way_of_ending_is_counted_once(cursor: Cursor) -> None:
    run(cursor, accepted(cursor))
    run(cursor, accepted(cursor), is_retryable=False)
    run(cursor, accepted(cursor), is_retryable=True)  # queued again: no end
    jobs.cancel(cursor, [(accepted(cursor), "t")])
    accepted(cursor, timeout_s=0.0)
    assert len(recovery.expire(cursor)) == 1
    leader = accepted(cursor, coalesce_key=b"same")
    accepted(cursor, coalesce_key=b"same")
    run(cursor, leader)
    assert len(flights.land(cursor, [leader])) == 1
    once = found(cursor)
    assert [counts(one) for one in once] == [{"succeeded": 2, "failed": 1, "cancelled": 1, "expired": 1, "shared": 1}]
    assert (once[0].prompt_tokens, once[0].completion_tokens, once[0].cost_nano) == (6, 8, 2 * (3 * 2 + 4 * 5))
    assert usage.add_up(cursor) == 6
    assert usage.add_up(cursor) == 0
    assert found(cursor) == once


def test_what_is_removed_stays_counted(cursor: Cursor) -> None:
    job_id = accepted(cursor)
    run(cursor, job_id)
    removal.delete(cursor, [(job_id, "t")])
    assert counts(found(cursor)[0]) == {"succeeded": 1}


def test_a_retried_job_counts_each_end(cursor: Cursor) -> None:
    job_id = accepted(cursor)
    run(cursor, job_id, is_retryable=False)
    usage.add_up(cursor)
    jobs.retry(cursor, [(job_id, "t")])
    run(cursor, job_id)
    usage.add_up(cursor)
    assert counts(found(cursor)[0]) == {"succeeded": 1, "failed": 1}


def test_an_end_that_is_rolled_back_was_none(cursor: Cursor) -> None:
    job_id = accepted(cursor)
    with contextlib.suppress(ZeroDivisionError), session.transaction(cursor):
        jobs.cancel(cursor, [(job_id, "t")])
        raise ZeroDivisionError
    assert found(cursor) == []


def test_answers_from_the_cache_are_counted_by_key(cursor: Cursor) -> None:
    def entry(verdict: str, key: uuid.UUID = KEY) -> Entry:
        return Entry(request_id="r", endpoint="/v1/completions", tenant="t", api_key_id=key, model="m",
                     cache_verdict=verdict)  # fmt: skip

    other = uuid.uuid4()
    request_log.append(cursor, [entry("HIT"), entry("HIT"), entry("MISS; not stored"), entry("HIT", other)])
    sums = found(cursor, by=("api_key_id",))
    assert {one.of["api_key_id"]: counts(one) for one in sums} == {str(KEY): {"cached": 2}, str(other): {"cached": 1}}


def test_sums_are_narrowed_and_end_with_one_more(cursor: Cursor) -> None:
    for tenant, model in (("a", "m"), ("a", "n"), ("b", "m")):
        jobs.cancel(cursor, [(accepted(cursor, tenant=tenant, model=model), tenant)])
    usage.add_up(cursor, limit=2)  # the rest is read from the entries
    assert [one.of for one in found(cursor, by=("tenant", "model"))] == [
        {"tenant": "a", "model": "m"}, {"tenant": "a", "model": "n"}, {"tenant": "b", "model": "m"},
    ]  # fmt: skip
    assert [one.of["model"] for one in found(cursor, tenant="a")] == ["m", "n"]
    assert len(found(cursor, by=("tenant", "model"), limit=1)) == 2
    assert found(cursor, end=TODAY - datetime.timedelta(1)) == []
    assert found(cursor, api_key_id=uuid.uuid4()) == []


def test_many_that_add_up_at_once_count_nothing_twice(cursor: Cursor, database_url: str) -> None:
    usage.add_hits(cursor, {("t", uuid.uuid4(), "m"): 1 for _ in range(2000)})

    def add_up() -> None:
        with contextlib.closing(session.connect(database_url, "tests")) as connection, connection.cursor() as mine:
            while usage.add_up(mine, limit=50):
                pass

    threads = [threading.Thread(target=add_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cursor.execute("SELECT (SELECT count(*) FROM usage_entries), (SELECT sum(num_cached) FROM usage_days)")
    assert cursor.fetchone() == (0, 2000)
