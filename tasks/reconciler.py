"""`python -m tasks.reconciler`: makes the queue agree with the ledger.

Messages get lost, workers die, Redis is wiped, deadlines pass. Each pass is one `reconcile_once`, made
of conditional updates only, so two reconcilers at once do no harm; an advisory lock keeps the second
one idle until the first is gone.
"""

import asyncio
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from uuid import UUID

import orjson
import redis.asyncio
import structlog

import catalog
import settings
from db import (
    accept,
    batches,
    budgets,
    cache,
    files,
    flights,
    job_views,
    recovery,
    request_log,
    session,
    usage,
    webhooks,
    workers,
)
from db.session import Cursor
from tasks import inference, logs, metrics, router, server_settings, transport
from tasks.call import Call
from tasks.fair_share import Level
from tasks.router import Load
from tasks.webhooks import Deliverer

log = structlog.get_logger()

_LEADER_LOCK = 0x5357_0002
_HOUSEKEEPING_S = 30.0
_MOST_LOST = 1000
_MOST_AGED = 4
"""Messages a pass that come forward because their jobs have waited for long: few, for they go before others."""
_LONGEST_SILENCE = 10
"""Passes a leader may miss before it loses its lock."""
_RECONNECT_BEATS = 4
"""Heartbeats for which a fresh session does not take a worker without a lock for dead: what cost the reconciler its
own connection may have cost all workers theirs."""


@dataclass(slots=True)
class Report:
    """What one pass did."""

    rescued: int = 0
    landed: int = 0
    handed_over: int = 0
    rerouted: int = 0
    exhausted: int = 0
    resent: int = 0
    expired: int = 0
    evicted: int = 0
    purged: int = 0
    settled: int = 0
    ended: list[tuple[str, str]] = field(default_factory=list)
    """(job id, status) of jobs that reached a final state in this pass."""
    messages: list[tuple[UUID, str, str]] = field(default_factory=list)
    """(job id, backend, task) to send."""

    @property
    def counts(self) -> dict[str, int]:
        return {name: value for name, value in asdict(self).items() if isinstance(value, int) and value}


@dataclass(frozen=True, slots=True)
class Queues:
    """What Redis says. None where it could not be asked: then nothing is re-sent, for nobody could take it."""

    lengths: dict[str, int] | None
    is_wiped: bool = False


def reconcile_once(cursor: Cursor, queues: Queues, config: settings.Settings, backends: Sequence[str], *,
                   is_fresh: bool = False) -> Report:  # fmt: skip
    """One pass over the ledger. Changes rows only; the caller sends `messages` and tells of `ended`. `is_fresh`:
    this session is new, so only leases tell of death yet."""
    report = Report()
    dead = workers.bury(cursor, config.lease_s if is_fresh else config.heartbeat_s)
    if dead:
        for job_id, backend, task, status in recovery.rescue(cursor, dead, config.max_attempts):
            if status == "queued":
                report.rescued += 1
                report.messages.append((job_id, backend, task))
            else:
                report.exhausted += 1
                report.ended.append((str(job_id), status))
    for job_id in recovery.expire(cursor):
        report.expired += 1
        report.ended.append((str(job_id), "expired"))
    followers = flights.land(cursor)
    report.landed = len(followers)
    report.ended += [(str(job_id), status) for job_id, status in followers]
    promoted = flights.hand_over(cursor)
    report.handed_over = len(promoted)
    report.messages += promoted
    if queues.lengths is not None:
        _resend(cursor, queues.lengths, queues.is_wiped, config, backends, report)
    return report


def _resend(cursor: Cursor, lengths: dict[str, int], is_wiped: bool, config: settings.Settings,
            backends: Sequence[str], report: Report) -> None:  # fmt: skip
    """Send again what is queued without a message, to the first level of the queue. A queue at least as long as its
    backlog has lost nothing yet, and doubling it would help nobody; after twelve times as long its oldest are sent
    again anyway, a few a pass: that is how calls of low priority age (a repeated message costs one refused claim)."""
    depths = job_views.depths(cursor)
    for backend in backends:
        depth = depths.get(backend)
        if depth is None or not depth.num_queued:
            continue
        patience, most = config.resend_after_s, _MOST_LOST
        if is_wiped:
            patience = 0.0
        elif lengths.get(backend, 0) >= depth.num_queued:
            patience, most = patience * 12, _MOST_AGED
        if depth.oldest_queued_s >= patience:
            unsent = recovery.find_unsent(cursor, backend, patience, most)
            report.resent += len(unsent)
            report.messages += unsent


def reroute(cursor: Cursor, served: catalog.Catalog, report: Report) -> None:
    """Send queued jobs of backends whose workers are all away to other backends of the same model. Tokens,
    and with them a stream's events so far, mean the same there."""
    lives, depths = workers.alive(cursor), job_views.depths(cursor)
    loads = {
        name: Load.of((life for life in lives if life.backend == name), depths.get(name, job_views.Depth(0, 0, 0, 0.0)))
        for name in served.backends
    }
    away = [name for name, load in loads.items() if not load.is_ready and load.depth.num_queued]
    if not away or len(away) == len(loads):
        return
    for job_id, backend, payload in recovery.stranded(cursor, away):
        try:
            call = Call.decode(payload)
        except ValueError:
            continue
        decision = router.choose(served, call, {call.model: call}, loads, can_wait=False)
        if decision.chosen is None or decision.chosen.model != call.model:
            continue
        moved = replace(decision, reason=f"moved: no worker of {backend} was up")
        task = recovery.reroute(cursor, job_id, backend, decision.chosen.backend, orjson.dumps(moved).decode())
        if task is not None:
            report.rerouted += 1
            report.messages.append((job_id, decision.chosen.backend, task))


