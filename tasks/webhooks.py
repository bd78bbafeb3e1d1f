"""Delivers webhooks, by the Standard Webhooks specification: at least once, each retry under the same id.

Runs in every reconciler, the leader and those that wait: a claim makes sure that one of them tries. What
was claimed by a process that died is tried again by another.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import random
import time
from collections.abc import Sequence

import structlog

import settings
from db import webhooks
from db.lanes import Lane, LaneDown
from db.webhooks import Due, Tried
from tasks import metrics, webhook_post
from tasks.webhook_post import Refused

log = structlog.get_logger()

_MOST_AT_ONCE = 32
_LONGEST_PAUSE_S = 86_400.0


class Deliverer:
    """Made inside the event loop."""

    def __init__(self, config: settings.Settings) -> None:
        self._pauses_s = [float(pause) for pause in config.webhook_retry_s.split(",")]
        self._allowed = webhook_post.networks(config.webhook_networks)
        self._timeout_s = config.webhook_timeout_s
        self._period_s = config.sweep_s
        self._claims = Lane(config.database_url, webhooks.claim)
        self._records = Lane(config.database_url, webhooks.record, patience_s=30.0)
        self._running: set[asyncio.Task[None]] = set()

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`; then what is under way is finished."""
        while not stop.is_set():
            due: list[Due] = []
            room = _MOST_AT_ONCE - len(self._running)
            with contextlib.suppress(LaneDown):
                due = await self._claims.submit(room) if room else []
            for one in due:
                task = asyncio.create_task(self._deliver(one))
                self._running.add(task)
                task.add_done_callback(self._running.discard)
            if due and len(due) == room:
                # There may be more: go on as soon as one is done.
                await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
                continue
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), self._period_s)
        await asyncio.gather(*self._running)
        await self._claims.close()
        await self._records.close()

    async def _deliver(self, due: Due) -> None:
        tried = await self._try(due)
        metrics.child(metrics.WEBHOOK_TRIES, tried.status).inc()
        log.info("webhook.tried", delivery_id=str(due.id), attempt=due.attempt, status=tried.status,
                 answer=tried.last_status, error=tried.last_error)  # fmt: skip
        with contextlib.suppress(LaneDown):  # then the claim runs out, and it is tried again
            await self._records.submit(tried)

    async def _try(self, due: Due) -> Tried:
        if not due.secrets:
            return Tried(id=due.id, attempt=due.attempt, status="failed", last_error="the tenant has no secret")
        body = due.body.encode()
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "switchyard-webhooks/1",
            **signed(f"evt_{due.id.hex}", int(time.time()), body, due.secrets),
        }
        retry_after_s, status, error = None, None, None
        try:
            answer = await webhook_post.post(due.url, body, headers, self._allowed, self._timeout_s)
            status, retry_after_s = answer.status, answer.retry_after_s
        except Refused as refusal:
            return Tried(id=due.id, attempt=due.attempt, status="failed", last_error=f"the URL {refusal}")
        except (OSError, TimeoutError, UnicodeError) as failure:
            error = type(failure).__name__
        if status is not None and 200 <= status < 300:
            return Tried(id=due.id, attempt=due.attempt, status="delivered", last_status=status)
        if status == 410:
            return Tried(id=due.id, attempt=due.attempt, status="disabled", last_status=status)
        if due.attempt > len(self._pauses_s):
            return Tried(id=due.id, attempt=due.attempt, status="failed", last_status=status, last_error=error)
        pause = self._pauses_s[due.attempt - 1] * random.uniform(0.8, 1.2)
        pause = min(max(pause, retry_after_s or 0.0), _LONGEST_PAUSE_S)
        return Tried(
            id=due.id, attempt=due.attempt, status="pending", after_s=pause, last_status=status, last_error=error
        )


def signed(message_id: str, timestamp: int, body: bytes, secrets: Sequence[str]) -> dict[str, str]:
    """The headers by which a receiver knows the sender: a signature for each living secret."""
    content = f"{message_id}.{timestamp}.".encode() + body
    signatures = []
    for secret in secrets:
        key = base64.b64decode(secret.removeprefix(webhooks.PREFIX))
        signatures.append("v1," + base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode())
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(signatures),
    }
