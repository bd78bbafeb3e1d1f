"""What leaves the Responses API: one object in every state of its job, and its events."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

import orjson
from starlette.requests import Request
from starlette.responses import Response

from api import answers, decoding, errors, ids, schemas, webhook_answers, wishes
from api.gateway import Accepted, Gateway
from api.schemas.responses import ResponseRequest
from db.api_keys import ApiKey
from db.cache import Hit
from db.job_views import Outcome, View
from db.lanes import LaneDown
from db.states import TERMINAL, JobStatus
from tasks import replay, response_object
from tasks.call import Call
from tasks.identity import RESPONSES, Identity
from tasks.response_object import Origin, ResponseFrames
from tasks.stream import Event


async def create(request: Request, caller: ApiKey) -> Response:
    """The response: as events, when it has ended, or at once where it runs in the background."""
    gateway: Gateway = request.app.state.gateway
    limits = gateway.catalog.limits
    wanted = schemas.read(ResponseRequest, decoding.decode(await decoding.read_body(request, limits), limits))
    call = wanted.to_call(await _context(gateway, caller, wanted.previous_response_id))
    wish = replace(wishes.read(request.headers, gateway.config.wait_s), metadata=wanted.metadata or {}, is_plain=False)
    if wanted.webhook is not None:
        await webhook_answers.check(gateway, caller, wanted.webhook.url)
        wish = replace(wish, webhook=wanted.webhook.kept())
    if wanted.background:
        wish = replace(wish, is_async=True, wait_s=wish.wait_s if wish.preference_applied else 0.0)
    made = await answers.submitted(request, gateway, call, caller, wish)
    if isinstance(made, Hit):
        return _from_cache(request, call, made, wish.metadata)
    headers = answers.headers_of(made, wish)
    origin = Origin(made.identity, made.call, wish.metadata)
    if call.stream:
        frames = answers.watched(gateway, made, caller, wish, lambda: _Frames(origin))
        return answers.EventStream(
            frames, 200, headers | answers.NO_BUFFERING | answers.server_timing(made.steps, {}), answers.SSE
        )
    try:
        outcome = await answers.wait_for(request, gateway, made, caller, wish)
    finally:
        made.watch.close()
    if outcome is None:
        return await _unfinished(gateway, made, origin, caller, headers, is_background=bool(wanted.background))
    if outcome.status is not JobStatus.SUCCEEDED and not wanted.background:
        raise gateway.error_of(outcome)
    answers.count_usage(request.state.log, outcome.usage)
    request.state.log.queue_ms, request.state.log.ttft_ms = outcome.queue_ms, outcome.ttft_ms
    return _json(_ended(origin, outcome.status, outcome.body, outcome.error, outcome.finished),
                 headers | answers.times(outcome, made.steps))  # fmt: skip


async def get(request: Request, caller: ApiKey, response_id: str) -> Response:
    found = await _find(request.app.state.gateway, caller, response_id)
    return _json(await _shown(request.app.state.gateway, found))


async def stream(request: Request, caller: ApiKey, response_id: str, starting_after: int | None) -> Response:
    gateway: Gateway = request.app.state.gateway
    found = await _find(gateway, caller, response_id)
    return events(request, gateway, found.view, found.flight_id, found.origin.call, starting_after)


def events(request: Request, gateway: Gateway, view: View, flight_id: UUID, call: Call,
           starting_after: int | None) -> Response:  # fmt: skip
    """The response's events behind number `starting_after`, or behind Last-Event-ID."""
    last = request.headers.get("last-event-id", "")
    seen = starting_after if starting_after is not None else int(last) if last.isdecimal() and len(last) < 10 else -1
    origin = _origin(view, call)
    frames = _followed(gateway, origin, flight_id, seen, view.status in TERMINAL)
    return answers.EventStream(frames, 200, answers.NO_BUFFERING | {"x-job-id": str(view.id)}, answers.SSE)


async def _followed(
    gateway: Gateway, origin: Origin, flight_id: UUID, seen: int, is_over: bool
) -> AsyncIterator[bytes]:
    identity = origin.identity
    watch = gateway.subscriber.watch(identity.job_id)
    if is_over:
        gateway.subscriber.ended([watch.job_id])
    after = max(seen - ResponseFrames(origin).first, 0)
    try:
        async for piece in gateway.stream(identity, flight_id, origin.call, watch, after,
                                          lambda: _Frames(origin, seen)):  # fmt: skip
            yield piece
    finally:
        watch.close()


async def cancel(request: Request, caller: ApiKey, response_id: str) -> Response:
    """Cancel a background response. One that has ended stays as it is, and is the answer."""
    gateway: Gateway = request.app.state.gateway
    found = await _find(gateway, caller, response_id)
    if not found.origin.is_background:
        raise errors.ConflictState("Only background responses can be cancelled.")
    try:
        await gateway.cancel(found.view.id, found.view.tenant)
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    return _json(await _shown(gateway, await _find(gateway, caller, response_id)))


async def delete(request: Request, caller: ApiKey, response_id: str) -> Response:
    """Remove the response, and its job with it; one that still runs is cancelled first."""
    gateway: Gateway = request.app.state.gateway
    found = await _find(gateway, caller, response_id)
    try:
        await gateway.cancel(found.view.id, found.view.tenant)
        await gateway.ledger.deletes.submit((found.view.id, found.view.tenant))
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    return _json({"id": response_id, "object": "response", "deleted": True})


