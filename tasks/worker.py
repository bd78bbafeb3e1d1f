"""A worker process: one backend with its models pinned in memory, many jobs in flight.

Life of the process: register (loading) → load and warm up → ready → drain → leave. It keeps its lease
with heartbeats from a thread of their own, so a busy event loop does not look like death.
"""

import asyncio
import contextlib
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence

import orjson
import structlog

import catalog
import settings
from backends.base import Backend, BackendDead
from backends.registry import backend_class
from db import flights, jobs, session, workers
from db.jobs import Claimed, Ended
from db.lanes import Lane, LaneDown
from db.states import JobStatus
from tasks import inference, transport
from tasks.gate import Gate
from tasks.inference import Run
from tasks.service_time import ServiceTime
from tasks.stream import Broadcaster, Writer

log = structlog.get_logger()

EXIT_DEAD = 70
"""The process cannot serve again and must be restarted (EX_SOFTWARE)."""
_SILENCE_S = 6.0
_FINISH_PATIENCE_S = 60.0
"""A result outlasts a restart of Postgres this long."""


class Worker:
    """Owns the backend, the connections and the jobs in flight. All methods run on its event loop."""

    def __init__(self, backend_name: str, name: str, slots: int) -> None:
        self._config = settings.load()
        served = catalog.load(self._config.config, self._config.models_dir)
        if backend_name not in served.backends:
            raise SystemExit(f"no backend {backend_name!r} in {self._config.config}; set SWITCHYARD_BACKEND")
        self._spec = served.backends[backend_name]
        self.models = {model.name: model for model in self._spec.models}
        self.backend: Backend = backend_class(self._spec.runtime)(self._spec)
        self.service = ServiceTime()
        self._name = name
        self._slots = slots
        self._runs: dict[uuid.UUID, Run] = {}
        self.full_at = float("-inf")
        """time.monotonic() when it last had no free slot: who came later had not to wait for one."""
        self._idle = asyncio.Event()
        self._idle.set()
        self.gate = Gate()
        """Every job passes it; one that may kill its worker passes alone."""
        self.is_leaving = False
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Register, load every model, and begin to be alive. Returns when jobs may come."""
        url, lease_s = self._config.database_url, self._config.lease_s
        self._pulse = _Pulse(url, self._name, self._spec, self._slots, self._config)
        self.id = self._pulse.worker_id
        structlog.contextvars.bind_contextvars(worker_id=self.id, backend=self._spec.name)
        log.info("worker.loading", models=list(self.models), lease_s=lease_s)
        started = time.monotonic()
        await self.backend.start()
        self.claims = Lane(
            url, jobs.claim, is_durable=False, is_kept=True, patience_s=_FINISH_PATIENCE_S, silence_s=_SILENCE_S
        )
        self.claims_alone = Lane(
            url, jobs.claim_alone, is_durable=False, patience_s=_FINISH_PATIENCE_S, silence_s=_SILENCE_S
        )
        self.finishes = Lane(url, jobs.finish, is_kept=True, patience_s=_FINISH_PATIENCE_S, silence_s=_SILENCE_S)
        self._ends = Lane(url, jobs.end, patience_s=_FINISH_PATIENCE_S, silence_s=_SILENCE_S)
        self._landings = Lane(url, _land, patience_s=_FINISH_PATIENCE_S, silence_s=_SILENCE_S)
        self._owned = Lane(url, jobs.owned)
        self._strays: set[tuple[uuid.UUID, int]] = set()
        self.redis = transport.connect(self._config.redis_url, timeout_s=5.0)
        self.outbox = transport.Outbox(self.redis, linger_s=0.002)
        self.broadcaster = Broadcaster(self.outbox)
        self._ended: list[tuple[str, str]] = []
        self.outbox.add_source(self._drain_ended)
        self._tasks = [
            asyncio.create_task(self._watch(), name="watch"),
            asyncio.create_task(self._listen(), name="listen"),
        ]
        self._pulse.state = "ready"
        self._pulse.stats = self._stats
        self._pulse.beat_now()
        log.info("worker.ready", load_s=round(time.monotonic() - started, 1))

    def is_running(self, job_id: uuid.UUID) -> bool:
        """Whether a run of this job is still going on here, be it one that the ledger has given up already."""
        return job_id in self._runs

    @contextlib.contextmanager
    def running(self, attempt: Run) -> Iterator[None]:
        """Hold an attempt in the table of what runs here."""
        self._runs[attempt.job.id] = attempt
        self._idle.clear()
        try:
            yield
        finally:
            if len(self._runs) >= self._slots:
                self.full_at = time.monotonic()
            if self._runs.get(attempt.job.id) is attempt:  # a later run of the job may be here already
                del self._runs[attempt.job.id]
            if not self._runs:
                self._idle.set()

    async def end(self, job: Claimed | jobs.Owned, code: str, message: str, *, is_retryable: bool,
                  is_counted: bool = True) -> JobStatus | None:  # fmt: skip
        """Record that an attempt ended without a result; the job's new state, None if it had moved on."""
        return await self._ends.submit(
            Ended(
                id=job.id,
                run=job.run,
                worker_id=self.id,
                code=code,
                message=message,
                is_retryable=is_retryable,
                is_counted=is_counted,
                max_attempts=self._config.max_attempts,
            )
        )

    def announce(self, job_id: uuid.UUID, status: JobStatus, writer: Writer | None) -> None:
        """Wake who waits for this job, and end its stream. Only after the state is committed."""
        self._ended.append((str(job_id), status))
        if writer is not None:
            writer.end(status)
        self.outbox.wake()

    async def land(self, leader_id: uuid.UUID) -> None:
        """Give a stored result to the followers as well. What goes wrong here the reconciler makes good."""
        with contextlib.suppress(LaneDown):
            self._ended += await self._landings.submit(leader_id)

    async def stopped(self, attempt: Run) -> None:
        """An attempt was cancelled here: if the job is still ours give it back, uncounted unless it may have
        been what made the backend hang."""
        code = "backend_stalled" if attempt.is_stalled else "released"
        state = await self.end(attempt.job, code, "", is_retryable=True, is_counted=attempt.is_stalled)
        log.info("job.stopped", job_id=str(attempt.job.id), attempt=attempt.job.attempt, state=state)
        if state is JobStatus.QUEUED:
            inference.enqueue(self.outbox, [(attempt.job.id, attempt.job.backend, attempt.job.task)])
        elif state is JobStatus.FAILED:
            self.announce(attempt.job.id, state, attempt.writer)

    async def drain(self) -> None:
        """Finish what runs within `drain_s`, give back the rest, and leave."""
        self.is_leaving = True
        self._pulse.state = "draining"
        self._pulse.beat_now()
        log.info("worker.draining", running=len(self._runs))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), self._config.drain_s)
        await self._give_back()
        for task in self._tasks:
            task.cancel()
        await self.outbox.close()
        await self.backend.stop()
        for lane in (self.claims, self.claims_alone, self.finishes, self._ends, self._landings, self._owned):
            await lane.close()
        await self.redis.aclose()
        self._pulse.stop()
        log.info("worker.left")

    def die(self, reason: str) -> None:
        """This process cannot serve again: give every job back and exit, to be restarted."""
        if not self.is_leaving:
            self.is_leaving = True
            log.error("worker.dying", reason=reason)
            self._tasks.append(asyncio.create_task(self._die(), name="die"))

    async def _die(self) -> None:
        with contextlib.suppress(TimeoutError, LaneDown):
            await asyncio.wait_for(self._give_back(), 10)
            await self.outbox.flush()
        self._pulse.stop()
        os._exit(EXIT_DEAD)

    async def _give_back(self) -> None:
        """Stop what runs, give its jobs back, and let those finish whose results are being stored."""
        tasks = [run.task for run in self._runs.values() if run.task is not None]
        for run in list(self._runs.values()):
            self._stop(run)
        await asyncio.gather(*tasks, return_exceptions=True)

    def _drain_ended(self) -> list[tuple[str, ...]]:
        if not self._ended:
            return []
        ended, self._ended = self._ended, []
        return [("PUBLISH", transport.DONE_CHANNEL, orjson.dumps(ended).decode())]

    def _stats(self) -> dict[str, object]:
        return {"running": len(self._runs), "service": self.service.stats()}

    async def _watch(self) -> None:
        """Once a heartbeat: is the backend alive, are we, and do we still own what we run?"""
        steps, since = -1, time.monotonic()
        while True:
            await asyncio.sleep(self._config.heartbeat_s)
            try:
                self.backend.check_health()
            except BackendDead as error:
                self.die(str(error))
                return
            if not self._runs or steps != self.backend.num_steps():
                steps, since = self.backend.num_steps(), time.monotonic()
            elif time.monotonic() - since > self._config.stall_s:
                for run in self._runs.values():
                    run.is_stalled = True
                self.die(f"the backend has not finished a step for {self._config.stall_s:g} s")
                return
            if self._pulse.is_dead:
                self.die("declared dead: the lease ran out")
                return
            try:
                await self._compare(await self._owned.submit(self.id))
            except LaneDown:
                continue
            except Exception:
                # Nothing that goes wrong once may end this watch: it finds what every other path missed.
                log.exception("watch.failed")

    async def _compare(self, owned: list[jobs.Owned]) -> None:
        """Stop what is no longer ours; give back what is ours but does not run here, because the answer
        to its claim was lost with a connection. A claim in flight looks the same for a moment, so only
        what strays in two comparisons counts."""
        mine = {(job.id, job.run): job for job in owned}
        held = {(run.job.id, run.job.run): run for run in self._runs.values()}
        for key, run in held.items():
            if key not in mine and time.monotonic() - run.started > self._config.heartbeat_s:
                self._stop(run)
        strays = mine.keys() - held.keys()
        for job_id, number in strays & self._strays:
            job = mine[job_id, number]
            state = await self.end(job, "claim_lost", "", is_retryable=True, is_counted=False)
            if state is JobStatus.QUEUED:
                inference.enqueue(self.outbox, [(job.id, job.backend, job.task)])
        self._strays = strays

    def _stop(self, run: Run) -> None:
        """Stop computing a job that is no longer ours. Finishing is over within milliseconds: leave it."""
        if run.task is not None and not run.is_finishing:
            run.task.cancel()

    async def _listen(self) -> None:
        """Stop cancelled jobs as soon as a gateway says so; `_watch` finds those that this misses."""
        pause = 0.1
        while True:
            pubsub = transport.connect(self._config.redis_url, timeout_s=30).pubsub()
            try:
                await pubsub.subscribe(transport.STOP_CHANNEL)
                pause = 0.1
                while True:
                    message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=5.0)
                    for job_id in _named(message["data"]) if message else ():
                        if run := self._runs.get(job_id):
                            self._stop(run)
            except transport.DOWN as error:
                log.warning("listen.retry", error=type(error).__name__)
                await asyncio.sleep(pause)
                pause = min(pause * 2, 2.0)
            finally:
                with contextlib.suppress(*transport.DOWN):
                    await pubsub.aclose()  # type: ignore[no-untyped-call]


