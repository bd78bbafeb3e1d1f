"""Budgets against a real Postgres: never overspent, never refused without need, and no drift whatever happens to jobs."""

import contextlib
import itertools
import random
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from db import accept, api_keys, budgets, flights, jobs, recovery, removal, session, tenants
from db.accept import Idempotency, Inserted, NewJob, Reserved
from db.budgets import Refused
from db.jobs import Claimed, Ended, Finished
from db.session import Cursor
from db.states import JobStatus
from db.tenants import Limits
from tests.db.test_jobs import new, worker

KEY = b"k" * 33


@pytest.fixture
def cursor(database_url: str) -> Iterator[Cursor]:
    connection = session.connect(database_url, "tests")
    with contextlib.closing(connection), connection.cursor() as opened:
        opened.execute(
            "TRUNCATE jobs, job_results, workers, response_cache, idempotency_keys, budget_days, api_keys, tenants"
        )
        yield opened


def key(cursor: Cursor, tenant: str = "t", **limits: int) -> uuid.UUID:
    return api_keys.create(cursor, "k", tenant, limits=Limits(**limits))[1].id


def job(key_id: uuid.UUID, tokens: int = 13, **fields: Any) -> NewJob:
    """Of 3 prompt tokens at 2 and up to `tokens` - 3 more at 5."""
    return new(api_key_id=key_id, reserved_tokens=tokens, input_price=2, output_price=5, **fields)


def outcome(one: uuid.UUID, life: int, run: int, completion: int) -> Finished:
    usage = f'{{"prompt_tokens": 3, "completion_tokens": {completion}}}'
    return Finished(id=one, run=run, worker_id=life, body=b"", sha256=b"", usage=usage, ttft_ms=1.0, timings="{}")


def run(cursor: Cursor, job_id: uuid.UUID, completion: int = 5) -> None:
    life = worker(cursor)
    claimed = jobs.claim(cursor, [(job_id, life)])[0]
    assert isinstance(claimed, Claimed)
    assert jobs.finish(cursor, [outcome(job_id, life, claimed.run, completion)]) != [None]


def accounts(cursor: Cursor) -> dict[Any, tuple[int, ...]]:
    """(key, day) → live jobs, reserved tokens and cost, spent tokens and cost; empty accounts left out."""
    cursor.execute(
        "SELECT api_key_id, day, num_live, reserved_tokens, reserved_cost, spent_tokens, spent_cost FROM budget_days"
    )
    return {(row[0], row[1]): row[2:] for row in cursor.fetchall() if any(row[2:])}


def truth(cursor: Cursor) -> dict[Any, tuple[int, ...]]:
    """The same, worked out from the jobs alone."""
    cursor.execute(
        """
        SELECT api_key_id, reserved_on, status, leader_id, reserved_tokens, prompt_tokens, input_price, output_price, usage
        FROM jobs WHERE reserved_tokens IS NOT NULL
        """
    )
    sums: dict[Any, list[int]] = {}
    for key_id, day, status, leader_id, reserved, prompt, price_in, price_out, usage in cursor.fetchall():
        account = sums.setdefault((key_id, day), [0] * 5)
        if status in ("queued", "running"):
            more = [1, reserved, prompt * price_in + (reserved - prompt) * price_out, 0, 0]
        elif status == "succeeded" and leader_id is None:
            used = usage["prompt_tokens"], usage["completion_tokens"]
            more = [0, 0, 0, sum(used), used[0] * price_in + used[1] * price_out]
        else:
            more = [0] * 5
        account[:] = map(sum, zip(account, more, strict=True))
    return {name: tuple(account) for name, account in sums.items() if any(account)}


def refusal(answer: object) -> tuple[str, str, bool]:
    assert isinstance(answer, Refused)
    assert 0 < answer.renewed_in_s <= 86_400
    return answer.limit, answer.of, answer.is_spent


