"""Deliveries are left by every way a job can end, in the transaction that ends it; and removal of jobs."""

import contextlib
import hashlib
import json
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from db import accept, flights, job_views, jobs, recovery, removal, session, webhooks, workers
from db.accept import NewJob
from db.jobs import Ended, Finished
from db.session import Cursor
from db.states import JobStatus
from db.webhooks import Filter, Tried

HOOK = '{"url": "http://receiver/"}'


@pytest.fixture
def cursor(database_url: str) -> Iterator[Cursor]:
    connection = session.connect(database_url, "tests")
    with contextlib.closing(connection), connection.cursor() as opened:
        opened.execute(
            "TRUNCATE jobs, job_results, workers, response_cache, webhook_deliveries, webhook_secrets, webhook_gone"
        )
        yield opened


def queued(cursor: Cursor, **fields: Any) -> uuid.UUID:
    defaults: dict[str, Any] = {
        "id": uuid.uuid4(), "tenant": "t", "api_key_id": None, "request_id": "r", "endpoint": "/v1/completions",
        "task": "generate", "requested_model": "m", "model": "m", "model_revision": "1", "backend": "echo",
        "is_stream": False, "payload": b"{}", "metadata": None, "decision": "{}", "cache_verdict": "MISS",
        "cache_key": None, "cache_ttl_s": None, "is_cache_refresh": False, "prompt_tokens": 3, "timings": "{}",
        "webhook": HOOK,
    }  # fmt: skip
    return accept.insert(cursor, [NewJob(**defaults | fields)])[0].id


def claimed(cursor: Cursor, **fields: Any) -> tuple[uuid.UUID, int]:
    job_id = queued(cursor, **fields)
    worker_id = workers.register(cursor, f"w{job_id}", "echo", 1, 4, {}, 60)
    assert jobs.claim(cursor, [(job_id, worker_id)])[0] is not None
    return job_id, worker_id


def finish(cursor: Cursor, job_id: uuid.UUID, worker_id: int, body: bytes = b"{}") -> None:
    outcome = Finished(id=job_id, run=0, worker_id=worker_id, body=body, sha256=hashlib.sha256(body).digest(),
                       usage="{}", ttft_ms=1.0, timings="{}")  # fmt: skip
    assert jobs.finish(cursor, [outcome]) != [None]


def succeed(cursor: Cursor, **fields: Any) -> uuid.UUID:
    job_id, worker_id = claimed(cursor, **fields)
    finish(cursor, job_id, worker_id)
    return job_id


def truncated(cursor: Cursor, **fields: Any) -> uuid.UUID:
    job_id, worker_id = claimed(cursor, **fields)
    finish(cursor, job_id, worker_id, b'{"choices":[{"index":0,"finish_reason":"length"}]}')
    return job_id


def quoted(cursor: Cursor, **fields: Any) -> uuid.UUID:
    job_id, worker_id = claimed(cursor, **fields)
    text = json.dumps(
        {"choices": [{"finish_reason": "stop", "text": '"finish_reason":"length"'}]}, separators=(",", ":")
    )
    finish(cursor, job_id, worker_id, text.encode())
    return job_id


def fail(cursor: Cursor, **fields: Any) -> uuid.UUID:
    job_id, worker_id = claimed(cursor, **fields)
    ending = Ended(id=job_id, run=0, worker_id=worker_id, code="backend_error", message="x")
    assert jobs.end(cursor, [ending]) == [JobStatus.FAILED]
    return job_id


def cancel(cursor: Cursor, **fields: Any) -> uuid.UUID:
    job_id = queued(cursor, **fields)
    jobs.cancel(cursor, [(job_id, "t")])
    return job_id


def expire(cursor: Cursor, **fields: Any) -> uuid.UUID:
    job_id = queued(cursor, deadline=1.0, **fields)
    assert recovery.expire(cursor) == [job_id]
    return job_id


def exhaust(cursor: Cursor, **fields: Any) -> uuid.UUID:
    job_id, worker_id = claimed(cursor, **fields)
    assert recovery.rescue(cursor, [worker_id], max_attempts=1)[0][3] == "failed"
    return job_id


def told(cursor: Cursor) -> list[tuple[str, str]]:
    cursor.execute("SELECT type, object_id, body, status FROM webhook_deliveries ORDER BY created_at")
    found = []
    for kind, object_id, body, status in cursor.fetchall():
        event = json.loads(body)
        assert (event["object"], event["type"], event["data"], status) == ("event", kind, {"id": object_id}, "pending")
        found.append((kind, object_id))
    return found


