"""What was used, by day, key and model."""

import datetime
import uuid
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response

from api import auth, usage_answers
from api.routes import parameters
from db.api_keys import ApiKey

router = APIRouter(prefix="/v1/usage", tags=["usage"])

Caller = Annotated[ApiKey, Depends(auth.authenticate)]


@router.get("")
async def get_usage(
    request: Request,
    caller: Caller,
    start_date: datetime.date | None = None,
    end_date: datetime.date | None = None,
    group_by: Annotated[str, Query(max_length=64)] = "day",
    tenant: Annotated[str | None, parameters.text(256)] = None,
    api_key_id: uuid.UUID | None = None,
    model: Annotated[str | None, parameters.text(256)] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> Response:
    """Requests by how they ended, tokens and cost, for days of UTC; the last 30 where none are named."""
    period = usage_answers.period(start_date, end_date)
    wanted = usage_answers.wanted(caller, period, group_by, tenant, api_key_id, model, limit)
    return await usage_answers.find(request, wanted)
