"""`python -m api.batcher`: runs batches, in what the backends' other callers leave idle.

Each line of a batch becomes an ordinary job, by the same `Gateway.submit` as everybody's. Its id is made
from the batch's and the line's number, so whoever asks for it again, after whatever crash, gets the job
that is there. A line's row goes in the transaction that writes its answer (`db.batches.settle`).

An advisory lock makes one process lead; a second one waits. Correctness does not depend on it.
"""

import asyncio
import contextlib
import functools
import signal
import sys
import time
import uuid
from collections import deque
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

import structlog
import uvloop

import settings
from api import batch_lines, errors, ids, schemas
from api.batch_answers import PREFIX
from api.batch_pace import Pace
from api.batch_validation import Validator
from api.gateway import Gateway
from api.wishes import Wish
from db import api_keys, batches, session
from db.api_keys import ApiKey
from db.batches import MARK, Answer, Batch, Item, Wanted
from db.cache import Hit
from db.job_views import Outcome
from db.lanes import LONG_S, Lane, LaneDown
from db.states import BatchStatus, JobStatus
from tasks import logs, metrics, server_settings
from tasks.call import Call
from tasks.fair_share import Priority
from tasks.router import Load

log = structlog.get_logger()

_LEADER_LOCK = 0x5357_0004
_SILENCE_S = 15.0
"""Of a leader that hangs, before it loses its lock."""
_REFRESH_S = 0.5
_TICK_S = 0.02
"""Outcomes of so long are answered with new jobs at once: jobs made together share their statements."""
_LATER_S = 2.0
_LONGEST_S = 8 * 86_400.0
"""More than the longest window: what is late ends by its deadline."""
_LONGEST_PAUSE_S = 60.0
_MOST_UNWRITTEN = 1024
_MOST_HOPELESS = 64
"""Lines under way of a batch whose models nobody serves any more: they are refused."""
_ENDINGS = {
    BatchStatus.EXPIRED: ("batch_expired", "The request was not answered before the batch's window ended."),
    BatchStatus.CANCELLED: ("batch_cancelled", "The batch was cancelled before the request was answered."),
}


class _Later(Exception):
    """The line cannot be run now."""

    def __init__(self, error: errors.APIError) -> None:
        super().__init__(error.code)
        self.is_limit = isinstance(error, errors.RateLimited | errors.InsufficientQuota)
        """It is the key's limits that say so, and not the state of a backend or a server."""
        self.retry_after_s = error.retry_after_s or 0.0


@dataclass(slots=True)
class _Feed:
    """A batch's lines of one model, in the order of the input."""

    model: str
    after: int = 0
    items: deque[Item] = field(default_factory=deque)
    is_over: bool = False
    """Everything has been fetched."""
    not_before: float = 0.0
    """time.monotonic() until which nothing of it is tried again."""


@dataclass(slots=True)
class _Slot:
    """A line on its way, and the backend on whose account it is."""

    item: Item
    backend: str | None
    task: "asyncio.Task[None] | None" = None


@dataclass(slots=True)
class _Run:
    """A batch that this process runs."""

    batch: Batch
    caller: ApiKey
    pace: Pace
    feeds: list[_Feed]
    slots: dict[int, _Slot] = field(default_factory=dict)
    """By line."""
    ending: BatchStatus | None = None
    """Set once it ends early: what has no answer by then gets none."""
    closing: "asyncio.Task[bool] | None" = None

    def job_id(self, line: int) -> uuid.UUID:
        return uuid.uuid5(self.batch.id, str(line))

    def wish(self, line: int) -> Wish:
        """How a line's job is asked for."""
        return Wish(
            wait_s=0.0,
            is_async=True,
            metadata={MARK: ids.to_wire(PREFIX, self.batch.id)},
            # Said as well, so that the key's own default, made for those who wait, does not come before it.
            timeout_s=_LONGEST_S,
            deadline=self.batch.expires_at.timestamp(),
            priority=Priority.BATCH,
            job_id=self.job_id(line),
        )


@dataclass(slots=True)
class _PutOff:
    """A batch whose validation failed for reasons that are not its own."""

    pause_s: float = 1.0
    until: float = 0.0
    """time.monotonic()."""

    def again(self) -> None:
        self.pause_s = min(2 * self.pause_s, _LONGEST_PAUSE_S)
        self.until = time.monotonic() + self.pause_s


