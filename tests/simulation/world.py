"""The system in one thread: clients, gateways, workers, reconcilers, a Redis that forgets, and what befalls them.

Where a process's code decides, the real code runs (`tests.simulation.product`). What stands here mirrors the
order of calls of the rest: `Gateway._accept` and `cancel`, the threads and lanes of `Worker`, `_Pulse`,
`Reconciler._pass` and Celery's consumer. Housekeeping (`keep_house`) and streams are not simulated.
"""

import asyncio
import contextlib
import functools
import math
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import MethodType, SimpleNamespace
from typing import Any

import orjson
import psycopg2

from db.accept import Idempotency, Inserted, NewJob, Reserved
from db.lanes import LaneDown
from db.models import TERMINAL, JobStatus
from db.workers import Heartbeat
from settings import Settings
from tasks import reconciler, transport
from tasks.worker import Worker as RealWorker
from tests.simulation.audit import Audit
from tests.simulation.kernel import (
    PARKED,
    Away,
    Exit,
    Kernel,
    Operation,
    Process,
    Session,
    Sleep,
    Statement,
    Task,
    Until,
)
from tests.simulation.product import VERSION, Product
from tests.simulation.store import SimStore

CONFIG = Settings.model_construct(
    heartbeat_s=1.0, lease_s=3.0, sweep_s=1.0, resend_after_s=2.0, drain_s=2.0, max_attempts=3
)
MAX_JOBS = 10
SILENCE_S = reconciler._LONGEST_SILENCE * CONFIG.sweep_s
_API_KEYS = {tenant: uuid.UUID(int=number) for number, tenant in enumerate("ab", 1)}
SETTLE_S = 120.0
"""With faults off, everything ends within this."""
KINDS = ("quick", "quick", "quick", "slow", "slow", "flaky", "flaky", "broken", "invalid", "poison")


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


class Redis:
    """Queues of messages, an epoch, and channels whose news may be lost."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self.queues: dict[str, list[uuid.UUID]] = {backend: [] for backend in world.backends}
        self.waiting: list[Task] = []
        self.has_epoch = False
        self.away_until = 0.0

    def check(self) -> None:
        if self.away_until > self._world.now:
            raise Away

    def wipe(self) -> None:
        self.has_epoch = False
        for waiting in self.queues.values():
            waiting.clear()

    def push(self, backend: str, job_id: uuid.UUID) -> None:
        """A message sent: it arrives, or not, or twice, or later."""
        world, faults = self._world, self._world.faults
        world.audit.send(job_id)
        draw = world.rng.random() if world.is_faulty else 1.0
        if draw < faults.message_dropped:
            world.count("message_dropped")
        elif draw < faults.message_dropped + faults.message_delayed:
            world.count("message_delayed")
            world.later(world.rng.random() * 6, lambda: self.put(backend, job_id))
        else:
            self.put(backend, job_id)
            if draw > 1 - faults.message_doubled and draw < 1.0:
                world.count("message_doubled")
                world.later(world.rng.choice((0.0, 0.1, 3.0)), lambda: self.put(backend, job_id))

    def put(self, backend: str, job_id: uuid.UUID) -> None:
        self.queues[backend].append(job_id)
        waiting, self.waiting = self.waiting, []
        for task in waiting:
            self._world.wake(task)

    def pop(self, backend: str) -> uuid.UUID | None:
        waiting = self.queues[backend]
        if not waiting:
            return None
        world = self._world
        if world.is_faulty and len(waiting) > 1 and world.rng.random() < world.faults.message_reordered:
            world.count("message_reordered")
            return waiting.pop(world.rng.randrange(len(waiting)))
        return waiting.pop(0)

    def execute(self, command: tuple[Any, ...]) -> None:
        name, key, value = command
        if name == "LPUSH":
            self.push(key, value)
        elif name == "SET":
            self.has_epoch = True
        elif key == transport.DONE_CHANNEL:
            for job_id, status in orjson.loads(value):
                self._world.audit.announce(uuid.UUID(job_id), status)
        else:
            for worker in self._world.workers:
                worker.hear(uuid.UUID(orjson.loads(value)[0]))


class Deliver(Operation):
    """An outbox's commands on their way to Redis."""

    __slots__ = ("commands",)

    def __init__(self, commands: list[tuple[Any, ...]]) -> None:
        self.commands = commands

    def perform(self, kernel: Kernel, task: Task) -> None:
        assert isinstance(kernel, World)
        kernel.redis.check()
        for command in self.commands:
            kernel.redis.execute(command)
        if kernel.is_faulty and kernel.rng.random() < kernel.faults.answer_lost:
            kernel.count("redis_answer_lost")
            raise Away


