"""A Redis that forgets, loses, repeats and reorders, and the outboxes whose commands reach it."""

import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import orjson

from tasks import reconciler, transport
from tests.simulation.kernel import PARKED, Away, Kernel, Operation, Process, Sleep, Task, Until

if TYPE_CHECKING:
    from tests.simulation.world import World


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

    __slots__ = ("_commands", "_redis")

    def __init__(self, redis: Redis, commands: list[tuple[Any, ...]]) -> None:
        self._redis, self._commands = redis, commands

    def perform(self, kernel: Kernel, task: Task) -> None:
        self._redis.check()
        for command in self._commands:
            self._redis.execute(command)
        if kernel.is_faulty and kernel.rng.random() < kernel.faults.answer_lost:
            kernel.count("redis_answer_lost")
            raise Away


class Pop(Operation):
    """A consumer's wait for a message; None is worth another look."""

    __slots__ = ("_backend", "_redis", "_unacked")

    def __init__(self, redis: Redis, backend: str, unacked: list[uuid.UUID]) -> None:
        self._redis, self._backend, self._unacked = redis, backend, unacked

    def perform(self, kernel: Kernel, task: Task) -> Any:
        self._redis.check()
        job_id = self._redis.pop(self._backend)
        if job_id is None:
            self._redis.waiting.append(task)
            return PARKED
        self._unacked.append(job_id)
        return job_id


class Survey(Operation):
    """The reconciler's question to Redis."""

    __slots__ = ("_redis",)

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def perform(self, kernel: Kernel, task: Task) -> reconciler.Queues:
        redis = self._redis
        if redis.away_until > kernel.now:
            return reconciler.Queues(None)
        lengths = {backend: len(waiting) for backend, waiting in redis.queues.items()}
        return reconciler.Queues(lengths, is_wiped=not redis.has_epoch)


class Outbox:
    """Commands that nobody waits for, as `transport.Outbox` keeps them. They die with their process."""

    def __init__(self, process: Process, redis: Redis, drain: Callable[[], list[tuple[Any, ...]]] = list) -> None:
        self._kernel, self._redis, self._drain = process.kernel, redis, drain
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
                await Deliver(self._redis, batch)
            except Away:
                self._pending = batch + self._pending
                await Sleep(0.2)
