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
from api import errors, fingerprints, ids, refusals, wishes
from api.grammar_checks import GrammarChecks
from api.ledger import Ledger
from api.prompts import Prompts
from api.rate_limits import RateLimits
from api.recent_hits import RecentHits
from api.stream_frames import EndpointFrames, StreamFrames
from api.survey import Survey
from api.wishes import CachePlan, Wish
from catalog import Catalog, ModelSpec
from db.accept import Idempotency, NewJob, Reserved, Retry
from db.api_keys import ApiKey
from db.budgets import Refused
from db.cache import Hit
from db.job_views import DeadLetters, Outcome
from db.lanes import LaneDown
from db.removal import Deletion
from db.states import TERMINAL, JobStatus
from tasks import inference, metrics, replay, router, transport, webhook_post
from tasks.call import Call
from tasks.fair_share import Level, Priority
from tasks.identity import Identity
from tasks.limiter import Limiter
from tasks.router import Decision
from tasks.stream import Interrupted, Subscriber, Watch

log = structlog.get_logger()

_SURVEY_S = 0.5
_SWEEP_S = 1.0
_KEEP_ALIVE_S = 10.0
_TOUCH_S = 5.0
_MOST_NARROWED = 1000


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
        self.config = config
        self.catalog = catalog.load(config.config, config.models_dir)
        self.prompts = Prompts(self.catalog)
        self._grammars = GrammarChecks()
        self.ledger = Ledger(config.database_url)
        self.webhook_networks = webhook_post.networks(config.webhook_networks)
        self._redis = transport.connect(config.redis_url)
        self._outbox = transport.Outbox(self._redis)
        # The batcher is a gateway too: its lines count against the same limits.
        self.rate_limits = RateLimits(Limiter(self._redis, num_processes=config.gateway_processes + 1))
        self.survey = Survey(config, self.catalog, self.rate_limits)
        self.subscriber = Subscriber(config.redis_url, self.survey.shares.ended)
        self._is_out_of_time = False
        self._loop = asyncio.get_running_loop()
        self._hits: dict[bytes, int] = {}
        self.recent_hits = RecentHits(self._hits)
        self._narrowed: dict[tuple[str, ...], Catalog] = {}
        """By the models of a key."""
        self._background = [
            asyncio.create_task(self._every(_SURVEY_S, self.survey.refresh), name="survey"),
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
        await asyncio.gather(self.ledger.close(), self.survey.close())

    def stop_waiting_in(self, seconds: float) -> None:
        """The process is being replaced: whoever still waits or streams by then is told to ask another."""

        def stop() -> None:
            self._is_out_of_time = True
            self.subscriber.wake_all()

        self._loop.call_soon_threadsafe(self._loop.call_later, seconds, stop)

    async def submit(self, call: Call, caller: ApiKey, wish: Wish, request_id: str) -> Hit | Accepted:
        """Answer from the cache, join a job, or make one. Whatever refuses the call raises before a row exists."""
        steps = _Steps()
        served = self.catalog_for(caller)
        models = self._models(call, served)
        plan = wishes.plan_cache(call, wish.cache, self.catalog.cache)
        keys = {model.name: fingerprints.cache_key(call, model, caller.tenant) for model in models}
        asked = [self.ledger.lookups.submit(key) for key in keys.values()] if plan.is_read else []
        if (joined := await self._join(call, caller, wish, list(keys.values()))) is not None:
            await self._take(caller, 0, joined)
            return joined
        hit, verdict = await self._look_up(plan, wish, asked)
        steps.mark("cache_ms")
        if hit is not None:
            await self.rate_limits.take(caller, 0)
            return hit
        if wish.cache.is_only_if_cached:
            raise errors.OnlyIfCached()
        tokenised, mistakes = await self._tokenise(call, models)
        steps.mark("tokenise_ms")
        decision = self._route(call, served, tokenised, mistakes, caller, wish)
        await self._grammars.check(call)
        steps.mark("route_ms")
        assert decision.chosen is not None
        ready = tokenised[decision.chosen.model]
        assert isinstance(ready, Call)
        if ready.model != decision.chosen.model:
            ready = replace(ready, model=decision.chosen.model)
        if keys[ready.model] in self.survey.quarantined:
            raise errors.Quarantined()
        await self.rate_limits.take(caller, ready.most_tokens)
        if plan.is_refresh:
            self.recent_hits.clear()
        job = self._new_job(ready, caller, wish, request_id, decision, verdict, plan, keys, steps.done)
        accepted = await self._accept(job, ready, decision, caller, wish, call)
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

    async def stream(self, identity: Identity, flight_id: uuid.UUID, call: Call, watch: Watch, after: int = 0,
                     make: Callable[[], StreamFrames] | None = None) -> AsyncIterator[bytes]:  # fmt: skip
        """The watched job's run as server-sent events, each with its number as id, from the first one after
        number `after`. Where Redis lost some, the rest is made from the stored answer. A stream that fails ends
        with an error event, never as a whole one does. `make` makes the frames of another form than the endpoint's."""
        make = make or (lambda: EndpointFrames(identity, call))
        frames = make()
        try:
            async for piece in self._frames(identity, flight_id, call, watch, after, frames, make):
                yield piece
        except Interrupted:
            yield frames.failed(errors.StreamInterrupted())
        except errors.APIError as error:
            yield frames.failed(error)

    async def _frames(self, identity: Identity, flight_id: uuid.UUID, call: Call, watch: Watch, after: int,
                      frames: StreamFrames, make: Callable[[], StreamFrames]) -> AsyncIterator[bytes]:  # fmt: skip
        if opening := frames.begin():
            yield opening
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
            status = None if outcome is None else outcome.status
            yield frames.failed(self.error_of(outcome), status)
            return
        if not is_whole:
            frames = make()
            for event in replay.events(call, outcome.body, outcome.events):
                made = frames.event(event)
                if event.is_new_to(seen):
                    seen = event.seq
                    yield made
        yield frames.end(outcome, outcome.body)

    async def cancel(self, job_id: uuid.UUID, tenant: str) -> JobStatus | None:
        """Cancel for good; the state afterwards, None if the tenant has no such job."""
        status = await self.ledger.cancels.submit((job_id, tenant))
        if status is JobStatus.CANCELLED:
            self._outbox.send("PUBLISH", transport.STOP_CHANNEL, orjson.dumps([str(job_id)]))
            self._outbox.send("PUBLISH", transport.DONE_CHANNEL, orjson.dumps([[str(job_id), status]]))
        return status

    async def retry(self, job_id: uuid.UUID, tenant: str) -> bool:
        """Queue a failed or expired job again; False if it is neither."""
        found = await self._requeue(job_id, tenant)
        if isinstance(found, Refused):
            raise refusals.of_budget(found)
        return found

    async def retry_all(self, wanted: DeadLetters) -> int:
        """Queue the failed jobs that match again; how many they were."""
        assert wanted.tenant is not None
        ids = await self.ledger.dead_letters.submit(wanted)
        return (await asyncio.gather(*[self._requeue(job_id, wanted.tenant) for job_id in ids])).count(True)

    async def delete_all(self, wanted: Deletion) -> tuple[int, int]:
        """Delete the ended jobs that match; how many were found and how many are gone by this."""
        found = await self.ledger.deletions.submit(wanted)
        states = await asyncio.gather(*[self.ledger.deletes.submit(one) for one in found])
        return len(found), sum(state in TERMINAL for state in states)

    async def _requeue(self, job_id: uuid.UUID, tenant: str) -> bool | Refused:
        found = await self.ledger.requeues.submit((job_id, tenant))
        if isinstance(found, Refused):
            return found
        if found is not None:
            inference.enqueue(self._outbox, [(job_id, *found)])
        return found is not None

    @staticmethod
    def error_of(outcome: Outcome | None) -> errors.APIError:
        """Why a job has no answer."""
        if outcome is None:
            return errors.DependencyUnavailable()
        if outcome.status is JobStatus.CANCELLED:
            return errors.JobCancelled()
        return errors.from_job(outcome.error or {})

    def catalog_for(self, caller: ApiKey) -> Catalog:
        """What is served to this caller: a model outside its key's scope does not exist for it."""
        if caller.models is None:
            return self.catalog
        known = self._narrowed.get(caller.models)
        if known is None:
            if len(self._narrowed) >= _MOST_NARROWED:
                self._narrowed.clear()
            known = self._narrowed[caller.models] = self.catalog.narrowed(caller.models)
        return known

    async def _join(self, call: Call, caller: ApiKey, wish: Wish, keys: Sequence[bytes]) -> Accepted | None:
        """The job that an earlier sending of this request made, if the caller says that there was one."""
        if wish.idempotency_key is not None:
            held = await self.ledger.keys.submit((caller.id, wish.idempotency_key))
            if held is not None:
                return await self._rejoin(held, fingerprints.request(call, wish), call, caller)
        elif wish.is_retry:
            job_id = await self.ledger.retries.submit(Retry(caller.id, tuple(keys), call.stream))
            if job_id is not None:
                return await self._watch_again(job_id, call, caller)
        return None

    async def _take(self, caller: ApiKey, tokens: int, joined: Accepted) -> None:
        """As `rate_limits.take`, for one who watches a job already."""
        try:
            await self.rate_limits.take(caller, tokens)
        except BaseException:
            joined.watch.close()
            raise

    async def _rejoin(self, held: Reserved, asked: bytes, call: Call, caller: ApiKey) -> Accepted:
        if held.fingerprint != asked:
            raise errors.IdempotencyKeyReuse()
        return await self._watch_again(held.job_id, call, caller)

    async def _watch_again(self, job_id: uuid.UUID, call: Call, caller: ApiKey) -> Accepted:
        watch = self.subscriber.watch(job_id)
        try:
            view = await self.ledger.views.submit((job_id, caller.tenant))
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

    def _models(self, call: Call, served: Catalog) -> list[ModelSpec]:
        models = router.models_for(served, call)
        if not models:
            raise errors.ModelNotFound(param="model")
        if not any(call.task in model.tasks for model in models):
            raise errors.ModelNotFound("The model exists, but does not do this task.", param="model")
        return models

    async def _look_up(
        self, plan: CachePlan, wish: Wish, asked: "Sequence[asyncio.Future[Hit | None]]"
    ) -> tuple[Hit | None, str]:
        if not plan.is_read:
            return None, f"BYPASS; {plan.reason}"
        hits = [hit for future in asked if (hit := await future) is not None]
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

    def _route(self, call: Call, served: Catalog, tokenised: dict[str, Call | str],
               mistakes: dict[str, errors.APIError], caller: ApiKey, wish: Wish) -> Decision:  # fmt: skip
        tenant, weight = caller.tenant, caller.tenant_weight
        crowded = [name for name, backend in self.catalog.backends.items()
                   if not self.survey.shares.may_queue(name, tenant, backend.entry.max_queued, weight)]  # fmt: skip
        levels = {name: self.survey.shares.level(name, tenant, wish.priority, load.slots, weight)
                  for name, load in self.survey.loads.items()}  # fmt: skip
        decision = router.choose(served, call, tokenised, self.survey.loads, can_wait=wish.is_async, crowded=crowded,
                                 within_ms=self._left_ms(caller, wish), levels=levels)  # fmt: skip
        if decision.chosen is None:
            raise refusals.of(decision, mistakes)
        asked = call.model if call.model == "auto" else decision.candidates[0].model
        backend = decision.chosen.backend
        metrics.child(metrics.ROUTER_CHOICES, asked, decision.chosen.model, backend).inc()
        return decision

    def _left_ms(self, caller: ApiKey, wish: Wish) -> float | None:
        """How long a job's deadline leaves it, by Postgres's clock. None for a batch's lines: they
        end with its window, answered or not."""
        if wish.priority is Priority.BATCH:
            return None
        timeout_s = wish.timeout_s or caller.timeout_s
        left = [] if timeout_s is None else [timeout_s]
        if wish.deadline is not None:
            left.append(wish.deadline - self.survey.now())
        return min(left) * 1000 if left else None

    def _new_job(self, call: Call, caller: ApiKey, wish: Wish, request_id: str, decision: Decision, verdict: str,
                 plan: CachePlan, keys: dict[str, bytes], timings: dict[str, float]) -> NewJob:  # fmt: skip
        assert decision.chosen is not None
        price = self.catalog.models[call.model].entry.price
        return NewJob(
            id=wish.job_id or ids.uuid7(),
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
            priority=wish.priority,
            predicted_tokens=call.prompt_tokens + int(decision.chosen.facts.get("tokens", 0)),
            webhook=orjson.dumps(wish.webhook).decode() if wish.webhook else None,
            result_ttl_s=wish.result_ttl_s,
            # A stream shares a run with streams: of another, it would see nothing before the end.
            coalesce_key=keys[call.model] + bytes([call.stream]) if plan.is_read else None,
            input_price=price.input_nano,
            output_price=price.output_nano,
            reserved_tokens=call.most_tokens if caller.has_budget else None,
        )

    async def _accept(self, job: NewJob, call: Call, decision: Decision, caller: ApiKey, wish: Wish,
                      asked: Call) -> Accepted:  # fmt: skip
        """Commit the row, then send the message: the other order could run a job that nobody recorded. `asked` is
        the call as it came, by which its next sending is recognised."""
        watch = self.subscriber.watch(job.id, is_recorded=False)
        try:
            # Whoever waits for the answer itself is promised nothing before it.
            is_promised = job.is_stream or wish.is_async or wish.wait_s < 1.0
            inserted = await self.ledger.insert(job, _idempotency(caller, wish, asked), is_promised=is_promised)
        except BaseException:
            watch.close()
            raise
        if isinstance(inserted, Reserved):
            watch.close()
            return await self._rejoin(inserted, fingerprints.request(asked, wish), call, caller)
        watch.is_recorded = True
        if inserted.leader_id is None:
            is_first = wish.priority is Priority.PRIORITY and decision.level is Level.WITHIN_SHARE
            inference.enqueue(self._outbox, [(job.id, job.backend, job.task)], decision.level, is_first=is_first)
            self.survey.count_queued(job)
        log.info("job.accepted", job_id=str(job.id), request_id=job.request_id, model=job.model,
                 backend=inserted.backend, endpoint=job.endpoint, prompt_tokens=job.prompt_tokens,
                 leader_id=None if inserted.leader_id is None else str(inserted.leader_id))  # fmt: skip
        return Accepted(job.id, inserted.flight_id, call, job.model, inserted.backend, decision.reason,
                        int(inserted.created_at.timestamp()), inserted.cache_verdict, watch)  # fmt: skip

    async def _outcome(self, job_id: uuid.UUID) -> Outcome | None:
        try:
            return await self.ledger.outcomes.submit(job_id)
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

    async def _sweep(self) -> None:
        """One question a second for all who wait: Redis may have lost the news of their job's end."""
        if watched := self.subscriber.watched:
            self.subscriber.ended(map(str, await self.ledger.ended.submit(watched)))

    async def _touch(self) -> None:
        hits = dict(self._hits)
        self._hits.clear()
        await asyncio.gather(*[self.ledger.touches.submit(hit) for hit in hits.items()])


def _idempotency(caller: ApiKey, wish: Wish, asked: Call) -> Idempotency | None:
    if wish.idempotency_key is None:
        return None
    return Idempotency(caller.id, wish.idempotency_key, fingerprints.request(asked, wish))


class _Steps:
    """How long each step before the job took, in milliseconds."""

    def __init__(self) -> None:
        self.done: dict[str, float] = {}
        self._last = time.perf_counter()

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self.done[name] = round((now - self._last) * 1000, 3)
        self._last = now
