"""The gateway's lines into the ledger: a lane for each thing that is asked of Postgres."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from api import refusals
from db import accept, budgets, cache, job_views, jobs, removal, request_log, usage, webhooks
from db.accept import Idempotency, Inserted, NewJob, Reserved
from db.budgets import Refused
from db.lanes import LONG_S, Lane
from db.session import Cursor

Recorded = TypeVar("Recorded", Inserted, Reserved)


class Ledger:
    """What one gateway process asks of Postgres for its callers. Made inside the event loop."""

    def __init__(self, url: str) -> None:
        self.lookups = Lane(url, cache.lookup, is_kept=True)
        self.touches = Lane(url, cache.touch, is_durable=False)
        self._durable_inserts = Lane(url, accept.insert, is_kept=True)
        self._relaxed_inserts = Lane(url, accept.insert, is_durable=False, is_kept=True)
        self._keyed_inserts = Lane(url, accept.insert_once, is_kept=True)
        self._budgeted_inserts = Lane(url, budgets.insert, is_kept=True)
        self._budgeted_keyed_inserts = Lane(url, budgets.insert_once, is_kept=True)
        self.keys = Lane(url, accept.find_key, is_kept=True)
        self.retries = Lane(url, accept.find_live, is_kept=True)
        self.outcomes = Lane(url, job_views.outcome, is_kept=True)
        self.ended = Lane(url, job_views.ended)
        self.views = Lane(url, job_views.view, is_kept=True)
        self.payloads = Lane(url, job_views.payload, is_kept=True)
        self.pages = Lane(url, job_views.find, silence_s=LONG_S)
        # Who cancels wants to know at once, and may say it again.
        self.cancels = Lane(url, jobs.cancel, patience_s=1.0, is_kept=True)
        self.dead_letters = Lane(url, job_views.dead_letters, silence_s=LONG_S)
        self.requeues = Lane(url, budgets.retry)
        # Each of a batch is a transaction of its own.
        self.deletes = Lane(url, removal.delete, max_batch=32, silence_s=LONG_S)
        self.deletions = Lane(url, removal.find, silence_s=LONG_S)
        self.webhook_secrets = Lane(url, webhooks.list_secrets)
        self.new_webhook_secrets = Lane(url, webhooks.create_secret)
        self.webhook_pages = Lane(url, webhooks.find, silence_s=LONG_S)
        self.redeliveries = Lane(url, webhooks.redeliver)
        self.purges = Lane(url, cache.purge, silence_s=LONG_S)
        # One piece of work at a time and once: what it does need not be safe to repeat.
        self.admin = Lane(url, _in_turn, max_batch=1, patience_s=0.0, silence_s=LONG_S)
        self.usage = Lane(url, usage.find, silence_s=LONG_S)
        self.cache_stats = Lane(url, cache.stats, silence_s=LONG_S)
        self.log_entries = Lane(url, request_log.append, is_durable=False, linger_s=0.1, max_batch=5000)

    async def close(self) -> None:
        """Finish what was asked, and hang up."""
        await asyncio.gather(*[lane.close() for lane in vars(self).values()])

    async def insert(self, job: NewJob, key: Idempotency | None, *, is_promised: bool) -> Inserted | Reserved:
        """Record the job; or learn that another request with the same Idempotency-Key was quicker. Raises what
        a budget that is spent is answered with.

        Only those whose caller is promised something before the answer itself need their own fsync: the answer's
        commit carries any earlier row to the disk with it.
        """
        has_budget = job.reserved_tokens is not None
        if key is not None:
            if has_budget:
                reserved = _admitted(await self._budgeted_keyed_inserts.submit((key, job)))
            else:
                reserved = await self._keyed_inserts.submit((key, job))
            return reserved.inserted or reserved
        if has_budget:
            return _admitted(await self._budgeted_inserts.submit(job))
        return await (self._durable_inserts if is_promised else self._relaxed_inserts).submit(job)


def _admitted(answer: Recorded | Refused) -> Recorded:
    if isinstance(answer, Refused):
        raise refusals.of_budget(answer)
    return answer


def _in_turn(cursor: Cursor, works: Sequence[Callable[[Cursor], Any]]) -> list[Any]:
    return [work(cursor) for work in works]
