"""A job's output events over Redis: the worker's writer and the gateway's reader.

Events are numbered from 1 without gaps. Each flush appends a batch to the job's Redis stream (for who
comes late) and publishes the same bytes on the channel of the same name (for who listens).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
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
        self._silent: dict[int, Piece] = {}
        self._broker = broker

    def write(self, choice: int, piece: Piece) -> None:
        """Tokens that show nothing yet (half a character, a held-back string) travel with the next that
        does: every event is something to see, so a client's events are numbered without gaps."""
        if (silent := self._silent.pop(choice, None)) is not None:
            tokens, logprobs = silent.token_ids + piece.token_ids, silent.logprobs + piece.logprobs
            piece = Piece(piece.text, tokens, logprobs, piece.finish_reason, piece.held)
        if piece.text or piece.finish_reason:
            self._add(Event(self.seq + 1, choice, piece))
        else:
            self._silent[choice] = piece

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
    entries: Any = await client.xrange(transport.chunks_key(job_id))
    for _, fields in entries:
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


_SUBSCRIBE_S = 0.5
_GRACE_S = 0.25
_ENDED: list[Event] = []


@dataclass(slots=True, eq=False)
class Watch:
    """Somebody's wait for a job."""

    subscriber: "Subscriber"
    job_id: str
    ended: "asyncio.Future[None]"
    is_recorded: bool
    """False while the job's row is on its way: the ledger not knowing it yet means nothing."""

    def rearm(self) -> None:
        """Wait for the next news: the last was not the job's end."""
        self.ended = self.ended.get_loop().create_future()

    def close(self) -> None:
        self.subscriber.unwatch(self)


class Subscriber:
    """The one subscription of a gateway process: wakes everyone who waits for a job or reads its stream."""

    def __init__(self, url: str) -> None:
        self._client = transport.connect(url)
        self._pubsub = transport.connect(url, timeout_s=30).pubsub()
        self._watches: dict[str, set[Watch]] = {}
        self._readers: dict[bytes, list[_Reader]] = {}
        self._task = asyncio.create_task(self._run(), name="subscriber")

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        with contextlib.suppress(RedisError, OSError):
            await self._pubsub.aclose()  # type: ignore[no-untyped-call]
            await self._client.aclose()

    def watch(self, job_id: UUID, *, is_recorded: bool = True) -> "Watch":
        """Be told when the job ends. Register before sending its message; close in the end."""
        watch = Watch(self, str(job_id), asyncio.get_running_loop().create_future(), is_recorded)
        self._watches.setdefault(watch.job_id, set()).add(watch)
        return watch

    def unwatch(self, watch: "Watch") -> None:
        watches = self._watches.get(watch.job_id, set())
        watches.discard(watch)
        if not watches:
            self._watches.pop(watch.job_id, None)

    @property
    def watched(self) -> list[UUID]:
        """The recorded jobs that somebody here waits for."""
        return [
            UUID(job_id) for job_id, watches in self._watches.items() if any(watch.is_recorded for watch in watches)
        ]

    def ended(self, job_ids: Iterable[str]) -> None:
        """Wake who waits for these jobs."""
        for job_id in job_ids:
            for watch in self._watches.get(job_id, ()):
                if not watch.ended.done():
                    watch.ended.set_result(None)

    async def events(self, watch: "Watch", after: int, tick_s: float) -> AsyncIterator[Event | None]:
        """The watched job's events after number `after`, past ones first; None whenever `tick_s` passed
        without one. Ends with the event that has a status, or without one if Redis lost it: then the
        job has ended, and the ledger knows how."""
        job_id = UUID(watch.job_id)
        key = transport.chunks_key(job_id).encode()
        reader = _Reader(asyncio.Event(), asyncio.Queue())
        await self._add_reader(key, reader)
        last = after
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.subscribed.wait(), _SUBSCRIBE_S)
            past = await self._history(job_id)
            while True:
                for event in past:
                    if event.seq > last:
                        last = event.seq
                        yield event
                        if event.status is not None:
                            return
                batch = await self._next(watch, reader, tick_s)
                if batch is _ENDED:
                    for event in await self._history(job_id):
                        if event.seq > last:
                            yield event
                    return
                if batch is None:
                    yield None
                    past = await self._history(job_id) if self._is_stale(reader) else []
                    continue
                past = batch
                if past and past[0].seq > last + 1:
                    past = [*await self._history(job_id), *past]
        finally:
            await self._remove_reader(key, reader)

    async def _next(self, watch: "Watch", reader: "_Reader", tick_s: float) -> "list[Event] | None":
        """The next batch; None after `tick_s`; `_ENDED` where the job is over and no more is coming."""
        getter: asyncio.Future[Any] = asyncio.ensure_future(reader.events.get())
        try:
            await asyncio.wait({getter, watch.ended}, timeout=tick_s, return_when=asyncio.FIRST_COMPLETED)
            if not getter.done() and watch.ended.done():
                # The end's own event travels on another channel: give it a moment.
                await asyncio.wait({getter}, timeout=_GRACE_S)
                if not getter.done():
                    return _ENDED
            return getter.result() if getter.done() else None
        finally:
            getter.cancel()

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
            self.ended(job_id for job_id, _ in orjson.loads(message["data"]))
        elif message["type"] == "message":
            events = decode(message["data"])
            for reader in self._readers.get(channel, ()):
                reader.events.put_nowait(events)


@dataclass(slots=True, eq=False)
class _Reader:
    subscribed: asyncio.Event
    events: asyncio.Queue[list[Event]]
    is_stale: bool = False
