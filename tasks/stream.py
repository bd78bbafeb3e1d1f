"""A job's output events over Redis: the worker's writer and the gateway's reader.

Events are numbered from 1 without gaps. Each flush appends a batch to the run's Redis stream (for who
comes late) and publishes the same bytes on the channel of the same name (for who listens). An attempt
that cannot find the events of the one before it starts again at a later thousand thousand: who has seen
nothing yet does not mind, and who has seen some knows that these do not continue them.

An attempt that takes over writes its token into the stream first. Whatever an older attempt, hung or cut
off until now, appends behind it has a lower token, and every reader passes over it.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import orjson
import redis.asyncio
import structlog

from tasks import transport
from tasks.output import Piece

log = structlog.get_logger()

RUN_STEP = 1_000_000
"""A run that starts again numbers its events from a multiple of this, plus 1."""


class Interrupted(Exception):
    """The events that follow do not continue those already seen."""


@dataclass(frozen=True, slots=True)
class Event:
    """A piece of one choice, or the end of the job."""

    seq: int
    choice: int = 0
    piece: Piece | None = None
    status: str | None = None
    """Set on the last event only: the job's final state, already stored."""

    @property
    def is_first(self) -> bool:
        """Whether a run's events begin with this one."""
        return self.seq % RUN_STEP == 1

    def is_new_to(self, seen: int) -> bool:
        """Whether this event comes after number `seen`, as its reader's last. Raises Interrupted where a
        new run's events would be taken for the old one's."""
        if self.is_first and 0 < seen < self.seq - 1:
            raise Interrupted
        return self.seq > seen


class Writer:
    """Numbers one run's events and hands them to the outbox at its next flush."""

    def __init__(self, flight_id: UUID, broker: "Broadcaster", past: Sequence[Event] = (), run: int = 0,
                 token: int = 0) -> None:  # fmt: skip
        """`past` are the events of the attempts before; without them run number `run` begins anew."""
        self.flight_id = flight_id
        self.token = token
        self.first = past[0].seq if past else run * RUN_STEP + 1
        self.seq = past[-1].seq if past else self.first - 1
        self.marks = [_mark(event.choice, event.piece) for event in past if event.piece is not None]
        """See `tasks.replay`."""
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
            self.marks.append(_mark(choice, piece))
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


def _mark(choice: int, piece: Piece) -> tuple[int, int, int]:
    return choice, len(piece.text), len(piece.logprobs)


class Broadcaster:
    """Turns what all writers gathered since the last flush into one append and one publish per job."""

    def __init__(self, outbox: transport.Outbox) -> None:
        self._outbox = outbox
        self._dirty: dict[Writer, None] = {}
        outbox.add_source(self._drain)

    def dirty(self, writer: Writer) -> None:
        self._dirty[writer] = None
        self._outbox.wake()

    def _drain(self) -> list[tuple[Any, ...]]:
        commands: list[tuple[Any, ...]] = []
        writers, self._dirty = self._dirty, {}
        for writer in writers:
            events, writer.pending = writer.pending, []
            key = transport.chunks_key(writer.flight_id)
            data = encode(Batch(writer.token, events))
            commands.append(("XADD", key, "*", "events", data))
            commands.append(("PUBLISH", key, data))
            # A stream may outlast what it keeps: its time starts anew every now and then.
            if events[0].is_first or events[-1].status or events[-1].seq % _EXPIRE_EVERY < len(events):
                commands.append(("EXPIRE", key, transport.CHUNKS_TTL_S))
        return commands


@dataclass(frozen=True, slots=True)
class Batch:
    """Events of one attempt, as they travel."""

    token: int
    """`Claimed.token`; 0 for a run's first attempt."""
    events: list[Event]


async def history(client: redis.asyncio.Redis, flight_id: UUID) -> Batch:
    """Every event of a run that Redis still has, each once, in order; and the latest attempt's token."""
    return _in_order(await client.xrange(transport.chunks_key(flight_id)))


async def take_over(client: redis.asyncio.Redis, flight_id: UUID, token: int) -> list[Event]:
    """Fence off the attempts before this one, and get what they wrote until then."""
    key, fence = transport.chunks_key(flight_id), encode(Batch(token, []))
    pipeline: Any = client.pipeline(transaction=False)
    pipeline.execute_command("XADD", key, "*", "events", fence)
    pipeline.execute_command("PUBLISH", key, fence)
    pipeline.expire(key, transport.CHUNKS_TTL_S)
    pipeline.xrange(key)
    return _in_order((await pipeline.execute())[-1]).events


def _in_order(entries: Any) -> Batch:
    token = 0
    events: dict[int, Event] = {}
    for _, fields in entries:
        batch = decode(fields[b"events"])
        if batch.token >= token:
            token = batch.token
            for event in batch.events:
                events.setdefault(event.seq, event)
    return Batch(token, [events[seq] for seq in sorted(events)])


def latest_run(events: Sequence[Event]) -> Sequence[Event]:
    """Of a history, the events of its last run; empty where any of them is missing."""
    start = max((at for at, event in enumerate(events) if event.is_first), default=len(events))
    run = events[start:]
    return run if run and run[-1].seq - run[0].seq == len(run) - 1 else []


def encode(batch: Batch) -> bytes:
    return orjson.dumps(batch if batch.token else batch.events)


def decode(data: bytes) -> Batch:
    found = orjson.loads(data)
    token, events = (0, found) if isinstance(found, list) else (found["token"], found["events"])
    return Batch(token, [_event(**fields) for fields in events])


def _event(seq: int, choice: int, piece: dict[str, Any] | None, status: str | None) -> Event:
    if type(seq) is not int:
        raise ValueError("not an event of ours")
    if piece is None:
        return Event(seq, choice, None, status)
    return Event(seq, choice, Piece(**{**piece, "token_ids": tuple(piece["token_ids"])}), status)


