"""Errors in the form of other APIs, on the routes that speak them. Statuses and messages come from the one table.

A form that has no place for the field's name puts it in front of the message.
"""

from collections.abc import Callable, Mapping
from typing import Any

from api import errors
from api.errors import APIError
from tasks.identity import frame

Form = Callable[[APIError, str | None], tuple[int, dict[str, Any]]]
"""Error and request id → status and body."""

_TEI_TYPES = {
    401: "Unauthorized",
    403: "Unauthorized",
    404: "NotFound",
    429: "Overloaded",
    503: "Unhealthy",
}
"""The first three are ours: its servers have one model and one key."""


def tei(error: APIError, request_id: str | None) -> tuple[int, dict[str, Any]]:
    """text-embeddings-inference's. What its clients know as refused input is a 422, and a failed model a 424."""
    status = error.status
    kind = _TEI_TYPES.get(status, "Validation" if status < 500 else "Backend")
    if isinstance(error, errors.InvalidPrompt):
        kind = "Empty"
    elif status == 400:
        status = 422
    elif status in (500, 502):
        status = 424
    return status, {"error": _message(error), "error_type": kind}


_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic(error: APIError, request_id: str | None) -> tuple[int, dict[str, Any]]:
    """Anthropic's, which has no place for a code either."""
    kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    body = {"type": "error", "error": {"type": kind, "message": _message(error)}}
    return error.status, body if request_id is None else {**body, "request_id": request_id}


def stream_error(endpoint: str, error: APIError) -> bytes:
    """The event that ends a stream of that endpoint badly. Nothing follows it."""
    if FORMS.get(endpoint) is anthropic:
        return frame(anthropic(error, None)[1], name="error")
    return errors.stream_error(error)


def _message(error: APIError) -> str:
    is_named = error.param is None or error.message.startswith(error.param)
    return error.message if is_named else f"{error.param}: {error.message}"


FORMS: Mapping[str, Form] = {
    "/embed": tei,
    "/predict": tei,
    "/rerank": tei,
    "/info": tei,
    "/v1/messages": anthropic,
    "/v1/messages/count_tokens": anthropic,
}
"""By path; every other path has OpenAI's."""
