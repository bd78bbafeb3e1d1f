"""The processes of the system. Where a process's code decides, the real code runs (`tests.simulation.product`); what
stands here mirrors the order of calls of the rest: `Gateway._accept` and `cancel`, the threads and lanes of
`Worker`, `_Pulse`, `Reconciler._pass` and Celery's consumer. Housekeeping (`keep_house`) and streams are not simulated.
"""

import asyncio
import contextlib
import functools
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import MethodType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import orjson
import psycopg2

from db.accept import Idempotency, Inserted, NewJob, Reserved
from db.lanes import LaneDown
from db.states import JobStatus
from db.workers import Heartbeat
from settings import Settings
from tasks import reconciler, transport
from tasks.worker import Worker as RealWorker
from tests.simulation.broker import Outbox, Pop, Survey
from tests.simulation.kernel import Away, Exit, Process, Session, Sleep, Statement
from tests.simulation.product import VERSION

if TYPE_CHECKING:
    from tests.simulation.world import World

CONFIG = Settings.model_construct(
    heartbeat_s=1.0, lease_s=3.0, sweep_s=1.0, resend_after_s=2.0, drain_s=2.0, max_attempts=3
)
SILENCE_S = reconciler._LONGEST_SILENCE * CONFIG.sweep_s


class Lane:
    """One kind of statement of one process, repeated while Postgres is away. Cancelling who waits for an answer
    does not stop the statement."""

    def __init__(self, process: Process, name: str, *, is_durable: bool = True, patience_s: float = 2.0,
                 read: Callable[[Any], Any] = lambda answers: answers[0]) -> None:  # fmt: skip
        self._read = read
        self._process, self._name, self._is_durable, self._patience_s = process, name, is_durable, patience_s
        self.num_pending = 0

    async def submit(self, item: Any) -> Any:
        kernel = self._process.kernel
        statement = Statement(self._process, self._name, [item], is_durable=self._is_durable)
        deadline, pause = kernel.now + self._patience_s, 0.05
        self.num_pending += 1
        try:
            while True:
                try:
                    return self._read(await statement)
                except psycopg2.OperationalError:
                    if kernel.now + pause > deadline:
                        kernel.count("lane_down")
                        raise LaneDown from None
                await Sleep(pause)
                pause = min(pause * 2, 1.0)
        except asyncio.CancelledError:
            if not statement.has_run:
                self._process.spawn(f"{self._name} without a waiter", self._go_on(item))
            raise
        finally:
            self.num_pending -= 1

    async def _go_on(self, item: Any) -> None:
        with contextlib.suppress(LaneDown):
            await self.submit(item)


@dataclass(slots=True)
class Client:
    """What a caller will do besides submitting."""

    job: NewJob
    is_promised: bool
    """Whether the answer to the submission says "accepted" (202, or a stream); others wait for the result."""
    polls: list[float] = field(default_factory=list)
    cancels_after: float | None = None
    retries: list[float] = field(default_factory=list)
    key: Idempotency | None = None