_SUBSCRIBE_S = 0.5
_GRACE_S = 0.25
_EXPIRE_EVERY = 256
_MOST_UNREAD = 256
"""Batches a reader may be behind."""
_ENDED = Batch(0, [])


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

    def __init__(self, url: str, on_ended: Callable[[list[str]], None]) -> None:
        """`on_ended` hears of the end of every job, whoever waits for it."""
        self._on_ended = on_ended
        self._client = transport.connect(url)
        self._pubsub = transport.connect(url, timeout_s=30).pubsub()
        self._watches: dict[str, set[Watch]] = {}
        self._readers: dict[bytes, list[_Reader]] = {}
        self._task = asyncio.create_task(self._run(), name="subscriber")

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        with contextlib.suppress(*transport.DOWN):
            await self._pubsub.aclose()  # type: ignore[no-untyped-call]
            await self._client.aclose()

    def watch(self, job_id: UUID, *, is_recorded: bool = True) -> "Watch":
        """Be told when the job ends. Register before sending its message; close in the end."""
        watch = Watch(self, str(job_id), asyncio.get_running_loop().create_future(), is_recorded)
        self._watches.setdefault(watch.job_id, set()).add(watch)
        return watch

    def wake_all(self) -> None:
        """Wake everyone, whatever their jobs do."""
        self.ended(list(self._watches))

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

    async def events(self, watch: "Watch", flight_id: UUID, tick_s: float) -> AsyncIterator[Event | None]:
        """The run's events from its first, past ones first; None whenever `tick_s` passed without one. Ends
        with the event that has a status, or without one if Redis lost any: then the job has ended, and the
        ledger has the rest. Raises Interrupted."""
        key = transport.chunks_key(flight_id).encode()
        reader = _Reader(asyncio.Event(), asyncio.Queue(_MOST_UNREAD))
        await self._add_reader(key, reader)
        last, token, is_lost = 0, 0, False
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.subscribed.wait(), _SUBSCRIBE_S)
            known = await self._history(flight_id)
            past, token = known.events, known.token
            while True:
                for event in past:
                    if event.seq == last + 1 or (event.is_first and not last):
                        last = event.seq
                        yield event
                        if event.status is not None:
                            return
                    elif event.is_first and event.seq > last:
                        raise Interrupted
                    elif event.seq > last:
                        is_lost = True
                batch = await self._next(watch, reader, tick_s)
                if batch is _ENDED and is_lost:
                    return
                if batch is None:
                    yield None
                past = []
                if batch is not None and batch is not _ENDED and batch.token >= token:
                    past, token = batch.events, batch.token
                has_gap = bool(past) and not is_lost and past[0].seq > last + 1
                if batch is _ENDED or has_gap or self._is_stale(reader):
                    known = await self._history(flight_id)
                    past, token = [*known.events, *past], max(token, known.token)
                if batch is _ENDED:
                    is_lost = True  # whatever is still missing after this look will not come
        finally:
            await self._remove_reader(key, reader)

    async def _next(self, watch: "Watch", reader: "_Reader", tick_s: float) -> Batch | None:
        """The next batch; None after `tick_s`; `_ENDED` where the job is over and no more is coming."""
        getter: asyncio.Future[Any] = asyncio.ensure_future(reader.batches.get())
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

    async def _history(self, flight_id: UUID) -> Batch:
        try:
            return await history(self._client, flight_id)
        except transport.DOWN:
            return Batch(0, [])

    async def _add_reader(self, key: bytes, reader: "_Reader") -> None:
        readers = self._readers.setdefault(key, [])
        readers.append(reader)
        if len(readers) > 1 and readers[0].subscribed.is_set():
            reader.subscribed.set()
            return
        with contextlib.suppress(*transport.DOWN):
            await self._pubsub.subscribe(key)

    async def _remove_reader(self, key: bytes, reader: "_Reader") -> None:
        readers = self._readers.get(key, [])
        if reader in readers:
            readers.remove(reader)
        if not readers and self._readers.pop(key, None) is not None:
            with contextlib.suppress(*transport.DOWN):
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
                        self._receive_ours(message)
            except transport.DOWN as error:
                log.warning("subscriber.retry", error=type(error).__name__)
                for readers in self._readers.values():
                    for reader in readers:
                        reader.is_stale = True
                await asyncio.sleep(pause)
                pause = min(pause * 2, 1.0)

    def _receive_ours(self, message: dict[str, Any]) -> None:
        try:
            self._receive(message)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            # Everyone else here goes on hearing the news, whoever wrote what cannot be read.
            log.error("message.malformed", error=type(error).__name__)

    def _receive(self, message: dict[str, Any]) -> None:
        channel: bytes = message["channel"]
        if message["type"] == "subscribe":
            for reader in self._readers.get(channel, ()):
                reader.subscribed.set()
        elif message["type"] == "message" and channel == transport.DONE_CHANNEL.encode():
            ended = [job_id for job_id, _ in orjson.loads(message["data"])]
            self.ended(ended)
            self._on_ended(ended)
        elif message["type"] == "message":
            batch = decode(message["data"])
            for reader in self._readers.get(channel, ()):
                reader.put(batch)


@dataclass(slots=True, eq=False)
class _Reader:
    subscribed: asyncio.Event
    batches: asyncio.Queue[Batch]
    is_stale: bool = False

    def put(self, batch: Batch) -> None:
        """A reader that falls behind keeps nothing, and reads from Redis when it has caught up."""
        if self.batches.full():
            while not self.batches.empty():
                self.batches.get_nowait()
            self.is_stale = True
        self.batches.put_nowait(batch)
