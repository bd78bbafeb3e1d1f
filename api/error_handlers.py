"""The one place that turns a failure into an HTTP answer, whoever raised it."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import errors
from api.error_forms import Form
from api.errors import APIError

log = structlog.get_logger(__name__)


def install(app: FastAPI, forms: Mapping[str, Form] | None = None) -> None:
    """Answer every failure of `app` from the table, on the paths of `forms` in theirs. Call after its other
    middleware is added, so that failures of those are answered too."""
    app.state.error_forms = forms or {}
    app.add_exception_handler(APIError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_framework_validation)
    app.add_middleware(_LastResort)


def _answer(request: Request, error: APIError) -> Response:
    request_id = getattr(request.state, "request_id", None)
    if (entry := getattr(request.state, "log", None)) is not None:
        entry.error_code = error.code
    form = request.app.state.error_forms.get(request.url.path)
    return errors.render(error, request_id=request_id, accept=request.headers.get("accept", ""), form=form)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return _answer(request, error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """What the framework raises by itself: routing, and bodies that routes left to it."""
    assert isinstance(error, HTTPException)
    otherwise = errors.InvalidRequest if error.status_code < 500 else errors.InternalError
    row = _BY_STATUS.get(error.status_code, otherwise)
    response = _answer(request, row())
    response.headers.update(error.headers or {})
    return response


async def _on_framework_validation(request: Request, error: Exception) -> Response:
    """Path and query parameters. The framework's own answer repeats the input; this names the field."""
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = dict(error.errors()[0]) if error.errors() else {}
    where = [str(part) for part in first.get("loc", ())[1:]]
    is_declared = first.get("type") != "extra_forbidden"
    return _answer(request, errors.InvalidValue(param=".".join(where) if where and is_declared else None))


_BY_STATUS: Mapping[int, type[APIError]] = {
    401: errors.Unauthorized,
    403: errors.Forbidden,
    404: errors.NotFound,
    405: errors.MethodNotAllowed,
    413: errors.PayloadTooLarge,
    415: errors.UnsupportedMediaType,
    429: errors.RateLimited,
    503: errors.DependencyUnavailable,
}
"""What the framework's own refusals mean."""


class _LastResort:
    """Answers what nothing else caught, and logs its type and place but not its text: messages of
    foreign exceptions may hold parts of a request. The server's own handler would print the traceback.

    Once an answer has begun it cannot be replaced: returning without its end makes the server close the
    connection, which a client sees as a truncated answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        has_begun = False

        async def watch(message: Message) -> None:
            nonlocal has_begun
            has_begun = has_begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except ClientDisconnect:
            return
        except Exception as error:
            request = Request(scope)
            request_id = getattr(request.state, "request_id", None)
            log.error("internal_error", error=type(error).__name__, place=_place(), request_id=request_id)
            if not has_begun:
                answer = _answer(request, error if isinstance(error, APIError) else errors.InternalError())
                await answer(scope, receive, send)


def _place() -> str:
    """Where the exception now being handled was raised, as file:line."""
    trace = sys.exc_info()[2]
    while trace and trace.tb_next:
        trace = trace.tb_next
    return f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else ""
