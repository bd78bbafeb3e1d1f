"""The ledger in memory: the statements of `db.accept`, `db.jobs`, `db.recovery`, `db.flights` and others, with the same names,
arguments and answers.

A `SimStore` is a drop-in for a cursor *and* for these modules: `SimStore.claim(store, wanted)` reads like
`jobs.claim(cursor, wanted)`. `test_conformance.py` holds it to what Postgres answers; without that, nothing
the simulation finds would mean anything. A statement is atomic and time stands still while it runs.

Which session speaks is state of the store (`begin`): locks belong to sessions, and what a session with
`is_durable=False` wrote since the last durable commit is what a crash of Postgres can take back.
"""

import datetime
import hashlib
import math
import operator
import uuid
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields, replace
from random import Random
from typing import Any

import orjson

from db.accept import Idempotency, Inserted, NewJob, Reserved
from db.job_views import Depth, Outcome
from db.jobs import Claimed, Ended, Finished, Owned, Suspect
from db.states import RETRYABLE, TERMINAL, JobStatus
from db.workers import Heartbeat

LOCK_GRACE_S = 10.0
"""After a start of Postgres, a missing lock proves nothing for so long."""

EXPIRED = {"code": "job_expired", "message": "the job's deadline passed before it finished"}
DEATHS = frozenset({"worker_died", "backend_dead", "backend_stalled"})
WORKER_DIED = {"code": "attempts_exhausted", "message": "every worker that ran this job died before it finished"}


@dataclass(slots=True)
class JobRow:
    """A row of `jobs`. Lists and dicts are replaced, never changed, so a shallow copy is a snapshot."""

    job: NewJob
    created_at: float
    enqueued_at: float
    deadline_at: float | None
    status: JobStatus = JobStatus.QUEUED
    attempt: int = 0
    worker_id: int | None = None
    attempts: list[dict[str, Any]] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    timings: dict[str, float] = field(default_factory=dict)
    started_at: float | None = None
    first_token_at: float | None = None
    finished_at: float | None = None
    leader_id: uuid.UUID | None = None
    flight_id: uuid.UUID | None = None
    num_followers: int = 0

    @property
    def id(self) -> uuid.UUID:
        return self.job.id

    def snapshot(self) -> "JobRow":
        return JobRow(*_FIELDS_OF_JOB(self))

    @property
    def backend(self) -> str:
        return self.job.backend

    @property
    def run(self) -> int:
        return len(self.attempts)


@dataclass(slots=True)
class ResultRow:
    body: bytes
    sha256: bytes
    events: bytes | None


@dataclass(slots=True)
class CacheRow:
    job_id: uuid.UUID
    body: bytes
    usage: dict[str, Any] | None
    created_at: float
    expires_at: float


@dataclass(slots=True)
class WorkerRow:
    name: str
    backend: str
    state: str
    heartbeat_at: float
    lease_until: float
    ready_at: float | None = None

    def snapshot(self) -> "WorkerRow":
        return WorkerRow(*_FIELDS_OF_WORKER(self))


@dataclass(frozen=True, slots=True)
class KeyRow:
    """What an Idempotency-Key stands for."""

    job_id: uuid.UUID
    fingerprint: bytes
    expires_at: float

    def snapshot(self) -> "KeyRow":
        return self


KEY_TTL_S = 24 * 3600.0

# `copy.copy` of a record with slots takes ten times as long, and every statement takes snapshots.
_FIELDS_OF_JOB = operator.attrgetter(*(one.name for one in fields(JobRow)))
_FIELDS_OF_WORKER = operator.attrgetter(*(one.name for one in fields(WorkerRow)))
_BY_ID = operator.attrgetter("job.id.int")

_Place = uuid.UUID | int | tuple[uuid.UUID, str]
"""Of a row: a job's id, a worker's, or a key with its owner."""


