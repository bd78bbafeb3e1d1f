"""The ledger's statements against a real Postgres."""

import contextlib
import hashlib
import itertools
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from db import accept, job_views, jobs, recovery, session, workers
from db.accept import NewJob
from db.job_views import Filter
from db.jobs import Claimed, Ended, Finished
from db.session import Cursor
from db.states import TERMINAL, TRANSITIONS, JobStatus


@pytest.fixture
def cursor(database_url: str) -> Iterator[Cursor]:
    connection = session.connect(database_url, "tests")
    with contextlib.closing(connection), connection.cursor() as opened:
        opened.execute("TRUNCATE jobs, job_results, workers, response_cache")
        yield opened


names = itertools.count()


def worker(cursor: Cursor, lease_s: float = 60) -> int:
    return workers.register(cursor, f"w{next(names)}", "echo", 1, 4, {}, lease_s)


def new(**fields: Any) -> NewJob:
    defaults: dict[str, Any] = {
        "id": uuid.uuid4(), "tenant": "t", "api_key_id": None, "request_id": "r", "endpoint": "/v1/completions",
        "task": "generate", "requested_model": "m", "model": "m", "model_revision": "1", "backend": "echo",
        "is_stream": False, "payload": b"{}", "metadata": None, "decision": "{}", "cache_verdict": "MISS",
        "cache_key": None, "cache_ttl_s": None, "is_cache_refresh": False, "prompt_tokens": 3, "timings": "{}",
    }  # fmt: skip
    return NewJob(**defaults | fields)


def queued(cursor: Cursor, **fields: Any) -> NewJob:
    job = new(**fields)
    accept.insert(cursor, [job])
    return job


def claimed(cursor: Cursor, worker_id: int, **fields: Any) -> NewJob:
    job = queued(cursor, **fields)
    assert jobs.claim(cursor, [(job.id, worker_id)])[0] is not None
    return job


def result(job: NewJob, worker_id: int, run: int = 0, body: bytes = b"body") -> Finished:
    return Finished(id=job.id, run=run, worker_id=worker_id, body=body, sha256=hashlib.sha256(body).digest(),
                    usage='{"prompt_tokens": 3}', ttft_ms=1.0, timings="{}")  # fmt: skip


def ending(job: NewJob, worker_id: int, run: int = 0, **fields: Any) -> Ended:
    return Ended(id=job.id, run=run, worker_id=worker_id, **{"code": "backend_error", "message": "x"} | fields)


def state(cursor: Cursor, job: NewJob) -> job_views.View:
    found = job_views.view(cursor, [(job.id, None)])[0]
    assert found is not None
    return found


def test_a_repeated_insert_changes_nothing(cursor: Cursor) -> None:
    job = new()
    first = accept.insert(cursor, [job])
    assert accept.insert(cursor, [replace(job, model="other")]) == first
    assert state(cursor, job).model == "m"


def test_a_job_is_claimed_once_however_often_its_message_comes(cursor: Cursor) -> None:
    job, one, two = queued(cursor), worker(cursor), worker(cursor)
    answers = jobs.claim(cursor, [(job.id, one), (job.id, one), (uuid.uuid4(), one)])
    assert [answer is not None for answer in answers] == [True, False, False]
    assert jobs.claim(cursor, [(job.id, two)]) == [None]
    assert (state(cursor, job).status, state(cursor, job).attempt) == ("running", 1)


def test_one_of_many_racing_workers_wins(database_url: str, cursor: Cursor) -> None:
    ids, lives = [queued(cursor).id for _ in range(20)], [worker(cursor) for _ in range(6)]
    barrier = threading.Barrier(len(lives))
    won: list[uuid.UUID] = []

    def race(life: int) -> None:
        with contextlib.closing(session.connect(database_url, "tests")) as connection, connection.cursor() as own:
            barrier.wait()
            won.extend(
                job.id for job in jobs.claim(own, [(job_id, life) for job_id in ids]) if isinstance(job, Claimed)
            )

    threads = [threading.Thread(target=race, args=(life,)) for life in lives]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == sorted(ids)


