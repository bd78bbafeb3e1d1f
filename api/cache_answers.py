"""What leaves the cache routes. An admin's key reaches every tenant's entries."""

import re

import orjson
from starlette.requests import Request
from starlette.responses import Response

from api import errors
from api.gateway import Gateway
from db.api_keys import ApiKey
from db.cache import Purge
from db.lanes import LaneDown

_KEY = re.compile(r"[0-9a-f]{64}")


async def stats(request: Request, caller: ApiKey) -> Response:
    gateway: Gateway = request.app.state.gateway
    try:
        found = await gateway.ledger.cache_stats.submit(_tenant(caller))
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    return Response(orjson.dumps({"object": "list", "data": found}), media_type="application/json")


async def purge(request: Request, caller: ApiKey, key: str | None, model: str | None) -> Response:
    gateway: Gateway = request.app.state.gateway
    if key is not None and not _KEY.fullmatch(key):
        raise errors.InvalidValue("key must be 64 lower-case hexadecimal digits.", param="key")
    gateway.recent_hits.clear()
    raw = None if key is None else bytes.fromhex(key)
    try:
        removed = await gateway.ledger.purges.submit(Purge(tenant=_tenant(caller), key=raw, model=model))
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    return Response(orjson.dumps({"object": "cache.purge", "removed": removed}), media_type="application/json")


def _tenant(caller: ApiKey) -> str | None:
    return None if caller.is_admin else caller.tenant