class Gateway(Process):
    """Takes submissions, cancels and questions. Mirrors `api.gateway.Gateway._accept`, `wait` and `cancel`."""

    kernel: "World"

    async def main(self) -> None:
        self.outbox = Outbox(self, self.kernel.redis)
        self._durable_inserts = Lane(self, "insert")
        self._relaxed_inserts = Lane(self, "insert", is_durable=False)
        self._keyed_inserts = Lane(self, "insert_once")
        self._keys = Lane(self, "find_key")
        self._outcomes = Lane(self, "outcome")
        self._ended = Lane(self, "ended")
        self._cancels = Lane(self, "cancel")
        self._requeues = Lane(self, "retry")
        self.is_serving = True

    is_serving = False

    async def submit(self, client: Client) -> None:
        try:
            job_id = await (self.accept_once(client) if client.key else self.accept(client.job, client.is_promised))
        except LaneDown:
            self.kernel.count("submission_refused")
            return
        if job_id is None:
            self.kernel.count("key_of_another_request")
            return
        await Sleep(0.0)  # the answer's way to the caller
        if client.key is not None:
            self.kernel.audit.keyed(client.key, job_id)
        if client.is_promised:
            self.kernel.audit.promise(job_id)
            self.kernel.follow(client, job_id)
        else:
            await self.wait(job_id)

    async def accept(self, job: NewJob, is_promised: bool) -> uuid.UUID | None:
        inserts = self._durable_inserts if is_promised else self._relaxed_inserts
        self.enqueue(job, await inserts.submit(job))
        return job.id

    async def accept_once(self, client: Client) -> uuid.UUID | None:
        """The job that the key stands for; None where it stands for another request's."""
        key, job = client.key, client.job
        assert key is not None
        held: Reserved | None = await self._keys.submit((key.api_key_id, key.key))
        if held is None:
            held = await self.insert_once(key, job)
            if held.inserted is not None:
                self.enqueue(job, held.inserted)
                return job.id
        self.kernel.count("key_replayed")
        return self.compared(held, key)

    async def insert_once(self, key: Idempotency, job: NewJob) -> Reserved:
        reserved: Reserved = await self._keyed_inserts.submit((key, job))
        return reserved

    def compared(self, held: Reserved, key: Idempotency) -> uuid.UUID | None:
        return held.job_id if held.fingerprint == key.fingerprint else None

    def enqueue(self, job: NewJob, inserted: Inserted) -> None:
        if inserted.leader_id is None:
            self.kernel.product.inference.enqueue(self.outbox, [(job.id, job.backend, job.task)])

    async def wait(self, job_id: uuid.UUID) -> None:
        while True:
            await Sleep(1.0)
            with contextlib.suppress(LaneDown):
                if job_id in await self._ended.submit([job_id]):
                    await self._outcomes.submit(job_id)
                    return

    async def read(self, job_id: uuid.UUID) -> None:
        with contextlib.suppress(LaneDown):
            await self._outcomes.submit(job_id)

    async def cancel(self, job_id: uuid.UUID, tenant: str) -> None:
        with contextlib.suppress(LaneDown):
            status = await self._cancels.submit((job_id, tenant))
            if status is JobStatus.CANCELLED:
                self.outbox.send("PUBLISH", transport.STOP_CHANNEL, orjson.dumps([str(job_id)]))
                self.outbox.send("PUBLISH", transport.DONE_CHANNEL, orjson.dumps([[str(job_id), status]]))
                await Sleep(0.0)
                self.kernel.audit.cancel(job_id)

    async def retry(self, job_id: uuid.UUID, tenant: str) -> None:
        with contextlib.suppress(LaneDown):
            found = await self._requeues.submit((job_id, tenant))
            if found is not None:
                self.kernel.product.inference.enqueue(self.outbox, [(job_id, *found)])


class Reconciler(Process):
    """Mirrors `tasks.reconciler.Reconciler`; the pass itself is the real one."""

    kernel: "World"

    async def main(self) -> None:
        self.outbox = Outbox(self, self.kernel.redis)
        self._session: Session | None = None
        self._is_leader = False
        while True:
            try:
                await self._pass()
            except psycopg2.OperationalError:
                self._session = None
            await Sleep(CONFIG.sweep_s)

    async def _pass(self) -> None:
        world = self.kernel
        if self._session is None or self._session not in self.sessions:
            self._session, self._is_leader = Session(world.now), False
            self.sessions[:] = [self._session]
            self._time_out(self._session)
        if not self._is_leader:
            lock = "leader" if world.has_one_leader else f"leader {self.name}"
            self._is_leader = await Statement(self, "try_lock", lock, session=self._session)
        if not self._is_leader:
            return
        queues = await self.survey()
        report = await world.product.reconcile(self, self._session, queues, CONFIG, world.backends)
        world.product.inference.enqueue(self.outbox, report.messages)
        if report.ended:
            self.outbox.send("PUBLISH", transport.DONE_CHANNEL, orjson.dumps(report.ended))
        if queues.is_wiped:
            self.outbox.send("SET", transport.EPOCH_KEY, "1")

    def _time_out(self, session: Session) -> None:
        """Postgres ends a session that has been silent for too long (idle_session_timeout)."""
        if not self.is_alive or session not in self.sessions:
            return
        left_s = session.spoke_at + SILENCE_S - self.kernel.now
        if left_s > 0:
            self.kernel.later(left_s, lambda: self._time_out(session))
            return
        self.kernel.count("session_timed_out")
        self.sessions.remove(session)
        self.kernel.store.unlock(session)

    async def survey(self) -> reconciler.Queues:
        answer: reconciler.Queues = await Survey(self.kernel.redis)
        return answer