def test_a_dead_worker_claims_nothing(cursor: Cursor) -> None:
    job, life = queued(cursor), worker(cursor)
    workers.leave(cursor, life)
    assert jobs.claim(cursor, [(job.id, life)]) == [None]


def test_finish_stores_state_result_and_cache_entry_together(cursor: Cursor) -> None:
    life = worker(cursor)
    job = claimed(cursor, life, cache_key=b"k" * 32, cache_ttl_s=60)
    assert jobs.finish(cursor, [result(job, life)]) == [0]
    outcome = job_views.outcome(cursor, [job.id])[0]
    assert outcome is not None
    assert (outcome.status, outcome.body, outcome.usage) == (JobStatus.SUCCEEDED, b"body", {"prompt_tokens": 3})
    cursor.execute("SELECT body, job_id FROM response_cache")
    assert [(bytes(row[0]), row[1]) for row in cursor.fetchall()] == [(b"body", job.id)]


def test_a_repeated_finish_is_still_mine_and_changes_nothing(cursor: Cursor) -> None:
    life = worker(cursor)
    job = claimed(cursor, life)
    assert jobs.finish(cursor, [result(job, life)]) == [0]
    assert jobs.finish(cursor, [result(job, life, body=b"other")]) == [0]
    assert job_views.outcome(cursor, [job.id])[0].body == b"body"  # type: ignore[union-attr]


def test_the_claim_of_a_stream_is_on_disk_before_it_is_answered(database_url: str) -> None:
    with contextlib.closing(session.connect(database_url, "tests", is_durable=False)) as connection:
        with connection.cursor() as cursor:
            life = worker(cursor)
            for _ in range(5):
                job = queued(cursor, is_stream=True)
                cursor.execute("SELECT pg_current_wal_insert_lsn()")
                before = cursor.fetchone()[0]  # type: ignore[index]
                assert isinstance(jobs.claim(cursor, [(job.id, life)])[0], Claimed)
                cursor.execute("SELECT pg_current_wal_flush_lsn() > %s::pg_lsn", (before,))
                assert cursor.fetchone() == (True,)
                cursor.execute("SHOW synchronous_commit")
                assert cursor.fetchone() == ("off",), "for this statement alone"


def test_the_fence_shuts_out_other_workers_and_earlier_runs(cursor: Cursor) -> None:
    one, two = worker(cursor), worker(cursor)
    job = claimed(cursor, one)
    assert jobs.finish(cursor, [result(job, two)]) == [None]
    assert recovery.rescue(cursor, [one], 3) == [(job.id, "echo", "generate", "queued")]
    assert jobs.claim(cursor, [(job.id, two)])[0].attempt == 2  # type: ignore[union-attr]
    assert jobs.finish(cursor, [result(job, one, 0, b"late")]) == [None]
    assert jobs.end(cursor, [ending(job, one, 0)]) == [None]
    assert jobs.finish(cursor, [result(job, two, 1, b"right")]) == [0]
    assert jobs.finish(cursor, [result(job, one, 0, b"later")]) == [None]
    assert job_views.outcome(cursor, [job.id])[0].body == b"right"  # type: ignore[union-attr]


def _release(cursor: Cursor, job: NewJob, life: int) -> None:
    jobs.end(cursor, [ending(job, life, is_retryable=True, is_counted=False)])


def _fail_and_retry(cursor: Cursor, job: NewJob, life: int) -> None:
    jobs.end(cursor, [ending(job, life)])
    jobs.retry(cursor, [(job.id, "t")])