@pytest.mark.parametrize(
    ("act", "as_job", "as_response"),
    [
        (succeed, "job.succeeded", "response.completed"),
        (quoted, "job.succeeded", "response.completed"),
        (truncated, "job.succeeded", "response.incomplete"),
        (fail, "job.failed", "response.failed"),
        (exhaust, "job.failed", "response.failed"),
        (cancel, "job.cancelled", "response.cancelled"),
        (expire, "job.expired", "response.failed"),
    ],
)
def test_every_ending_leaves_one_delivery(
    cursor: Cursor, act: Callable[..., uuid.UUID], as_job: str, as_response: str
) -> None:
    job_id = act(cursor)
    assert told(cursor) == [(as_job, str(job_id))]
    response_id = act(cursor, endpoint="/v1/responses")
    assert told(cursor)[1:] == [(as_response, f"resp_{response_id.hex}")]
    act(cursor, webhook=None)
    act(cursor, webhook=json.dumps({"url": "http://receiver/", "events": ["job.unheard"]}))
    assert len(told(cursor)) == 2
    act(cursor, webhook=json.dumps({"url": "http://receiver/", "events": [as_job]}))
    assert len(told(cursor)) == 3


def test_a_follower_tells_of_itself(cursor: Cursor) -> None:
    leader, worker_id = claimed(cursor, coalesce_key=b"k", webhook=None)
    follower = queued(cursor, coalesce_key=b"k")
    finish(cursor, leader, worker_id)
    flights.land(cursor, [leader])
    assert told(cursor) == [("job.succeeded", str(follower))]


def test_an_end_that_is_rolled_back_tells_nothing(cursor: Cursor) -> None:
    job_id, worker_id = claimed(cursor)
    cursor.execute("BEGIN")
    finish(cursor, job_id, worker_id)
    assert len(told(cursor)) == 1
    cursor.execute("ROLLBACK")
    assert told(cursor) == []


def test_others_leave_deliveries_in_their_own_transactions(cursor: Cursor) -> None:
    webhooks.emit(cursor, "t", HOOK, "batch.completed", "batch_1")
    webhooks.emit(cursor, "t", '{"url": "http://receiver/", "events": ["batch.failed"]}', "batch.completed", "batch_2")
    assert told(cursor) == [("batch.completed", "batch_1")]


def due(cursor: Cursor) -> list[webhooks.Due]:
    return webhooks.claim(cursor, [10])[0]


def test_a_delivery_is_claimed_by_one_and_again_when_its_time_comes(cursor: Cursor) -> None:
    _, text = webhooks.create_secret(cursor, ["t"])[0]
    succeed(cursor)
    [first] = due(cursor)
    assert (first.attempt, first.secrets) == (1, [text])
    assert due(cursor) == []
    webhooks.record(cursor, [Tried(id=first.id, attempt=1, status="pending", after_s=0, last_status=500)])
    [second] = due(cursor)
    assert (second.id, second.attempt) == (first.id, 2)
    # Late news of the first attempt changes nothing.
    webhooks.record(cursor, [Tried(id=first.id, attempt=1, status="failed")])
    webhooks.record(cursor, [Tried(id=first.id, attempt=2, status="delivered", last_status=200)])
    cursor.execute("UPDATE webhook_deliveries SET next_at = clock_timestamp()")
    assert due(cursor) == []
    [[shown]] = webhooks.find(cursor, [Filter(tenant="t")])
    assert (shown.status, shown.attempts, shown.last_status) == ("delivered", 2, 200)
    assert webhooks.find(cursor, [Filter(tenant="other"), Filter(tenant="t", status="failed")]) == [[], []]


def test_who_dies_with_a_claim_loses_it(cursor: Cursor) -> None:
    succeed(cursor)
    [first] = due(cursor)
    cursor.execute("UPDATE webhook_deliveries SET next_at = next_at - %s * interval '1 s'", (webhooks._CLAIM_S,))
    assert [one.id for one in due(cursor)] == [first.id]