class Batcher:
    """What the process owns. Made inside the event loop."""

    def __init__(self, config: settings.Settings) -> None:
        url = config.database_url
        self._url = url
        self._gateway = Gateway(config)
        self._validator = Validator(url)
        self._keys = Lane(url, api_keys.by_id)
        self._items = Lane(url, batches.items, silence_s=LONG_S)
        self._models = Lane(url, batches.models, silence_s=LONG_S)
        self._left = Lane(url, batches.left)
        self._others = Lane(url, batches.others)
        self._settles = Lane(url, batches.settle, max_batch=512, linger_s=0.05, silence_s=LONG_S)
        self._finals = Lane(url, batches.finalize)
        self._ends = Lane(url, batches.end, silence_s=LONG_S)
        self._forgets = Lane(url, batches.forget_items, silence_s=LONG_S)
        self._connection: session.Connection | None = None
        self._is_leader = False
        self._runs: dict[uuid.UUID, _Run] = {}
        self._paces: dict[uuid.UUID, Pace] = {}
        """By API key."""
        self._validation: asyncio.Task[bool] | None = None
        self._put_off: dict[uuid.UUID, _PutOff] = {}
        self._taken: dict[str, int] = {}
        """Live jobs of ours, by backend."""
        self._foreign: dict[str, int] = {}
        self._num_unwritten = 0
        self._wake = asyncio.Event()
        self._next_refresh = float("-inf")

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            self._wake.clear()
            try:
                if time.monotonic() >= self._next_refresh:
                    self._next_refresh = time.monotonic() + _REFRESH_S
                    await self._refresh()
                await self._pump()
            except (LaneDown, *session.DependencyDown) as error:
                log.warning("batcher.postgres_down", error=type(error).__name__)
                await self._let_go()
            waiting = {asyncio.ensure_future(self._wake.wait()), asyncio.ensure_future(stop.wait())}
            await asyncio.wait(waiting, timeout=_REFRESH_S, return_when=asyncio.FIRST_COMPLETED)
            for one in waiting:
                one.cancel()
            await asyncio.sleep(_TICK_S)

    async def close(self) -> None:
        """Stop. Jobs go on; whoever leads next finds them by their ids."""
        await self._let_go()
        for lane in [value for value in vars(self).values() if isinstance(value, Lane)]:
            await lane.close()
        await self._validator.close()
        await self._gateway.close()

    async def _let_go(self) -> None:
        """Lose the lead and forget everything: the ledger knows it all."""
        if self._connection is not None:
            with contextlib.suppress(*session.DependencyDown):
                self._connection.close()
        self._connection, self._is_leader = None, False
        tasks: list[asyncio.Task[Any]] = [
            slot.task for run in self._runs.values() for slot in run.slots.values() if slot.task is not None
        ]
        tasks += [run.closing for run in self._runs.values() if run.closing is not None]
        if self._validation is not None:
            tasks.append(self._validation)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._runs.clear()
        self._paces.clear()
        self._taken.clear()
        self._validation = None

    async def _refresh(self) -> None:
        """What the ledger says of the batches, and of everybody else's jobs."""
        live = await asyncio.to_thread(self._lead)
        if live is None:
            if self._runs or self._validation is not None:
                await self._let_go()
            return
        known = {batch.id for batch in live}
        for batch_id in self._runs.keys() - known:
            del self._runs[batch_id]
        for batch_id in self._put_off.keys() - known:
            del self._put_off[batch_id]
        # A key's limits and models may change while its batch runs. A revoked key's batch goes on, as its jobs do.
        callers = await asyncio.gather(*[self._keys.submit(batch.api_key_id) for batch in live])
        for batch, caller in zip(live, callers, strict=True):
            if caller is None:
                log.error("batch.without_key", batch_id=str(batch.id))
            elif batch.status == BatchStatus.VALIDATING:
                self._start_validating(batch, caller)
            else:
                run = self._runs.get(batch.id)
                if run is None:
                    pace = self._paces.setdefault(caller.id, Pace())
                    run = self._runs[batch.id] = _Run(batch, caller, pace, await self._feeds(batch))
                if (caller.limits, caller.tenant_limits) != (run.caller.limits, run.caller.tenant_limits):
                    run.pace.start_anew()
                run.batch, run.caller = batch, caller
                self._end_early(run)
        if self._runs:
            self._foreign = await self._others.submit(Priority.BATCH)

    def _lead(self) -> list[Batch] | None:
        """The live batches, if this process leads."""
        if self._connection is None or self._connection.closed:
            self._connection = session.connect(self._url, "switchyard-batcher", idle_s=_SILENCE_S)
            self._is_leader = False
        with self._connection.cursor() as cursor:
            if not self._is_leader:
                cursor.execute("SELECT pg_try_advisory_lock(%s)", (_LEADER_LOCK,))
                row = cursor.fetchone()
                self._is_leader = bool(row and row[0])
                if self._is_leader:
                    log.info("batcher.leading")
            return batches.live(cursor) if self._is_leader else None

    async def _feeds(self, batch: Batch) -> list[_Feed]:
        return [_Feed(model) for model in await self._models.submit(batch.id)]

    def _start_validating(self, batch: Batch, caller: ApiKey) -> None:
        """One batch at a time; one that failed lately lets others go first."""
        put_off = self._put_off.get(batch.id)
        if self._validation is not None or (put_off is not None and put_off.until > time.monotonic()):
            return
        served = self._gateway.catalog_for(caller)
        self._validation = self._spawn(self._validator.validate(batch, served), "validate")
        self._validation.add_done_callback(functools.partial(self._validated, batch.id))

    def _validated(self, batch_id: uuid.UUID, task: "asyncio.Task[bool]") -> None:
        self._validation = None
        if task.cancelled() or not task.result():
            self._put_off.setdefault(batch_id, _PutOff()).again()
            return
        self._put_off.pop(batch_id, None)
        self._next_refresh = float("-inf")
        self._wake.set()

    def _spawn(self, work: Coroutine[Any, Any, None], what: str) -> "asyncio.Task[bool]":
        """A task that may fail, and says whether it did not: what is not done is done again after a later refresh."""

        async def guarded() -> bool:
            try:
                await work
            except LaneDown as error:
                log.warning("batcher.postgres_down", work=what, error=str(error))
            except Exception:
                log.exception("batcher.failed", work=what)
            else:
                return True
            return False

        return asyncio.create_task(guarded(), name=what)

    # Running

    async def _pump(self) -> None:
        """Start as many lines as the idle slots take, the batches in turns."""
        waiting = [(run, feed) for run in self._runs.values() for feed in run.feeds if run.ending is None]
        while waiting and self._num_unwritten < _MOST_UNWRITTEN:
            still = []
            for run, feed in waiting:
                if await self._start_one(run, feed):
                    still.append((run, feed))
            waiting = still
        for run in list(self._runs.values()):
            if run.ending is None and not run.slots and all(feed.is_over and not feed.items for feed in run.feeds):
                await self._complete(run)

    async def _start_one(self, run: _Run, feed: _Feed) -> bool:
        """Start the feed's next line; False where it has none, or neither backends nor limits have room."""
        if not run.pace.has_room or feed.not_before > time.monotonic():
            return False
        backends = list(self._backends(run, feed.model))
        backend = self._with_room(backends)
        if backend is None and (backends or len(run.slots) >= _MOST_HOPELESS):
            return False
        if not feed.items and not feed.is_over:
            page = await self._items.submit(Wanted(run.batch.id, feed.model, feed.after))
            feed.items += page
            feed.is_over = not page
            feed.after = page[-1].line if page else feed.after
        if not feed.items:
            return False
        slot = _Slot(feed.items.popleft(), None)
        self._move(slot, backend)
        run.slots[slot.item.line] = slot
        run.pace.num_sent += 1
        slot.task = asyncio.create_task(self._do(run, feed, slot), name="batch-line")
        return True

    def _with_room(self, backends: list[str]) -> str | None:
        """Of these, the one with the most idle slots."""
        most, name = max(((self._room(name), name) for name in backends), default=(0, ""))
        return name if most > 0 else None

    def _backends(self, run: _Run, model: str) -> Iterator[str]:
        """Where the router may send a batch's calls of a model: elsewhere only while its own backends are away.
        None at all: a model that is gone, or no longer for this key."""
        served, loads = self._gateway.catalog_for(run.caller), self._gateway.survey.loads
        if model == "auto":
            task = schemas.ENDPOINTS[run.batch.endpoint].task
            for spec in served.models.values():
                if spec.entry.auto and task in spec.tasks:
                    yield from spec.entry.backends
            return
        first = served.model(model)
        others = [] if first is None else [served.models[name] for name in first.entry.fallback]
        for spec in [first, *others] if first is not None else []:
            yield from spec.entry.backends
            if any(loads.get(name, Load()).is_ready for name in spec.entry.backends):
                return

    def _room(self, backend: str) -> int:
        """Slots that nobody uses, and a few more, so that a worker finds its next job waiting: these are the
        only batch jobs in a queue, and there are none while others wait in it."""
        load = self._gateway.survey.load(backend)
        others = self._foreign.get(backend, 0)
        if not load.is_ready or others >= load.slots:
            return 0
        return load.slots + max(1, load.slots // 16) - others - self._taken.get(backend, 0)

    def _move(self, slot: _Slot, backend: str | None) -> None:
        if slot.backend is not None:
            self._taken[slot.backend] = self._taken.get(slot.backend, 0) - 1
        slot.backend = backend
        if backend is not None:
            self._taken[backend] = self._taken.get(backend, 0) + 1

    async def _do(self, run: _Run, feed: _Feed, slot: _Slot) -> None:
        """A line, from its job to its answer in the file."""
        try:
            answer = await self._answer(run, slot)
            self._move(slot, None)
            self._wake.set()
            self._num_unwritten += 1
            try:
                await self._settles.submit(answer)
            finally:
                self._num_unwritten -= 1
        except (_Later, LaneDown) as error:
            # Behind the others: a line that is larger than what the limits leave holds none of them up.
            feed.items.append(slot.item)
            if isinstance(error, _Later) and error.is_limit:
                run.pace.refused(error.retry_after_s)
            else:
                feed.not_before = time.monotonic() + _LATER_S
        finally:
            run.pace.num_sent -= 1
            self._move(slot, None)
            run.slots.pop(slot.item.line, None)
            self._wake.set()

    async def _answer(self, run: _Run, slot: _Slot) -> Answer:
        """Run a line. Raises _Later where only time can help."""
        item, request_id = slot.item, self._request_id(run, slot.item.line)
        try:
            call = self._call(run, item)
            made = await self._gateway.submit(call, run.caller, run.wish(item.line), request_id)
            if isinstance(made, Hit):
                return self._done(run, item.line, item.custom_id, made.body, made.usage)
            self._move(slot, made.backend)
            run.pace.num_accepted += 1
            try:
                outcome = await self._gateway.wait(made.watch, _LONGEST_S)
                run.pace.answered()
            finally:
                run.pace.num_accepted -= 1
                made.watch.close()
            assert outcome is not None
        except errors.APIError as error:
            # Tomorrow there is another budget; a request that is more than a minute's tokens is too much for ever.
            if isinstance(error, errors.InsufficientQuota) or (error.status in (429, 503) and not error.is_permanent):
                raise _Later(error) from None
            return self._refused(run, item.line, item.custom_id, error)
        except LaneDown:
            raise
        except Exception:
            # One line that nobody foresaw must not hold up its batch.
            log.exception("batch.line_failed", batch_id=str(run.batch.id), line=item.line)
            return self._refused(run, item.line, item.custom_id, errors.InternalError())
        return self._of(run, item.line, item.custom_id, outcome)

    def _call(self, run: _Run, item: Item) -> Call:
        limits = self._gateway.catalog.limits
        fields = batch_lines.decode(item.text, limits)
        call = schemas.parse(run.batch.endpoint, fields["body"], limits)
        if call.stream:
            raise errors.UnsupportedParameter("A batch cannot stream.", param="stream")
        return call

    def _of(self, run: _Run, line: int, custom_id: str, outcome: Outcome) -> Answer:
        """The answer that a job's outcome comes to."""
        if outcome.status is JobStatus.SUCCEEDED:
            assert outcome.body is not None
            return self._done(run, line, custom_id, outcome.body, outcome.usage)
        is_stopped = outcome.status is JobStatus.CANCELLED and run.ending is not None
        is_late = outcome.status is JobStatus.EXPIRED and time.time() >= run.batch.expires_at.timestamp() - 1
        if is_stopped or is_late:
            return self._unanswered(run, line, custom_id)
        return self._refused(run, line, custom_id, self._gateway.error_of(outcome))

    def _done(self, run: _Run, line: int, custom_id: str, body: bytes, usage: dict[str, Any] | None) -> Answer:
        text = batch_lines.answered(self._request_id(run, line), custom_id, body)
        used = usage or {}
        spent = (used.get("prompt_tokens") or 0, used.get("completion_tokens") or 0)
        return Answer(run.batch.id, line, text, False, *spent)

    def _refused(self, run: _Run, line: int, custom_id: str, error: errors.APIError) -> Answer:
        text = batch_lines.refused(self._request_id(run, line), custom_id, error, run.batch.endpoint)
        return Answer(run.batch.id, line, text, is_error=True)

    def _unanswered(self, run: _Run, line: int, custom_id: str) -> Answer:
        code, message = _ENDINGS[run.ending or BatchStatus.EXPIRED]
        text = batch_lines.unanswered(self._request_id(run, line), custom_id, code, message)
        return Answer(run.batch.id, line, text, is_error=True)

    @staticmethod
    def _request_id(run: _Run, line: int) -> str:
        return f"batch_req_{run.job_id(line).hex}"

    # Ending

    async def _complete(self, run: _Run) -> None:
        if run.closing is not None and not run.closing.done():
            return
        run.closing = self._spawn(self._finish(run), "finish")

    async def _finish(self, run: _Run) -> None:
        if await self._finals.submit(run.batch.id):
            await self._ends.submit((run.batch.id, BatchStatus.COMPLETED))
            self._runs.pop(run.batch.id, None)
            log.info("batch.completed", batch_id=str(run.batch.id))
        else:
            run.feeds = await self._feeds(run.batch)

    def _end_early(self, run: _Run) -> None:
        """See that a batch that is cancelled, or whose window is over, comes to its end."""
        if run.batch.status == BatchStatus.CANCELLING:
            run.ending = BatchStatus.CANCELLED
        elif run.batch.is_late and run.batch.status == BatchStatus.IN_PROGRESS:
            run.ending = BatchStatus.EXPIRED
        if run.ending is not None and (run.closing is None or run.closing.done()):
            run.closing = self._spawn(self._wind_up(run, run.ending), "wind_up")

    async def _wind_up(self, run: _Run, ending: BatchStatus) -> None:
        """Stop what runs, keep what is answered, and say of everything else that it is not."""
        run.feeds = []
        if run.batch.in_progress_at is None:
            await self._forgets.submit(run.batch.id)
        while run.slots:
            await self._cancel_jobs(run, list(run.slots))
            tasks = [slot.task for slot in run.slots.values() if slot.task is not None]
            await asyncio.wait(tasks, timeout=_REFRESH_S)
        while page := await self._left.submit(run.batch.id):
            states = await self._cancel_jobs(run, [line for line, _ in page])
            for (line, custom_id), state in zip(page, states, strict=True):
                outcome = None
                if state not in (None, JobStatus.CANCELLED):
                    outcome = await self._gateway.ledger.outcomes.submit(run.job_id(line))
                is_answered = outcome is not None and outcome.status in (JobStatus.SUCCEEDED, JobStatus.FAILED)
                answer = (
                    self._of(run, line, custom_id, outcome)
                    if is_answered and outcome is not None
                    else self._unanswered(run, line, custom_id)
                )
                self._settles.send(answer)
            await self._settles.submit(answer)
        await self._ends.submit((run.batch.id, ending))
        self._runs.pop(run.batch.id, None)
        log.info("batch.ended", batch_id=str(run.batch.id), status=ending)

    async def _cancel_jobs(self, run: _Run, lines: list[int]) -> "list[JobStatus | None]":
        tenant = run.batch.tenant
        return await asyncio.gather(*[self._gateway.cancel(run.job_id(line), tenant) for line in lines])


def main() -> int:
    logs.configure("batcher")
    config = settings.load()
    server_settings.check(config)
    metrics.serve()

    async def serve() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        batcher = Batcher(config)
        await batcher.run(stop)
        await batcher.close()

    uvloop.run(serve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