@pytest.mark.parametrize("lose", [_release, _fail_and_retry])
def test_the_fence_shuts_out_an_earlier_run_of_the_same_worker_with_the_same_attempt_number(
    cursor: Cursor, lose: Callable[[Cursor, NewJob, int], None]
) -> None:
    life = worker(cursor)
    job = claimed(cursor, life)
    lose(cursor, job, life)
    again = jobs.claim(cursor, [(job.id, life)])[0]
    assert isinstance(again, Claimed)
    assert again.attempt == 1
    assert jobs.finish(cursor, [result(job, life, 0, b"late")]) == [None]
    assert jobs.end(cursor, [ending(job, life, 0)]) == [None]
    assert [(one.id, one.run) for one in jobs.owned(cursor, [life])[0]] == [(job.id, again.run)]
    assert jobs.finish(cursor, [result(job, life, again.run, b"right")]) == [0]
    assert jobs.finish(cursor, [result(job, life, 0, b"later")]) == [None]
    assert job_views.outcome(cursor, [job.id])[0].body == b"right"  # type: ignore[union-attr]


def test_only_the_first_answer_is_cached_unless_a_refresh_was_asked_for(cursor: Cursor) -> None:
    life, key = worker(cursor), {"cache_key": b"k" * 32, "cache_ttl_s": 60}
    first, second, third = (
        claimed(cursor, life, **key),
        claimed(cursor, life, **key),
        claimed(cursor, life, **key, is_cache_refresh=True),
    )
    stored = []
    for job, body in ((first, b"1"), (second, b"2"), (third, b"3")):
        jobs.finish(cursor, [result(job, life, body=body)])
        cursor.execute("SELECT body FROM response_cache")
        stored.append(bytes(cursor.fetchone()[0]))  # type: ignore[index]
    assert stored == [b"1", b"1", b"3"]


def test_twins_finishing_in_one_batch_make_one_cache_entry(cursor: Cursor) -> None:
    life, key = worker(cursor), {"cache_key": b"k" * 32, "cache_ttl_s": 60}
    twins = [claimed(cursor, life, **key) for _ in range(3)]
    assert jobs.finish(cursor, [result(job, life) for job in twins]) == [0] * 3


def test_attempts_are_counted_and_end(cursor: Cursor) -> None:
    life, job = worker(cursor), queued(cursor)
    states = []
    for run in (0, 1, 2):
        jobs.claim(cursor, [(job.id, life)])
        states += jobs.end(cursor, [ending(job, life, run, is_retryable=True)])
    assert states == [JobStatus.QUEUED, JobStatus.QUEUED, JobStatus.FAILED]
    view = state(cursor, job)
    assert view.error is not None
    assert view.error["code"] == "attempts_exhausted"
    assert [one["attempt"] for one in view.attempts] == [1, 2, 3]


def test_a_release_does_not_count(cursor: Cursor) -> None:
    life, job = worker(cursor), queued(cursor)
    for run in range(5):
        assert jobs.claim(cursor, [(job.id, life)])[0].attempt == 1  # type: ignore[union-attr]
        assert jobs.end(cursor, [ending(job, life, run, is_retryable=True, is_counted=False)]) == [JobStatus.QUEUED]


def test_what_can_never_succeed_fails_at_once(cursor: Cursor) -> None:
    life = worker(cursor)
    job = claimed(cursor, life)
    assert jobs.end(cursor, [ending(job, life, code="invalid_request")]) == [JobStatus.FAILED]
    assert state(cursor, job).error == {"code": "invalid_request", "message": "x", "param": None}


def test_cancel_is_final_and_only_for_the_tenant(cursor: Cursor) -> None:
    life = worker(cursor)
    waiting, running = queued(cursor), claimed(cursor, life)
    assert jobs.cancel(cursor, [(waiting.id, "t"), (running.id, "other"), (uuid.uuid4(), "t")]) == [
        "cancelled",
        None,
        None,
    ]
    assert jobs.cancel(cursor, [(running.id, "t")]) == ["cancelled"]
    assert jobs.finish(cursor, [result(running, life)]) == [None]
    assert jobs.claim(cursor, [(waiting.id, life)]) == [None]
    done = claimed(cursor, life)
    jobs.finish(cursor, [result(done, life)])
    assert jobs.cancel(cursor, [(done.id, "t")]) == ["succeeded"]