def keep_house(cursor: Cursor, config: settings.Settings, limits: catalog.CacheEntry, report: Report) -> None:
    """Evict from the cache, and delete what is past its time."""
    report.evicted = cache.evict(cursor, limits.max_bytes)
    report.purged = recovery.purge(cursor, config.result_ttl_s)
    webhooks.purge(cursor, config.result_ttl_s)
    request_log.purge(cursor, config.result_ttl_s * 30)
    workers.forget(cursor, config.result_ttl_s)
    accept.forget_keys(cursor)
    budgets.forget(cursor)
    usage.add_up(cursor)
    files.purge(cursor)
    batches.purge(cursor)


class Reconciler:
    """The process: leads if it can, and keeps making passes."""

    def __init__(self) -> None:
        self._config = settings.load()
        self._catalog = catalog.load(self._config.config, self._config.models_dir)
        self._redis = transport.connect(self._config.redis_url)
        self._connection: session.Connection | None = None
        self._is_leader = False
        self._connected_at = float("-inf")
        self._next_housekeeping = 0.0

    async def run(self, stop: asyncio.Event) -> None:
        outbox = transport.Outbox(self._redis)
        while not stop.is_set():
            started = time.monotonic()
            try:
                await self._pass(outbox)
            except session.DependencyDown as error:
                log.warning("reconciler.retry", error=type(error).__name__)
                self._connection = None
                self._is_leader = False
            rest = self._config.sweep_s - (time.monotonic() - started)
            try:
                await asyncio.wait_for(stop.wait(), max(rest, 0.05))
            except TimeoutError:
                continue
        await outbox.close()

    async def _pass(self, outbox: transport.Outbox) -> None:
        if not await asyncio.to_thread(self._lead):
            return
        queues = await self._queues()
        report = await asyncio.to_thread(self._reconcile, queues)
        inference.enqueue(outbox, report.messages)
        if report.ended:
            outbox.send("PUBLISH", transport.DONE_CHANNEL, orjson.dumps(report.ended))
        if queues.is_wiped:
            outbox.send("SET", transport.EPOCH_KEY, str(time.time_ns()))
        for action, count in report.counts.items():
            metrics.RECONCILER_ACTIONS.labels(action).inc(count)
        if report.counts:
            log.info("reconciled", **report.counts)

    def _lead(self) -> bool:
        if self._connection is None or self._connection.closed:
            # A leader that hangs must not keep the lock: one that lives speaks in every pass.
            silence = _LONGEST_SILENCE * self._config.sweep_s
            self._connection = session.connect(self._config.database_url, "switchyard-reconciler", idle_s=silence)
            self._connected_at = time.monotonic()
            self._is_leader = False
        if not self._is_leader:
            with self._connection.cursor() as cursor:
                cursor.execute("SELECT pg_try_advisory_lock(%s)", (_LEADER_LOCK,))
                row = cursor.fetchone()
                self._is_leader = bool(row and row[0])
            if self._is_leader:
                log.info("reconciler.leading")
        return self._is_leader

    def _reconcile(self, queues: Queues) -> Report:
        assert self._connection is not None
        is_fresh = time.monotonic() - self._connected_at < _RECONNECT_BEATS * self._config.heartbeat_s
        with self._connection.cursor() as cursor:
            report = reconcile_once(cursor, queues, self._config, list(self._catalog.backends), is_fresh=is_fresh)
            reroute(cursor, self._catalog, report)
            report.settled = budgets.settle(cursor)
            if time.monotonic() >= self._next_housekeeping:
                self._next_housekeeping = time.monotonic() + _HOUSEKEEPING_S
                keep_house(cursor, self._config, self._catalog.cache, report)
        return report

    async def _queues(self) -> Queues:
        return await queues(self._redis, list(self._catalog.backends))


async def queues(client: redis.asyncio.Redis, backends: Sequence[str]) -> Queues:
    """Ask Redis how long each queue is, and whether it is the Redis we knew."""
    try:
        pipeline: Any = client.pipeline(transaction=False)
        pipeline.exists(transport.EPOCH_KEY)
        for backend in backends:
            for level in Level:
                pipeline.llen(transport.queue_key(backend, level.step))
        is_known, *answers = await pipeline.execute()
    except transport.DOWN:
        return Queues(None)
    lengths = {backend: sum(answers[n * len(Level) : (n + 1) * len(Level)]) for n, backend in enumerate(backends)}
    return Queues(lengths, is_wiped=not is_known)


def main() -> int:
    logs.configure("reconciler")
    server_settings.check(settings.load())
    metrics.serve()

    async def serve() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await asyncio.gather(Reconciler().run(stop), Deliverer(settings.load()).run(stop))

    asyncio.run(serve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
