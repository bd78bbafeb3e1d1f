"""The gateway's half of the life of a call: submit → wait | stream | cancel. Start reading here.

`submit` is the list of everything that can answer or refuse a call before a job exists. From its last
line on the job is the ledger's; a waiter or a stream only watches it.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

import orjson
import structlog

import catalog
import settings
from api import error_forms, errors, fingerprints, ids, refusals, wishes
from api.grammar_checks import GrammarChecks
from api.prompts import Prompts
from api.recent_hits import RecentHits
from api.wishes import CachePlan, Wish
from catalog import ModelSpec
from db import accept, cache, job_views, jobs, request_log, workers
from db.accept import Idempotency, Inserted, NewJob, Reserved, Retry
from db.api_keys import ApiKey
from db.cache import Hit
from db.job_views import DeadLetters, Depth, Outcome
from db.lanes import Lane, LaneDown
from db.models import TERMINAL, JobStatus
from db.session import Cursor
from tasks import inference, metrics, replay, responses, router, transport
from tasks.call import Call
from tasks.identity import Identity
from tasks.router import Decision, Load
from tasks.stream import Interrupted, Subscriber, Watch

log = structlog.get_logger()

_SURVEY_S = 0.5
_SWEEP_S = 1.0
_KEEP_ALIVE_S = 10.0
_TOUCH_S = 5.0
_LONG_S = 6.0
"""For statements whose work grows with the tables: a little more than Postgres's own limit."""


@dataclass(slots=True)
class Accepted:
    """A job that now exists, watched by its caller."""

    job_id: uuid.UUID
    flight_id: uuid.UUID
    """Under whose name the run's events are kept."""
    call: Call
    model: str
    backend: str
    route_reason: str
    created: int
    """Unix seconds, by Postgres's clock."""
    cache_verdict: str
    watch: Watch
    is_replayed: bool = False
    """An earlier sending of the same request made the job."""
    steps: dict[str, float] = field(default_factory=dict)
    """What the gateway did before the job, in milliseconds."""

    @property
    def identity(self) -> Identity:
        return Identity(self.call.endpoint, self.job_id, self.model, self.created)