def test_deadlines_expire_queued_and_running_jobs(cursor: Cursor) -> None:
    life = worker(cursor)
    late, running, early = (
        queued(cursor, timeout_s=-1),
        claimed(cursor, life, timeout_s=60),
        queued(cursor, timeout_s=60, deadline=time.time() + 60),
    )
    passed = queued(cursor, timeout_s=60, deadline=1.0)
    cursor.execute("UPDATE jobs SET deadline_at = now() - interval '1 s' WHERE id = %s", (running.id,))
    assert jobs.claim(cursor, [(late.id, life)]) == [None], "a late job never reaches an engine"
    assert jobs.claim(cursor, [(passed.id, life)]) == [None], "the earlier of the two counts"
    assert sorted(recovery.expire(cursor)) == sorted([late.id, running.id, passed.id])
    assert jobs.finish(cursor, [result(running, life)]) == [None]
    assert state(cursor, early).status == "queued"


@pytest.mark.parametrize("end_it", [
    lambda cursor, job, life: jobs.finish(cursor, [result(job, life)]),
    lambda cursor, job, life: jobs.end(cursor, [ending(job, life)]),
    lambda cursor, job, life: jobs.cancel(cursor, [(job.id, "t")]),
])  # fmt: skip
def test_a_final_state_never_changes(cursor: Cursor, end_it: Callable[[Cursor, NewJob, int], object]) -> None:
    life = worker(cursor)
    job = claimed(cursor, life)
    end_it(cursor, job, life)
    before = state(cursor, job)
    assert before.status in TERMINAL
    jobs.finish(cursor, [result(job, life, body=b"other")])
    jobs.end(cursor, [ending(job, life, is_retryable=True)])
    jobs.cancel(cursor, [(job.id, "t")])
    jobs.claim(cursor, [(job.id, life)])
    recovery.rescue(cursor, [life], 3)
    cursor.execute("UPDATE jobs SET deadline_at = now() - interval '1 s' WHERE id = %s", (job.id,))
    recovery.expire(cursor)
    assert replace(state(cursor, job), deadline_at=before.deadline_at) == before


def test_unsent_jobs_are_found_once_per_patience(cursor: Cursor) -> None:
    job = queued(cursor)
    assert recovery.find_unsent(cursor, "echo", 5) == []
    cursor.execute("UPDATE jobs SET enqueued_at = now() - interval '6 s'")
    assert recovery.find_unsent(cursor, "bert", 5) == []
    assert recovery.find_unsent(cursor, "echo", 5) == [(job.id, "echo", "generate")]
    assert recovery.find_unsent(cursor, "echo", 5) == []


def test_a_lost_lease_or_lock_is_a_death(database_url: str, cursor: Cursor) -> None:
    hung, healthy, crashed = worker(cursor, 0), worker(cursor), worker(cursor)
    owned = {life: claimed_by(cursor, life) for life in (healthy, crashed)}
    cursor.execute("UPDATE workers SET heartbeat_at = now() - interval '3 s' WHERE id IN (%s, %s)", (healthy, crashed))
    cursor.execute("SELECT pg_postmaster_start_time() < clock_timestamp() - interval '10 s'")
    believes_locks = cursor.fetchone()[0]  # type: ignore[index]
    with contextlib.closing(session.connect(database_url, "tests")) as connection, connection.cursor() as own:
        workers.hold_lock(own, healthy)
        dead = workers.bury(cursor, 1.0)
        assert dead == ([crashed] if believes_locks else [])
        alive = {life.id for life in workers.alive(cursor)}
        assert healthy in alive
        assert hung not in alive
        assert workers.heartbeat(cursor, [workers.Heartbeat(worker_id=hung, state="ready", lease_s=9, stats={})]) == [
            False
        ]
    assert owned


