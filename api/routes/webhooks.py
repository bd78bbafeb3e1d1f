"""Webhooks: the secrets that sign them, and what became of each."""

from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request, Response

from api import auth, webhook_answers
from api.routes import parameters
from db.api_keys import ApiKey
from db.webhooks import Filter

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"])

Caller = Annotated[ApiKey, Depends(auth.authenticate)]
Status = Literal["pending", "delivered", "failed", "disabled"]


@router.post("/secrets", status_code=201)
async def create_webhook_secret(request: Request, caller: Caller) -> Response:
    """A new signing secret, shown once. The one before it signs beside it for a day."""
    return await webhook_answers.create_secret(request, caller)


@router.get("/secrets")
async def list_webhook_secrets(request: Request, caller: Caller) -> Response:
    """The living secrets, without their text."""
    return await webhook_answers.list_secrets(request, caller)


@router.get("/deliveries")
async def list_deliveries(
    request: Request,
    caller: Caller,
    status: Status | None = None,
    object_id: Annotated[str | None, parameters.text(128)] = None,
    after: UUID | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Response:
    """The caller's deliveries, newest first; `object_id` is the job or response that they tell of."""
    wanted = Filter(tenant=caller.tenant, status=status, object_id=object_id, after=after, limit=limit)
    return await webhook_answers.page(request, wanted)


@router.post("/deliveries/{delivery_id}/redeliver", status_code=202)
async def redeliver(request: Request, caller: Caller, delivery_id: UUID) -> Response:
    """Deliver again, with all tries, under the same event id; a URL that was disabled is called again."""
    return await webhook_answers.redeliver(request, caller, delivery_id)
