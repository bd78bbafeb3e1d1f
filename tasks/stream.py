"""A job's output events over Redis: the worker's writer and the gateway's reader.

Events are numbered from 1 without gaps. Each flush appends a batch to the job's Redis stream (for who
comes late) and publishes the same bytes on the channel of the same name (for who listens).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import orjson
import redis.asyncio
import structlog
from redis.exceptions import RedisError

from tasks import transport
from tasks.output import Piece

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Event:
    """A piece of one choice, or the end of the job."""

    seq: int
    choice: int = 0
    piece: Piece | None = None
    status: str | None = None
    """Set on the last event only: the job's final state, already stored."""


class Writer:
    """Numbers one job's events and hands them to the outbox at its next flush."""

    def __init__(self, job_id: UUID, broker: "Broadcaster", seq: int = 0) -> None:
        self.job_id = job_id
        self.seq = seq
        self.pending: list[Event] = []
        self._broker = broker

    def write(self, choice: int, piece: Piece) -> None:
        if piece.text or piece.finish_reason or piece.token_ids:
            self._add(Event(self.seq + 1, choice, piece))

    def end(self, status: str) -> None:
        """The job's last event. Send it only after the final state is committed."""
        self._add(Event(self.seq + 1, status=status))

    def _add(self, event: Event) -> None:
        self.seq = event.seq
        self.pending.append(event)
        self._broker.dirty(self)


class Broadcaster:
    """Turns what all writers gathered since the last flush into one append and one publish per job."""

    def __init__(self, outbox: transport.Outbox) -> None:
        self._outbox = outbox
        self._dirty: dict[UUID, Writer] = {}
        outbox.add_source(self._drain)

    def dirty(self, writer: Writer) -> None:
        self._dirty[writer.job_id] = writer
        self._outbox.wake()

    def _drain(self) -> list[tuple[Any, ...]]:
        commands: list[tuple[Any, ...]] = []
        writers, self._dirty = self._dirty, {}
        for writer in writers.values():
            events, writer.pending = writer.pending, []
            key = transport.chunks_key(writer.job_id)
            data = encode(events)
            commands.append(("XADD", key, "*", "events", data))
            commands.append(("PUBLISH", key, data))
            if events[0].seq == 1 or events[-1].status:
                commands.append(("EXPIRE", key, transport.CHUNKS_TTL_S))
        return commands


async def history(client: redis.asyncio.Redis, job_id: UUID) -> list[Event]:
    """Every event of a job that Redis still has, each once, in order."""
    events: dict[int, Event] = {}
    for _, fields in await client.xrange(transport.chunks_key(job_id)):
        for event in decode(fields[b"events"]):
            events.setdefault(event.seq, event)
    return [events[seq] for seq in sorted(events)]


def encode(events: list[Event]) -> bytes:
    return orjson.dumps(events)


def decode(data: bytes) -> list[Event]:
    return [_event(**fields) for fields in orjson.loads(data)]


def _event(seq: int, choice: int, piece: dict[str, Any] | None, status: str | None) -> Event:
    if piece is None:
        return Event(seq, choice, None, status)
    return Event(seq, choice, Piece(**{**piece, "token_ids": tuple(piece["token_ids"])}), status)


class Subscriber:
    """The one subscription of a gateway process: wakes everyone who waits for a job or reads its stream."""

    def __init__(self, url: str) -> None:
        self._client = transport.connect(url)
        self._pubsub = transport.connect(url, timeout_s=30).pubsub()
        self._waiters: dict[str, set[asyncio.Future[None]]] = {}
        self._readers: dict[bytes, list[_Reader]] = {}
        self._task = asyncio.create_task(self._run(), name="subscriber")

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        with contextlib.suppress(RedisError, OSError):
            await self._pubsub.aclose()
            await self._client.aclose()

    @contextlib.contextmanager
    def waiting(self, job_id: UUID) -> "Any":
        """A future that resolves when the job is said to have ended. Register before sending its message."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiters = self._waiters.setdefault(str(job_id), set())
        waiters.add(future)
        try:
            yield future
        finally:
            waiters.discard(future)
            if not waiters:
                self._waiters.pop(str(job_id), None)

    async def events(self, job_id: UUID, after: int, tick_s: float) -> AsyncIterator[Event | None]:
        """The job's events after number `after`, past ones first; None whenever `tick_s` passed without one.

        Never ends by itself but with the event that has a status: on None look whether the job has
        ended without telling (Redis lost it, or it ended before a worker took it).
        """
        key = transport.chunks_key(job_id).encode()
        reader = _Reader(asyncio.Event(), asyncio.Queue())
        await self._add_reader(key, reader)
        last = after
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.subscribed.wait(), tick_s)
            past = await self._history(job_id)
            while True:
                for event in past:
                    if event.seq > last:
                        last = event.seq
                        yield event
                        if event.status is not None:
                            return
                try:
                    past = await asyncio.wait_for(reader.events.get(), tick_s)
                except TimeoutError:
                    yield None
                    past = await self._history(job_id) if self._is_stale(reader) else []
                if past and past[0].seq > last + 1:
                    past = [*await self._history(job_id), *past]
        finally:
            await self._remove_reader(key, reader)

    def _is_stale(self, reader: "_Reader") -> bool:
        """Whether events may have passed this reader by: its subscription was renewed or never confirmed."""
        is_stale, reader.is_stale = reader.is_stale or not reader.subscribed.is_set(), False
        return is_stale

    async def _history(self, job_id: UUID) -> list[Event]:
        try:
            return await history(self._client, job_id)
        except (RedisError, OSError):
            return []

    async def _add_reader(self, key: bytes, reader: "_Reader") -> None:
        readers = self._readers.setdefault(key, [])
        readers.append(reader)
        if len(readers) > 1 and readers[0].subscribed.is_set():
            reader.subscribed.set()
            return
        with contextlib.suppress(RedisError, OSError):
            await self._pubsub.subscribe(key)

    async def _remove_reader(self, key: bytes, reader: "_Reader") -> None:
        readers = self._readers.get(key, [])
        if reader in readers:
            readers.remove(reader)
        if not readers and self._readers.pop(key, None) is not None:
            with contextlib.suppress(RedisError, OSError):
                await self._pubsub.unsubscribe(key)

    async def _run(self) -> None:
        pause = 0.05
        while True:
            try:
                await self._pubsub.subscribe(transport.DONE_CHANNEL, *self._readers)
                pause = 0.05
                while True:
                    message = await self._pubsub.get_message(timeout=5.0)
                    if message is not None:
                        self._receive(message)
            except (RedisError, OSError) as error:
                log.warning("subscriber.retry", error=type(error).__name__)
                for readers in self._readers.values():
                    for reader in readers:
                        reader.is_stale = True
                await asyncio.sleep(pause)
                pause = min(pause * 2, 1.0)

    def _receive(self, message: dict[str, Any]) -> None:
        channel: bytes = message["channel"]
        if message["type"] == "subscribe":
            for reader in self._readers.get(channel, ()):
                reader.subscribed.set()
        elif message["type"] == "message" and channel == transport.DONE_CHANNEL.encode():
            for job_id, _ in orjson.loads(message["data"]):
                for future in self._waiters.get(job_id, ()):
                    if not future.done():
                        future.set_result(None)
        elif message["type"] == "message":
            events = decode(message["data"])
            for reader in self._readers.get(channel, ()):
                reader.events.put_nowait(events)


@dataclass(slots=True, eq=False)
class _Reader:
    subscribed: asyncio.Event
    events: asyncio.Queue[list[Event]]
    is_stale: bool = False