@pytest.mark.parametrize(
    ("limits", "limit"),
    [({"daily_tokens": 39}, "daily_tokens"), ({"daily_cost_nano": 168}, "daily_cost"), ({"max_concurrent": 3}, "max_concurrent")],
)  # fmt: skip
@pytest.mark.parametrize("of", ["key", "tenant"])
def test_what_is_held_is_not_given_twice(cursor: Cursor, limits: dict[str, int], limit: str, of: str) -> None:
    if of == "key":
        keys = [key(cursor, "t", **limits)] * 2
    else:
        keys = [key(cursor), key(cursor)]
        tenants.change(cursor, "t", dict(limits))
    made = [job(keys[number % 2]) for number in range(4)]
    answers = budgets.insert(cursor, made[:2]) + budgets.insert(cursor, made[2:])
    assert [isinstance(answer, Inserted) for answer in answers] == [True, True, True, False]
    assert refusal(answers[3]) == (limit, of, False)
    cursor.execute("SELECT count(*) FROM jobs")
    assert cursor.fetchall() == [(3,)]
    # An end gives back what was not used; what was used is gone for the day.
    jobs.cancel(cursor, [(made[0].id, "t")])
    run(cursor, made[1].id, completion=10)
    again = [job(keys[0]), job(keys[0])]
    answers = budgets.insert(cursor, again)
    assert isinstance(answers[0], Inserted)
    assert isinstance(answers[1], Inserted) == (limit == "max_concurrent")
    assert accounts(cursor) == truth(cursor)


def test_a_spent_budget_says_so_and_the_next_day_has_a_new_one(cursor: Cursor) -> None:
    mine = key(cursor, daily_tokens=20, max_concurrent=2)
    first = job(mine)
    budgets.insert(cursor, [first])
    run(cursor, first.id, completion=10)
    assert refusal(budgets.insert(cursor, [job(mine)])[0]) == ("daily_tokens", "key", True)
    live = job(mine, tokens=4)
    assert isinstance(budgets.insert(cursor, [live])[0], Inserted)
    cursor.execute("UPDATE budget_days SET day = day - 1")
    cursor.execute("UPDATE jobs SET reserved_on = reserved_on - 1")
    assert isinstance(budgets.insert(cursor, [job(mine)])[0], Inserted)
    # Yesterday's job still lives.
    assert refusal(budgets.insert(cursor, [job(mine, tokens=4)])[0]) == ("max_concurrent", "key", False)
    run(cursor, live.id, completion=1)
    assert budgets.settle(cursor) == 1
    assert accounts(cursor) == truth(cursor)
    assert budgets.forget(cursor, 0) == 1


