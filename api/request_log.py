"""The outermost layer: gives each request its id, and accounts for it once it is answered."""

import itertools
import re
import secrets
import time
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import metrics
from api.schemas import ENDPOINTS
from db.request_log import Entry
from tasks.metrics import child

if TYPE_CHECKING:
    from api.gateway import Gateway

# Asking the kernel for randomness costs 70 µs on some virtual machines: once a process is enough.
_PROCESS_ID = secrets.token_hex(10)
_numbers = itertools.count(1)
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class RequestLog:
    """ASGI middleware. `request.state.log` is the entry that later steps fill in."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = _given_id(scope) or f"{_PROCESS_ID}{next(_numbers):012x}"
        entry = Entry(request_id=request_id, endpoint="unknown")
        state = scope.setdefault("state", {})
        state["log"], state["request_id"] = entry, request_id
        raw_id = (b"x-request-id", request_id.encode())

        async def stamp(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry.status_code = message["status"]
                headers = message["headers"] = list(message["headers"])
                if raw_id not in headers:
                    headers.append(raw_id)
                if (limited := state.get("limited")) is not None:
                    headers += await scope["app"].state.gateway.rate_limits.headers(limited)
            await send(message)

        try:
            await self.app(scope, receive, stamp)
        finally:
            _account(scope, entry, time.perf_counter() - started)


def _given_id(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return str(value.decode())
    return None


def _account(scope: Scope, entry: Entry, seconds: float) -> None:
    route = getattr(scope.get("route"), "path", "unmatched")
    method = scope["method"] if route != "unmatched" else "any"
    child(metrics.REQUEST_SECONDS, route, method).observe(seconds)
    child(metrics.REQUESTS, route, method, str(entry.status_code)).inc()
    if entry.error_code:
        child(metrics.ERRORS, route, entry.error_code).inc()
    if not route.startswith(("/v1/", "/v2/", "/admin/")) and route not in ENDPOINTS:
        return
    entry.endpoint, entry.duration_ms = route, seconds * 1000
    if entry.cache_verdict:
        verdict, _, reason = entry.cache_verdict.partition("; ")
        child(metrics.CACHE, verdict, reason).inc()
    gateway: Gateway | None = getattr(scope["app"].state, "gateway", None)
    if gateway is not None:
        # Nobody waits for this line: an answer is not held up, nor lost, for its own account.
        gateway.ledger.log_entries.send(entry)
