"""`SimStore` answers what Postgres answers: every call goes to both, and answers and rows must agree.

"Time passes" moves the store's clock on and every timestamp in Postgres back. Waits are multiples of ten seconds
and limits end in five, so the real time that a test takes decides nothing.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from db import accept, flights, job_views, jobs, recovery, session, workers
from db.accept import Idempotency, NewJob
from db.jobs import Ended, Finished, Suspect
from db.session import Cursor
from db.workers import Heartbeat
from tests.simulation.store import SimStore

TOLERANCE_S = 4.0
LEASE_S, BEAT_S, PATIENCE_S, TIMEOUT_S, TTL_S = 35.0, 5.0, 15.0, 25.0, 45
UNORDERED = {"rescue", "find_unsent", "expire", "bury", "land", "hand_over", "stranded"}
"""Of these, Postgres answers in any order."""
TIMESTAMPS = {
    "jobs": "created_at enqueued_at started_at first_token_at finished_at deadline_at",
    "workers": "started_at ready_at heartbeat_at lease_until",
    "response_cache": "created_at last_hit_at expires_at",
    "idempotency_keys": "expires_at",
}
JOBS = [uuid.UUID(int=number) for number in range(1, 6)]
API_KEY = uuid.UUID(int=1)


class Ledgers:
    """Postgres and SimStore side by side."""

    def __init__(self, cursor: Cursor) -> None:
        cursor.execute("TRUNCATE jobs, job_results, workers, response_cache, idempotency_keys RESTART IDENTITY")
        cursor.execute("SELECT pg_advisory_unlock_all()")
        self.cursor = cursor
        self.store = SimStore()
        self._waited_s = 0.0

    def call(self, name: str, *arguments: Any) -> Any:
        """Both ledgers' answer to one statement."""
        module = next(
            module for module in (accept, jobs, job_views, recovery, flights, workers) if hasattr(module, name)
        )
        theirs = getattr(module, name)(self.cursor, *arguments)
        self.store.now = time.time() + self._waited_s
        self.store.begin("tests")
        ours = getattr(self.store, name)(*arguments)
        if name in UNORDERED:
            theirs, ours = sorted(theirs), sorted(ours)
        if name == "owned":
            theirs, ours = ([sorted(of_one, key=lambda job: job.id) for of_one in answer] for answer in (theirs, ours))
        assert_alike(name, plain(ours, self._waited_s), plain(theirs))
        return ours

    def wait(self, seconds: int) -> None:
        self._waited_s += seconds
        for table, columns in TIMESTAMPS.items():
            shifts = ", ".join(f"{column} = {column} - interval '{seconds} s'" for column in columns.split())
            self.cursor.execute(f"UPDATE {table} SET {shifts}")

    def drop_lock(self, worker_id: int) -> None:
        if self.store.locks.pop(worker_id, None) is not None:
            self.cursor.execute("SELECT pg_advisory_unlock(%s, %s)", (workers._LOCK_CLASS, worker_id))

    def compare(self) -> None:
        """All rows of all tables."""
        ours = {
            "jobs": {
                row.id: [row.status, row.attempt, row.worker_id, undated(row.attempts), row.usage, row.error,
                         row.timings, row.job.tenant, row.backend, row.job.payload, row.job.cache_verdict,
                         row.job.coalesce_key, row.leader_id, row.flight_id, row.num_followers,
                         *map(self._date, (row.created_at, row.enqueued_at, row.started_at, row.first_token_at,
                                           row.finished_at, row.deadline_at))]
                for row in self.store.jobs.values()
            },
            "job_results": {job_id: [row.body, row.sha256, row.events] for job_id, row in self.store.results.items()},
            "response_cache": {
                key: [row.job_id, row.body, row.usage, self._date(row.created_at), self._date(row.expires_at)]
                for key, row in self.store.cache.items()
            },
            "workers": {
                number: [row.name, row.backend, row.state,
                         *map(self._date, (row.ready_at, row.heartbeat_at, row.lease_until))]
                for number, row in self.store.workers.items()
            },
            "idempotency_keys": {
                name: [row.job_id, row.fingerprint, self._date(row.expires_at)]
                for (_, name), row in self.store.keys.items()
            },
        }  # fmt: skip
        theirs = {
            "jobs": self._read("id, status, attempt, worker_id, attempts, usage, error, timings, tenant, backend, payload,"
                               "cache_verdict, coalesce_key, leader_id, flight_id, num_followers, created_at, enqueued_at, started_at, first_token_at, finished_at, deadline_at", "jobs"),
            "job_results": self._read("job_id, body, sha256, events", "job_results"),
            "response_cache": self._read("key, job_id, body, usage, created_at, expires_at", "response_cache"),
            "idempotency_keys": self._read("key, job_id, fingerprint, expires_at", "idempotency_keys"),
            "workers": self._read("id, name, backend, state, ready_at, heartbeat_at, lease_until", "workers"),
        }  # fmt: skip
        for row in theirs["jobs"].values():
            row[3] = undated(row[3])
        assert_alike("rows", plain(ours), plain(theirs))

    def _read(self, columns: str, table: str) -> dict[Any, list[Any]]:
        self.cursor.execute(f"SELECT {columns} FROM {table}")
        rows = [plain(list(row)) for row in self.cursor.fetchall()]
        return {row[0]: row[1:] for row in rows}

    def _date(self, at: float | None) -> float | None:
        """A time of the store as Postgres has it."""
        return None if at is None else at - self._waited_s


