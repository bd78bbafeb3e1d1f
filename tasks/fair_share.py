"""Who goes first where there is more work than slots: priorities between calls, fair shares between tenants.

A backend's queue has levels, which workers empty in order. Two rules are enough, and neither costs a round trip:

- **Levels.** A tenant is within its share while its backlog is no larger than what the backend runs at once, or than a
  quarter of the mean backlog. Its calls go before everyone's backlog: a newcomer waits at most a quarter of that.
- **Dynamic thresholds** (Choudhury and Hahne, 1998, for shared buffers): a tenant may queue while it has less than
  `_ALPHA` times what is still free. Alone it gets most of the queue; several in a flood get equal parts, hence, first
  come first served among them, equal service; and there is always room for one who comes late.

A backlog is measured in average calls: its predicted tokens, divided by those of the queue's average call. A
tenant's weight multiplies both of its bounds.
"""

import enum
from collections.abc import Iterable, Mapping

from db.job_views import Backlog

_ALPHA = 8.0
_SMALL = 0.25


class Priority(enum.IntEnum):
    """OpenAI's service tiers, and what the Batch API runs at. Kept on the job."""

    PRIORITY = 0
    DEFAULT = 1
    FLEX = 2
    BATCH = 3


class Level(enum.StrEnum):
    """Of a queue, the first to be emptied first."""

    WITHIN_SHARE = "within_share"
    PRIORITY = "priority"
    DEFAULT = "default"
    FLEX = "flex"
    BATCH = "batch"

    @property
    def step(self) -> int:
        """Its number among Celery's `priority_steps`."""
        return _STEPS[self]


_STEPS = {level: step for step, level in enumerate(Level)}


_BEYOND = {
    Priority.PRIORITY: Level.PRIORITY,
    Priority.DEFAULT: Level.DEFAULT,
    Priority.FLEX: Level.FLEX,
    Priority.BATCH: Level.BATCH,
}


class FairShare:
    """One gateway process's view of every tenant's backlog: what Postgres said last, and what was added since."""

    def __init__(self) -> None:
        self._backlogs: dict[str, dict[str, Backlog]] = {}
        self._added: dict[str, Backlog] = {}
        """What this process queued since the ledger spoke, by job id."""

    def update(self, backlogs: Iterable[Backlog]) -> None:
        """Replace everything by what the ledger says."""
        self._backlogs = {}
        for one in backlogs:
            self._backlogs.setdefault(one.backend, {})[one.tenant] = one
        self._added = {}

    def add(self, job_id: str, backend: str, tenant: str, tokens: int) -> None:
        """Count a job that this process has just queued."""
        self._added[job_id] = one = Backlog(backend, tenant, 1, tokens)
        self._change(one, 1)

    def ended(self, job_ids: Iterable[str]) -> None:
        """Jobs have ended; those queued since the ledger spoke no longer count."""
        for job_id in job_ids:
            if (one := self._added.pop(job_id, None)) is not None:
                self._change(one, -1)

    def _change(self, one: Backlog, sign: int) -> None:
        tenants = self._backlogs.setdefault(one.backend, {})
        before = tenants.get(one.tenant) or Backlog(one.backend, one.tenant, 0, 0)
        num_queued, tokens = before.num_queued + sign, before.tokens + sign * one.tokens
        if num_queued > 0:
            tenants[one.tenant] = Backlog(one.backend, one.tenant, num_queued, tokens)
        else:
            tenants.pop(one.tenant, None)

    def may_queue(self, backend: str, tenant: str, max_queued: int, weight: float = 1.0) -> bool:
        """Whether the tenant's part of the queue has room for one more."""
        tenants = self._backlogs.get(backend)
        if not tenants or tenant not in tenants:
            return True
        free = max_queued - sum(one.num_queued for one in tenants.values())
        return self._average_calls(tenants, tenant) < _ALPHA * free * weight

    def level(self, backend: str, tenant: str, priority: Priority, slots: int, weight: float = 1.0) -> Level:
        """Where the tenant's next call waits. Flexible and batch work is never within a share."""
        if priority >= Priority.FLEX:
            return _BEYOND[priority]
        tenants = self._backlogs.get(backend)
        if not tenants or tenant not in tenants:
            return Level.WITHIN_SHARE
        mean = sum(one.num_queued for one in tenants.values()) / len(tenants)
        is_small = self._average_calls(tenants, tenant) < max(slots, _SMALL * mean, 1) * weight
        return Level.WITHIN_SHARE if is_small else _BEYOND[priority]

    @staticmethod
    def _average_calls(tenants: Mapping[str, Backlog], tenant: str) -> float:
        whole = sum(one.tokens for one in tenants.values())
        return tenants[tenant].tokens * sum(one.num_queued for one in tenants.values()) / max(whole, 1)
