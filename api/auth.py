"""Who calls: the API key of a request, checked per route.

A key found valid is remembered for a second and a half, so a revocation, and every other change of a key,
takes effect within two.
"""

import ipaddress
import time
from collections.abc import Callable
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api import errors, rate_limits
from db import api_keys
from db.api_keys import ApiKey
from db.lanes import Lane, LaneDown

_REMEMBERED_S = 1.5
_MAX_REMEMBERED = 10_000
_MAX_SECRET = 128


class Keys:
    """Verifies secrets against the ledger."""

    def __init__(self, database_url: str) -> None:
        self._lane = Lane(database_url, api_keys.verify, is_kept=True)
        self._known: dict[str, tuple[float, ApiKey]] = {}
        """By Authorization header."""

    async def verify(self, authorization: str) -> ApiKey | None:
        """The living key that an Authorization header holds. Raises LaneDown: a database that is away is
        not a bad key."""
        known = self._known.get(authorization)
        if known is not None and known[0] > time.monotonic():
            return known[1]
        self._known.pop(authorization, None)
        scheme, _, secret = authorization.partition(" ")
        secret = secret.strip()
        if scheme.lower() != "bearer" or not secret.startswith(api_keys.PREFIX) or len(secret) > _MAX_SECRET:
            return None
        key = await self._lane.submit(api_keys.hash_of(secret))
        if key is not None:
            if len(self._known) >= _MAX_REMEMBERED:
                self._known.clear()
            self._known[authorization] = (time.monotonic() + _REMEMBERED_S, key)
        return key

    async def close(self) -> None:
        await self._lane.close()


async def authenticate(request: Request) -> ApiKey:
    """The caller of a request. Every public route but the health checks depends on this."""
    key = await _caller(request)
    scope = needed_scope(request.method, request.scope["path"])
    if scope not in key.scopes:
        raise errors.Forbidden(f"This API key lacks the scope `{scope}`.")
    return key


async def authenticate_admin(request: Request) -> ApiKey:
    """The operator who calls. Every route of the admin API depends on this: it is not there at all for those
    whom the setting keeps out."""
    served: str = request.app.state.gateway.config.admin_api
    if served == "off" or (served == "loopback" and not _is_local(request)):
        raise errors.NotFound()
    key = await _caller(request)
    if not key.is_admin:
        raise errors.Forbidden("Only an admin's API key may do that.")
    return key


def needed_scope(method: str, path: str) -> str:
    """What a key must be allowed to do for such a request."""
    if method in ("GET", "HEAD"):
        return "read"
    if method == "DELETE" or path.endswith("/cancel"):
        return "cancel"
    return "submit"


def _is_local(request: Request) -> bool:
    try:
        return request.client is not None and ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False


async def _caller(request: Request) -> ApiKey:
    keys: Keys = request.app.state.keys
    try:
        key = await keys.verify(_authorization(request))
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    if key is None:
        raise errors.Unauthorized()
    entry = request.state.log
    entry.tenant, entry.api_key_id = key.tenant, key.id
    if rate_limits.is_limited(key):
        request.state.limited = key
    return key


def _authorization(request: Request) -> str:
    """Anthropic's clients send the bare key, as `x-api-key`."""
    given = request.headers.get("authorization")
    return given if given is not None else f"Bearer {request.headers.get('x-api-key', '')}"


class CallerRoute(APIRoute):
    """A route whose function takes (request, caller) and nothing else.

    Declared and documented like any other; called without FastAPI's dependency solver and exit stacks:
    by profile, 60 µs of a request that otherwise needs 150.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            request = Request(scope, receive, send)
            response: Response = await endpoint(request, await authenticate(request))
            await response(scope, receive, send)

        self.app = answer