class Pop(Operation):
    """A consumer's wait for a message; None is worth another look."""

    __slots__ = ("backend",)

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def perform(self, kernel: Kernel, task: Task) -> Any:
        assert isinstance(kernel, World)
        kernel.redis.check()
        job_id = kernel.redis.pop(self.backend)
        if job_id is None:
            kernel.redis.waiting.append(task)
            return PARKED
        assert isinstance(task.process, Worker)
        task.process.unacked.append(job_id)
        return job_id


class Survey(Operation):
    """The reconciler's question to Redis."""

    __slots__ = ()

    def perform(self, kernel: Kernel, task: Task) -> reconciler.Queues:
        assert isinstance(kernel, World)
        redis = kernel.redis
        if redis.away_until > kernel.now:
            return reconciler.Queues(None)
        lengths = {backend: len(waiting) for backend, waiting in redis.queues.items()}
        return reconciler.Queues(lengths, is_wiped=not redis.has_epoch)


class Outbox:
    """Commands that nobody waits for, as `transport.Outbox` keeps them. They die with their process."""

    def __init__(self, process: Process, drain: Callable[[], list[tuple[Any, ...]]] = list) -> None:
        self._kernel, self._drain = process.kernel, drain
        self._pending: list[tuple[Any, ...]] = []
        self.is_idle = True
        self._task = process.spawn("outbox", self._run())

    def send(self, *command: Any) -> None:
        self._pending.append(command)
        self.wake()

    def wake(self) -> None:
        if self.is_idle:
            self.is_idle = False
            self._kernel.wake(self._task)

    async def flush(self) -> None:
        deadline = self._kernel.now + 2.0
        while not self.is_idle and self._kernel.now < deadline:
            await Sleep(0.1)

    async def _run(self) -> None:
        while True:
            self._pending += self._drain()
            batch, self._pending = self._pending, []
            if not batch:
                self.is_idle = True
                await Until(lambda: not self.is_idle)
                continue
            try:
                await Deliver(batch)
            except Away:
                self._pending = batch + self._pending
                await Sleep(0.2)


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
        self.outbox = Outbox(self)
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
        self.outbox = Outbox(self)
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
        answer: reconciler.Queues = await Survey()
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
        self.outbox = Outbox(self, self._drain_ended)
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
                job_id = await Pop(self.backend_name)
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


@dataclass(frozen=True, slots=True)
class Parts:
    """What a world is made of. A mutant replaces one part."""

    store: type[SimStore] = SimStore
    gateway: type[Gateway] = Gateway
    worker: type[Worker] = Worker
    reconciler: type[Reconciler] = Reconciler


REAL = Parts()