def test_gone_means_gone_until_asked_for_again(cursor: Cursor) -> None:
    succeed(cursor)
    succeed(cursor)
    first, second = due(cursor)
    webhooks.record(cursor, [Tried(id=first.id, attempt=1, status="disabled", last_status=410)])
    succeed(cursor)
    succeed(cursor, webhook='{"url": "http://elsewhere/"}')
    cursor.execute("UPDATE webhook_deliveries SET next_at = clock_timestamp()")
    assert [one.url for one in due(cursor)] == ["http://elsewhere/"]
    assert webhooks.redeliver(cursor, [(second.id, "stranger"), (uuid.uuid4(), "t")]) == [None, None]
    [again] = webhooks.redeliver(cursor, [(second.id, "t")])
    assert again is not None
    assert [one.id for one in due(cursor)] == [second.id]
    succeed(cursor)
    assert len(due(cursor)) == 1


def test_two_secrets_live_during_a_rotation(cursor: Cursor) -> None:
    texts = [webhooks.create_secret(cursor, ["t"])[0][1] for _ in range(3)]
    assert len(set(texts)) == 3
    succeed(cursor)
    assert due(cursor)[0].secrets == [texts[2], texts[1]]
    [living] = webhooks.list_secrets(cursor, ["t"])
    assert [one.expires_at is None for one in living] == [True, False]
    assert webhooks.list_secrets(cursor, ["other"]) == [[]]
    cursor.execute("UPDATE webhook_deliveries SET ended_at = clock_timestamp() - interval '2 s'")
    assert webhooks.purge(cursor, 1) == 1
    cursor.execute("SELECT count(*) FROM webhook_secrets")
    assert cursor.fetchone() == (2,)


def test_a_job_is_deleted_with_its_answer_and_its_cache_entry(cursor: Cursor) -> None:
    job_id = succeed(cursor, cache_key=b"k", cache_ttl_s=60)
    running, _ = claimed(cursor)
    stranger = [(job_id, "other"), (uuid.uuid4(), "t")]
    assert removal.delete(cursor, [*stranger, (running, "t"), (job_id, "t")]) == [
        None, None, JobStatus.RUNNING, JobStatus.SUCCEEDED
    ]  # fmt: skip
    for table in ("job_results", "response_cache"):
        cursor.execute(f"SELECT count(*) FROM {table}")
        assert cursor.fetchone() == (0,)
    assert removal.delete(cursor, [(job_id, "t")]) == [None]


def test_a_deleted_leaders_answer_stays_its_followers(cursor: Cursor) -> None:
    leader, worker_id = claimed(cursor, coalesce_key=b"k", webhook=None)
    first, second = (queued(cursor, coalesce_key=b"k", webhook=None) for _ in range(2))
    finish(cursor, leader, worker_id, b"answer")
    # One has landed by then, the other has not.
    cursor.execute("UPDATE jobs SET status = 'succeeded', finished_at = clock_timestamp() WHERE id = %s", (first,))
    assert removal.delete(cursor, [(leader, "t")]) == [JobStatus.SUCCEEDED]
    outcomes = job_views.outcome(cursor, [first, second])
    assert [(one.status, one.body) for one in outcomes if one] == [(JobStatus.SUCCEEDED, b"answer")] * 2
    assert removal.delete(cursor, [(first, "t")]) == [JobStatus.SUCCEEDED]
    [last] = job_views.outcome(cursor, [second])
    assert last is not None
    assert last.body == b"answer"


def test_a_deleted_cancelled_leader_strands_nobody(cursor: Cursor) -> None:
    leader = queued(cursor, coalesce_key=b"k", webhook=None)
    follower = queued(cursor, coalesce_key=b"k", webhook=None)
    jobs.cancel(cursor, [(leader, "t")])
    removal.delete(cursor, [(leader, "t")])
    assert [row[0] for row in recovery.find_unsent(cursor, "echo", 0)] == [follower]


def test_a_result_may_be_kept_for_less(cursor: Cursor) -> None:
    short, long = succeed(cursor, result_ttl_s=5), succeed(cursor, result_ttl_s=500)
    cursor.execute("UPDATE jobs SET finished_at = finished_at - interval '10 s'")
    assert recovery.purge(cursor, 60) == 1
    assert [one is not None for one in job_views.outcome(cursor, [short, long])] == [False, True]


def test_jobs_are_found_by_their_metadata(cursor: Cursor) -> None:
    wanted = queued(cursor, metadata='{"run": "7", "x": "y"}')
    queued(cursor, metadata='{"run": "8"}')
    queued(cursor)
    found = job_views.find(cursor, [job_views.Filter(tenant="t", metadata='{"run": "7"}')])[0]
    assert [view.id for view in found] == [wanted]
