"""What a gateway knows of the backends: who lives, who waits, and how long the queues are."""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import settings
from api import views
from api.rate_limits import RateLimits
from catalog import Catalog, ModelSpec
from db import job_views, session, workers
from db.accept import NewJob
from db.job_views import Backlog, Depth, View
from db.lanes import LONG_S, Lane
from db.session import Cursor
from db.states import JobStatus
from tasks import router
from tasks.fair_share import FairShare, Level
from tasks.router import Load

_FRESH_S = 4.0


class Survey:
    """Postgres's account of workers and queues, asked for again and again, and kept up in between by what this
    process adds. Made inside the event loop."""

    def __init__(self, config: settings.Settings, catalog: Catalog, rate_limits: RateLimits) -> None:
        self._config = config
        self._catalog = catalog
        self._rate_limits = rate_limits
        self._descriptions = Lane(config.database_url, self._described, is_kept=True)
        self._aheads = Lane(config.database_url, self._count_ahead, silence_s=LONG_S)
        self.loads: dict[str, Load] = {}
        """By backend."""
        self.shares = FairShare()
        self.quarantined: frozenset[bytes] = frozenset()
        """Cache keys of requests that killed their workers lately."""
        self._clock_ahead_s = 0.0
        """Postgres's clock less this machine's."""
        self._answered_at = float("-inf")

    async def close(self) -> None:
        await self._descriptions.close()
        await self._aheads.close()

    async def refresh(self) -> None:
        """Ask Postgres. Raises LaneDown, and then what was known stays."""
        found = await self._descriptions.submit(None)
        self.quarantined = found.quarantined
        self.shares.update(found.backlogs)
        self._clock_ahead_s = found.clock_ahead_s
        nothing = Depth(0, 0, 0, 0.0)
        self.loads = {
            name: Load.of((life for life in found.lives if life.backend == name), found.depths.get(name, nothing))
            for name in self._catalog.backends
        }
        self._answered_at = time.monotonic()

    @property
    def is_fresh(self) -> bool:
        """Whether Postgres answered lately."""
        return time.monotonic() - self._answered_at < _FRESH_S

    def now(self) -> float:
        """Unix seconds by Postgres's clock, as near as is known."""
        return time.time() + self._clock_ahead_s

    def load(self, backend: str) -> Load:
        return self.loads.get(backend, Load())

    def count_queued(self, job: NewJob) -> None:
        """Between two answers the queue is at least as deep as what this process added."""
        self.loads[job.backend] = self.load(job.backend).with_one_more(job.prompt_tokens)
        self.shares.add(str(job.id), job.backend, job.tenant, max(job.predicted_tokens, 1))

    def model_state(self, model: ModelSpec) -> str:
        """ready, loading or down, by the best of the model's backends."""
        loads = [self.load(name) for name in model.entry.backends]
        if any(load.is_ready for load in loads):
            return "ready"
        return "loading" if any(load.is_loading for load in loads) else "down"

    async def queue_of(self, view: View) -> dict[str, Any] | None:
        """Where a queued job stands, and when its answer may be expected; None once it runs, or where it waits for
        another's run."""
        if view.status != JobStatus.QUEUED or view.leader_id is not None:
            return None
        ahead = await self._aheads.submit(view.id)
        model = self._catalog.models.get(view.model)
        expected = {} if model is None else router.expected(None, model, self.load(view.backend), ahead)
        return views.queue(view, ahead, expected)

    def _count_ahead(self, cursor: Cursor, ids: Sequence[uuid.UUID]) -> list[int]:
        return job_views.ahead(cursor, ids, list(Level))

    def _described(self, cursor: Cursor, items: Sequence[None]) -> "list[_Description]":
        if self._rate_limits.is_used:
            # Each gateway has one session for this very statement, and loses it with its life.
            self._rate_limits.limiter.num_processes = session.count(cursor, self._descriptions.name)
        found = _Description(
            workers.alive(cursor),
            job_views.depths(cursor),
            job_views.backlogs(cursor),
            job_views.quarantined(cursor, self._config.quarantine_s),
            session.clock(cursor) - time.time(),
        )
        return [found] * len(items)


@dataclass(frozen=True, slots=True)
class _Description:
    lives: Sequence[workers.Life]
    depths: Mapping[str, Depth]
    backlogs: list[Backlog]
    quarantined: frozenset[bytes]
    clock_ahead_s: float