def claimed_by(cursor: Cursor, life: int) -> NewJob:
    return claimed(cursor, life)


def test_purge_takes_results_along_and_leaves_live_jobs(cursor: Cursor) -> None:
    life = worker(cursor)
    done, live = claimed(cursor, life), queued(cursor)
    jobs.finish(cursor, [result(done, life)])
    cursor.execute("UPDATE jobs SET finished_at = now() - interval '2 h' WHERE id = %s", (done.id,))
    assert recovery.purge(cursor, 3600) == 1
    assert job_views.view(cursor, [(done.id, None)]) == [None]
    assert state(cursor, live).status == "queued"
    cursor.execute("SELECT count(*) FROM job_results")
    assert cursor.fetchone() == (0,)


def test_pages_follow_each_other(cursor: Cursor) -> None:
    ids = [queued(cursor, tenant="pages").id for _ in range(5)]
    first = job_views.find(cursor, [Filter(tenant="pages", limit=2)])[0]
    assert len(first) == 3, "one more tells of another page"
    second = job_views.find(cursor, [Filter(tenant="pages", limit=3, after=first[1].id)])[0]
    assert [view.id for view in [*first[:2], *second]] == ids[::-1]


def test_depths_count_per_backend(cursor: Cursor) -> None:
    life = worker(cursor)
    claimed(cursor, life)
    queued(cursor)
    queued(cursor, backend="bert")
    found = job_views.depths(cursor)
    assert (found["echo"].num_queued, found["echo"].num_running, found["bert"].num_queued) == (1, 1, 1)


def test_every_status_is_final_or_leads_somewhere() -> None:
    assert set(TRANSITIONS) == set(JobStatus)
    assert {status for status, targets in TRANSITIONS.items() if not targets} == TERMINAL


@pytest.mark.parametrize("statement", [
    "SELECT id FROM jobs WHERE status = 'running' AND worker_id = ANY(ARRAY[1])",
    "SELECT id FROM jobs WHERE backend = 'echo' AND status = 'queued' ORDER BY created_at LIMIT 10",
    "SELECT id FROM jobs WHERE tenant = 't' ORDER BY created_at DESC, id DESC LIMIT 20",
    "SELECT id, tenant FROM jobs WHERE finished_at IS NOT NULL AND tenant = 't1' ORDER BY finished_at LIMIT 1000",
    """SELECT count(*) FROM jobs o WHERE o.backend = 'echo' AND o.status = 'queued' AND o.leader_id IS NULL
       AND (coalesce(array_position(ARRAY['batch'], o.decision ->> 'level'), 1), o.created_at, o.id)
           < (1, now(), gen_random_uuid())""",
    "SELECT id FROM jobs WHERE finished_at < now() - interval '1 day' ORDER BY finished_at LIMIT 10",
])  # fmt: skip
def test_hot_statements_use_an_index(cursor: Cursor, statement: str) -> None:
    cursor.execute("""
        INSERT INTO jobs (id, tenant, request_id, endpoint, task, requested_model, model, model_revision, backend, status,
            payload, decision, cache_verdict, worker_id, finished_at)
        SELECT gen_random_uuid(), 't' || n % 50, '', '', '', '', '', '', 'echo',
               CASE WHEN n % 1000 = 0 THEN 'queued' WHEN n % 1000 = 1 THEN 'running' ELSE 'succeeded' END, '', '{}', '',
               n % 100, CASE WHEN n % 1000 > 1 THEN now() - n * interval '1 s' END
        FROM generate_series(1, 50000) n
    """)
    cursor.execute("ANALYZE jobs")
    cursor.execute(f"EXPLAIN {statement}")
    plan = "\n".join(row[0] for row in cursor.fetchall())
    assert "Index" in plan
    assert "Seq Scan" not in plan
