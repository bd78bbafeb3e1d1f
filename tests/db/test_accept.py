"""Accepting: leaders, followers, idempotency keys, SDK retries; against a real Postgres."""

import contextlib
import threading
import uuid
from collections.abc import Iterator
from dataclasses import replace

import psycopg2
import pytest

from db import accept, flights, job_views, jobs, recovery, session
from db.accept import Idempotency, NewJob, Reserved, Retry
from db.jobs import Claimed
from db.session import Cursor
from tests.db.test_jobs import ending, new, result, state, worker

KEY = b"k" * 33


@pytest.fixture
def cursor(database_url: str) -> Iterator[Cursor]:
    connection = session.connect(database_url, "tests")
    with contextlib.closing(connection), connection.cursor() as opened:
        opened.execute("TRUNCATE jobs, job_results, workers, response_cache, idempotency_keys")
        yield opened


def flight(cursor: Cursor, size: int) -> list[NewJob]:
    """A leader and its followers."""
    made = [new(coalesce_key=KEY) for _ in range(size)]
    accept.insert(cursor, made[:1])
    accept.insert(cursor, made[1:])
    return made


def test_of_identical_jobs_one_leads_also_within_a_batch(cursor: Cursor) -> None:
    inserted = accept.insert(cursor, [new(coalesce_key=KEY) for _ in range(5)])
    leaders = [one for one in inserted if one.leader_id is None]
    assert len(leaders) == 1
    followers = [one for one in inserted if one.leader_id is not None]
    assert {one.leader_id for one in followers} == {leaders[0].id}
    assert {one.flight_id for one in inserted} == {leaders[0].id}
    assert {one.cache_verdict for one in followers} == {f"COALESCED; joined {leaders[0].id}"}
    cursor.execute("SELECT num_followers FROM jobs WHERE leader_id IS NULL")
    assert cursor.fetchall() == [(4,)]


def test_a_repeated_insert_of_a_follower_changes_nothing(cursor: Cursor) -> None:
    _, follower = flight(cursor, 2)
    first = accept.insert(cursor, [follower])
    assert accept.insert(cursor, [follower]) == first
    cursor.execute("SELECT max(num_followers), count(*) FROM jobs")
    assert cursor.fetchall() == [(1, 2)]


