"""What leaves the usage route. An admin's key reads every tenant's."""

import datetime
import uuid

import orjson
from starlette.requests import Request
from starlette.responses import Response

from api import errors, views
from api.gateway import Gateway
from db.api_keys import ApiKey
from db.lanes import LaneDown
from db.usage import GROUPINGS, Grouping, Wanted

_DAYS = 30
_MOST_DAYS = 366

Period = tuple[datetime.date, datetime.date]


def period(start: datetime.date | None, end: datetime.date | None) -> Period:
    """First and last day. Without an end: today (UTC); without a start: thirty days in all."""
    last = end or datetime.datetime.now(datetime.UTC).date()
    # Of the first days of the calendar there are not thirty before.
    first = start or datetime.date.fromordinal(max(last.toordinal() - _DAYS + 1, 1))
    if not 0 <= (last - first).days < _MOST_DAYS:
        raise errors.InvalidValue(f"start_date to end_date must be 1 to {_MOST_DAYS} days.", param="start_date")
    return first, last


def wanted(caller: ApiKey, period: Period, group_by: str, tenant: str | None, api_key_id: uuid.UUID | None,
           model: str | None, limit: int) -> Wanted:  # fmt: skip
    """What this caller may ask for. Another's tenant and an unknown one are refused alike."""
    names = group_by.split(",")
    by: tuple[Grouping, ...] = tuple(name for name in GROUPINGS if name in names)
    if len(by) != len(names):
        raise errors.InvalidValue(f"group_by names some of {', '.join(GROUPINGS)}, each once.", param="group_by")
    if not caller.is_admin:
        if tenant not in (None, caller.tenant):
            raise errors.Forbidden("Another tenant's usage is shown to keys with the scope admin only.")
        tenant = caller.tenant
    return Wanted(start=period[0], end=period[1], by=by, tenant=tenant, api_key_id=api_key_id, model=model, limit=limit)


async def find(request: Request, wanted: Wanted) -> Response:
    gateway: Gateway = request.app.state.gateway
    try:
        found = await gateway.ledger.usage.submit(wanted)
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    body = {
        "object": "list",
        "start_date": wanted.start,
        "end_date": wanted.end,
        "data": [views.usage(one) for one in found[: wanted.limit]],
        "has_more": len(found) > wanted.limit,
    }
    return Response(orjson.dumps(body), media_type="application/json")