def undated(attempts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the times, which stand in jsonb, where waiting does not move them."""
    assert all(attempt["started_at"] <= attempt["ended_at"] for attempt in attempts if "started_at" in attempt)
    return [{key: attempt.get(key) for key in ("attempt", "worker_id", "outcome")} for attempt in attempts]


def plain(value: Any, ahead_s: float = 0.0) -> Any:
    """Values that compare: times as Unix seconds, durations in seconds, records as dicts."""
    if isinstance(value, datetime.datetime):
        return value.timestamp() - ahead_s
    if isinstance(value, memoryview):
        return bytes(value)
    if isinstance(value, list | tuple):
        return [plain(one, ahead_s) for one in value]
    if isinstance(value, dict):
        return {key: plain(one, ahead_s) for key, one in value.items()}
    if dataclasses.is_dataclass(value):
        fields = {field.name: plain(getattr(value, field.name), ahead_s) for field in dataclasses.fields(value)}
        for name, field in fields.items():
            if name.endswith("_ms") and field is not None:
                fields[name] = field / 1000
        for name in ("created", "finished"):
            if fields.get(name) is not None:
                fields[name] = float(fields[name]) - ahead_s
        if "token" in fields:
            fields["token"] = fields["token"] / 1000 - ahead_s
        return fields
    return value


def assert_alike(where: str, ours: Any, theirs: Any) -> None:
    """Equal, floats within the tolerance."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key, one in ours.items():
            assert_alike(f"{where}.{key}", one, theirs[key])
    elif isinstance(ours, list) and isinstance(theirs, list):
        assert len(ours) == len(theirs), f"{where}: {ours} {theirs}"
        for index, one in enumerate(ours):
            assert_alike(f"{where}[{index}]", one, theirs[index])
    elif isinstance(ours, float) and isinstance(theirs, float):
        assert abs(ours - theirs) < TOLERANCE_S, f"{where}: SimStore {ours}, Postgres {theirs}"
    else:
        assert ours == theirs, f"{where}: SimStore {ours!r}, Postgres {theirs!r}"


@pytest.fixture(scope="module")
def cursor(database_url: str) -> Iterator[Cursor]:
    """One session for all: advisory locks belong to it. Locks are believed from its first statement on."""
    connection = session.connect(database_url, "tests")
    with contextlib.closing(connection), connection.cursor() as opened:
        believed = "SELECT pg_postmaster_start_time() < clock_timestamp() - interval '10 s'"
        opened.execute(believed)
        while opened.fetchone() != (True,):
            time.sleep(0.2)
            opened.execute(believed)
        yield opened


@pytest.fixture
def ledgers(cursor: Cursor) -> Ledgers:
    return Ledgers(cursor)


def new(number: int, **fields: Any) -> NewJob:
    defaults: dict[str, Any] = {
        "id": JOBS[number], "tenant": "t", "api_key_id": None, "request_id": "r", "endpoint": "/v1/completions",
        "task": "generate", "requested_model": "m", "model": "m", "model_revision": "1", "backend": "echo",
        "is_stream": False, "payload": b"{}", "metadata": None, "decision": "{}", "cache_verdict": "MISS",
        "cache_key": None, "cache_ttl_s": None, "is_cache_refresh": False, "prompt_tokens": 3 + number,
        "timings": '{"route_ms": 9000.0}',
    }  # fmt: skip
    return NewJob(**defaults | fields)


def result(number: int, worker_id: int, run: int = 0, body: bytes = b"body") -> Finished:
    return Finished(id=JOBS[number], run=run, worker_id=worker_id, body=body,
                    sha256=hashlib.sha256(body).digest(), usage='{"prompt_tokens": 3}', ttft_ms=1.0,
                    timings='{"run_ms": 5000.0}')  # fmt: skip


def ending(number: int, worker_id: int, run: int = 0, **fields: Any) -> Ended:
    return Ended(id=JOBS[number], run=run, worker_id=worker_id,
                 **{"code": "backend_error", "message": "x"} | fields)  # fmt: skip


def beat(worker_id: int, state: str = "ready") -> Heartbeat:
    return Heartbeat(worker_id=worker_id, state=state, lease_s=LEASE_S, stats={})


def register(ledgers: Ledgers, name: str, lease_s: float = LEASE_S) -> int:
    return int(ledgers.call("register", name, "echo", 1, 4, {}, lease_s))


Scenario = Callable[[Ledgers], None]
SCENARIOS: list[Scenario] = []


def scenario(function: Scenario) -> Scenario:
    SCENARIOS.append(function)
    return function


@scenario
def a_job_runs_and_ends_once(ledgers: Ledgers) -> None:
    life = register(ledgers, "a")
    ledgers.call("insert", [new(0), new(1)])
    ledgers.call("insert", [new(0, model="other"), new(3, backend="bert")])
    assert ledgers.call("claim", [(JOBS[3], life)]) == [None]
    assert ledgers.call("claim_alone", [(JOBS[3], life)]) == [None]
    ledgers.wait(10)
    assert ledgers.call("claim", [(JOBS[0], life), (JOBS[0], life), (JOBS[4], life)])[1:] == [None, None]
    assert ledgers.call("claim", [(JOBS[0], life)]) == [None]
    ledgers.call("depths")
    ledgers.call("owned", [life, 77])
    ledgers.call("ended", [[JOBS[0], JOBS[1]], [JOBS[4]], []])
    assert ledgers.call("finish", [result(0, life)]) == [0]
    assert ledgers.call("finish", [result(0, life, body=b"again")]) == [0]
    assert ledgers.call("finish", [result(0, life, 1), result(1, life), result(4, life)]) == [None] * 3
    ledgers.call("outcome", [JOBS[0], JOBS[1], JOBS[4]])
    ledgers.call("ended", [[JOBS[0], JOBS[1]], [JOBS[4]], []])


@scenario
def attempts_run_out(ledgers: Ledgers) -> None:
    life = register(ledgers, "a")
    ledgers.call("insert", [new(0), new(1)])
    for run in (0, 1, 2):
        ledgers.call("claim", [(JOBS[0], life), (JOBS[1], life)])
        again = [ending(0, life, run, is_retryable=True), ending(1, life, run)]
        assert ledgers.call("end", again) == ["queued" if run < 2 else "failed", "failed" if run < 1 else None]
        assert ledgers.call("end", again) == [None, None]


@scenario
def a_release_is_not_counted(ledgers: Ledgers) -> None:
    life = register(ledgers, "a")
    ledgers.call("insert", [new(0)])
    for run in range(4):
        ledgers.wait(10)
        assert ledgers.call("claim", [(JOBS[0], life)])[0].attempt == 1
        assert ledgers.call("end", [ending(0, life, run - 1, is_retryable=True)]) == [None]
        assert ledgers.call("end", [ending(0, life, run, is_retryable=True, is_counted=False)]) == ["queued"]
    ledgers.call("claim", [(JOBS[0], life)])
    ledgers.call("end", [ending(0, life, 4, is_counted=False)])


@scenario
def the_dead_are_buried_and_their_jobs_rescued(ledgers: Ledgers) -> None:
    hung, crashed, healthy = (register(ledgers, name) for name in "abc")
    ledgers.call("hold_lock", hung)
    ledgers.call("hold_lock", healthy)
    ledgers.call("insert", [new(number) for number in range(3)])
    for number, life in enumerate((hung, crashed, healthy)):
        ledgers.call("claim", [(JOBS[number], life)])
    assert ledgers.call("bury", BEAT_S) == []
    ledgers.wait(10)
    ledgers.call("heartbeat", [beat(healthy), beat(hung, "loading")])
    assert ledgers.call("bury", BEAT_S) == [crashed]
    assert ledgers.call("heartbeat", [beat(crashed), beat(99)]) == [False, False]
    assert ledgers.call("rescue", [crashed], 3) == [(JOBS[1], "echo", "generate", "queued")]
    assert ledgers.call("claim", [(JOBS[1], crashed)]) == [None]
    ledgers.wait(20)
    ledgers.call("heartbeat", [beat(healthy)])
    ledgers.wait(20)
    assert ledgers.call("bury", BEAT_S) == [hung]
    assert ledgers.call("rescue", [hung, crashed], 1) == [(JOBS[0], "echo", "generate", "failed")]
    ledgers.drop_lock(healthy)
    ledgers.wait(10)
    assert ledgers.call("bury", BEAT_S) == [healthy]
    assert ledgers.call("finish", [result(2, healthy)]) == [0], "dead, but not robbed yet"


@scenario
def a_new_life_ends_the_old_one_of_its_name(ledgers: Ledgers) -> None:
    first = register(ledgers, "a")
    ledgers.call("insert", [new(0)])
    ledgers.call("claim", [(JOBS[0], first)])
    second = register(ledgers, "a")
    ledgers.call("leave", 99)
    assert ledgers.call("bury", BEAT_S) == [first]
    ledgers.call("leave", second)
    assert ledgers.call("heartbeat", [beat(second)]) == [False]


@scenario
def cancel_is_final(ledgers: Ledgers) -> None:
    life = register(ledgers, "a")
    ledgers.call("insert", [new(0), new(1), new(2)])
    ledgers.call("claim", [(JOBS[1], life), (JOBS[2], life)])
    ledgers.call("finish", [result(2, life)])
    wanted = [(JOBS[0], "t"), (JOBS[1], "t"), (JOBS[2], "t"), (JOBS[0], "other"), (JOBS[4], "t")]
    assert ledgers.call("cancel", wanted) == ["cancelled", "cancelled", "succeeded", None, None]
    assert ledgers.call("cancel", wanted) == ["cancelled", "cancelled", "succeeded", None, None]
    assert ledgers.call("finish", [result(1, life)]) == [None]
    assert ledgers.call("end", [ending(1, life)]) == [None]
    assert ledgers.call("rescue", [life], 3) == []


@scenario
def deadlines_pass(ledgers: Ledgers) -> None:
    life = register(ledgers, "a")
    ledgers.call("insert", [new(0, timeout_s=TIMEOUT_S), new(1, timeout_s=TIMEOUT_S), new(2, timeout_s=-5.0), new(3)])
    ledgers.call("claim", [(JOBS[0], life), (JOBS[2], life)])
    assert ledgers.call("expire") == [JOBS[2]]
    ledgers.wait(30)
    assert ledgers.call("claim", [(JOBS[1], life)]) == [None]
    assert ledgers.call("expire") == JOBS[:2]
    assert ledgers.call("expire") == []
    assert ledgers.call("finish", [result(0, life)]) == [None]


@scenario
def what_was_not_sent_is_found(ledgers: Ledgers) -> None:
    life = register(ledgers, "a")
    ledgers.call("insert", [new(0), new(1, backend="bert")])
    ledgers.wait(10)
    ledgers.call("insert", [new(2)])
    assert ledgers.call("find_unsent", "echo", PATIENCE_S) == []
    ledgers.wait(10)
    assert ledgers.call("find_unsent", "echo", PATIENCE_S) == [(JOBS[0], "echo", "generate")]
    assert ledgers.call("find_unsent", "echo", PATIENCE_S) == []
    ledgers.wait(20)
    assert len(ledgers.call("find_unsent", "echo", PATIENCE_S, 1)) == 1
    ledgers.call("claim", [(JOBS[2], life)])
    ledgers.call("end", [ending(2, life, is_retryable=True)])
    assert ledgers.call("find_unsent", "echo", PATIENCE_S) == []
    ledgers.call("depths")


@scenario
def the_cache_keeps_the_first_answer(ledgers: Ledgers) -> None:
    life = register(ledgers, "a")
    cached: dict[str, Any] = {"cache_key": b"k" * 32, "cache_ttl_s": TTL_S}
    ledgers.call("insert", [new(0, **cached), new(1, **cached), new(2, **cached | {"is_cache_refresh": True}),
                            new(3, cache_key=b"k" * 32), new(4, **cached)])  # fmt: skip
    ledgers.call("claim", [(job_id, life) for job_id in JOBS])
    ledgers.call("finish", [result(1, life, body=b"1"), result(0, life, body=b"0")])
    ledgers.compare()
    ledgers.wait(10)
    ledgers.call("finish", [result(2, life, body=b"2")])
    ledgers.compare()
    ledgers.wait(50)
    ledgers.call("finish", [result(3, life, body=b"3"), result(4, life, body=b"4")])


@scenario
def two_endings_in_one_batch(ledgers: Ledgers) -> None:
    life = register(ledgers, "a")
    ledgers.call("insert", [new(0), new(1)])
    ledgers.call("claim", [(JOBS[0], life), (JOBS[1], life)])
    assert ledgers.call("finish", [result(0, life), result(0, 77), result(1, life, 1)]) == [0, 0, None]
    assert ledgers.call("end", [ending(1, 77), ending(1, life), ending(0, life)]) == ["failed", "failed", None]


@scenario
def a_suspect_runs_alone(ledgers: Ledgers) -> None:
    life = register(ledgers, "a")
    ledgers.call("insert", [new(0, timeout_s=TIMEOUT_S), new(1)])
    for run, code in enumerate(("backend_dead", "backend_error", "backend_stalled")):
        assert ledgers.call("claim", [(JOBS[0], life)])[0].run == run
        ledgers.call("end", [ending(0, life, run, code=code, is_retryable=True, max_attempts=5)])
    both = [(JOBS[0], life), (JOBS[1], life), (JOBS[0], life)]
    assert ledgers.call("claim", both)[::2] == [Suspect.SUSPECT] * 2
    assert ledgers.call("claim", [(JOBS[0], 77)]) == [Suspect.SUSPECT]
    assert ledgers.call("claim_alone", both)[1:] == [None, None]
    assert ledgers.call("claim", both) == [None] * 3
    ledgers.call("rescue", [life], 5)
    ledgers.wait(30)
    assert ledgers.call("claim", [(JOBS[0], life)]) == [Suspect.SUSPECT]
    assert ledgers.call("claim_alone", [(JOBS[0], life)]) == [None], "too late"


@scenario
def followers_end_as_their_leader(ledgers: Ledgers) -> None:
    life = register(ledgers, "a")
    ledgers.call("insert", [new(0, coalesce_key=b"k"), new(1, coalesce_key=b"k"), new(2, coalesce_key=b"l")])
    ledgers.wait(10)
    ledgers.call("insert", [new(1, coalesce_key=b"l"), new(3, coalesce_key=b"l", backend="bert")])
    ledgers.compare()
    assert ledgers.call("claim", [(JOBS[1], life), (JOBS[0], life), (JOBS[2], life)])[0] is None
    ledgers.call("depths")
    assert ledgers.call("land") == []
    assert ledgers.call("finish", [result(0, life)]) == [1]
    assert ledgers.call("finish", [result(0, life)]) == [1]
    ledgers.call("end", [ending(2, life)])
    ledgers.call("insert", [new(4, coalesce_key=b"k")])
    ledgers.call("outcome", JOBS)
    assert ledgers.call("land", [JOBS[4]]) == []
    assert ledgers.call("land", [JOBS[0]]) == [(JOBS[1], "succeeded")]
    assert ledgers.call("land") == [(JOBS[3], "failed")]
    assert ledgers.call("hand_over") == []
    ledgers.call("outcome", JOBS)


@scenario
def the_oldest_follower_takes_over(ledgers: Ledgers) -> None:
    life = register(ledgers, "a")
    ledgers.call("insert", [new(2, coalesce_key=b"k", timeout_s=TIMEOUT_S)])
    ledgers.call("claim", [(JOBS[2], life)])
    ledgers.call("end", [ending(2, life, code="backend_dead", is_retryable=True)])
    ledgers.call("claim", [(JOBS[2], life)])
    for number in (1, 0, 3):
        ledgers.call("insert", [new(number, coalesce_key=b"k")])
    ledgers.call("cancel", [(JOBS[0], "t")])
    assert ledgers.call("hand_over") == []
    ledgers.wait(30)
    assert ledgers.call("find_unsent", "echo", PATIENCE_S) == []
    assert ledgers.call("expire") == [JOBS[2]]
    assert ledgers.call("land") == []
    assert ledgers.call("hand_over") == [(JOBS[1], "echo", "generate")]
    assert ledgers.call("hand_over") == []
    ledgers.call("insert", [new(4, coalesce_key=b"k")])
    ledgers.compare()
    assert ledgers.call("claim", [(JOBS[1], life)])[0].run == 2
    assert ledgers.call("finish", [result(1, life, 2)]) == [1]
    assert ledgers.call("land", [JOBS[1]]) == [(JOBS[3], "succeeded")]


@scenario
def what_failed_is_retried(ledgers: Ledgers) -> None:
    life = register(ledgers, "a")
    ledgers.call("insert", [new(0, coalesce_key=b"k", timeout_s=TIMEOUT_S), new(1, timeout_s=TIMEOUT_S), new(2)])
    ledgers.call("insert", [new(3, coalesce_key=b"k"), new(4, coalesce_key=b"k")])
    ledgers.call("claim", [(JOBS[0], life), (JOBS[2], life)])
    ledgers.call("end", [ending(0, life)])
    ledgers.call("land")
    ledgers.call("finish", [result(2, life)])
    ledgers.wait(30)
    ledgers.call("expire")
    moved = ("echo", "generate")
    wanted = [(JOBS[0], "t"), (JOBS[1], None), (JOBS[2], "t"), (JOBS[3], "t"), (JOBS[4], "other")]
    assert ledgers.call("retry", wanted) == [moved, moved, None, moved, None]
    assert ledgers.call("retry", wanted) == [None] * 5
    ledgers.compare()
    ledgers.call("claim", [(JOBS[0], life), (JOBS[1], life), (JOBS[3], life)])
    assert ledgers.call("finish", [result(0, life), result(0, life, 2), result(3, life)]) == [None, 2, None]


def keyed(key: str, fingerprint: bytes, number: int) -> tuple[Idempotency, NewJob]:
    return Idempotency(API_KEY, key, fingerprint), new(number)


@scenario
def a_key_makes_one_job(ledgers: Ledgers) -> None:
    assert ledgers.call("find_key", [(API_KEY, "a")]) == [None]
    assert ledgers.call("insert_once", [keyed("a", b"1", 0), keyed("b", b"2", 1)])[0].job_id == JOBS[0]
    again = ledgers.call("insert_once", [keyed("a", b"1", 0), keyed("b", b"2", 2)])
    assert [(one.job_id, one.inserted is None) for one in again] == [(JOBS[0], False), (JOBS[1], True)]
    ledgers.call("insert_once", [keyed("c", b"3", 3), keyed("c", b"4", 4)])
    ledgers.call("find_key", [(API_KEY, "a"), (API_KEY, "x"), (uuid.UUID(int=99), "a"), (API_KEY, "c")])
    ledgers.wait(86_000)
    assert ledgers.call("find_key", [(API_KEY, "a")])[0].job_id == JOBS[0]
    ledgers.wait(1_000)
    assert ledgers.call("find_key", [(API_KEY, "a")]) == [None]
    assert ledgers.call("insert_once", [keyed("a", b"5", 4)])[0].job_id == JOBS[4]


@scenario
def the_stranded_move(ledgers: Ledgers) -> None:
    ledgers.call("insert", [new(0, coalesce_key=b"k"), new(1)])
    ledgers.call("insert", [new(2, coalesce_key=b"k"), new(3, backend="bert")])
    ledgers.wait(10)
    ledgers.call("cancel", [(JOBS[1], "t")])
    assert ledgers.call("stranded", ["echo"]) == [(JOBS[0], "echo", b"{}")]
    assert ledgers.call("reroute", JOBS[0], "bert", "echo", "{}") is None
    assert ledgers.call("reroute", JOBS[0], "echo", "bert", "{}") == "generate"
    assert ledgers.call("reroute", JOBS[1], "echo", "bert", "{}") is None
    ledgers.call("depths")


@pytest.mark.parametrize("play", SCENARIOS, ids=lambda play: play.__name__)
def test_both_ledgers_agree_on(ledgers: Ledgers, play: Scenario) -> None:
    play(ledgers)
    ledgers.compare()


numbers = st.integers(0, len(JOBS) - 1)
lives = st.integers(1, 3)
attempts = st.integers(1, 3)
runs = st.sampled_from([0, 0, 1, 1, 2, 3, 4])
codes = st.fixed_dictionaries(
    {
        "code": st.sampled_from(["backend_error", "backend_dead"]),
        "is_retryable": st.booleans(),
        "is_counted": st.booleans(),
    }
)


def some(strategy: st.SearchStrategy[Any], *keys: Callable[[Any], Any]) -> st.SearchStrategy[list[Any]]:
    """A batch. Two items of one job in a batch have a test of their own: which of them Postgres takes is open,
    and so is which of two followers is the older."""
    return st.lists(strategy, min_size=1, max_size=3, unique_by=keys)


inserted = st.builds(
    lambda number, timeout_s, cache_key, is_refresh, coalesce_key: new(
        number, timeout_s=timeout_s, cache_key=cache_key, coalesce_key=coalesce_key,
        cache_ttl_s=None if cache_key is None else TTL_S, is_cache_refresh=is_refresh,
        backend="bert" if number == 4 else "echo"),
    numbers, st.sampled_from([None, None, TIMEOUT_S, -5.0]), st.sampled_from([None, b"k" * 32]), st.booleans(),
    st.sampled_from([None, b"a", b"b"]),
)  # fmt: skip
finishes = st.builds(lambda number, life, run: result(number, life, run, b"%d-%d" % (life, run)),
                     numbers, lives, runs)  # fmt: skip
endings = st.builds(lambda number, life, run, fields: ending(number, life, run, **fields),
                    numbers, lives, runs, codes)  # fmt: skip
claims = st.tuples(some(numbers, lambda number: number), lives).map(
    lambda drawn: [(JOBS[number], drawn[1]) for number in drawn[0]]
)
# What makes work comes up often: without it most statements meet a ledger in which nothing runs.
steps = st.one_of(
    st.tuples(st.just("insert"), some(inserted, lambda job: job.id, lambda job: job.coalesce_key or job.id)),
    st.tuples(st.just("insert_once"), some(st.builds(keyed, st.sampled_from("abc"), st.sampled_from([b"1", b"2"]), numbers),
                                           lambda pair: pair[0].key, lambda pair: pair[1].id)),
    st.tuples(st.just("find_key"), st.just([(API_KEY, "a"), (API_KEY, "b")])),
    *[st.tuples(st.just("claim"), claims)] * 3,
    *[st.tuples(st.just("finish"), some(finishes, lambda one: one.id))] * 2,
    *[st.tuples(st.just("end"), some(endings, lambda one: one.id))] * 2,
    st.tuples(st.just("claim_alone"), claims),
    st.tuples(st.just("land"), st.none() | st.lists(numbers.map(JOBS.__getitem__), max_size=2)),
    st.tuples(st.just("hand_over")),
    st.tuples(st.just("retry"), some(st.tuples(numbers.map(JOBS.__getitem__), st.sampled_from(["t", "u", None])),
                                     lambda pair: pair[0])),
    st.tuples(st.just("stranded"), st.just(["echo"])),
    st.tuples(st.just("reroute"), numbers.map(JOBS.__getitem__), st.just("echo"), st.just("bert"), st.just("{}")),
    st.tuples(st.just("cancel"), some(st.tuples(numbers.map(JOBS.__getitem__), st.sampled_from("tu")), lambda one: one)),
    st.tuples(st.just("expire")),
    st.tuples(st.just("rescue"), st.lists(lives, min_size=1, max_size=2), attempts),
    st.tuples(st.just("find_unsent"), st.sampled_from(["echo", "bert"]), st.just(PATIENCE_S), st.integers(1, 3)),
    st.tuples(st.just("depths")),
    st.tuples(st.just("owned"), st.lists(lives, max_size=2)),
    st.tuples(st.just("outcome"), st.just(JOBS)),
    st.tuples(st.just("ended"), st.just([JOBS])),
    *[st.tuples(st.just("register"), st.sampled_from("ab"), st.just("echo"), st.just(1), st.just(4), st.just({}),
                st.just(LEASE_S))] * 2,
    st.tuples(st.just("hold_lock"), lives),
    st.tuples(st.just("drop_lock"), lives),
    st.tuples(st.just("heartbeat"), some(st.builds(beat, lives, st.sampled_from(["ready", "draining"])), id)),
    st.tuples(st.just("leave"), lives),
    st.tuples(st.just("bury"), st.just(BEAT_S)),
    st.tuples(st.just("wait"), st.sampled_from([10, 20, 40])),
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(steps, min_size=20, max_size=40))
def test_both_ledgers_agree_on_any_sequence(cursor: Cursor, sequence: list[tuple[Any, ...]]) -> None:
    ledgers = Ledgers(cursor)
    ledgers.call("register", "a", "echo", 1, 4, {}, LEASE_S)
    ledgers.call("insert", [new(0), new(1, timeout_s=TIMEOUT_S)])
    for name, *arguments in sequence:
        if name in ("wait", "drop_lock"):
            getattr(ledgers, name)(*arguments)
        else:
            ledgers.call(name, *arguments)
    ledgers.compare()