def test_racing_jobs_never_take_more_than_there_is(database_url: str, cursor: Cursor) -> None:
    keys = [key(cursor, daily_tokens=10 * 13), key(cursor)]
    tenants.change(cursor, "t", {"daily_tokens": 15 * 13})
    barrier = threading.Barrier(50)
    answers: list[Inserted | Refused] = []

    def race(number: int) -> None:
        with contextlib.closing(session.connect(database_url, "tests")) as connection, connection.cursor() as own:
            barrier.wait()
            answers.extend(budgets.insert(own, [job(keys[number % 2])]))

    threads = [threading.Thread(target=race, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 50
    assert sum(isinstance(answer, Inserted) for answer in answers) == 15
    assert accounts(cursor) == truth(cursor)


def test_a_repeated_insert_reserves_once(cursor: Cursor) -> None:
    mine = key(cursor, daily_tokens=20)
    one = job(mine)
    assert budgets.insert(cursor, [one]) == budgets.insert(cursor, [one])
    assert accounts(cursor) == truth(cursor)
    assert len(truth(cursor)) == 1


def test_a_refused_keyed_job_leaves_its_key_free(cursor: Cursor) -> None:
    mine = key(cursor, max_concurrent=1)
    first = job(mine)
    held, *others = budgets.insert_once(
        cursor, [(Idempotency(mine, "a", b"f"), first), (Idempotency(mine, "b", b"f"), job(mine)),
                 (Idempotency(mine, "b", b"f"), job(mine)), (Idempotency(mine, "a", b"f"), job(mine))]
    )  # fmt: skip
    assert isinstance(held, Reserved)
    assert held.inserted is not None
    assert [isinstance(other, Refused) for other in others] == [True, True, False]
    assert isinstance(others[2], Reserved)
    assert (others[2].job_id, others[2].inserted) == (first.id, None)
    assert accept.find_key(cursor, [(mine, "b")]) == [None]
    jobs.cancel(cursor, [(first.id, "t")])
    again = budgets.insert_once(cursor, [(Idempotency(mine, "b", b"f"), job(mine))])[0]
    assert isinstance(again, Reserved)
    assert again.inserted is not None
    assert accounts(cursor) == truth(cursor)


def test_a_retried_job_needs_room_again(cursor: Cursor) -> None:
    mine = key(cursor, max_concurrent=1)
    failed, other = job(mine, timeout_s=-1), job(mine)
    budgets.insert(cursor, [failed])
    assert recovery.expire(cursor) == [failed.id]
    assert isinstance(budgets.insert(cursor, [other])[0], Inserted)
    assert refusal(budgets.retry(cursor, [(failed.id, "t")])[0]) == ("max_concurrent", "key", False)
    assert budgets.retry(cursor, [(failed.id, "nobody"), (uuid.uuid4(), None)]) == [None, None]
    jobs.cancel(cursor, [(other.id, "t")])
    assert budgets.retry(cursor, [(failed.id, "t")]) == [("echo", "generate")]
    assert accounts(cursor) == truth(cursor)
    assert isinstance(budgets.insert(cursor, [other])[0], Inserted), (
        "a job that an earlier try recorded is none too many"
    )
    assert refusal(budgets.insert(cursor, [job(mine)])[0])[0] == "max_concurrent"


def test_who_shares_a_run_pays_nothing(cursor: Cursor) -> None:
    mine = key(cursor, daily_tokens=100)
    made = [job(mine, coalesce_key=KEY) for _ in range(3)]
    for one in made:
        budgets.insert(cursor, [one])
    run(cursor, made[0].id, completion=10)
    flights.land(cursor)
    budgets.settle(cursor)
    ((_, _, _, spent, cost),) = accounts(cursor).values()
    assert (spent, cost) == (13, 3 * 2 + 10 * 5)
    assert accounts(cursor) == truth(cursor)


def test_an_unsettled_job_is_not_purged(cursor: Cursor) -> None:
    one = job(key(cursor, daily_tokens=100))
    budgets.insert(cursor, [one])
    jobs.cancel(cursor, [(one.id, "t")])
    assert recovery.purge(cursor, -1) == 0
    assert budgets.settle(cursor) == 1
    assert recovery.purge(cursor, -1) == 1
    assert accounts(cursor) == {}


def test_what_a_deleted_job_used_stays_spent(cursor: Cursor) -> None:
    key_id = key(cursor, daily_tokens=100)
    leader, follower = job(key_id, coalesce_key=KEY), job(key_id, coalesce_key=KEY)
    budgets.insert(cursor, [leader, follower])
    run(cursor, leader.id, completion=10)
    assert removal.delete(cursor, [(leader.id, "t")]) == [JobStatus.SUCCEEDED]
    (held,) = accounts(cursor).values()
    assert held == (0, 0, 0, 13, 3 * 2 + 10 * 5), "and its heir, who did not run, has paid nothing"
    assert removal.delete(cursor, [(follower.id, "t"), (leader.id, "t")]) == [JobStatus.SUCCEEDED, None]


def test_an_unsettled_job_is_not_purged_before_its_own_time_either(cursor: Cursor) -> None:
    one = job(key(cursor, daily_tokens=100), result_ttl_s=0)
    budgets.insert(cursor, [one])
    jobs.cancel(cursor, [(one.id, "t")])
    assert recovery.purge(cursor, 3600) == 0
    budgets.settle(cursor)
    assert recovery.purge(cursor, 3600) == 1
    assert accounts(cursor) == {}


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_to_jobs_nothing_drifts(cursor: Cursor, seed: int) -> None:
    """Schedules of everything that moves a job, with dead workers, lost answers and repeated statements."""
    dice = random.Random(seed)
    keys = [key(cursor, daily_tokens=400), key(cursor, "u", max_concurrent=2), key(cursor, "u")]
    tenants.change(cursor, "u", {"daily_cost_nano": 900})
    names = {keys[0]: "t", keys[1]: "u", keys[2]: "u"}
    sent: list[NewJob] = []
    running: dict[uuid.UUID, tuple[int, int]] = {}
    fresh = itertools.count()

    def submit() -> None:
        batch = []
        for _ in range(dice.randint(1, 4)):
            owner = dice.choice(keys)
            shared = names[owner].encode() * 33 if dice.random() < 0.4 else None
            late = -1.0 if dice.random() < 0.1 else None
            batch.append(job(owner, dice.randint(3, 60), tenant=names[owner], coalesce_key=shared, timeout_s=late))
        sent.extend(batch)
        if dice.random() < 0.3:
            keyed = [(Idempotency(one.api_key_id or keys[0], f"{next(fresh) // 2}", b"f"), one) for one in batch]
            budgets.insert_once(cursor, keyed)
        else:
            budgets.insert(cursor, batch)
        if dice.random() < 0.3:
            budgets.insert(cursor, [replace(one) for one in batch if one.coalesce_key is None][:1])

    def claim() -> None:
        life = worker(cursor)
        for one in dice.sample(sent, min(5, len(sent))):
            claimed = jobs.claim(cursor, [(one.id, life)])[0]
            if isinstance(claimed, Claimed):
                running[one.id] = (life, claimed.run)

    def finish() -> None:
        for job_id in dice.sample(sorted(running), min(2, len(running))):
            life, claimed_run = running.pop(job_id)
            reserved = next(one.reserved_tokens for one in sent if one.id == job_id) or 3
            jobs.finish(
                cursor, [outcome(job_id, life, claimed_run, dice.randint(0, reserved - 3))] * dice.randint(1, 2)
            )

    def fail() -> None:
        for job_id in dice.sample(sorted(running), min(1, len(running))):
            life, claimed_run = running.pop(job_id)
            jobs.end(cursor, [Ended(id=job_id, run=claimed_run, worker_id=life, code="x", message="x",
                                    is_retryable=dice.random() < 0.5)])  # fmt: skip

    def die() -> None:
        if running:
            recovery.rescue(cursor, [dice.choice(list(running.values()))[0]], 2)

    def cancel() -> None:
        jobs.cancel(cursor, [(one.id, one.tenant) for one in dice.sample(sent, min(2, len(sent)))])

    def retry() -> None:
        budgets.retry(
            cursor, [(one.id, dice.choice([one.tenant, None])) for one in dice.sample(sent, min(4, len(sent)))]
        )

    steps: list[Callable[[], object]] = [submit, submit, submit, claim, claim, finish, finish, fail, die, cancel, retry,
             lambda: recovery.expire(cursor), lambda: flights.land(cursor), lambda: flights.hand_over(cursor),
             lambda: budgets.settle(cursor)]  # fmt: skip
    submit()
    for _ in range(60):
        dice.choice(steps)()
        for day in accounts(cursor).values():
            assert min(day) >= 0
    budgets.settle(cursor)
    assert accounts(cursor) == truth(cursor)
    cursor.execute("SELECT sum(spent_tokens), sum(reserved_tokens) FROM budget_days WHERE api_key_id = %s", (keys[0],))
    assert sum(cursor.fetchall()[0]) <= 400
    assert isinstance(budgets.insert(cursor, [job(keys[0], 401)])[0], Refused)