class Gateway:
    """What one gateway process owns, and what it does with calls. Made inside the event loop."""

    def __init__(self, config: settings.Settings) -> None:
        url = config.database_url
        self.config = config
        self.catalog = catalog.load(config.config, config.models_dir)
        self.prompts = Prompts(self.catalog)
        self._grammars = GrammarChecks()
        self.lookups = Lane(url, cache.lookup)
        self._touches = Lane(url, cache.touch, is_durable=False)
        self._durable_inserts = Lane(url, accept.insert)
        self._relaxed_inserts = Lane(url, accept.insert, is_durable=False)
        self._keyed_inserts = Lane(url, accept.insert_once)
        self._keys = Lane(url, accept.find_key)
        self._retries = Lane(url, accept.find_live)
        self.outcomes = Lane(url, job_views.outcome)
        self.views = Lane(url, job_views.view)
        self.payloads = Lane(url, job_views.payload)
        self.pages = Lane(url, job_views.find, silence_s=_LONG_S)
        self.cancels = Lane(url, jobs.cancel)
        self._dead_letters = Lane(url, job_views.dead_letters, silence_s=_LONG_S)
        self._requeues = Lane(url, jobs.retry)
        self.purges = Lane(url, cache.purge, silence_s=_LONG_S)
        self.cache_stats = Lane(url, cache.stats, silence_s=_LONG_S)
        self.log_entries = Lane(url, request_log.append, is_durable=False, linger_s=0.1, max_batch=5000)
        self._surveys = Lane(url, self._described)
        self._ended = Lane(url, job_views.ended)
        self._redis = transport.connect(config.redis_url)
        self._outbox = transport.Outbox(self._redis)
        self.subscriber = Subscriber(config.redis_url)
        self.loads: dict[str, Load] = {}
        self._quarantined: frozenset[bytes] = frozenset()
        """Cache keys of requests that killed their workers lately."""
        self._is_out_of_time = False
        self._loop = asyncio.get_running_loop()
        self.surveyed_at = float("-inf")
        """time.monotonic() of the last time Postgres described its workers and queues."""
        self._hits: dict[bytes, int] = {}
        self.recent_hits = RecentHits(self._hits)
        self._background = [
            asyncio.create_task(self._every(_SURVEY_S, self._survey), name="survey"),
            asyncio.create_task(self._every(_SWEEP_S, self._sweep), name="sweep"),
            asyncio.create_task(self._every(_TOUCH_S, self._touch), name="touch"),
        ]

    async def close(self) -> None:
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self.subscriber.close()
        await self._outbox.close()
        await self._redis.aclose()
        await self._grammars.close()
        lanes = [value for value in vars(self).values() if isinstance(value, Lane)]
        await asyncio.gather(*[lane.close() for lane in lanes])

    def stop_waiting_in(self, seconds: float) -> None:
        """The process is being replaced: whoever still waits or streams by then is told to ask another."""

        def stop() -> None:
            self._is_out_of_time = True
            self.subscriber.wake_all()

        self._loop.call_soon_threadsafe(self._loop.call_later, seconds, stop)

    async def submit(self, call: Call, caller: ApiKey, wish: Wish, request_id: str) -> Hit | Accepted:
        """Answer from the cache, join a job, or make one. Whatever refuses the call raises before a row exists."""
        steps = _Steps()
        models = self._models(call)
        plan = wishes.plan_cache(call, wish.cache, self.catalog.cache)
        keys = {model.name: fingerprints.cache_key(call, model, caller.tenant) for model in models}
        if (joined := await self._join(call, caller, wish, list(keys.values()))) is not None:
            return joined
        hit, verdict = await self._look_up(plan, wish, list(keys.values()))
        steps.mark("cache_ms")
        if hit is not None:
            return hit
        if wish.cache.is_only_if_cached:
            raise errors.OnlyIfCached()
        tokenised, mistakes = await self._tokenise(call, models)
        steps.mark("tokenise_ms")
        decision = self._route(call, tokenised, mistakes, wish)
        await self._grammars.check(call)
        steps.mark("route_ms")
        assert decision.chosen is not None
        ready = tokenised[decision.chosen.model]
        assert isinstance(ready, Call)
        ready = replace(ready, model=decision.chosen.model)
        if keys[ready.model] in self._quarantined:
            raise errors.Quarantined()
        if plan.is_refresh:
            self.recent_hits.clear()
        job = self._new_job(ready, caller, wish, request_id, decision, verdict, plan, keys, steps.done)
        accepted = await self._accept(job, ready, decision.reason, caller, wish)
        accepted.steps = steps.done
        return accepted

    async def wait(self, watch: Watch, wait_s: float) -> Outcome | None:
        """The outcome once the watched job has ended; None if it takes longer than `wait_s`."""
        deadline = asyncio.get_running_loop().time() + wait_s
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    await watch.ended
            except TimeoutError:
                return None
            outcome = await self._outcome(uuid.UUID(watch.job_id))
            if outcome is None:
                # Postgres itself crashed before this job's relaxed insert reached its disk.
                raise errors.DependencyUnavailable("The job was lost with a restart of the database; send it again.")
            if outcome.status in TERMINAL:
                return outcome
            if self._is_out_of_time:
                raise errors.GatewayStopping()
            watch.rearm()

    async def stream(self, identity: Identity, flight_id: uuid.UUID, call: Call, watch: Watch,
                     after: int = 0) -> AsyncIterator[bytes]:  # fmt: skip
        """The watched job's run as server-sent events, each with its number as id, from the first one after
        number `after`. Where Redis lost some, the rest is made from the stored answer. A stream that fails ends
        with an error event, never as a whole one does."""
        try:
            async for piece in self._frames(identity, flight_id, call, watch, after):
                yield piece
        except Interrupted:
            yield error_forms.stream_error(call.endpoint, errors.StreamInterrupted())
        except errors.APIError as error:
            yield error_forms.stream_error(call.endpoint, error)

    async def _frames(self, identity: Identity, flight_id: uuid.UUID, call: Call, watch: Watch,
                      after: int) -> AsyncIterator[bytes]:  # fmt: skip
        frames = responses.frames(identity, call)
        seen, is_whole = after, False
        async for event in self.subscriber.events(watch, flight_id, _KEEP_ALIVE_S):
            if event is None:
                yield b": keep-alive\n\n"
            elif event.piece is None:
                is_whole = True
            else:
                made = frames.event(event)
                if event.is_new_to(seen):
                    seen = event.seq
                    yield made
        outcome = await self._outcome(identity.job_id)
        if self._is_out_of_time and (outcome is None or outcome.status not in TERMINAL):
            raise errors.GatewayStopping()
        if outcome is None or outcome.body is None:
            raise self.error_of(outcome)
        if not is_whole:
            frames = responses.frames(identity, call)
            for event in replay.events(call, outcome.body, outcome.events):
                made = frames.event(event)
                if event.is_new_to(seen):
                    seen = event.seq
                    yield made
        yield frames.end(outcome.usage, outcome.body)

    async def cancel(self, job_id: uuid.UUID, tenant: str) -> JobStatus | None:
        """Cancel for good; the state afterwards, None if the tenant has no such job."""
        status = await self.cancels.submit((job_id, tenant))
        if status is JobStatus.CANCELLED:
            self._outbox.send("PUBLISH", transport.STOP_CHANNEL, orjson.dumps([str(job_id)]))
            self._outbox.send("PUBLISH", transport.DONE_CHANNEL, orjson.dumps([[str(job_id), status]]))
        return status

    async def retry(self, job_id: uuid.UUID, tenant: str) -> bool:
        """Queue a failed or expired job again; False if it is neither."""
        found = await self._requeues.submit((job_id, tenant))
        if found is not None:
            inference.enqueue(self._outbox, [(job_id, *found)])
        return found is not None

    async def retry_all(self, wanted: DeadLetters) -> int:
        """Queue the failed jobs that match again; how many they were."""
        assert wanted.tenant is not None
        ids = await self._dead_letters.submit(wanted)
        return sum(await asyncio.gather(*[self.retry(job_id, wanted.tenant) for job_id in ids]))

    @staticmethod
    def error_of(outcome: Outcome | None) -> errors.APIError:
        """Why a job has no answer."""
        if outcome is None:
            return errors.DependencyUnavailable()
        if outcome.status is JobStatus.CANCELLED:
            return errors.JobCancelled()
        return errors.from_job(outcome.error or {})

    def model_state(self, model: ModelSpec) -> str:
        """ready, loading or down, by the best of the model's backends."""
        loads = [self.loads.get(name, Load()) for name in model.entry.backends]
        if any(load.is_ready for load in loads):
            return "ready"
        return "loading" if any(load.is_loading for load in loads) else "down"

    @property
    def is_surveying(self) -> bool:
        """Whether Postgres answered lately."""
        return time.monotonic() - self.surveyed_at < 4.0

    async def _join(self, call: Call, caller: ApiKey, wish: Wish, keys: Sequence[bytes]) -> Accepted | None:
        """The job that an earlier sending of this request made, if the caller says that there was one."""
        if wish.idempotency_key is not None:
            held = await self._keys.submit((caller.id, wish.idempotency_key))
            if held is not None:
                return await self._rejoin(held, fingerprints.request(call, wish), call, caller)
        elif wish.is_retry:
            job_id = await self._retries.submit(Retry(caller.id, tuple(keys), call.stream))
            if job_id is not None:
                return await self._watch_again(job_id, call, caller)
        return None

    async def _rejoin(self, held: Reserved, asked: bytes, call: Call, caller: ApiKey) -> Accepted:
        if held.fingerprint != asked:
            raise errors.IdempotencyKeyReuse()
        return await self._watch_again(held.job_id, call, caller)

    async def _watch_again(self, job_id: uuid.UUID, call: Call, caller: ApiKey) -> Accepted:
        watch = self.subscriber.watch(job_id)
        try:
            view = await self.views.submit((job_id, caller.tenant))
            if view is None:
                raise errors.JobNotFound("The job of this Idempotency-Key has been deleted.")
        except BaseException:
            watch.close()
            raise
        if view.status in TERMINAL:
            self.subscriber.ended([watch.job_id])
        call = replace(call, token_ids=[])
        return Accepted(job_id, view.flight_id, call, view.model, view.backend, view.decision["reason"],
                        int(view.created_at.timestamp()), view.cache_verdict, watch, is_replayed=True)  # fmt: skip

    def _models(self, call: Call) -> list[ModelSpec]:
        models = router.models_for(self.catalog, call)
        if not models:
            raise errors.ModelNotFound(param="model")
        if not any(call.task in model.tasks for model in models):
            raise errors.ModelNotFound("The model exists, but does not do this task.", param="model")
        return models

    async def _look_up(self, plan: CachePlan, wish: Wish, keys: Sequence[bytes]) -> tuple[Hit | None, str]:
        if not plan.is_read:
            return None, f"BYPASS; {plan.reason}"
        waiting = [self.lookups.submit(key) for key in keys]
        hits = [hit for future in waiting if (hit := await future) is not None]
        if not hits:
            return None, "MISS; not stored"
        if wish.cache.max_age_s is not None and hits[0].age_s > wish.cache.max_age_s:
            return None, "MISS; older than max-age"
        self._hits[hits[0].key] = self._hits.get(hits[0].key, 0) + 1
        return hits[0], "HIT"

    async def _tokenise(
        self, call: Call, models: Sequence[ModelSpec]
    ) -> tuple[dict[str, Call | str], dict[str, errors.APIError]]:
        tokenised: dict[str, Call | str] = {}
        mistakes: dict[str, errors.APIError] = {}
        for model in models:
            if call.task not in model.tasks:
                continue
            try:
                tokenised[model.name] = await self.prompts.tokenise(call, model)
            except errors.APIError as error:
                tokenised[model.name] = error.code
                mistakes[model.name] = error
        return tokenised, mistakes

    def _route(self, call: Call, tokenised: dict[str, Call | str], mistakes: dict[str, errors.APIError],
               wish: Wish) -> Decision:  # fmt: skip
        decision = router.choose(self.catalog, call, tokenised, self.loads, can_wait=wish.is_async)
        if decision.chosen is None:
            raise refusals.of(decision, mistakes)
        asked = call.model if call.model == "auto" else decision.candidates[0].model
        metrics.child(metrics.ROUTER_CHOICES, asked, decision.chosen.model, decision.chosen.backend).inc()
        return decision

    def _new_job(self, call: Call, caller: ApiKey, wish: Wish, request_id: str, decision: Decision, verdict: str,
                 plan: CachePlan, keys: dict[str, bytes], timings: dict[str, float]) -> NewJob:  # fmt: skip
        assert decision.chosen is not None
        return NewJob(
            id=ids.uuid7(),
            tenant=caller.tenant,
            api_key_id=caller.id,
            request_id=request_id,
            endpoint=call.endpoint,
            task=call.task,
            requested_model=decision.requested_model,
            model=call.model,
            model_revision=self.catalog.models[call.model].revision,
            backend=decision.chosen.backend,
            is_stream=call.stream,
            payload=call.without_text().encode(),
            metadata=orjson.dumps(wish.metadata).decode() if wish.metadata else None,
            decision=orjson.dumps(decision).decode(),
            cache_verdict=verdict,
            cache_key=keys[call.model],
            cache_ttl_s=self.catalog.cache.ttl_s if plan.is_written else None,
            is_cache_refresh=plan.is_refresh,
            prompt_tokens=call.prompt_tokens,
            timings=orjson.dumps(timings).decode(),
            timeout_s=wish.timeout_s or caller.timeout_s,
            deadline=wish.deadline,
            # A stream shares a run with streams: of another, it would see nothing before the end.
            coalesce_key=keys[call.model] + bytes([call.stream]) if plan.is_read else None,
        )

    async def _accept(self, job: NewJob, call: Call, reason: str, caller: ApiKey, wish: Wish) -> Accepted:
        """Commit the row, then send the message: the other order could run a job that nobody recorded."""
        watch = self.subscriber.watch(job.id, is_recorded=False)
        try:
            inserted = await self._insert(job, call, caller, wish)
        except BaseException:
            watch.close()
            raise
        if isinstance(inserted, Reserved):
            watch.close()
            return await self._rejoin(inserted, fingerprints.request(call, wish), call, caller)
        watch.is_recorded = True
        if inserted.leader_id is None:
            inference.enqueue(self._outbox, [(job.id, job.backend, job.task)])
            self._count_queued(job.backend, job.prompt_tokens)
        log.info("job.accepted", job_id=str(job.id), request_id=job.request_id, model=job.model,
                 backend=inserted.backend, endpoint=job.endpoint, prompt_tokens=job.prompt_tokens,
                 leader_id=None if inserted.leader_id is None else str(inserted.leader_id))  # fmt: skip
        return Accepted(job.id, inserted.flight_id, call, job.model, inserted.backend, reason,
                        int(inserted.created_at.timestamp()), inserted.cache_verdict, watch)  # fmt: skip

    async def _insert(self, job: NewJob, call: Call, caller: ApiKey, wish: Wish) -> Inserted | Reserved:
        """Record the job; or learn that another request with the same Idempotency-Key was quicker.

        Whoever waits for the answer itself is promised nothing before it, and the answer's own commit
        carries this row to the disk with it; only they get the relaxed insert, one fsync less.
        """
        if wish.idempotency_key is not None:
            key = Idempotency(caller.id, wish.idempotency_key, fingerprints.request(call, wish))
            reserved = await self._keyed_inserts.submit((key, job))
            return reserved.inserted or reserved
        is_promised = job.is_stream or wish.is_async or wish.wait_s < 1.0
        return await (self._durable_inserts if is_promised else self._relaxed_inserts).submit(job)

    def _count_queued(self, backend: str, tokens: int) -> None:
        """Between two surveys the queue is at least as deep as what this process added."""
        load = self.loads.get(backend, Load())
        depth = replace(
            load.depth, num_queued=load.depth.num_queued + 1, queued_tokens=load.depth.queued_tokens + tokens
        )
        self.loads[backend] = replace(load, depth=depth)

    async def _outcome(self, job_id: uuid.UUID) -> Outcome | None:
        try:
            return await self.outcomes.submit(job_id)
        except LaneDown:
            raise errors.DependencyUnavailable() from None

    async def _every(self, period_s: float, work: Callable[[], Awaitable[None]]) -> None:
        """Do `work` again and again. Nothing that goes wrong once may end it."""
        while True:
            try:
                await work()
            except LaneDown as error:
                log.warning("gateway.postgres_down", work=work.__name__, error=str(error))
            except Exception:
                log.exception("gateway.background_failed", work=work.__name__)
            await asyncio.sleep(period_s)

    def _described(self, cursor: Cursor, items: Sequence[None]) -> "list[_Described]":
        quarantined = job_views.quarantined(cursor, self.config.quarantine_s)
        return [_Described(workers.alive(cursor), job_views.depths(cursor), quarantined)] * len(items)

    async def _survey(self) -> None:
        found = await self._surveys.submit(None)
        lives, depths, self._quarantined = found.lives, found.depths, found.quarantined
        nothing = Depth(0, 0, 0, 0.0)
        self.loads = {
            name: Load.of((life for life in lives if life.backend == name), depths.get(name, nothing))
            for name in self.catalog.backends
        }
        self.surveyed_at = time.monotonic()

    async def _sweep(self) -> None:
        """One question a second for all who wait: Redis may have lost the news of their job's end."""
        if watched := self.subscriber.watched:
            self.subscriber.ended(map(str, await self._ended.submit(watched)))

    async def _touch(self) -> None:
        hits = dict(self._hits)
        self._hits.clear()
        await asyncio.gather(*[self._touches.submit(hit) for hit in hits.items()])


class _Steps:
    """How long each step before the job took, in milliseconds."""

    def __init__(self) -> None:
        self.done: dict[str, float] = {}
        self._last = time.perf_counter()

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self.done[name] = round((now - self._last) * 1000, 3)
        self._last = now


@dataclass(frozen=True, slots=True)
class _Described:
    lives: list[workers.Life]
    depths: dict[str, Depth]
    quarantined: frozenset[bytes]
