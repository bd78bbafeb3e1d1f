"""A Celery pool that runs tasks as coroutines: `celery -A tasks worker -P custom` with
CELERY_CUSTOM_WORKER_POOL=tasks.pool:TaskPool.

Celery keeps what it is good at (consuming, events, Flower, remote control, warm shutdown); the pool
hands each message to the worker's event loop, where hundreds wait at the cost of one thread. Celery
has no pool of this kind: prefork children may not start vLLM's engine, and a thread a job costs more.

Celery calls the pool on its hub thread and expects callbacks there; everything else happens on the
worker's loop thread. Both hand-overs are coalesced, one wake-up for all that gathered.
"""

import asyncio
import collections
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import structlog
import uvloop
from celery import signals
from celery.concurrency.base import BasePool
from kombu.serialization import loads

from tasks import inference, logs, metrics
from tasks.worker import EXIT_DEAD, Worker

log = structlog.get_logger()

Callback = Callable[[Any], None]

_GATHER_S = 0.002
_EVENTS_S = 0.25
_EVENTS_BUFFER = 500


class TaskPool(BasePool):
    """Up to `limit` coroutines of `tasks.inference.run`."""

    body_can_be_buffer = True
    signal_safe = False
    task_join_will_block = False

    def on_start(self) -> None:
        """Load the models. Celery connects its consumer only afterwards, so no message waits for a load."""
        name = os.environ.get("SWITCHYARD_WORKER_NAME") or f"{os.environ['SWITCHYARD_BACKEND']}@{os.uname().nodename}"
        logs.configure(name)
        metrics.serve()
        self._hub: Any = None
        self._inbox: collections.deque[tuple[Any, ...]] = collections.deque()
        self._outbox: collections.deque[Callable[[], None]] = collections.deque()
        self._num_running = 0
        self._loop = uvloop.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run_loop, name="worker-loop", daemon=True)
        self._thread.start()
        future = asyncio.run_coroutine_threadsafe(self._start_worker(name), self._loop)
        # Celery's own handler only notes the signal for later; nothing runs yet that would need draining.
        celerys = signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        try:
            self._worker = future.result()
        except Exception:
            # Celery would go on without a pool; a worker that cannot load must die and be restarted.
            log.exception("worker.load_failed")
            os._exit(EXIT_DEAD)
        finally:
            signal.signal(signal.SIGTERM, celerys)

    def register_with_event_loop(self, hub: Any) -> None:
        self._hub = hub

    def on_stop(self) -> None:
        """Drain. Celery has stopped consuming; its hub no longer runs."""
        self._hub = None
        asyncio.run_coroutine_threadsafe(self._worker.drain(), self._loop).result()
        self._run_callbacks()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)

    on_terminate = on_stop

    def on_apply(self, target: Any, args: tuple[Any, ...] = (), kwargs: Any = None, callback: Callback | None = None,
                 accept_callback: Any = None, **_: Any) -> None:  # fmt: skip
        """Take one message: args are (task name, task id, headers, body, content type, content encoding)."""
        was_empty = not self._inbox
        self._inbox.append((args, callback, accept_callback))
        if was_empty:
            self._loop.call_soon_threadsafe(self._take)

    def _get_info(self) -> dict[str, Any]:
        info: dict[str, Any] = super()._get_info()
        return {**info, "max-concurrency": self.limit, "running": self._num_running}

    @property
    def num_processes(self) -> int:
        return int(self.limit)

    async def _start_worker(self, name: str) -> Worker:
        worker = Worker(os.environ["SWITCHYARD_BACKEND"], name, int(self.limit))
        await worker.start()
        return worker

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _take(self) -> None:
        while self._inbox:
            task = self._loop.create_task(self._run(*self._inbox.popleft()))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self, args: tuple[Any, ...], callback: Callback, accept_callback: Any) -> None:
        started = time.monotonic()
        self._on_hub(lambda: accept_callback(os.getpid(), started))
        self._num_running += 1
        try:
            job_id, version = _decode(*args[3:6])
        except (ValueError, TypeError) as error:
            metrics.DROPPED_MESSAGES.labels("malformed").inc()
            log.error("message.malformed", error=type(error).__name__)
        else:
            await inference.run(self._worker, job_id, version)
        finally:
            self._num_running -= 1
            runtime = time.monotonic() - started
            self._on_hub(lambda: callback((0, None, runtime)))

    def _on_hub(self, call: Callable[[], None]) -> None:
        """Run `call` on Celery's thread, whose sets of active requests no other thread may touch. Waking
        that thread costs more than the call, so calls gather for a moment."""
        was_empty = not self._outbox
        self._outbox.append(call)
        if was_empty:
            self._loop.call_later(_GATHER_S, self._wake_hub)

    def _wake_hub(self) -> None:
        hub = self._hub
        if hub is not None:
            hub.call_soon(self._run_callbacks)

    def _run_callbacks(self) -> None:
        while self._outbox:
            self._outbox.popleft()()


@signals.worker_ready.connect
def _gather_events(sender: Any, **_: Any) -> None:
    """Send Flower's events four times a second. Stock, Celery flushes after each turn of its hub, which is
    one publish an event: 40 % of a busy worker's time."""
    is_scheduled = False

    def flush() -> None:
        nonlocal is_scheduled
        is_scheduled = False
        sender._flush_events()  # noqa: SLF001 - what the stock callback schedules

    def later() -> None:
        nonlocal is_scheduled
        if not is_scheduled and sender.hub is not None:
            is_scheduled = True
            sender.hub.call_later(_EVENTS_S, flush)

    sender.on_send_event_buffered = later
    if sender.event_dispatcher is not None:
        sender.event_dispatcher.on_send_buffered = later
        sender.event_dispatcher.buffer_limit = _EVENTS_BUFFER


def _decode(body: Any, content_type: str, encoding: str) -> tuple[uuid.UUID, int]:
    """The job id and version of a message. Raises ValueError; only JSON is ever loaded."""
    try:
        (job_id, version), *_ = loads(body, content_type, encoding, accept=("application/json",))
    except Exception as error:  # kombu raises its own family per content type
        raise ValueError("not a message of ours") from error
    return uuid.UUID(job_id), int(version)