class Worker(Process):
    """Mirrors the threads and tasks of `tasks.worker.Worker`; `end`, `stopped`, `announce`, `land`, `_compare`, `_stop`
    and everything of `tasks.inference` and `tasks.gate` are the real ones."""

    kernel: "World"

    def __init__(self, kernel: "World", name: str) -> None:
        self._runs: dict[uuid.UUID, Any] = {}
        self._has_suspect = False
        self.gate = kernel.product.Gate()
        self._idle = SimpleNamespace(set=lambda: None, clear=lambda: None)
        self._config = CONFIG
        self._slots, self.full_at = 4, 0.0
        self._strays: set[tuple[uuid.UUID, int]] = set()
        self._ended_jobs: list[tuple[str, str]] = []
        self.models = {"m": SimpleNamespace(name="m")}
        self.service = SimpleNamespace(observe=lambda *_: None, observe_dispatch=lambda _: None)
        self.unacked: list[uuid.UUID] = []
        self.state = "loading"
        self.is_leaving = self.is_declared_dead = False
        self.backend_name = kernel.backend_of(name)
        real = kernel.product.worker
        for method in ("end", "stopped", "announce", "land", "_compare", "_stop"):
            setattr(self, method, MethodType(getattr(real, method), self))
        super().__init__(kernel, name)

    async def main(self) -> None:
        self._session = Session()
        self.sessions.append(self._session)
        self.id: int = await Statement(self, "register", self.name, self.backend_name, 1, 4, {}, CONFIG.lease_s,
                                       session=self._session, is_durable=False)  # fmt: skip
        await Statement(self, "hold_lock", self.id, session=self._session, is_durable=False)
        self._pulse = self.spawn("pulse", self._beat_on())
        await Sleep(self.kernel.rng.random())
        self.claims = Lane(self, "claim", is_durable=False, patience_s=10.0)
        self.claims_alone = Lane(self, "claim_alone", is_durable=False, patience_s=10.0)
        self.finishes: Any = Lane(self, "finish", patience_s=10.0)
        self._ends = Lane(self, "end", patience_s=10.0)
        self._landings = Lane(self, "land", patience_s=10.0, read=_announced)
        self._owned = Lane(self, "owned")
        self._ended = self._ended_jobs
        self.outbox = Outbox(self, self.kernel.redis, self._drain_ended)
        self.state = "ready"
        self.spawn("watch", self._watch())
        self.spawn("consumer", self._consume())

    def is_running(self, job_id: uuid.UUID) -> bool:
        return job_id in self._runs

    @contextlib.contextmanager
    def running(self, attempt: Any) -> Iterator[None]:
        is_suspect = self.kernel.audit.start(attempt.job, len(self._runs), self._has_suspect)
        if is_suspect:
            self.kernel.count("suspect_alone")
        with RealWorker.running(self, attempt):  # type: ignore[arg-type]
            self._has_suspect = is_suspect
            try:
                yield
            finally:
                self._has_suspect = False

    def hear(self, job_id: uuid.UUID) -> None:
        """A gateway says that this job was cancelled."""
        if (run := self._runs.get(job_id)) is not None:
            self.kernel.count("run_stopped")
            self._stop(run)  # type: ignore[attr-defined]

    def die(self, reason: str) -> None:
        if not self.is_leaving:
            self.is_leaving = True
            self.kernel.count("worker_died_by_itself")
            self.spawn("die", self._leave(3.0))

    async def drain(self) -> None:
        """SIGTERM."""
        self.is_leaving, self.state = True, "draining"
        deadline = self.kernel.now + CONFIG.drain_s
        while self._runs and self.kernel.now < deadline:
            await Sleep(0.2)
        await self._leave(10.0)

    def on_end(self) -> None:
        for job_id in self.unacked:
            if self.kernel.rng.random() < 0.5:
                self.kernel.count("message_redelivered")
                again = functools.partial(self.kernel.redis.put, self.backend_name, job_id)
                self.kernel.later(self.kernel.rng.random() * 5, again)

    async def _leave(self, patience_s: float) -> None:
        """Stop what runs, give its jobs back, let those finish whose results are being stored, and exit."""
        runs = [run.task for run in self._runs.values()]
        for run in list(self._runs.values()):
            self._stop(run)  # type: ignore[attr-defined]
        deadline = self.kernel.now + patience_s
        lanes = (self.claims, self.claims_alone, self.finishes, self._ends) if self.state != "loading" else ()
        while self.kernel.now < deadline:
            if all(run.done() for run in runs) and not any(lane.num_pending for lane in lanes):
                break
            await Sleep(0.2)
        if self.state != "loading":
            await self.outbox.flush()
        with contextlib.suppress(psycopg2.OperationalError):
            await Statement(self, "leave", self.id, session=self._session, is_durable=False)
        await Exit()

    async def _consume(self) -> None:
        while not self.is_leaving:
            if len(self.unacked) >= 4:
                await Sleep(0.3)
                continue
            try:
                job_id = await Pop(self.kernel.redis, self.backend_name, self.unacked)
            except Away:
                await Sleep(0.5)
                continue
            if job_id is not None:
                self.spawn("run", self._run(job_id))

    async def _run(self, job_id: uuid.UUID) -> None:
        try:
            await self.kernel.product.inference.run(self, job_id, VERSION)
        finally:
            self.unacked.remove(job_id)  # the message is acknowledged, whatever became of it

    def _drain_ended(self) -> list[tuple[Any, ...]]:
        ended, self._ended_jobs[:] = list(self._ended_jobs), []
        return [("PUBLISH", transport.DONE_CHANNEL, orjson.dumps(ended))] if ended else []

    async def _watch(self) -> None:
        while True:
            await Sleep(CONFIG.heartbeat_s)
            if self.is_declared_dead:
                self.die("declared dead")
                return
            with contextlib.suppress(LaneDown):
                await self._compare(await self._owned.submit(self.id))  # type: ignore[attr-defined]

    async def _beat_on(self) -> None:
        while True:
            await Sleep(CONFIG.heartbeat_s * self.kernel.rng.random())
            with contextlib.suppress(psycopg2.OperationalError):
                await self._beat()

    async def _beat(self) -> None:
        if self._session not in self.sessions:
            self._session = Session()
            self.sessions[:] = [self._session]
            await Statement(self, "hold_lock", self.id, session=self._session, is_durable=False)
        beat = Heartbeat(worker_id=self.id, state=self.state, lease_s=CONFIG.lease_s, stats={})
        answers = await Statement(self, "heartbeat", [beat], session=self._session, is_durable=False)
        self.is_declared_dead = not answers[0]
        if self.is_declared_dead and self.state == "loading":
            await Exit()


def _announced(landed: Sequence[tuple[uuid.UUID, str]]) -> list[tuple[str, str]]:
    """As `tasks.worker._land` answers."""
    return [(str(job_id), status) for job_id, status in landed]