async def input_items(request: Request, caller: ApiKey, response_id: str, after: str | None, limit: int,
                      *, is_ascending: bool) -> Response:  # fmt: skip
    found = await _find(request.app.state.gateway, caller, response_id)
    items = response_object.input_items(found.origin)
    if not is_ascending:
        items.reverse()
    if after is not None:
        position = next((place for place, item in enumerate(items, 1) if item["id"] == after), None)
        if position is None:
            raise errors.InvalidValue("after must be the id of one of the response's items.", param="after")
        items = items[position:]
    page = items[:limit]
    return _json({
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(items) > len(page),
    })  # fmt: skip


async def result(gateway: Gateway, view: View, flight_id: UUID, call: Call) -> Response:
    """The response of a job that was asked for as a job."""
    return _json(await _shown(gateway, _Found(view, flight_id, _origin(view, call))), {"x-job-id": str(view.id)})


@dataclass(frozen=True, slots=True)
class _Found:
    view: View
    flight_id: UUID
    origin: Origin


class _Frames:
    """A response's events, as the gateway streams them."""

    def __init__(self, origin: Origin, seen: int = -1) -> None:
        self._frames = ResponseFrames(origin, seen)

    def begin(self) -> bytes:
        return self._frames.begin()

    def event(self, event: Event) -> bytes:
        return self._frames.event(event)

    def end(self, outcome: Outcome, body: bytes) -> bytes:
        return self._frames.end(outcome.usage, outcome.finished)

    def failed(self, error: errors.APIError, status: JobStatus | None = None) -> bytes:
        return self._frames.failed(errors.as_dict(error), status)


async def _find(gateway: Gateway, caller: ApiKey, response_id: str) -> _Found:
    """The caller's own stored response; an admin's key sees every tenant's."""
    name = response_id.removeprefix("resp_")
    if len(name) != 32 or len(response_id) != 37 or not all(letter in "0123456789abcdef" for letter in name):
        raise errors.ResponseNotFound()
    job_id = UUID(name)
    try:
        viewing = gateway.ledger.views.submit((job_id, None if caller.is_admin else caller.tenant))
        loading = gateway.ledger.payloads.submit(job_id)
        view, stored = await viewing, await loading
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    if view is None or stored is None or view.endpoint != RESPONSES:
        raise errors.ResponseNotFound()
    found = _Found(view, stored[1], _origin(view, Call.decode(stored[0])))
    if not found.origin.is_stored:
        raise errors.ResponseNotFound()
    return found


def _origin(view: View, call: Call) -> Origin:
    identity = Identity(RESPONSES, view.id, view.model, int(view.created_at.timestamp()))
    return Origin(identity, call, view.metadata or {})


async def _shown(gateway: Gateway, found: _Found) -> dict[str, Any]:
    view = found.view
    if view.status not in TERMINAL:
        return response_object.pending(found.origin, view.status)
    try:
        outcome = await gateway.ledger.outcomes.submit(view.id)
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    if outcome is None:
        raise errors.ResponseNotFound()
    return _ended(found.origin, view.status, outcome.body, outcome.error, outcome.finished)


def _ended(origin: Origin, status: JobStatus, body: bytes | None, error: Mapping[str, Any] | None,
           finished: int | None) -> dict[str, Any]:  # fmt: skip
    if body is not None:
        return response_object.answered(origin, body, finished)
    if status == JobStatus.CANCELLED:
        return response_object.pending(origin, status)
    return response_object.failed(origin, errors.as_dict(errors.from_job(error or {})))


async def _unfinished(gateway: Gateway, made: Accepted, origin: Origin, caller: ApiKey, headers: dict[str, str],
                      *, is_background: bool) -> Response:  # fmt: skip
    """A background response as it stands; any other that takes longer than its caller waits is a job by now."""
    if not is_background:
        return await answers.accepted(gateway, made, caller, headers)
    if made.is_replayed:
        return _json(await _shown(gateway, await _find(gateway, caller, made.identity.id)), headers)
    return _json(response_object.pending(origin, "queued"), headers)


def _from_cache(request: Request, call: Call, hit: Hit, metadata: Mapping[str, str]) -> Response:
    """A stored answer under an id of its own: a response that is not stored is nobody else's."""
    entry = request.state.log
    entry.model, entry.backend, entry.cache_verdict, entry.job_id = hit.model, hit.backend, "HIT", hit.job_id
    answers.count_usage(entry, hit.usage)
    now = orjson.loads(hit.body)["created"] + hit.age_s
    origin = Origin(Identity(call.endpoint, ids.uuid7(), hit.model, now), call, metadata)
    headers = {
        "x-cache": "HIT",
        "age": str(hit.age_s),
        "x-cache-key": hit.key.hex(),
        "x-model-used": hit.model,
        "x-backend": hit.backend,
    }
    if not call.stream:
        return _json(response_object.answered(origin, hit.body, now), headers)
    frames = ResponseFrames(origin)
    streamed = frames.begin()
    for event in replay.events(call, hit.body, None):
        streamed += frames.event(event)
    streamed += frames.end(hit.usage, now)
    return Response(streamed, 200, headers | answers.NO_BUFFERING, answers.SSE)


async def _context(gateway: Gateway, caller: ApiKey, previous_id: str | None) -> list[dict[str, Any]]:
    """The turns up to the end of the response that the new one goes on from."""
    if previous_id is None:
        return []
    try:
        found = await _find(gateway, caller, previous_id)
    except errors.ResponseNotFound:
        raise errors.PreviousResponseNotFound(param="previous_response_id") from None
    shown = await _shown(gateway, found)
    if not shown["output"]:
        raise errors.InvalidValue("previous_response_id names a response without an answer.",
                                  param="previous_response_id")  # fmt: skip
    asked = found.origin.asked
    return [*asked["context"], *asked["input"], response_object.turn_of(shown["output"])]


def _json(body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), 200, headers, "application/json")
