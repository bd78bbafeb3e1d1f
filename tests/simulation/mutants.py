"""Broken versions of the core, one rule each. The simulation is worth what it finds among them.

The first block holds the design's mutants that live in the core (the others break HTTP, tenants, idempotency or
bytes on the wire, which are not simulated); the second, rules that are easy to lose in a rewrite.
"""

import math
import uuid
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from db.accept import Idempotency, NewJob, Reserved
from db.jobs import Ended, Finished
from db.states import JobStatus
from db.workers import Heartbeat
from tasks import reconciler
from tests.simulation.processes import Client, Gateway, Lane, Reconciler, Worker
from tests.simulation.store import JobRow, SimStore, WorkerRow
from tests.simulation.world import Parts


class DropRow(SimStore):
    """One accepted job in eight is not kept."""

    def insert(self, jobs: Sequence[NewJob]) -> Any:
        answers = super().insert(jobs)
        for job in jobs:
            if job.id.int % 8 == 0:
                del self.jobs[job.id]
                self.changed.clear()
        return answers


class SecondCompletion(SimStore):
    """A job that succeeded can succeed again."""

    def _may_finish(self, row: JobRow, one: Finished) -> bool:
        return row.status in (JobStatus.RUNNING, JobStatus.SUCCEEDED)


class Unfenced(SimStore):
    """Whoever brings a result of a running job may store it."""

    def _may_finish(self, row: JobRow, one: Finished) -> bool:
        return row.status is JobStatus.RUNNING


class NoAttemptsCap(SimStore):
    def _has_attempts(self, attempt: int, max_attempts: int) -> bool:
        return True


class ProcessClock(SimStore):
    """Leases by the clocks of the processes that take and judge them."""

    def register(self, *arguments: Any) -> int:
        return int(self._by_the_caller(super().register, *arguments))

    def heartbeat(self, beats: Sequence[Heartbeat]) -> Any:
        return self._by_the_caller(super().heartbeat, beats)

    def bury(self, heartbeat_s: float) -> Any:
        return self._by_the_caller(super().bury, heartbeat_s)

    def _by_the_caller(self, statement: Any, *arguments: Any) -> Any:
        true, self.now = self.now, self.caller_now
        try:
            return statement(*arguments)
        finally:
            self.now = true


class EnqueueBeforeCommit(Gateway):
    async def accept(self, job: NewJob, is_promised: bool) -> uuid.UUID | None:
        self.kernel.product.inference.enqueue(self.outbox, [(job.id, job.backend, job.task)])
        return await super().accept(job, is_promised)


class AcceptBeforeCommit(Gateway):
    """ "Accepted", and then the row."""

    async def submit(self, client: Client) -> None:
        self.kernel.audit.promise(client.job.id)
        await super().submit(client)


class NewsBeforeStore(Worker):
    """The job's end is announced, then stored."""

    async def main(self) -> None:
        await super().main()
        self.finishes = _Hasty(self)


class _Hasty:
    def __init__(self, worker: Worker) -> None:
        self._worker, self._lane = worker, worker.finishes
        self.num_pending = 0

    async def submit(self, item: Finished) -> Any:
        self._worker.announce(item.id, JobStatus.SUCCEEDED, None)  # type: ignore[attr-defined]
        return await self._lane.submit(item)


class AckBeforeStore(Reconciler):
    """A message taken counts as work done: what is queued without a message is not looked for."""

    async def survey(self) -> reconciler.Queues:
        await super().survey()
        return reconciler.Queues(None)


# Rules that are easy to lose.


class CancelNotFinal(SimStore):
    """A result that comes late still counts, though the job was cancelled."""

    def _may_finish(self, row: JobRow, one: Finished) -> bool:
        return row.status in (JobStatus.RUNNING, JobStatus.CANCELLED) and self._is_owner(row, one)


class FencedByAttempt(SimStore):
    """An attempt given back, and a retry, lead to a number that the worker may have had before."""

    def __init__(self) -> None:
        super().__init__()
        self._attempts: dict[tuple[uuid.UUID, int, int], int] = {}

    def _claim(self, wanted: Sequence[tuple[uuid.UUID, int]], **options: Any) -> Any:
        claimed = super()._claim(wanted, **options)
        for job in claimed.values():
            self._attempts[job.id, wanted[0][1], job.run] = job.attempt
        return claimed

    def _is_owner(self, row: JobRow, one: Finished | Ended) -> bool:
        return row.worker_id == one.worker_id and row.attempt == self._attempts.get((one.id, one.worker_id, one.run))


class FencedByRunAlone(SimStore):
    """A crash of Postgres takes a claim back, and two workers have the same run."""

    def _is_owner(self, row: JobRow, one: Finished | Ended) -> bool:
        return row.run == one.run


class UnfencedEnd(SimStore):
    def _may_end(self, row: JobRow, one: Ended) -> bool:
        return row.status is JobStatus.RUNNING


class EndAfterTheEnd(SimStore):
    def _may_end(self, row: JobRow, one: Ended) -> bool:
        return row.status is not JobStatus.QUEUED and self._is_owner(row, one)


class ClaimOfTheRunning(SimStore):
    def _is_claimable(self, row: JobRow) -> bool:
        return row.status is JobStatus.RUNNING or super()._is_claimable(row)


class ClaimOfTheLate(SimStore):
    def _is_claimable(self, row: JobRow) -> bool:
        return row.status is JobStatus.QUEUED


class ClaimByTheDead(SimStore):
    def _may_take(self, worker_id: int) -> bool:
        return True