def test_racing_inserts_make_one_leader(database_url: str, cursor: Cursor) -> None:
    barrier = threading.Barrier(6)
    made: list[accept.Inserted] = []

    def race() -> None:
        with contextlib.closing(session.connect(database_url, "tests")) as connection, connection.cursor() as own:
            barrier.wait()
            for _ in range(20):
                made.extend(accept.insert(own, [new(coalesce_key=KEY), new(coalesce_key=b"o" * 33)]))

    threads = [threading.Thread(target=race) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 240
    assert sum(one.leader_id is None for one in made) == 2
    cursor.execute("SELECT sum(num_followers) FROM jobs")
    assert cursor.fetchall() == [(238,)]


def test_followers_are_neither_claimed_nor_sent_nor_counted(cursor: Cursor) -> None:
    leader, follower = flight(cursor, 2)
    assert recovery.find_unsent(cursor, "echo", -1) == [(leader.id, "echo", "generate")]
    assert job_views.depths(cursor)["echo"].num_queued == 1
    claimed, refused = jobs.claim(cursor, [(leader.id, life := worker(cursor)), (follower.id, life)])
    assert isinstance(claimed, Claimed)
    assert refused is None


def test_a_result_lands_on_every_follower_once(cursor: Cursor) -> None:
    leader, *followers = flight(cursor, 4)
    life = worker(cursor)
    jobs.claim(cursor, [(leader.id, life)])
    assert flights.land(cursor) == []
    assert jobs.finish(cursor, [result(leader, life)]) == [3]
    landed = flights.land(cursor, [leader.id])
    assert {job_id for job_id, _ in landed} == {job.id for job in followers}
    assert flights.land(cursor) == []
    outcomes = job_views.outcome(cursor, [job.id for job in followers])
    assert {(one.status, one.body) for one in outcomes if one is not None} == {("succeeded", b"body")}
    cursor.execute("SELECT count(*) FROM job_results")
    assert cursor.fetchall() == [(1,)]


def test_a_follower_that_comes_while_its_leader_ends_is_not_forgotten(database_url: str, cursor: Cursor) -> None:
    """The leader's end waits for the follower's commit, or the follower leads itself."""
    for _ in range(30):
        leader, life = new(coalesce_key=KEY), worker(cursor)
        accept.insert(cursor, [leader])
        jobs.claim(cursor, [(leader.id, life)])
        late: list[accept.Inserted] = []

        def join(late: list[accept.Inserted] = late) -> None:
            with contextlib.closing(session.connect(database_url, "tests")) as connection, connection.cursor() as own:
                late.extend(accept.insert(own, [new(coalesce_key=KEY)]))

        joining = threading.Thread(target=join)
        joining.start()
        num_followers = jobs.finish(cursor, [result(leader, life)])[0]
        joining.join()
        assert num_followers == (late[0].leader_id == leader.id)
        flights.land(cursor, [leader.id])
        cursor.execute("SELECT count(*) FROM jobs WHERE status = 'queued' AND leader_id IS NOT NULL")
        assert cursor.fetchall() == [(0,)]
        cursor.execute("DELETE FROM jobs")


def test_a_failed_leader_fails_for_all(cursor: Cursor) -> None:
    leader, follower = flight(cursor, 2)
    life = worker(cursor)
    jobs.claim(cursor, [(leader.id, life)])
    jobs.end(cursor, [ending(leader, life, is_retryable=False)])
    assert flights.land(cursor) == [(follower.id, "failed")]
    assert state(cursor, follower).error == state(cursor, leader).error


def test_a_cancelled_leader_hands_over_to_its_oldest_follower(cursor: Cursor) -> None:
    leader, second, third = flight(cursor, 3)
    jobs.cancel(cursor, [(leader.id, "t")])
    assert flights.land(cursor) == []
    ((promoted, backend, task),) = flights.hand_over(cursor)
    assert (backend, task) == ("echo", "generate")
    assert flights.hand_over(cursor) == []
    claimed = jobs.claim(cursor, [(promoted, life := worker(cursor))])[0]
    assert isinstance(claimed, Claimed)
    assert (claimed.flight_id, claimed.was_begun, claimed.attempt) == (leader.id, True, 1)
    next_job = second if promoted == second.id else third
    assert jobs.finish(cursor, [result(next_job, life, claimed.run)]) == [1]
    assert len(flights.land(cursor, [promoted])) == 1
    assert state(cursor, leader).status == "cancelled"
    cursor.execute("SELECT count(*) FROM jobs WHERE status = 'succeeded'")
    assert cursor.fetchall() == [(2,)]


def test_a_cancelled_follower_leaves_the_others_alone(cursor: Cursor) -> None:
    leader, follower, other = flight(cursor, 3)
    jobs.cancel(cursor, [(follower.id, "t")])
    life = worker(cursor)
    jobs.claim(cursor, [(leader.id, life)])
    jobs.finish(cursor, [result(leader, life)])
    assert flights.land(cursor) == [(other.id, "succeeded")]
    assert state(cursor, follower).status == "cancelled"


def test_a_key_stands_for_one_job(database_url: str, cursor: Cursor) -> None:
    key, caller = "order-1", uuid.uuid4()
    barrier = threading.Barrier(8)
    answers: list[Reserved] = []

    def race() -> None:
        with contextlib.closing(session.connect(database_url, "tests")) as connection, connection.cursor() as own:
            barrier.wait()
            wanted = [(Idempotency(caller, key, b"f"), new()) for _ in range(3)]
            answers.extend(accept.insert_once(own, wanted))

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({answer.job_id for answer in answers}) == 1
    assert sum(answer.inserted is not None for answer in answers) == 1
    cursor.execute("SELECT count(*) FROM jobs")
    assert cursor.fetchall() == [(1,)]
    assert accept.find_key(cursor, [(caller, key), (uuid.uuid4(), key), (caller, "other")]) == [
        replace(answers[0], inserted=None), None, None
    ]  # fmt: skip


def test_a_key_keeps_its_first_fingerprint_until_it_expires(cursor: Cursor) -> None:
    caller = uuid.uuid4()
    first, second = new(), new()
    accept.insert_once(cursor, [(Idempotency(caller, "k", b"one"), first)])
    held = accept.insert_once(cursor, [(Idempotency(caller, "k", b"two"), second)])[0]
    assert (held.job_id, held.fingerprint, held.inserted) == (first.id, b"one", None)
    cursor.execute("UPDATE idempotency_keys SET expires_at = clock_timestamp()")
    assert accept.find_key(cursor, [(caller, "k")]) == [None]
    fresh = accept.insert_once(cursor, [(Idempotency(caller, "k", b"two"), second)])[0]
    assert (fresh.job_id, fresh.fingerprint) == (second.id, b"two")
    cursor.execute("UPDATE idempotency_keys SET expires_at = clock_timestamp()")
    assert accept.forget_keys(cursor) == 1


def test_an_answer_that_was_lost_can_be_asked_for_again(cursor: Cursor) -> None:
    wanted = (Idempotency(uuid.uuid4(), "k", b"f"), new())
    first = accept.insert_once(cursor, [wanted])
    assert accept.insert_once(cursor, [wanted]) == first


def test_a_refused_job_leaves_no_key_behind(cursor: Cursor) -> None:
    wanted = (Idempotency(uuid.uuid4(), "k", b"f"), new(payload=None))
    with pytest.raises(psycopg2.Error):
        accept.insert_once(cursor, [wanted])
    cursor.execute("SELECT count(*) FROM idempotency_keys")
    assert cursor.fetchall() == [(0,)]


def test_an_sdk_retry_finds_the_live_job_of_its_own_key(cursor: Cursor) -> None:
    caller = uuid.uuid4()
    job = new(api_key_id=caller, cache_key=b"c")
    accept.insert(cursor, [job])
    own = Retry(caller, (b"x", b"c"), is_stream=False)
    others = [replace(own, api_key_id=uuid.uuid4()), replace(own, cache_keys=(b"x",)), replace(own, is_stream=True)]
    assert accept.find_live(cursor, [own, *others]) == [job.id, None, None, None]
    jobs.cancel(cursor, [(job.id, "t")])
    assert accept.find_live(cursor, [own]) == [None]


def test_a_failed_job_can_be_retried_under_its_id(cursor: Cursor) -> None:
    job = new()
    accept.insert(cursor, [job])
    assert jobs.retry(cursor, [(job.id, "t")]) == [None]
    life = worker(cursor)
    jobs.claim(cursor, [(job.id, life)])
    jobs.end(cursor, [ending(job, life, is_retryable=False)])
    assert jobs.retry(cursor, [(job.id, "other"), (uuid.uuid4(), None)]) == [None, None]
    assert jobs.retry(cursor, [(job.id, None)]) == [("echo", "generate")]
    again = jobs.claim(cursor, [(job.id, life)])[0]
    assert isinstance(again, Claimed)
    assert (again.attempt, again.run) == (1, 2)
    assert again.flight_id != job.id, "the events of its first end stay where they are"
    assert jobs.finish(cursor, [result(job, life, again.run)]) == [0]


def test_what_killed_its_workers_is_quarantined(cursor: Cursor) -> None:
    poison, unlucky = new(cache_key=b"poison"), new(cache_key=b"unlucky")
    accept.insert(cursor, [poison, unlucky])
    for _ in range(3):
        life = worker(cursor)
        jobs.claim_alone(cursor, [(poison.id, life)])
        recovery.rescue(cursor, [life], 3)
    jobs.claim(cursor, [(unlucky.id, life := worker(cursor))])
    jobs.end(cursor, [ending(unlucky, life, is_retryable=True, max_attempts=1)])
    assert state(cursor, unlucky).error["code"] == "attempts_exhausted"  # type: ignore[index]
    assert job_views.quarantined(cursor, 600) == {b"poison"}
    assert job_views.quarantined(cursor, 0) == frozenset()
    jobs.retry(cursor, [(poison.id, "t")])
    assert job_views.quarantined(cursor, 600) == frozenset()


def test_what_was_there_at_two_deaths_is_claimed_alone(cursor: Cursor) -> None:
    job, other = new(), new()
    accept.insert(cursor, [job, other])
    for _ in range(2):
        life = worker(cursor)
        assert isinstance(jobs.claim(cursor, [(job.id, life)])[0], Claimed)
        recovery.rescue(cursor, [life], 3)
    life = worker(cursor)
    answers = jobs.claim(cursor, [(job.id, life), (other.id, life)])
    assert answers[0] is jobs.Suspect.SUSPECT
    assert isinstance(answers[1], Claimed)
    alone = jobs.claim_alone(cursor, [(job.id, life)])[0]
    assert alone is not None
    assert alone.attempt == 3
    assert jobs.claim(cursor, [(job.id, life)]) == [None]
