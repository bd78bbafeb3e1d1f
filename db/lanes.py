"""Lanes: many small statements from one asyncio loop become few set-based ones.

A lane is a thread with one autocommit connection and one statement kind. Items that arrive while it is
busy form the next batch, so the batch grows with the load and an idle lane adds no wait. Measured on
2 cores: 57,000 coalesced primary-key look-ups a second against 7,100 through a pool, and group commit
shares one fsync.
"""

import asyncio
import contextlib
import functools
import os
import queue
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import psycopg2
import structlog

from db import session
from db.session import Connection, Cursor

log = structlog.get_logger()

LONG_S = 6.0
"""The silence that statements need whose work grows with the tables: a little more than Postgres's own limit."""
_LINGER_S = 0.001
_FAIL_FAST_S = 1.0
_PATIENT_S = 10.0
"""Lanes with more patience than this carry what nobody waits for and nobody can send again."""
_WATCH_S = 0.25
_IDLE_S = 60.0

Item = TypeVar("Item")
Answer = TypeVar("Answer")
_Entry = tuple[Item, "asyncio.Future[Answer] | None", float]
"""What is asked, who waits for it, and since when (time.monotonic())."""


class LaneDown(Exception):
    """Postgres did not answer within the lane's patience. The statement may or may not have run."""


