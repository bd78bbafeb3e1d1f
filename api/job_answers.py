"""What leaves the job routes. Another tenant's job and an unknown one get the same 404."""

import re
from collections.abc import AsyncIterator
from uuid import UUID

import orjson
from starlette.requests import Request
from starlette.responses import Response

from api import answers, decoding, errors, response_answers, schemas, views, webhook_answers, wishes
from api.gateway import Gateway
from api.wishes import CacheControl, Wish
from db.api_keys import ApiKey
from db.job_views import DeadLetters, Filter, View
from db.lanes import LaneDown
from db.removal import Deletion
from db.states import TERMINAL, JobStatus
from tasks.call import Call
from tasks.fair_share import Priority
from tasks.identity import RESPONSES, Identity


async def create(request: Request, caller: ApiKey) -> Response:
    """202 and the job; or its answer at once where the cache has it."""
    gateway: Gateway = request.app.state.gateway
    limits = gateway.catalog.limits
    wanted = schemas.parse_job(decoding.decode(await decoding.read_body(request, limits), limits), limits)
    asked = wishes.read(request.headers, gateway.config.wait_s)
    if wanted.webhook is not None:
        await webhook_answers.check(gateway, caller, wanted.webhook["url"])
    wish = Wish(
        # A webhook tells of a job of its own: an answer from the cache would leave it nothing to tell.
        cache=asked.cache if wanted.webhook is None else CacheControl(is_no_cache=True),
        wait_s=asked.wait_s if asked.preference_applied else 0.0,
        is_async=True,
        preference_applied=asked.preference_applied,
        metadata=wanted.metadata,
        timeout_s=wanted.timeout_s or asked.timeout_s,
        deadline=wanted.deadline,
        priority=Priority[wanted.priority.upper()],
        webhook=wanted.webhook,
        result_ttl_s=wanted.result_ttl_s,
        idempotency_key=asked.idempotency_key,
        is_retry=asked.is_retry,
    )
    return await answers.answer(request, gateway, wanted.call, caller, wish)


_METADATA = re.compile(r"metadata\[([^\[\]\x00]{1,64})\]")


def metadata_of(request: Request) -> str | None:
    """The pairs that `metadata[key]=value` parameters ask for, as JSON."""
    wanted = {}
    for name, value in request.query_params.multi_items():
        if match := _METADATA.fullmatch(name):
            if len(value) > 512 or "\x00" in value:
                raise errors.InvalidValue("metadata values must have at most 512 characters.", param="metadata")
            wanted[match[1]] = value
    return orjson.dumps(wanted).decode() if wanted else None


async def page(request: Request, wanted: Filter) -> Response:
    gateway: Gateway = request.app.state.gateway
    try:
        found = await gateway.ledger.pages.submit(wanted)
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    shown = found[: wanted.limit]
    body = {
        "object": "list",
        "data": [views.job(view) for view in shown],
        "first_id": str(shown[0].id) if shown else None,
        "last_id": str(shown[-1].id) if shown else None,
        "has_more": len(found) > len(shown),
    }
    return _json(body)


async def get(request: Request, caller: ApiKey, job_id: UUID, wait_s: float) -> Response:
    gateway: Gateway = request.app.state.gateway
    watch = gateway.subscriber.watch(job_id)
    try:
        view = await _view(gateway, caller, job_id)
        if wait_s and view.status not in TERMINAL:
            await gateway.wait(watch, wait_s)
            view = await _view(gateway, caller, job_id)
        queue = await gateway.survey.queue_of(view)
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    finally:
        watch.close()
    return _json(views.job(view, queue), 200 if view.status in TERMINAL else 202)


async def result(request: Request, caller: ApiKey, job_id: UUID) -> Response:
    gateway: Gateway = request.app.state.gateway
    try:
        outcome = await gateway.ledger.outcomes.submit(job_id)
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    if outcome is None or not (caller.is_admin or outcome.tenant == caller.tenant):
        raise errors.JobNotFound()
    if outcome.status not in TERMINAL:
        return _json(views.job(await _view(gateway, caller, job_id)), 202, {"Retry-After": "1"})
    if outcome.status is not JobStatus.SUCCEEDED:
        raise gateway.error_of(outcome)
    if outcome.endpoint == RESPONSES:
        view = await _view(gateway, caller, job_id)
        call, flight_id = await _call(gateway, job_id)
        return await response_answers.result(gateway, view, flight_id, call)
    headers = {"x-job-id": str(job_id), "x-model-used": outcome.model, "x-backend": outcome.backend}
    return Response(outcome.body, 200, headers | answers.times(outcome), "application/json")


