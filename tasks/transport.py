"""Redis: the client, every key and channel by name, and the outbox that coalesces what is sent.

Nothing in Redis is needed for correctness. Losing all of it delays jobs until the reconciler sends
their messages again.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import redis.asyncio
import structlog
from redis.exceptions import RedisError

log = structlog.get_logger()

DOWN = (RedisError, OSError, RuntimeError)
"""What a command raises while Redis is away. uvloop answers a write to a connection that was reset with a
RuntimeError ("the handler is closed")."""

DONE_CHANNEL = "switchyard:done"
"""JSON [[job id, status], …]: these jobs reached a final state. Gateways listen."""
STOP_CHANNEL = "switchyard:stop"
"""JSON [job id, …]: stop computing these. Workers listen."""
EPOCH_KEY = "switchyard:epoch"
"""Set by the reconciler; its absence means that Redis was wiped."""
PARKED_KEY = "switchyard:parked"
"""A list of JSON [job id, version]: messages of a version that their worker did not know, the latest first."""
MOST_PARKED = 10_000
CHUNKS = "switchyard:chunks:{}"
"""Per job: a stream of its output events, and under the same name the channel that carries them live."""
CHUNKS_TTL_S = 900
RATE = "switchyard:rate:{}"
"""Per key or tenant and unit: a hash of what was let through, by slot of the window (`tasks.limiter`)."""


def queue_key(backend: str, level: int) -> str:
    """The list that holds one level of a backend's queue, as kombu names it."""
    return f"{backend}\x06\x16{level}" if level else backend


def chunks_key(job_id: object) -> str:
    return CHUNKS.format(job_id)


def connect(url: str, *, timeout_s: float = 2.0) -> redis.asyncio.Redis:
    """A client whose every operation is bounded."""
    return redis.asyncio.Redis.from_url(
        url,
        protocol=2,
        socket_connect_timeout=1.0,
        socket_timeout=timeout_s,
        socket_keepalive=True,
        health_check_interval=10,
    )


class Outbox:
    """Commands that nobody waits for, sent in order, all that gathered since the last flush in one pipeline.

    While Redis is away commands are kept and sent again (so a command may arrive twice), up to
    `max_pending`; beyond it the oldest go. The reconciler replaces lost messages.
    """

    def __init__(self, client: redis.asyncio.Redis, *, linger_s: float = 0.0, max_pending: int = 100_000) -> None:
        self._client = client
        self._linger_s = linger_s
        self._max_pending = max_pending
        self._pending: list[tuple[Any, ...]] = []
        self._sources: list[Callable[[], list[tuple[Any, ...]]]] = []
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task = asyncio.create_task(self._run(), name="outbox")

    def send(self, *command: Any) -> None:
        """Queue one Redis command."""
        self._pending.append(command)
        self.wake()

    def add_source(self, drain: Callable[[], list[tuple[Any, ...]]]) -> None:
        """Commands that are made at flush time: `drain` is asked once a flush."""
        self._sources.append(drain)

    def wake(self) -> None:
        self._idle.clear()
        self._wake.set()

    async def flush(self, timeout_s: float = 2.0) -> None:
        """Wait until everything sent so far has left, at most `timeout_s`."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            log.warning("outbox.unsent", commands=len(self._pending))

    async def close(self) -> None:
        await self.flush()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        pause = 0.05
        while True:
            await self._wake.wait()
            self._wake.clear()
            for drain in self._sources:
                self._pending.extend(drain())
            batch, self._pending = self._pending, []
            if batch and not await self._deliver(batch):
                self._pending = (batch + self._pending)[-self._max_pending :]
                self._wake.set()
                await asyncio.sleep(pause)
                pause = min(pause * 2, 1.0)
                continue
            pause = 0.05
            if not self._wake.is_set():
                self._idle.set()
            if self._linger_s:
                await asyncio.sleep(self._linger_s)

    async def _deliver(self, batch: list[tuple[Any, ...]]) -> bool:
        try:
            if len(batch) == 1:
                await self._client.execute_command(*batch[0])  # type: ignore[no-untyped-call]
            else:
                pipeline = self._client.pipeline(transaction=False)
                for command in batch:
                    pipeline.execute_command(*command)
                await pipeline.execute(raise_on_error=False)
        except DOWN as error:
            log.warning("outbox.retry", error=type(error).__name__, commands=len(batch))
            return False
        return True
