"""What leaves the batch routes. Another tenant's batch and an unknown one get the same 404."""

import datetime
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from api import decoding, errors, file_answers, fingerprints, ids, schemas, uploads, webhook_answers, wishes
from api.gateway import Gateway
from api.schemas.batches import BatchRequest
from db import batches
from db.accept import Idempotency, Reserved
from db.api_keys import ApiKey
from db.batches import Batch, BatchFilter, NewBatch
from db.lanes import Lane, LaneDown
from db.states import BatchStatus

PREFIX = "batch_"
_TIMES = (
    "created_at", "in_progress_at", "expires_at", "finalizing_at", "completed_at", "failed_at", "expired_at",
    "cancelling_at", "cancelled_at",
)  # fmt: skip
_SHOWING = {BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED}


class Batches:
    """The gateway's lanes for batches. Running them is the batcher's business (`api.batcher`)."""

    def __init__(self, database_url: str) -> None:
        self.creates = Lane(database_url, batches.create)
        self.views = Lane(database_url, batches.view)
        self.pages = Lane(database_url, batches.find)
        self.cancels = Lane(database_url, batches.cancel)

    async def close(self) -> None:
        for lane in (self.creates, self.views, self.pages, self.cancels):
            await lane.close()


def as_dict(batch: Batch) -> dict[str, Any]:
    """OpenAI's batch object. Its files are named once they are whole."""
    tokens = {"input_tokens": batch.input_tokens, "output_tokens": batch.output_tokens}
    is_over = batch.status in _SHOWING
    return {
        "id": ids.to_wire(PREFIX, batch.id),
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": None if batch.errors is None else {"object": "list", "data": batch.errors},
        "input_file_id": ids.to_wire(file_answers.PREFIX, batch.input_file_id),
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": ids.to_wire(file_answers.PREFIX, batch.output_file_id)
        if is_over and batch.output_file_id
        else None,
        "error_file_id": ids.to_wire(file_answers.PREFIX, batch.error_file_id)
        if is_over and batch.error_file_id
        else None,
        **{name: _seconds(getattr(batch, name)) for name in _TIMES},
        "request_counts": {"total": batch.num_total, "completed": batch.num_completed, "failed": batch.num_failed},
        "usage": {
            **tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": sum(tokens.values()),
        },
        "metadata": batch.metadata,
    }


async def create(request: Request, caller: ApiKey) -> Response:
    gateway: Gateway = request.app.state.gateway
    limits = gateway.catalog.limits
    wanted = schemas.read(BatchRequest, decoding.decode(await decoding.read_body(request, limits), limits))
    key = wishes.read(request.headers, gateway.config.wait_s).idempotency_key
    asked = fingerprints.batch(wanted)
    input_id = ids.from_wire(file_answers.PREFIX, wanted.input_file_id)
    if input_id is None:
        raise errors.FileNotFound(param="input_file_id")
    if wanted.webhook is not None:
        await webhook_answers.check(gateway, caller, wanted.webhook.url)
    expires = wanted.output_expires_after
    new = NewBatch(
        id=ids.uuid7(),
        tenant=caller.tenant,
        api_key_id=caller.id,
        endpoint=wanted.endpoint,
        input_file_id=input_id,
        completion_window=wanted.completion_window,
        window_s=wanted.window_s,
        metadata=None if wanted.metadata is None else orjson.dumps(wanted.metadata).decode(),
        output_ttl_s=uploads.DEFAULT_TTL_S if expires is None else expires.seconds,
        webhook=None if wanted.webhook is None else orjson.dumps(wanted.webhook.kept()).decode(),
        idempotency=None if key is None else Idempotency(caller.id, key, asked),
    )
    try:
        made = await _batches(request).creates.submit(new)
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    if made is None:
        raise errors.FileNotFound(param="input_file_id")
    if isinstance(made, Reserved):
        if made.fingerprint != asked:
            raise errors.IdempotencyKeyReuse()
        known = await _ask(_batches(request).views, caller, ids.to_wire(PREFIX, made.job_id))
        return _json(as_dict(known), {"Idempotent-Replayed": "true"})
    return _json(as_dict(made))


async def page(request: Request, caller: ApiKey, after: str | None, limit: int) -> Response:
    start = None
    if after is not None and (start := ids.from_wire(PREFIX, after)) is None:
        raise errors.InvalidValue("after must be the id of a batch.", param="after")
    try:
        found = await _batches(request).pages.submit(BatchFilter(tenant=caller.tenant, after=start, limit=limit))
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    shown = [as_dict(batch) for batch in found[:limit]]
    return _json(
        {
            "object": "list",
            "data": shown,
            "first_id": shown[0]["id"] if shown else None,
            "last_id": shown[-1]["id"] if shown else None,
            "has_more": len(found) > len(shown),
        }
    )


async def get(request: Request, caller: ApiKey, wire_id: str) -> Response:
    return _json(as_dict(await _ask(_batches(request).views, caller, wire_id)))


async def cancel(request: Request, caller: ApiKey, wire_id: str) -> Response:
    batch = await _ask(_batches(request).cancels, caller, wire_id)
    if batch.status not in (BatchStatus.CANCELLING, BatchStatus.CANCELLED):
        raise errors.ConflictState(f"The batch is {batch.status} and cannot be cancelled.")
    return _json(as_dict(batch))


async def _ask(lane: "Lane[Any, Batch | None]", caller: ApiKey, wire_id: str) -> Batch:
    batch_id = ids.from_wire(PREFIX, wire_id)
    if batch_id is None:
        raise errors.BatchNotFound()
    try:
        batch = await lane.submit((batch_id, caller.tenant))
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    if batch is None:
        raise errors.BatchNotFound()
    return batch


def _batches(request: Request) -> Batches:
    found: Batches = request.app.state.batches
    return found


def _seconds(moment: datetime.datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())


def _json(body: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), 200, headers, "application/json")