class SimStore:
    """Small predicates carry the guards, so that a mutant breaks one of them and nothing else."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now
        """Postgres's clock, Unix seconds. Whoever owns the store moves it."""
        self.started_at = -math.inf
        self.jobs: dict[uuid.UUID, JobRow] = {}
        self.results: dict[uuid.UUID, ResultRow] = {}
        self.cache: dict[bytes, CacheRow] = {}
        self.workers: dict[int, WorkerRow] = {}
        self.keys: dict[tuple[uuid.UUID, str], KeyRow] = {}
        self.locks: dict[Hashable, object] = {}
        """Advisory locks: key → the session that holds it."""
        self.changed: list[uuid.UUID] = []
        """Jobs that the current statement wrote."""
        self.num_workers = 0
        self.caller_now = now
        """The clock of the process that speaks. No statement may look at it."""
        self._session: object = None
        self._is_durable = True
        self._num_statements = 0
        self._undo: list[tuple[int, _Place, JobRow | WorkerRow | KeyRow | None]] = []

    def begin(self, session: object, *, is_durable: bool = True, caller_now: float = 0.0) -> None:
        """The next statement is this session's."""
        self._session, self._is_durable, self.caller_now = session, is_durable, caller_now
        self._num_statements += 1
        self.changed = []

    # Jobs, as in db.jobs.

    def insert(self, jobs: Sequence[NewJob]) -> list[Inserted]:
        followers = []
        for job in sorted(jobs, key=lambda job: job.coalesce_key or b""):
            if job.id in self.jobs:
                continue
            if self._live_with(job.coalesce_key) is None:
                self._add(job)
            else:
                followers.append(job)
        for job in followers:
            self._add(job)
        return [self._inserted(self.jobs[job.id]) for job in jobs]

    def insert_once(self, wanted: Sequence[tuple[Idempotency, NewJob]]) -> list[Reserved]:
        for one, job in wanted:
            self._hold_key(one, job.id)
        mine = [job for one, job in wanted if self.keys[one.api_key_id, one.key].job_id == job.id]
        made = {one.id: one for one in self.insert(mine)}
        answers = []
        for one, job in wanted:
            held = self.keys[one.api_key_id, one.key]
            answers.append(Reserved(held.job_id, held.fingerprint, made.get(job.id) if held.job_id == job.id else None))
        return answers

    def find_key(self, wanted: Sequence[tuple[uuid.UUID, str]]) -> list[Reserved | None]:
        found = [self.keys.get(one) for one in wanted]
        return [
            None if held is None or held.expires_at <= self.now else Reserved(held.job_id, held.fingerprint, None)
            for held in found
        ]

    def hold_keys(
        self, wanted: Sequence[tuple[Idempotency, uuid.UUID]]
    ) -> dict[tuple[uuid.UUID, str], tuple[uuid.UUID, bytes]]:
        for one, job_id in wanted:
            self._hold_key(one, job_id)
        held = {(one.api_key_id, one.key): self.keys[one.api_key_id, one.key] for one, _ in wanted}
        return {name: (row.job_id, row.fingerprint) for name, row in held.items()}

    def claim(self, wanted: Sequence[tuple[uuid.UUID, int]]) -> list[Claimed | Suspect | None]:
        claimed = self._claim(wanted, takes_suspects=False)
        missing = {job_id for job_id, _ in wanted} - claimed.keys()
        suspects = {
            job_id
            for job_id in missing
            if (row := self.jobs.get(job_id)) is not None
            and row.status is JobStatus.QUEUED
            and self._is_suspect(row)
        }  # fmt: skip
        return [Suspect.SUSPECT if job_id in suspects else claimed.pop(job_id, None) for job_id, _ in wanted]

    def claim_alone(self, wanted: Sequence[tuple[uuid.UUID, int]]) -> list[Claimed | None]:
        claimed = self._claim(wanted, takes_suspects=True)
        return [claimed.pop(job_id, None) for job_id, _ in wanted]

    def finish(self, outcomes: Sequence[Finished]) -> list[int | None]:
        owned = [one for one in outcomes if (row := self.jobs.get(one.id)) is not None and self._may_finish(row, one)]
        done = [one for one in owned if self._store(self.jobs[one.id], one)]
        self._cache(done)
        mine = {(one.id, one.run) for one in done}
        return [
            row.num_followers
            if (row := self.jobs.get(one.id)) is not None and ((one.id, one.run) in mine or self._is_stored(row, one))
            else None
            for one in outcomes
        ]

    def end(self, endings: Sequence[Ended]) -> list[JobStatus | None]:
        states: dict[tuple[uuid.UUID, int], JobStatus] = {}
        for one in endings:
            row = self.jobs.get(one.id)
            if row is None or not self._may_end(row, one) or one.id in self.changed:
                continue
            self._change_job(row)
            is_requeued = one.is_retryable and (not one.is_counted or self._has_attempts(row.attempt, one.max_attempts))
            error = {"code": one.code, "message": one.message, "param": one.param}
            row.attempts = [*row.attempts, self._attempt(row, one.code)]
            row.attempt -= not one.is_counted
            row.worker_id = None
            if is_requeued:
                row.status, row.enqueued_at, row.finished_at, row.error = JobStatus.QUEUED, self.now, None, None
            else:
                row.status, row.finished_at = JobStatus.FAILED, self.now
                row.error = error | {"code": "attempts_exhausted"} if one.is_retryable else error
            states[one.id, one.run] = row.status
        return [states.get((one.id, one.run)) for one in endings]

    def cancel(self, wanted: Sequence[tuple[uuid.UUID, str]]) -> list[JobStatus | None]:
        states: dict[tuple[uuid.UUID, str], JobStatus] = {}
        for job_id, tenant in wanted:
            row = self.jobs.get(job_id)
            if row is None or row.job.tenant != tenant:
                continue
            if row.status not in TERMINAL:
                self._change_job(row)
                row.status, row.finished_at = JobStatus.CANCELLED, self.now
            states[job_id, tenant] = row.status
        return [states.get(pair) for pair in wanted]

    def outcome(self, ids: Sequence[uuid.UUID]) -> list[Outcome | None]:
        return [None if (row := self.jobs.get(job_id)) is None else self._outcome(row) for job_id in ids]

    def ended(self, groups: Sequence[Sequence[uuid.UUID]]) -> list[list[uuid.UUID]]:
        return [
            [job_id for job_id in ids if (row := self.jobs.get(job_id)) is None or row.status in TERMINAL]
            for ids in groups
        ]

    def owned(self, worker_ids: Sequence[int]) -> list[list[Owned]]:
        running = [row for row in self.jobs.values() if row.status is JobStatus.RUNNING]
        return [
            [Owned(row.id, row.run, row.backend, row.job.task) for row in running if row.worker_id == worker_id]
            for worker_id in worker_ids
        ]

    def rescue(self, worker_ids: list[int], max_attempts: int) -> list[tuple[uuid.UUID, str, str, str]]:
        answers = []
        for row in self._rows():
            if not self._is_rescuable(row) or row.worker_id not in worker_ids:
                continue
            self._change_job(row)
            row.attempts = [*row.attempts, self._attempt(row, "worker_died")]
            row.worker_id, row.enqueued_at = None, self.now
            if self._has_attempts(row.attempt, max_attempts):
                row.status, row.finished_at, row.error = JobStatus.QUEUED, None, None
            else:
                row.status, row.finished_at, row.error = JobStatus.FAILED, self.now, WORKER_DIED
            answers.append((row.id, row.backend, row.job.task, str(row.status)))
        return answers

    def find_unsent(self, backend: str, older_than_s: float, limit: int = 1000) -> list[tuple[uuid.UUID, str, str]]:
        late = [
            row
            for row in self.jobs.values()
            if row.backend == backend
            and row.status is JobStatus.QUEUED
            and self._leads(row)
            and row.enqueued_at < self.now - older_than_s
        ]  # fmt: skip
        late.sort(key=lambda row: row.created_at)
        for row in late[:limit]:
            self._change_job(row)
            row.enqueued_at = self.now
        return [(row.id, row.backend, row.job.task) for row in late[:limit]]

    def expire(self) -> list[uuid.UUID]:
        late = [
            row
            for row in self._rows()
            if self._is_live(row) and row.deadline_at is not None and row.deadline_at <= self.now
        ]
        for row in late:
            self._change_job(row)
            row.status, row.finished_at, row.error = JobStatus.EXPIRED, self.now, EXPIRED
        return [row.id for row in late]

    def retry(self, wanted: Sequence[tuple[uuid.UUID, str | None]]) -> list[tuple[str, str] | None]:
        answers: dict[uuid.UUID, tuple[str, str]] = {}
        for row in self._rows():
            is_wanted = (row.id, row.job.tenant) in wanted or (row.id, None) in wanted
            if not is_wanted or row.status not in RETRYABLE:
                continue
            self._change_job(row)
            row.status, row.attempt, row.worker_id = JobStatus.QUEUED, 0, None
            row.leader_id = None
            row.flight_id = uuid.UUID(hashlib.md5(f"{row.id}{row.run}".encode()).hexdigest())
            row.error = row.usage = row.finished_at = row.started_at = row.first_token_at = None
            row.job, row.enqueued_at = replace(row.job, coalesce_key=None), self.now
            row.deadline_at = None if row.deadline_at is None else self.now + row.deadline_at - row.created_at
            row.attempts = [*row.attempts, {"attempt": 0, "outcome": "retried", "ended_at": self.now}]
            answers[row.id] = (row.backend, row.job.task)
        return [answers.get(job_id) for job_id, _ in wanted]

    def reroute(self, job_id: uuid.UUID, start: str, end: str, decision: str) -> str | None:
        row = self.jobs.get(job_id)
        if row is None or row.backend != start or row.status is not JobStatus.QUEUED:
            return None
        for one in [row, *(follower for follower in self._followers() if follower.leader_id == row.id)]:
            self._change_job(one)
            one.job = replace(one.job, backend=end)
        row.enqueued_at = self.now
        return row.job.task

    def stranded(self, backends: Sequence[str], limit: int = 200) -> list[tuple[uuid.UUID, str, bytes]]:
        rows = [
            row
            for row in self.jobs.values()
            if row.backend in backends and row.status is JobStatus.QUEUED and self._leads(row)
        ]  # fmt: skip
        rows.sort(key=lambda row: row.created_at)
        return [(row.id, row.backend, row.job.payload) for row in rows[:limit]]

    def depths(self) -> dict[str, Depth]:
        live: dict[str, list[JobRow]] = {}
        for row in self.jobs.values():
            if row.status not in TERMINAL and self._leads(row):
                live.setdefault(row.backend, []).append(row)
        return {backend: self._depth(rows) for backend, rows in live.items()}

    # Flights, as in db.flights.

    def land(self, leader_ids: Sequence[uuid.UUID] | None = None) -> list[tuple[uuid.UUID, str]]:
        landed = []
        for row in self._followers():
            if leader_ids is None or row.leader_id in leader_ids:
                leader = self._leader(row)
                if leader.status in (JobStatus.SUCCEEDED, JobStatus.FAILED):
                    self._land(row, leader)
                    landed.append((row.id, str(row.status)))
        return landed

    def hand_over(self) -> list[tuple[uuid.UUID, str, str]]:
        waiting: dict[uuid.UUID, list[JobRow]] = {}
        for row in self._followers():
            leader = self._leader(row)
            if leader.status in (JobStatus.CANCELLED, JobStatus.EXPIRED):
                waiting.setdefault(leader.id, []).append(row)
        promoted = []
        for leader_id, rows in waiting.items():
            oldest, *others = sorted(rows, key=lambda row: (row.created_at, row.id))
            self._change_job(oldest)
            oldest.leader_id, oldest.enqueued_at, oldest.num_followers = None, self.now, len(others)
            before = [*oldest.attempts, *self.jobs[leader_id].attempts]
            oldest.attempts = [*before, {"attempt": 0, "outcome": "took_over", "ended_at": self.now}]
            for row in others:
                self._change_job(row)
                row.leader_id = oldest.id
            promoted.append((oldest.id, oldest.backend, oldest.job.task))
        return promoted

    # Workers, as in db.workers.

    def register(self, name: str, backend: str, pid: int, slots: int, models: dict[str, str], lease_s: float) -> int:
        for worker_id, life in self.workers.items():
            if life.name == name and life.state != "dead":
                self._change_worker(worker_id)
                life.state = "dead"
        self.num_workers += 1
        self._change_worker(self.num_workers)
        self.workers[self.num_workers] = WorkerRow(name, backend, "loading", self.now, self.now + lease_s)
        return self.num_workers

    def hold_lock(self, worker_id: int) -> None:
        self.try_lock(worker_id)

    def heartbeat(self, beats: Sequence[Heartbeat]) -> list[bool]:
        return [self._beat(beat) for beat in beats]

    def leave(self, worker_id: int) -> None:
        if worker_id in self.workers:
            self._change_worker(worker_id)
            self.workers[worker_id].state = "dead"

    def bury(self, heartbeat_s: float) -> list[int]:
        for worker_id, life in self.workers.items():
            if life.state != "dead" and self._is_lost(worker_id, life, heartbeat_s):
                self._change_worker(worker_id)
                life.state = "dead"
        dead = {worker_id for worker_id, life in self.workers.items() if life.state == "dead"}
        running = (row.worker_id for row in self.jobs.values() if row.status is JobStatus.RUNNING)
        return sorted({worker_id for worker_id in running if worker_id is not None and worker_id in dead})

    # Sessions, locks and the server itself.

    def try_lock(self, key: Hashable) -> bool:
        """pg_try_advisory_lock for the session that speaks."""
        return self.locks.setdefault(key, self._session) is self._session

    def unlock(self, session: object) -> None:
        """The session is gone, and its locks with it."""
        for key in [key for key, holder in self.locks.items() if holder is session]:
            del self.locks[key]

    def crash(self, rng: Random) -> set[uuid.UUID]:
        """Postgres dies and is back: no session, no lock, and a tail of what was not flushed is taken back.
        Answers the jobs that differ from before."""
        undone: set[uuid.UUID] = set()
        first = rng.choice(self._undo)[0] if self._undo and rng.random() < 0.7 else math.inf
        while self._undo and self._undo[-1][0] >= first:
            _, key, before = self._undo.pop()
            table: dict[Any, Any] = (
                self.jobs if isinstance(key, uuid.UUID) else self.workers if isinstance(key, int) else self.keys
            )
            if before is None:
                table.pop(key, None)
            else:
                table[key] = before
            if isinstance(key, uuid.UUID):
                undone.add(key)
        self._undo.clear()
        self.locks.clear()
        self.started_at = self.now
        return undone

    # The guards.

    def _is_claimable(self, row: JobRow) -> bool:
        is_late = row.deadline_at is not None and row.deadline_at <= self.now
        return row.status is JobStatus.QUEUED and self._leads(row) and not is_late

    def _leads(self, row: JobRow) -> bool:
        """It has a run of its own."""
        return row.leader_id is None

    def _is_suspect(self, row: JobRow) -> bool:
        return sum(attempt["outcome"] in DEATHS for attempt in row.attempts) >= 2

    def _may_take(self, worker_id: int) -> bool:
        return worker_id in self.workers and self.workers[worker_id].state != "dead"

    def _is_owner(self, row: JobRow, one: Finished | Ended) -> bool:
        return row.run == one.run and row.worker_id == one.worker_id

    def _may_finish(self, row: JobRow, one: Finished) -> bool:
        return row.status is JobStatus.RUNNING and self._is_owner(row, one)

    def _is_stored(self, row: JobRow, one: Finished) -> bool:
        return row.status is JobStatus.SUCCEEDED and self._is_owner(row, one)

    def _may_end(self, row: JobRow, one: Ended) -> bool:
        return row.status is JobStatus.RUNNING and self._is_owner(row, one)

    def _is_rescuable(self, row: JobRow) -> bool:
        return row.status is JobStatus.RUNNING

    def _is_live(self, row: JobRow) -> bool:
        return row.status not in TERMINAL

    def _has_attempts(self, attempt: int, max_attempts: int) -> bool:
        return attempt < max_attempts

    def _is_lost(self, worker_id: int, life: WorkerRow, heartbeat_s: float) -> bool:
        return life.lease_until < self.now or (
            life.heartbeat_at < self.now - heartbeat_s
            and self.started_at < self.now - LOCK_GRACE_S
            and worker_id not in self.locks
        )

    # The parts of statements.

    def _rows(self) -> list[JobRow]:
        return sorted(self.jobs.values(), key=_BY_ID)

    def _add(self, job: NewJob) -> None:
        deadline = None if job.timeout_s is None else self.now + job.timeout_s
        leader = self._live_with(job.coalesce_key)
        if leader is not None:
            self._change_job(leader)
            leader.num_followers += 1
            verdict = f"COALESCED; joined {leader.id}"
            job = replace(job, backend=leader.backend, cache_verdict=verdict, coalesce_key=None)
        row = JobRow(job, self.now, self.now, deadline, timings=orjson.loads(job.timings))
        if leader is not None:
            row.leader_id, row.flight_id = leader.id, leader.flight_id or leader.id
        self._change_job(row)
        self.jobs[job.id] = row

    def _hold_key(self, one: Idempotency, job_id: uuid.UUID) -> None:
        name = one.api_key_id, one.key
        held = self.keys.get(name)
        if held is None or held.expires_at <= self.now:
            self._remember(name, held)
            self.keys[name] = KeyRow(job_id, one.fingerprint, self.now + KEY_TTL_S)

    def _live_with(self, key: bytes | None) -> JobRow | None:
        if key is None:
            return None
        return next((row for row in self.jobs.values() if row.job.coalesce_key == key and self._is_live(row)), None)

    def _inserted(self, row: JobRow) -> Inserted:
        created_at = datetime.datetime.fromtimestamp(row.created_at, datetime.UTC)
        return Inserted(row.id, created_at, row.backend, row.job.cache_verdict, row.leader_id, row.flight_id or row.id)

    def _claim(self, wanted: Sequence[tuple[uuid.UUID, int]], *, takes_suspects: bool) -> dict[uuid.UUID, Claimed]:
        worker_id = wanted[0][1]
        claimed: dict[uuid.UUID, Claimed] = {}
        if not self._may_take(worker_id):
            return claimed
        for job_id in dict.fromkeys(job_id for job_id, _ in wanted):
            row = self.jobs.get(job_id)
            if row is None or row.backend != self.workers[worker_id].backend:
                continue
            if not self._is_claimable(row) or (not takes_suspects and self._is_suspect(row)):
                continue
            self._change_job(row)
            row.status, row.worker_id = JobStatus.RUNNING, worker_id
            row.attempt += 1
            row.started_at, row.first_token_at = self.now, None
            job = row.job
            claimed[job_id] = Claimed(job_id, row.attempt, job.payload, job.is_stream, job.backend, job.task,
                                      round(row.created_at), (self.now - row.created_at) * 1000, row.run,
                                      row.flight_id or job_id, int(self.now * 1000))  # fmt: skip
        if any(one.is_stream for one in claimed.values()):
            self._undo.clear()
        return claimed

    def _followers(self) -> list[JobRow]:
        waiting = [row for row in self.jobs.values() if row.status is JobStatus.QUEUED and row.leader_id is not None]
        return sorted(waiting, key=_BY_ID)

    def _leader(self, row: JobRow) -> JobRow:
        assert row.leader_id is not None
        return self.jobs[row.leader_id]

    def _land(self, row: JobRow, leader: JobRow) -> None:
        self._change_job(row)
        row.status, row.finished_at, row.usage, row.error = leader.status, self.now, leader.usage, leader.error
        row.attempt, row.worker_id, row.timings = leader.attempt, leader.worker_id, row.timings | leader.timings
        row.started_at = max(leader.started_at or 0.0, row.created_at)
        row.first_token_at = max(leader.first_token_at or 0.0, row.created_at)

    def _store(self, row: JobRow, one: Finished) -> bool:
        """False for the second of two results of one attempt in one batch."""
        if row.id in self.changed:
            return False
        self._change_job(row)
        row.status, row.finished_at = JobStatus.SUCCEEDED, self.now
        row.usage, row.timings = orjson.loads(one.usage), row.timings | orjson.loads(one.timings)
        started = row.started_at
        row.first_token_at = None if started is None or one.ttft_ms is None else started + one.ttft_ms / 1000
        self.results[row.id] = ResultRow(one.body, one.sha256, one.events)
        return True

    def _cache(self, done: Sequence[Finished]) -> None:
        first: dict[bytes, Finished] = {}
        for one in sorted(done, key=lambda one: one.id):
            job = self.jobs[one.id].job
            if job.cache_ttl_s is not None and job.cache_key is not None:
                first.setdefault(job.cache_key, one)
        for key, one in first.items():
            job, entry = self.jobs[one.id].job, self.cache.get(key)
            if entry is None or entry.expires_at <= self.now or job.is_cache_refresh:
                assert job.cache_ttl_s is not None
                self.cache[key] = CacheRow(one.id, one.body, self.jobs[one.id].usage, self.now,
                                           self.now + job.cache_ttl_s)  # fmt: skip

    def _attempt(self, row: JobRow, outcome: str) -> dict[str, Any]:
        return {"attempt": row.attempt, "worker_id": row.worker_id, "started_at": row.started_at,
                "ended_at": self.now, "outcome": outcome}  # fmt: skip

    def _outcome(self, row: JobRow) -> Outcome:
        result = self.results.get(row.leader_id or row.id) if row.status is JobStatus.SUCCEEDED else None
        body, events = (None, None) if result is None else (result.body, result.events)
        return Outcome(row.job.tenant, row.job.endpoint, row.status, body, events, row.error, row.usage, row.job.model,
                       row.backend, row.attempt, _ms(row.created_at, row.started_at),
                       _ms(row.started_at, row.finished_at), _ms(row.started_at, row.first_token_at),
                       None if row.finished_at is None else int(row.finished_at))  # fmt: skip

    def _depth(self, rows: Sequence[JobRow]) -> Depth:
        queued = [row for row in rows if row.status is JobStatus.QUEUED]
        return Depth(len(queued), len(rows) - len(queued), sum(row.job.prompt_tokens for row in queued),
                     self.now - min(row.created_at for row in queued) if queued else 0.0)  # fmt: skip

    def _beat(self, beat: Heartbeat) -> bool:
        life = self.workers.get(beat.worker_id)
        if life is None or life.state == "dead":
            return False
        self._change_worker(beat.worker_id)
        life.state, life.heartbeat_at, life.lease_until = beat.state, self.now, self.now + beat.lease_s
        if beat.state == "ready" and life.ready_at is None:
            life.ready_at = self.now
        return True

    def _change_job(self, row: JobRow) -> None:
        """Every write of a job's row announces itself here first."""
        self.changed.append(row.id)
        self._remember(row.id, self.jobs.get(row.id))

    def _change_worker(self, worker_id: int) -> None:
        self._remember(worker_id, self.workers.get(worker_id))

    def _remember(self, key: "_Place", before: JobRow | WorkerRow | KeyRow | None) -> None:
        if self._is_durable:
            self._undo.clear()
        else:
            self._undo.append((self._num_statements, key, None if before is None else before.snapshot()))


def _ms(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else (end - start) * 1000