class Lane(Generic[Item, Answer]):
    """Runs `statement(cursor, items) -> answers` (same length, same order) for items submitted one by one.

    `patience_s`: how long it tries while Postgres is away; `silence_s`: how long one statement may stay
    without an answer before its connection is cut. `linger_s` makes every batch wait that long for company:
    for what nobody waits for. `is_kept`: for what every call passes; it connects at once, so that no call waits for
    that, and stays connected. Others come when they are asked, and leave when nobody has asked for a minute.
    The statement must be safe to repeat: after a lost connection the batch is sent again.
    """

    def __init__(
        self,
        url: str,
        statement: Callable[[Cursor, Sequence[Item]], Sequence[Answer]],
        *,
        is_durable: bool = True,
        max_batch: int = 256,
        patience_s: float = 2.0,
        silence_s: float = 2.0,
        linger_s: float = 0.0,
        is_kept: bool = False,
    ) -> None:
        self._url = url
        self._statement = statement
        self._is_durable = is_durable
        self._max_batch = max_batch
        self._patience_s = patience_s
        self._silence_s = silence_s
        self._linger_s = linger_s
        self._is_kept = is_kept
        self.name = f"switchyard-{statement.__name__}"
        """Of its thread and its session."""
        self._items: queue.SimpleQueue[_Entry[Item, Answer] | None] = queue.SimpleQueue()
        self._connection: Connection | None = None
        self._asked_at: float | None = None
        """time.monotonic() of the statement that Postgres has not answered yet."""
        self._failed_at = float("-inf")
        _watched.add(self)
        _start_watch()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()

    def submit(self, item: Item) -> "asyncio.Future[Answer]":
        """Queue `item`. The future raises LaneDown, or what Postgres raised for this very item."""
        future: asyncio.Future[Answer] = self._loop.create_future()
        self._items.put((item, future, time.monotonic()))
        return future

    def send(self, item: Item) -> None:
        """Queue `item` for whose answer nobody waits; a failure is logged."""
        self._items.put((item, None, time.monotonic()))

    def cut_if_silent(self) -> None:
        """Cut a connection that has said nothing for too long: libpq would wait for ever for a server that
        is neither dead nor answering. The thread then meets an error like any other."""
        asked_at, connection = self._asked_at, self._connection
        if asked_at is None or connection is None or time.monotonic() - asked_at < self._silence_s:
            return
        log.warning("lane.cut", lane=self.name)
        with contextlib.suppress(OSError, *session.DependencyDown):
            duplicate = socket.socket(fileno=os.dup(connection.fileno()))
            with contextlib.closing(duplicate):
                duplicate.shutdown(socket.SHUT_RDWR)

    async def close(self) -> None:
        """Finish what was submitted, then close the connection."""
        self._items.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        if self._is_kept:
            with contextlib.suppress(*session.DependencyDown):
                self._connect()
        is_busy = False
        while (first := self._next()) is not None:
            batch = [first]
            if self._linger_s or is_busy:
                # Under load a moment's wait halves the statements, and with them Postgres's share of the CPU.
                time.sleep(self._linger_s or _LINGER_S)
            is_closing = False
            while len(batch) < self._max_batch:
                try:
                    entry = self._items.get_nowait()
                except queue.Empty:
                    break
                if entry is None:
                    is_closing = True
                    break
                batch.append(entry)
            is_busy = len(batch) > 1
            batch, late = self._parted(batch)
            self._deliver([(future, LaneDown("waited behind a statement that failed")) for _, future, _ in late])
            outcomes = self._outcomes([item for item, _, _ in batch]) if batch else []
            self._deliver(list(zip([future for _, future, _ in batch], outcomes, strict=True)))
            if is_closing:
                break
        if self._connection is not None:
            self._connection.close()

    def _next(self) -> "_Entry[Item, Answer] | None":
        while True:
            try:
                return self._items.get(timeout=None if self._is_kept or self._connection is None else _IDLE_S)
            except queue.Empty:
                self._drop_connection()

    def _parted(
        self, batch: "list[_Entry[Item, Answer]]"
    ) -> "tuple[list[_Entry[Item, Answer]], list[_Entry[Item, Answer]]]":
        """Who is tried, and who has waited too long behind what failed: a try of their own may take as long again."""
        since = time.monotonic() - self._patience_s / 4
        if self._patience_s >= _PATIENT_S or self._failed_at < batch[0][2]:
            return batch, []
        limit = min(since, self._failed_at)
        return [entry for entry in batch if entry[2] >= limit], [entry for entry in batch if entry[2] < limit]

    def _deliver(self, pairs: "list[tuple[asyncio.Future[Answer] | None, Answer | Exception]]") -> None:
        failures = [outcome for future, outcome in pairs if future is None and isinstance(outcome, Exception)]
        if failures:
            log.warning("lane.lost", lane=self.name, items=len(failures), error=type(failures[0]).__name__)
        if all(future is None for future, _ in pairs):
            return

        def resolve() -> None:
            for future, outcome in pairs:
                if future is None or future.done():
                    continue
                if isinstance(outcome, Exception):
                    future.set_exception(outcome)
                    future.exception()  # whoever asked may have gone, and then asyncio need not complain
                else:
                    future.set_result(outcome)

        try:
            self._loop.call_soon_threadsafe(resolve)
        except RuntimeError:  # the loop is closed: nobody waits any more
            log.warning("lane.undelivered", lane=self.name, items=len(pairs))

    def _outcomes(self, items: Sequence[Item]) -> "Sequence[Answer | Exception]":
        """Answers in order; a batch that Postgres refuses is split until the refused item stands alone."""
        try:
            return self._execute(items)
        except psycopg2.Error as error:
            if isinstance(error, session.DependencyDown):
                return [LaneDown(str(error).strip().splitlines()[0] if str(error).strip() else "") for _ in items]
            if len(items) == 1:
                return [error]
            middle = len(items) // 2
            return [*self._outcomes(items[:middle]), *self._outcomes(items[middle:])]
        except Exception as error:  # a bug in the statement must not leave callers waiting for ever
            log.exception("lane.failed", lane=self.name)
            return [error for _ in items]

    def _execute(self, items: Sequence[Item]) -> Sequence[Answer]:
        # Who asks while Postgres is known to be away gets one try, not a wait.
        is_down = self._patience_s < _PATIENT_S and time.monotonic() - self._failed_at < _FAIL_FAST_S
        deadline = time.monotonic() + (0.0 if is_down else self._patience_s)
        pause = 0.05
        while True:
            try:
                return self._attempt(items)
            except session.DependencyDown as error:
                self._drop_connection()
                if time.monotonic() + pause > deadline:
                    self._failed_at = time.monotonic()
                    raise
                log.warning("lane.retry", lane=self.name, error=type(error).__name__)
                time.sleep(pause)
                pause = min(pause * 2, 1.0)

    def _attempt(self, items: Sequence[Item]) -> Sequence[Answer]:
        self._connect()
        assert self._connection is not None
        self._asked_at = time.monotonic()
        try:
            with self._connection.cursor() as cursor:
                return self._statement(cursor, items)
        finally:
            self._asked_at = None

    def _connect(self) -> None:
        if self._connection is None:
            self._connection = session.connect(self._url, self.name, is_durable=self._is_durable)

    def _drop_connection(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(*session.DependencyDown):
                self._connection.close()
            self._connection = None


_watched: "weakref.WeakSet[Lane[Any, Any]]" = weakref.WeakSet()


def _watch() -> None:
    while True:
        time.sleep(_WATCH_S)
        for lane in list(_watched):
            lane.cut_if_silent()


@functools.cache
def _start_watch() -> None:
    """One thread for all lanes of a process."""
    threading.Thread(target=_watch, name="lane-watch", daemon=True).start()