def _named(data: bytes) -> list[uuid.UUID]:
    """The jobs that a message on the stop channel names; none where it is not one of ours."""
    try:
        return [uuid.UUID(job_id) for job_id in orjson.loads(data)]
    except (ValueError, TypeError, AttributeError) as error:
        log.error("message.malformed", channel=transport.STOP_CHANNEL, error=type(error).__name__)
        return []


def _land(cursor: session.Cursor, leaders: Sequence[uuid.UUID]) -> list[list[tuple[str, str]]]:
    """(follower, state) of all of them, with the first leader's answer."""
    landed = [(str(job_id), status) for job_id, status in flights.land(cursor, leaders)]
    return [landed, *([] for _ in leaders[1:])]


class _Pulse:
    """The thread that registers this life, holds its lock and beats."""

    def __init__(self, url: str, name: str, spec: catalog.BackendSpec, slots: int, config: settings.Settings) -> None:
        self.state = "loading"
        self.stats: Callable[[], dict[str, object]] = dict
        self.is_dead = False
        self._url, self._config = url, config
        self._stop = threading.Event()
        self._now = threading.Event()
        self._connection = session.connect(url, "switchyard-pulse", is_durable=False)
        with self._connection.cursor() as cursor:
            revisions = {model.name: model.revision for model in spec.models}
            self.worker_id = workers.register(cursor, name, spec.name, os.getpid(), slots, revisions, config.lease_s)
            workers.hold_lock(cursor, self.worker_id)
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def beat_now(self) -> None:
        self._now.set()

    def stop(self) -> None:
        """Stop beating and leave the table of living workers."""
        self._stop.set()
        self._now.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        pause = self._config.heartbeat_s
        while True:
            self._now.wait(pause)
            self._now.clear()
            try:
                if self._stop.is_set():
                    self._leave()
                    return
                self._beat()
                pause = self._config.heartbeat_s
            except session.DependencyDown as error:
                log.warning("heartbeat.retry", error=type(error).__name__)
                with contextlib.suppress(*session.DependencyDown):
                    self._connection.close()
                # The lock went with the connection: whoever misses it for a heartbeat takes this worker for dead.
                pause = 0.05 if pause == self._config.heartbeat_s else min(pause * 2, self._config.heartbeat_s / 2)
            except Exception:
                # Without this thread the worker would be taken for dead.
                log.exception("heartbeat.failed")

    def _leave(self) -> None:
        with self._connection.cursor() as cursor:
            workers.leave(cursor, self.worker_id)
        self._connection.close()

    def _beat(self) -> None:
        if self._connection.closed:
            self._connection = session.connect(self._url, "switchyard-pulse", is_durable=False)
            with self._connection.cursor() as cursor:
                workers.hold_lock(cursor, self.worker_id)
        beat = workers.Heartbeat(
            worker_id=self.worker_id, state=self.state, lease_s=self._config.lease_s, stats=self.stats()
        )
        with self._connection.cursor() as cursor:
            self.is_dead = not workers.heartbeat(cursor, [beat])[0]
        if self.is_dead and self.state == "loading":
            log.error("worker.declared_dead_while_loading")
            os.kill(os.getpid(), signal.SIGKILL)
