"""The invariants of docs and design, checked from outside the ledger: after every statement and at the end.

The audit keeps its own account of every job and of every worker's life, made of what was asked and answered.
It never asks the store's guards, so a mutant of the store cannot fool it.
"""

import uuid
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from db.accept import Idempotency
from db.job_views import Outcome
from db.jobs import Claimed, Ended, Finished
from db.states import RETRYABLE, TERMINAL, TRANSITIONS, JobStatus
from tests.simulation.kernel import Violation
from tests.simulation.store import DEATHS, LOCK_GRACE_S, JobRow, SimStore


@dataclass(slots=True)
class Record:
    """A job as the last legal statement left it."""

    status: JobStatus
    attempt: int
    run: int
    worker_id: int | None
    finished_at: float | None
    error: dict[str, Any] | None
    usage: dict[str, Any] | None
    body: bytes | None


@dataclass(slots=True)
class Life:
    heartbeat_at: float
    lease_until: float


class Audit:
    def __init__(self, store: SimStore, max_attempts: int, heartbeat_s: float) -> None:
        self._store, self._max_attempts, self._heartbeat_s = store, max_attempts, heartbeat_s
        self.records: dict[uuid.UUID, Record] = {}
        self.lost: set[uuid.UUID] = set()
        """Jobs that a crash of Postgres took back before anything was promised."""
        self.promised: set[uuid.UUID] = set()
        self.cancelled: set[uuid.UUID] = set()
        self.retried: set[uuid.UUID] = set()
        """News of their first end may be late."""
        self.observed: dict[uuid.UUID, tuple[JobStatus, bytes | None]] = {}
        self.lives: dict[int, Life] = {}
        """Who is alive by what it was answered, and by the true clock."""
        self.key_of: dict[tuple[uuid.UUID, str], tuple[uuid.UUID, bytes]] = {}
        """The job and the request that each Idempotency-Key was said to stand for."""
        self.under: dict[tuple[uuid.UUID, str], set[uuid.UUID]] = {}
        """The jobs that requests with that key would make."""
        self.transitions: Counter[str] = Counter()
        self.checked: Counter[str] = Counter()

    def after_statement(self, name: str, arguments: tuple[Any, ...], answer: Any) -> None:
        if name in _OF_WORKERS:
            self._of_workers(name, arguments, answer)
        elif name == "outcome":
            for job_id, outcome in zip(arguments[0], answer, strict=True):
                self._observe(job_id, outcome)
        for job_id in self._store.changed:
            self._job(name, arguments, job_id)

    def promise(self, job_id: uuid.UUID) -> None:
        """A caller was told that the job is accepted."""
        self.promised.add(job_id)

    def ask(self, key: Idempotency, job_id: uuid.UUID) -> None:
        """A request with an Idempotency-Key is on its way, and may make this job."""
        self.under.setdefault((key.api_key_id, key.key), set()).add(job_id)

    def keyed(self, key: Idempotency, job_id: uuid.UUID) -> None:
        """A caller was told that its key stands for the job."""
        known = self.key_of.setdefault((key.api_key_id, key.key), (job_id, key.fingerprint))
        self._hold("I7", known == (job_id, key.fingerprint), "{} stood for {} and stands for {}", key, known, job_id)

    def cancel(self, job_id: uuid.UUID) -> None:
        """A caller was told that the job is cancelled."""
        self.cancelled.add(job_id)

    def announce(self, job_id: uuid.UUID, status: str) -> None:
        """The news of a job's end went out: never ahead of the ledger."""
        record = self.records.get(job_id)
        self._hold(
            "news",
            record is not None and (record.status == status or job_id in self.retried),
            "{} is said to be {}: {}",
            job_id,
            status,
            record,
        )

    def send(self, job_id: uuid.UUID) -> None:
        """A message went out: never ahead of the row."""
        self._hold(
            "message", job_id in self.records or job_id in self.lost, "a message of {}, which no row has", job_id
        )

    def resume(self, undone: Collection[uuid.UUID]) -> None:
        """Postgres is back from a crash, without these changes."""
        for job_id in undone:
            row, record = self._store.jobs.get(job_id), self.records.pop(job_id)
            self._hold("I1", row is not None or job_id not in self.promised, "{} was promised and is gone", job_id)
            self._hold("I2", record.status not in TERMINAL, "{} was {}", job_id, record.status)
            if row is None:
                self.lost.add(job_id)
            else:
                self.records[job_id] = self._record(row)
        self.lives = {
            number: Life(life.heartbeat_at, life.lease_until)
            for number, life in self._store.workers.items()
            if life.state != "dead"
        }

    def start(self, job: Claimed, num_others: int, has_suspect: bool) -> bool:
        """A worker begins to run the job, beside so many others. True for one that must run alone."""
        row = self._store.jobs.get(job.id)
        # The ledger may have gone on since the claim, whose answer was late.
        is_suspect = row is not None and _num_deaths(row.attempts[: job.run]) >= 2
        self._hold("alone", not has_suspect and not (is_suspect and num_others), "{} has company", job.id)
        return is_suspect

    def finish(self, is_quiet: bool) -> None:
        """The end of a schedule, faults over and everything still."""
        rows, results = self._store.jobs, self._store.results
        for job_id in self.promised:
            self._hold("I1", job_id in rows, "{} was promised and is not in the ledger", job_id)
        for name, job_ids in self.under.items():
            made = job_ids & rows.keys()
            self._hold("I7", len(made) <= 1, "{} made {}", name, made)
        for name, (job_id, _) in self.key_of.items():
            self._hold("I7", job_id in self.under[name], "{} stands for {}, which nobody asked for", name, job_id)
        for row in rows.values():
            self._hold("I1", row.status in TERMINAL, "{} never ended: {}", row.id, row)
            self._hold("I20", is_quiet, "the world did not come to rest")
            self._hold("I6", row.attempt <= self._max_attempts, "{} had {} attempts", row.id, row.attempt)
            self._hold("I2", row.id in self.records and self._record(row) == self.records[row.id],
                       "{} changed unseen: {}", row.id, row)  # fmt: skip
            has_result = row.id in results or (row.status is JobStatus.SUCCEEDED and row.leader_id in results)
            self._hold("I5", has_result == (row.status is JobStatus.SUCCEEDED),
                       "{} is {}, result: {}", row.id, row.status, results.get(row.id))  # fmt: skip
        for job_id in self.cancelled:
            self._hold("I17", rows[job_id].status is JobStatus.CANCELLED, "{} was cancelled: {}", job_id, rows[job_id])
        for job_id, seen in self.observed.items():
            now = rows[job_id].status, self._record(rows[job_id]).body
            self._hold("I2", seen == now, "{} was seen as {} and is {}", job_id, seen, now)
        counts = Counter(row.status for row in rows.values())
        self._hold("I19", rows.keys() == self.records.keys() and sum(counts[status] for status in TERMINAL) == len(rows),
                   "accepted {}, in the ledger {}", len(self.records), counts)  # fmt: skip
        self._hold("I19", counts == Counter(record.status for record in self.records.values()), "{}", counts)

    def _observe(self, job_id: uuid.UUID, outcome: Outcome | None) -> None:
        """A caller reads the outcome."""
        self._hold("I1", outcome is not None or job_id in self.lost, "{} is unknown to the ledger", job_id)
        if outcome is None or outcome.status not in TERMINAL:
            self._hold("I2", job_id not in self.observed, "{} had ended and has not any more", job_id)
            return
        answer = outcome.status, outcome.body if outcome.status is JobStatus.SUCCEEDED else None
        seen = self.observed.setdefault(job_id, answer)
        self._hold("I2", seen == answer, "{} ended as {} and as {}", job_id, seen, outcome)

    def _job(self, name: str, arguments: tuple[Any, ...], job_id: uuid.UUID) -> None:
        row, record = self._store.jobs.get(job_id), self.records.get(job_id)
        if row is None:
            raise Violation("I1", f"{name} made {job_id} vanish")
        now = self._record(row)
        if record is None:
            self._hold(
                "I1", name in ("insert", "insert_once") and now.status is JobStatus.QUEUED, "{} made {}", name, row
            )
            self.transitions["new->queued"] += 1
        elif name == "retry":
            self._hold("I2", record.status in RETRYABLE, "{} was retried", record)
            self.retried.add(job_id)
            self.observed.pop(job_id, None)
            self.transitions[f"{record.status}->{now.status}"] += 1
        elif record.status in TERMINAL:
            self._hold("I2", now == record, "{} changed a job that had ended: {} -> {}", name, record, now)
        elif name in _UNMOVING:
            is_promoted = name == "hand_over" and now == replace(record, run=now.run) and now.run > record.run
            self._hold("I2", now == record or is_promoted, "{} changed more than it says: {} -> {}", name, record, now)
        else:
            is_legal = now.status in TRANSITIONS[record.status]
            self._hold("I2", is_legal, "{} moved {} {} -> {}", name, job_id, record.status, now.status)
            self._move(name, arguments, row, record, now)
            self.transitions[f"{record.status}->{now.status}"] += 1
        self.records[job_id] = now

    def _move(self, name: str, arguments: tuple[Any, ...], row: JobRow, before: Record, now: Record) -> None:
        match name:
            case "claim" | "claim_alone":
                self._hold("alone", name == "claim_alone" or _num_deaths(row.attempts) < 2, "{} is a suspect", row.id)
                self._hold("flight", row.leader_id is None, "{} follows and was taken", row.id)
                self._hold("I6", now.attempt == before.attempt + 1 <= self._max_attempts, "{} -> {}", before, now)
                self._hold("I5", now.worker_id in self.lives, "worker {} is dead and took {}", now.worker_id, row.id)
                self._hold("I1", row.deadline_at is None or row.deadline_at > self._store.now, "{} is too late", row.id)
            case "finish":
                body = b"%d:%d:%d" % (row.id.int, before.worker_id or 0, before.run)
                self._hold("I5", now.body == body, "{} was owned by {}, stored is {}", row.id, before, now.body)
            case "end":
                self._fenced(arguments[0], row, before)
            case "land":
                leader = self.records.get(row.leader_id) if row.leader_id is not None else None
                self._hold("flight", leader is not None and (leader.status, leader.body) == (now.status, now.body)
                           and now.status in (JobStatus.SUCCEEDED, JobStatus.FAILED),
                           "{} ended as {}, its leader as {}", row.id, now, leader)  # fmt: skip
            case "cancel":
                is_meant = (row.id, row.job.tenant) in arguments[0]
                self._hold("flight", is_meant, "{} was cancelled and nobody asked for it", row.id)
            case "rescue":
                self._hold("I18", before.worker_id not in self.lives, "{} was taken from a living worker", row.id)
            case "expire":
                is_late = row.deadline_at is not None and row.deadline_at <= self._store.now
                self._hold("I18", is_late, "{} expired early", row.id)
        if now.status is JobStatus.FAILED and (now.error or {}).get("code") == "attempts_exhausted":
            self._hold("I6", now.attempt >= self._max_attempts, "{} gave up after {}", row.id, now.attempt)

    def _fenced(self, endings: Sequence[Ended | Finished], row: JobRow, before: Record) -> None:
        owners = {(one.worker_id, one.run) for one in endings if one.id == row.id}
        self._hold("I5", (before.worker_id, before.run) in owners, "{} ended {}, owned by {}", owners, row.id, before)

    def _of_workers(self, name: str, arguments: tuple[Any, ...], answer: Any) -> None:
        now, workers = self._store.now, self._store.workers
        if name == "register":
            for number in [number for number in self.lives if workers[number].name == arguments[0]]:
                del self.lives[number]
            self.lives[answer] = Life(now, now + arguments[-1])
        elif name == "heartbeat":
            for beat, is_alive in zip(arguments[0], answer, strict=True):
                known = self.lives.get(beat.worker_id)
                self._hold("I18", is_alive == (known is not None), "worker {} was told {}", beat.worker_id, is_alive)
                if known is not None:
                    known.heartbeat_at, known.lease_until = now, now + beat.lease_s
        elif name == "leave":
            self.lives.pop(arguments[0], None)
        else:
            for number in [number for number in self.lives if workers[number].state == "dead"]:
                self._hold(
                    "I18", self._is_lost(number, self.lives.pop(number)), "worker {} lives and was buried", number
                )

    def _is_lost(self, number: int, life: Life) -> bool:
        now = self._store.now
        is_lockless = number not in self._store.locks and self._store.started_at < now - LOCK_GRACE_S
        return life.lease_until < now or (life.heartbeat_at < now - self._heartbeat_s and is_lockless)

    def _record(self, row: JobRow) -> Record:
        result = self._store.results.get(row.leader_id or row.id) if row.status is JobStatus.SUCCEEDED else None
        return Record(row.status, row.attempt, row.run, row.worker_id, row.finished_at, row.error, row.usage,
                      None if result is None else result.body)  # fmt: skip

    def _hold(self, invariant: str, holds: bool, text: str, *seen: object) -> None:
        self.checked[invariant] += 1
        if not holds:
            raise Violation(invariant, text.format(*seen))


def _num_deaths(attempts: Sequence[dict[str, Any]]) -> int:
    return sum(attempt["outcome"] in DEATHS for attempt in attempts)


_UNMOVING = frozenset({"insert", "insert_once", "find_unsent", "hand_over"})
"""Statements that leave a job that is there as it stands."""
_OF_WORKERS = frozenset({"register", "heartbeat", "leave", "bury"})