async def stream(request: Request, caller: ApiKey, job_id: UUID, starting_after: int | None) -> Response:
    gateway: Gateway = request.app.state.gateway
    last = request.headers.get("last-event-id", "")
    after = starting_after if starting_after is not None else int(last) if last.isdecimal() and len(last) < 10 else 0
    view = await _view(gateway, caller, job_id)
    call, flight_id = await _call(gateway, job_id)
    if view.endpoint == RESPONSES:
        return response_answers.events(request, gateway, view, flight_id, call, starting_after)
    if call.task != "generate":
        raise errors.ConflictState("Only generation jobs can be streamed; read the job's result instead.")
    identity = Identity(view.endpoint, view.id, view.model, int(view.created_at.timestamp()))
    return answers.EventStream(
        _frames(gateway, identity, flight_id, call, after, view.status in TERMINAL),
        200,
        answers.NO_BUFFERING | {"x-job-id": str(job_id)},
        answers.SSE,
    )


async def _frames(gateway: Gateway, identity: Identity, flight_id: UUID, call: Call, after: int,
                  is_over: bool) -> AsyncIterator[bytes]:  # fmt: skip
    watch = gateway.subscriber.watch(identity.job_id)
    if is_over:
        gateway.subscriber.ended([watch.job_id])
    try:
        async for piece in gateway.stream(identity, flight_id, call, watch, after):
            yield piece
    finally:
        watch.close()


async def cancel(request: Request, caller: ApiKey, job_id: UUID) -> Response:
    gateway: Gateway = request.app.state.gateway
    try:
        status = await gateway.cancel(job_id, caller.tenant)
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    if status is None:
        raise errors.JobNotFound()
    if status is not JobStatus.CANCELLED:
        raise errors.ConflictState(f"The job has already {status}.")
    return _json(views.job(await _view(gateway, caller, job_id)))


async def delete(request: Request, caller: ApiKey, job_id: UUID) -> Response:
    gateway: Gateway = request.app.state.gateway
    view = await _view(gateway, caller, job_id)
    try:
        status = await gateway.ledger.deletes.submit((job_id, view.tenant))
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    if status is not None and status not in TERMINAL:
        raise errors.ConflictState("The job has not ended; cancel it first.")
    gateway.recent_hits.clear()
    return _json({"id": str(job_id), "object": "job", "deleted": True})


async def retry(request: Request, caller: ApiKey, job_id: UUID) -> Response:
    gateway: Gateway = request.app.state.gateway
    view = await _view(gateway, caller, job_id)
    try:
        is_queued = await gateway.retry(job_id, view.tenant)
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    if not is_queued:
        raise errors.ConflictState("Only failed and expired jobs can be retried.")
    return _json(views.job(await _view(gateway, caller, job_id)), 202, {"Retry-After": "1"})


async def retry_all(request: Request, wanted: DeadLetters) -> Response:
    gateway: Gateway = request.app.state.gateway
    try:
        retried = await gateway.retry_all(wanted)
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    return _json({"object": "job.retry", "retried": retried}, 202)


async def delete_all(request: Request, wanted: Deletion) -> Response:
    gateway: Gateway = request.app.state.gateway
    try:
        found, deleted = await gateway.delete_all(wanted)
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    gateway.recent_hits.clear()
    return _json({"object": "job.deletion", "deleted": deleted, "has_more": found == wanted.limit})


async def events(request: Request, caller: ApiKey, job_id: UUID) -> Response:
    return _json(views.history(await _view(request.app.state.gateway, caller, job_id)))


async def explain(request: Request, caller: ApiKey, job_id: UUID) -> Response:
    return _json(views.explanation(await _view(request.app.state.gateway, caller, job_id)))


async def _call(gateway: Gateway, job_id: UUID) -> tuple[Call, UUID]:
    """The stored call, and under whose name its events are kept."""
    try:
        stored = await gateway.ledger.payloads.submit(job_id)
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    if stored is None:
        raise errors.JobNotFound()
    return Call.decode(stored[0]), stored[1]


async def _view(gateway: Gateway, caller: ApiKey, job_id: UUID) -> View:
    """The caller's own job; an admin's key sees every tenant's."""
    try:
        view = await gateway.ledger.views.submit((job_id, None if caller.is_admin else caller.tenant))
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    if view is None:
        raise errors.JobNotFound()
    return view


def _json(body: views.JSON, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), status, headers, "application/json")
