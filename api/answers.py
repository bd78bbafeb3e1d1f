"""What leaves an inference route: the hit, the answer, the stream or the 202, with its headers."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Mapping

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Send

from api import decoding, errors, schemas, views, wishes
from api.gateway import Accepted, Gateway
from api.recent_hits import RequestKey
from api.stream_frames import StreamFrames
from api.wishes import Wish
from db.api_keys import ApiKey
from db.cache import Hit
from db.job_views import Outcome
from db.lanes import LaneDown
from db.request_log import Entry
from db.states import TERMINAL, JobStatus
from tasks import responses
from tasks.call import Call
from tasks.identity import Identity

SSE = "text/event-stream"
_EVENT_ID = re.compile(rb"^id: \d+\n", re.MULTILINE)
_UNREAD_S = 30.0
NO_BUFFERING = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(StreamingResponse):
    """Server-sent events for a client that reads them. One that reads nothing for half a minute is
    disconnected: what it has not taken waits in no memory of ours, and it can come back for it."""

    async def stream_response(self, send: Send) -> None:
        async def within_time(message: Message) -> None:
            try:
                async with asyncio.timeout(_UNREAD_S):
                    await send(message)
            except TimeoutError:
                raise ClientDisconnect from None

        await super().stream_response(within_time)


async def infer(request: Request, endpoint: str, caller: ApiKey) -> Response:
    """Any inference route: read, submit, answer."""
    gateway: Gateway = request.app.state.gateway
    limits = gateway.catalog.limits
    body = await decoding.read_body(request, limits)
    wish = wishes.read(request.headers, gateway.config.wait_s)
    # Past the recent hits nobody asks which models a key may use, and how often.
    is_plain = wish.is_plain and caller.models is None and not caller.has_rate_limit
    recent = (caller.tenant, endpoint, body) if is_plain else None
    if recent is not None and (known := gateway.recent_hits.get(recent)) is not None:
        entry: Entry = request.state.log
        entry.requested_model, entry.is_stream = known.call.model, known.call.stream
        return _from_cache(entry, known.call, known.now())
    call = schemas.parse(endpoint, decoding.decode(body, limits), limits)
    return await answer(request, gateway, call, caller, wish, recent)


async def answer(request: Request, gateway: Gateway, call: Call, caller: ApiKey, wish: Wish,
                 recent: RequestKey | None = None) -> Response:  # fmt: skip
    """Submit a call and answer in the form that it and its wish ask for. `recent` remembers a hit."""
    entry: Entry = request.state.log
    made = await submitted(request, gateway, call, caller, wish)
    if isinstance(made, Hit):
        if recent is not None and not gateway.config.log_prompts:
            gateway.recent_hits.put(recent, call, made)
        return _from_cache(entry, call, made)
    headers = headers_of(made, wish)
    if call.stream and not wish.is_async:
        headers |= NO_BUFFERING | server_timing(made.steps, {})
        return EventStream(watched(gateway, made, caller, wish), 200, headers, SSE)
    try:
        outcome = await wait_for(request, gateway, made, caller, wish)
    finally:
        made.watch.close()
    if outcome is None:
        return await accepted(gateway, made, caller, headers)
    return _from_outcome(gateway, entry, outcome, headers | times(outcome, made.steps))


async def submitted(request: Request, gateway: Gateway, call: Call, caller: ApiKey, wish: Wish) -> Hit | Accepted:
    """Submit a call, and account for it."""
    entry: Entry = request.state.log
    entry.requested_model, entry.is_stream = call.model[:256], call.stream
    if gateway.config.log_prompts:
        entry.prompt = orjson.dumps(call.messages or call.inputs).decode()
    try:
        made = await gateway.submit(call, caller, wishes.in_tier(wish, call), entry.request_id)
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    if isinstance(made, Accepted):
        entry.job_id, entry.model, entry.backend = made.job_id, made.model, made.backend
        entry.cache_verdict, entry.prompt_tokens = made.cache_verdict, made.call.prompt_tokens
    return made


async def wait_for(request: Request, gateway: Gateway, made: Accepted, caller: ApiKey, wish: Wish) -> Outcome | None:
    """Wait as long as asked. A caller who said so takes the job along when it hangs up."""
    if wish.wait_s == 0:
        return None
    if not wish.cancels_on_disconnect:
        return await gateway.wait(made.watch, wish.wait_s)
    waiting = asyncio.ensure_future(gateway.wait(made.watch, wish.wait_s))
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if leaving.done() and not waiting.done():
            await gateway.cancel(made.job_id, caller.tenant)
        return await waiting
    finally:
        leaving.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def watched(gateway: Gateway, made: Accepted, caller: ApiKey, wish: Wish,
                  make: Callable[[], StreamFrames] | None = None) -> AsyncIterator[bytes]:  # fmt: skip
    """The stream; closes its watch, and cancels the job where the caller asked for that and is gone."""
    is_whole = False
    try:
        async for piece in gateway.stream(made.identity, made.flight_id, made.call, made.watch, make=make):
            yield piece if wish.has_event_ids else _EVENT_ID.sub(b"", piece)
        is_whole = True
    finally:
        made.watch.close()
        if not is_whole and wish.cancels_on_disconnect:
            with contextlib.suppress(LaneDown):
                await asyncio.shield(gateway.cancel(made.job_id, caller.tenant))


async def accepted(gateway: Gateway, made: Accepted, caller: ApiKey, headers: dict[str, str]) -> Response:
    """202: the job goes on by itself; 200 where it is an earlier one that has ended."""
    try:
        view = await gateway.ledger.views.submit((made.job_id, caller.tenant))
    except LaneDown:
        view = None
    body = (
        views.job(view, views.queue_as_accepted(view))
        if view is not None
        else {"id": str(made.job_id), "object": "job", "status": "queued"}
    )
    location = {"Location": f"/v1/jobs/{made.job_id}", "Retry-After": "1"}
    is_over = made.is_replayed and view is not None and view.status in TERMINAL
    return Response(orjson.dumps(body), 200 if is_over else 202, headers | location, "application/json")


def _from_outcome(gateway: Gateway, entry: Entry, outcome: Outcome, headers: dict[str, str]) -> Response:
    entry.queue_ms, entry.ttft_ms = outcome.queue_ms, outcome.ttft_ms
    if outcome.status is not JobStatus.SUCCEEDED:
        raise gateway.error_of(outcome)
    count_usage(entry, outcome.usage)
    return Response(outcome.body, 200, headers, "application/json")


def _from_cache(entry: Entry, call: Call, hit: Hit) -> Response:
    entry.model, entry.backend, entry.cache_verdict, entry.job_id = hit.model, hit.backend, "HIT", hit.job_id
    count_usage(entry, hit.usage)
    if not call.stream:
        return _Stored(hit.body, _hit_headers(hit, "application/json"))
    body = orjson.loads(hit.body)
    frames = responses.frames(Identity(call.endpoint, hit.job_id, hit.model, body.get("created", 0)), call)
    streamed = b"".join(frames.replay(body))
    extra = [(name.lower().encode(), value.encode()) for name, value in NO_BUFFERING.items()]
    return _Stored(streamed, [*_hit_headers(hit, SSE), *extra])


def _hit_headers(hit: Hit, media_type: str) -> list[tuple[bytes, bytes]]:
    return [
        (b"x-cache", b"HIT"),
        (b"age", b"%d" % hit.age_s),
        (b"x-cache-key", hit.key.hex().encode()),
        (b"x-model-used", hit.model.encode()),
        (b"x-backend", hit.backend.encode()),
        (b"x-job-id", str(hit.job_id).encode()),
        (b"content-type", media_type.encode()),
    ]


class _Stored(Response):
    """A response from bytes as they are, past Starlette's encoding of each header: this is the hottest path."""

    def __init__(self, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        self.status_code, self.body, self.background = 200, body, None
        self.raw_headers = [*headers, (b"content-length", b"%d" % len(body))]


def count_usage(entry: Entry, usage: Mapping[str, int] | None) -> None:
    if usage:
        entry.prompt_tokens, entry.completion_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")


def headers_of(made: Accepted, wish: Wish) -> dict[str, str]:
    headers = {
        "x-job-id": str(made.job_id),
        "x-cache": made.cache_verdict,
        "x-model-used": made.model,
        "x-backend": made.backend,
        "x-route-reason": made.route_reason,
    }
    if wish.preference_applied:
        headers |= {"Preference-Applied": wish.preference_applied, "Vary": "Prefer"}
    return headers | {"Idempotent-Replayed": "true"} if made.is_replayed else headers


def times(outcome: Outcome, steps: Mapping[str, float] | None = None) -> dict[str, str]:
    """Milliseconds in the queue and in the worker, and of every step in Server-Timing's form; how many attempts."""
    measured = {"x-queue-time": outcome.queue_ms, "x-inference-time": outcome.run_ms}
    headers = {name: f"{value:.1f}" for name, value in measured.items() if value is not None}
    spent = {"queue": outcome.queue_ms, "ttft": outcome.ttft_ms, "run": outcome.run_ms}
    return headers | {"x-attempts": str(outcome.attempt)} | server_timing(steps or {}, spent)


def server_timing(steps: Mapping[str, float], spent: Mapping[str, float | None]) -> dict[str, str]:
    """The gateway's `steps`, and then what was `spent` on the job."""
    known = {name.removesuffix("_ms"): ms for name, ms in steps.items()} | dict(spent)
    metrics = [f"{name};dur={ms:.1f}" for name, ms in known.items() if ms is not None]
    return {"Server-Timing": ", ".join(metrics)} if metrics else {}