class RescueOfTheEnded(SimStore):
    """Whatever a dead worker touched last is queued again."""

    def _is_rescuable(self, row: JobRow) -> bool:
        return row.status is not JobStatus.QUEUED


class ExpiryOfTheEnded(SimStore):
    def _is_live(self, row: JobRow) -> bool:
        return row.status is not JobStatus.EXPIRED


class LeasesNeverEnd(SimStore):
    """Only locks are believed: a worker that hangs keeps its jobs, and its caller waits."""

    def _is_lost(self, worker_id: int, life: WorkerRow, heartbeat_s: float) -> bool:
        return False


class LocksBelievedAtOnce(SimStore):
    """After a restart of Postgres no session has its lock back yet."""

    def _is_lost(self, worker_id: int, life: WorkerRow, heartbeat_s: float) -> bool:
        started, self.started_at = self.started_at, -math.inf
        try:
            return super()._is_lost(worker_id, life, heartbeat_s)
        finally:
            self.started_at = started


class ResultLost(SimStore):
    """The state is stored and the body is not."""

    def _store(self, row: JobRow, one: Finished) -> bool:
        is_stored = super()._store(row, one)
        del self.results[row.id]
        return is_stored


class RelaxedPromise(Gateway):
    """A job is promised whose row a crash of Postgres can take back."""

    async def accept(self, job: NewJob, is_promised: bool) -> uuid.UUID | None:
        return await super().accept(job, is_promised=False)


class KeyNotCompared(Gateway):
    """Whatever is asked under a known key gets the job of the first request."""

    def compared(self, held: Reserved, key: Idempotency) -> uuid.UUID | None:
        return held.job_id


class KeyApart(Gateway):
    """The key is stored, and then its job."""

    async def main(self) -> None:
        await super().main()
        self._holds = Lane(self, "hold_keys", read=lambda held: next(iter(held.values())))

    async def insert_once(self, key: Idempotency, job: NewJob) -> Reserved:
        job_id, fingerprint = await self._holds.submit((key, job.id))
        inserted = await self._durable_inserts.submit(job) if job_id == job.id else None
        return Reserved(job_id, fingerprint, inserted)


class KeyOverwritten(SimStore):
    """The last request has the key, not the first."""

    def _hold_key(self, one: Idempotency, job_id: uuid.UUID) -> None:
        self.keys.pop((one.api_key_id, one.key), None)
        super()._hold_key(one, job_id)


class RelaxedEnds(SimStore):
    """How a job ended is not on the disk when it is told."""

    def begin(self, session: object, *, is_durable: bool = True, caller_now: float = 0.0) -> None:
        super().begin(session, is_durable=False, caller_now=caller_now)


class ReleaseUncounted(Worker):
    """Every failed attempt is given back, so a job that always fails is run for ever."""

    async def main(self) -> None:
        await super().main()
        ends = self._ends
        self._ends: Any = _Forgiving(ends)


class _Forgiving:
    def __init__(self, lane: Any) -> None:
        self._lane = lane

    @property
    def num_pending(self) -> int:
        return int(self._lane.num_pending)

    async def submit(self, item: Ended) -> Any:
        is_counted = item.code == "invalid_request"
        fields = {name: getattr(item, name) for name in Ended.__slots__}
        return await self._lane.submit(Ended(**fields | {"is_counted": is_counted}))


class SuspectsInCompany(SimStore):
    """A job that may kill its worker is run beside others."""

    def _is_suspect(self, row: JobRow) -> bool:
        return False


class GateLeftOpen(Worker):
    """Whoever must be alone waits until the others are through, and new ones come in meanwhile."""

    async def main(self) -> None:
        self.gate._is_open = SimpleNamespace(is_set=lambda: True, set=lambda: None, clear=lambda: None)
        await super().main()


class FollowersRun(SimStore):
    """Whoever follows is run as well."""

    def _leads(self, row: JobRow) -> bool:
        return True


class FollowersForgotten(SimStore):
    """A leader ends, and nobody tells its followers."""

    def land(self, leader_ids: Sequence[uuid.UUID] | None = None) -> Any:
        return []


class NobodyTakesOver(SimStore):
    """A leader is cancelled, and its followers wait for ever."""

    def hand_over(self) -> Any:
        return []


class EndsWithItsLeader(SimStore):
    """Who cancels a leader cancels its followers."""

    def cancel(self, wanted: Sequence[tuple[uuid.UUID, str]]) -> Any:
        answers = super().cancel(wanted)
        for row in self._followers():
            leader = self._leader(row)
            if leader.status is JobStatus.CANCELLED:
                self._land(row, leader)
        return answers


MUTANTS: dict[str, Parts] = {
    part.__name__: Parts(**{kind: part})  # type: ignore[arg-type]
    for kind, parts in {
        "store": (DropRow, SecondCompletion, Unfenced, NoAttemptsCap, ProcessClock, CancelNotFinal, FencedByAttempt, FencedByRunAlone,
                  UnfencedEnd, EndAfterTheEnd, ClaimOfTheRunning, ClaimOfTheLate, ClaimByTheDead,
                  RescueOfTheEnded, ExpiryOfTheEnded, LeasesNeverEnd, LocksBelievedAtOnce, ResultLost, RelaxedEnds,
                  SuspectsInCompany, KeyOverwritten, FollowersForgotten, NobodyTakesOver, EndsWithItsLeader, FollowersRun),
        "gateway": (EnqueueBeforeCommit, AcceptBeforeCommit, RelaxedPromise, KeyNotCompared, KeyApart),
        "worker": (NewsBeforeStore, ReleaseUncounted, GateLeftOpen),
        "reconciler": (AckBeforeStore,),
    }.items()
    for part in parts
}  # fmt: skip