class World(Kernel):
    """One schedule: faults for `num_steps`, then peace until everything has ended."""

    def __init__(self, seed: int, parts: Parts = REAL, *, is_traced: bool = False) -> None:
        super().__init__(seed, parts.store(), is_traced=is_traced)
        rng = self.rng
        self.backends = ["echo", "bert"] if rng.random() < 0.3 else ["echo"]
        self.has_one_leader = rng.random() < 0.7
        self.audit = Audit(self.store, CONFIG.max_attempts, CONFIG.heartbeat_s)
        self.product = Product(self)
        self.redis = Redis(self)
        self._num_jobs = 0
        self._arrivals = rng.choice((0.05, 0.1, 0.2))
        for number in range(rng.choice((2, 3))):
            parts.gateway(self, f"gateway{number}")
        for number in range(max(len(self.backends), rng.choice((1, 2, 3, 4)))):
            parts.worker(self, f"worker{number}")
        for number in range(2):
            parts.reconciler(self, f"reconciler{number}")

    @property
    def workers(self) -> list[Worker]:
        return [process for process in self.processes if isinstance(process, Worker)]

    def backend_of(self, worker: str) -> str:
        return self.backends[int(worker.removeprefix("worker")[0]) % len(self.backends)]

    def run(self, num_steps: int) -> None:
        """Raises Violation."""
        try:
            for _ in range(num_steps):
                if self._num_jobs < MAX_JOBS and self.rng.random() < self._arrivals:
                    self._arrive()
                self.step()
            self._calm()
            until = self.now + SETTLE_S
            while self.now < until and not self._is_quiet():
                for _ in range(20):
                    self.step()
            self.audit.finish(self._is_quiet())
        finally:
            self.close()

    def follow(self, client: Client, job_id: uuid.UUID) -> None:
        """What a caller does once its job is accepted."""
        for after in client.polls:
            self.later(after, lambda: self._ask(lambda gateway: gateway.read(job_id)))
        if client.cancels_after is not None:
            self.later(
                client.cancels_after,
                lambda: self._ask(lambda gateway: gateway.cancel(job_id, client.job.tenant)),
            )

        for after in client.retries:
            self.later(after, lambda: self._ask(lambda gateway: gateway.retry(job_id, client.job.tenant)))

    def after_statement(self, name: str, arguments: tuple[Any, ...], answer: Any) -> None:
        if name == "finish" and None in answer:
            self.count("fenced_result")
        self.audit.after_statement(name, arguments, answer)

    def inflict(self, fault: str) -> None:
        rng, process = self.rng, self.rng.choice(self.processes) if self.processes else None
        if fault == "postgres_crash":
            self._crash_postgres()
        elif fault == "redis_wiped":
            self.redis.wipe()
        elif fault == "redis_away":
            self.redis.away_until = self.now + rng.random() * 4
        elif fault == "stall":
            self.store.now += rng.random() * 4
        elif process is None:
            return
        elif fault == "crash":
            self.end(process)
        elif fault == "hang":
            process.hung_until = max(process.hung_until, self.now + rng.random() * 9)
        elif fault == "freeze":
            process.hung_until = math.inf
            process.rebirth(f"{process.name}.{len(self.processes)}")
        elif fault == "session_cut":
            if not process.sessions:
                return
            self.store.unlock(process.sessions[0])
            process.sessions.clear()
        elif fault == "stop":
            if not isinstance(process, Worker) or process.state != "ready" or process.is_leaving:
                return
            process.is_leaving = True
            process.spawn("drain", process.drain())
        name = (
            f" of {process.name}"
            if process is not None and fault in ("crash", "hang", "freeze", "session_cut", "stop")
            else ""
        )
        self.note(f"*** {fault}{name}")
        self.coverage[fault] += 1

    def _crash_postgres(self) -> None:
        undone = self.store.crash(self.rng)
        if undone:
            self.count("commits_taken_back")
        self.audit.resume(undone)
        for process in self.processes:
            process.sessions.clear()

    def _arrive(self) -> None:
        """A new request, and where it has a key, the same again, or another by mistake, sooner or later."""
        rng = self.rng
        kind, tenant = rng.choice(KINDS).encode(), rng.choice("ab")
        if rng.random() < 0.85:
            self._send(kind, tenant, None)
            return
        key = Idempotency(_API_KEYS[tenant], f"k{self._num_jobs}", kind)
        self._send(kind, tenant, key)
        for _ in range(rng.choice((1, 2))):
            other = b"other" if rng.random() < 0.2 else kind
            again = functools.partial(self._send, kind, tenant, Idempotency(key.api_key_id, key.key, other))
            self.later(rng.random() * rng.choice((0.2, 6)), again)

    def _send(self, kind: bytes, tenant: str, key: Idempotency | None) -> None:
        rng = self.rng
        self._num_jobs += 1
        job = NewJob(
            id=uuid.UUID(int=rng.getrandbits(32) << 8 | self._num_jobs),
            tenant=tenant, api_key_id=None, request_id="r", endpoint="/v1/completions", task="generate",
            requested_model="m", model="m", model_revision="1", backend=rng.choice(self.backends), is_stream=False,
            payload=kind, metadata=None, decision="{}", cache_verdict="MISS", cache_key=None,
            cache_ttl_s=None, is_cache_refresh=False, prompt_tokens=1, timings="{}",
            timeout_s=rng.choice((None, None, None, 2.0, 10.0)),
            coalesce_key=kind if rng.random() < 0.5 else None,
        )  # fmt: skip
        # A request with a key is on the disk before its answer, whoever waits for it.
        client = Client(job, is_promised=key is not None or rng.random() < 0.7, key=key)
        client.polls = [rng.random() * 8 for _ in range(rng.choice((0, 1, 2)))]
        if rng.random() < 0.25:
            client.cancels_after = rng.random() * rng.choice((1, 6))
        client.retries = [rng.random() * 12 for _ in range(rng.choice((0, 0, 1, 3, 8)))]
        if key is not None:
            self.audit.ask(key, job.id)
        self._ask(lambda gateway: gateway.submit(client))

    def _ask(self, request: Callable[[Gateway], Any]) -> None:
        """Send a request to one of the gateways, if one is up."""
        up = [process for process in self.processes if isinstance(process, Gateway) and process.is_serving]
        if up:
            gateway = self.rng.choice(up)
            gateway.spawn("request", request(gateway))

    def _calm(self) -> None:
        """Faults are over. What hangs comes back, what is away returns."""
        self.note("*** no more faults")
        self.is_faulty = False
        self.redis.away_until = 0.0

    def _is_quiet(self) -> bool:
        return all(row.status in TERMINAL for row in self.store.jobs.values()) and not any(
            worker._runs for worker in self.workers if worker.hung_until < math.inf
        )
