"""Every way a call can be refused or fail, and how each is written.

Each class below is a row of the table: status, OpenAI error type, code, default message. Raise one
anywhere between the request and the answer; `api.error_handlers` answers with it. Messages are our own
words: no text of the request ever appears in one.
"""

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, ClassVar

import orjson
from starlette.responses import Response

if TYPE_CHECKING:
    from api.error_forms import Form


class APIError(Exception):
    """A call's end, as the caller sees it."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    default: ClassVar[str] = "Something went wrong on our side."
    is_permanent: bool = False
    """Sent as `x-should-retry: false`: OpenAI's SDKs otherwise retry 409, 429 and every 5xx."""
    default_retry_s: ClassVar[float | None] = None
    problem: ClassVar[str] = "about:blank"
    """The type URI of the RFC 9457 form."""
    extra_headers: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self, message: str | None = None, *, param: str | None = None, retry_after_s: float | None = None,
        is_permanent: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message or self.default)
        self.message = message or self.default
        self.param = param
        """The request's field, as a dotted path."""
        self.retry_after_s = self.default_retry_s if retry_after_s is None else retry_after_s
        if is_permanent is not None:
            self.is_permanent = is_permanent


class InvalidRequest(APIError):
    status, type, code = 400, "invalid_request_error", "invalid_request"
    default = "The request cannot be understood."


class InvalidJSON(InvalidRequest):
    code, default = "invalid_json", "The body is not valid JSON."


class InvalidEncoding(InvalidRequest):
    code, default = "invalid_encoding", "The body is not UTF-8 without a byte order mark."


class JSONTooDeep(InvalidRequest):
    code, default = "json_too_deep", "The body is nested too deeply."


class DuplicateKey(InvalidRequest):
    code, default = "duplicate_key", "An object of the body has the same key twice."


class NonFiniteNumber(InvalidRequest):
    code, default = "non_finite_number", "NaN, Infinity and numbers beyond a double's range are not allowed."


class NumberOutOfRange(InvalidRequest):
    code, default = "number_out_of_range", "A number is out of range."


class PayloadTooLarge(InvalidRequest):
    status, code, default = 413, "payload_too_large", "The body is too large."


class InvalidHTTP(InvalidRequest):
    code, default = "invalid_http", "The request is not valid HTTP/1.1."


class HeadersTooLarge(InvalidRequest):
    status, code, default = 431, "headers_too_large", "The request's line and headers are too large or too many."


class UnsupportedMediaType(InvalidRequest):
    status, code, default = 415, "unsupported_media_type", "Content-Type must be application/json (UTF-8)."


class UnsupportedContentEncoding(InvalidRequest):
    status, code, default = 415, "unsupported_content_encoding", "The body must not be compressed."


class InvalidValue(InvalidRequest):
    code, default = "validation_error", "A field has the wrong type or an impossible value."


class UnknownField(InvalidRequest):
    code, default = "unknown_field", "The request has a field that this endpoint does not know."


class UnsupportedParameter(InvalidRequest):
    code, default = "unsupported_parameter", "A parameter is known but cannot be honoured."


class InvalidPrompt(InvalidRequest):
    code, default = "invalid_prompt", "The prompt is empty or cannot be used with this model."


class ContextLengthExceeded(InvalidRequest):
    code, default = "context_length_exceeded", "The prompt does not fit the model's context."


class ModelNotFound(InvalidRequest):
    status, code, default = 404, "model_not_found", "The model does not exist here, or does not do this task."


class JobNotFound(InvalidRequest):
    status, code, default = 404, "job_not_found", "There is no such job."


class KeyNotFound(InvalidRequest):
    status, code, default = 404, "key_not_found", "There is no such living API key."


class TenantNotFound(InvalidRequest):
    status, code, default = 404, "tenant_not_found", "There is no such tenant."


class ResponseNotFound(InvalidRequest):
    status, code, default = 404, "response_not_found", "There is no such response, or it is not stored."


class PreviousResponseNotFound(InvalidRequest):
    code, default = "previous_response_not_found", "There is no such stored response to go on from."


class DeliveryNotFound(InvalidRequest):
    status, code, default = 404, "delivery_not_found", "There is no such delivery."


class WebhookSecretMissing(InvalidRequest):
    code, default = (
        "webhook_secret_missing",
        "Webhooks are signed: make a secret first, with POST /v1/webhooks/secrets.",
    )


class FileNotFound(InvalidRequest):
    status, code, default = 404, "file_not_found", "There is no such file."


class BatchNotFound(InvalidRequest):
    status, code, default = 404, "batch_not_found", "There is no such batch."


class NotFound(InvalidRequest):
    status, code, default = 404, "not_found", "There is no such path."


class MethodNotAllowed(InvalidRequest):
    status, code, default = 405, "method_not_allowed", "The path exists, but not with this method."


class Unauthorized(APIError):
    status, type, code = 401, "authentication_error", "invalid_api_key"
    default = "A valid API key is needed: send `Authorization: Bearer <key>`."
    extra_headers: ClassVar[Mapping[str, str]] = {"WWW-Authenticate": "Bearer"}


class Forbidden(APIError):
    status, type, code, default = 403, "permission_error", "permission_denied", "This API key may not do that."


class ConflictState(InvalidRequest):
    status, code, default = 409, "conflict_state", "The job's state does not allow that."
    is_permanent = True


class JobCancelled(InvalidRequest):
    status, code, default = 409, "job_cancelled", "The job was cancelled."
    is_permanent = True


class IdempotencyKeyReuse(InvalidRequest):
    status, code = 422, "idempotency_key_reuse"
    default = "This Idempotency-Key was used for a different request."


class Quarantined(InvalidRequest):
    """Temporary, but far longer than any client's own retries."""

    status, code = 409, "quarantined"
    default = "This request has failed on every attempt lately, and is refused for a while."
    is_permanent = True


class StreamInterrupted(APIError):
    status, code = 502, "stream_interrupted"
    default = "The stream cannot go on without a gap; read the job's result instead."
    is_permanent = True


class GatewayStopping(APIError):
    status, code, default = 503, "gateway_stopping", "This gateway is being replaced; go on with Last-Event-ID."
    default_retry_s = 1.0


class RateLimited(APIError):
    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"
    default = "The API key's rate limit is reached."
    default_retry_s = 1.0
    problem = "https://iana.org/assignments/http-problem-types#quota-exceeded"


class InsufficientQuota(APIError):
    """Of a day's budget, what is left does not hold the request."""

    status, type, code = 429, "insufficient_quota", "insufficient_quota"
    default = "The API key's budget of the day is used up."
    default_retry_s = 60.0
    is_permanent = True
    problem = "https://iana.org/assignments/http-problem-types#quota-exceeded"


class TooManyUploads(APIError):
    status, type, code = 429, "rate_limit_error", "too_many_uploads"
    default = "This gateway is taking as many uploads as it can."
    default_retry_s = 1.0
    problem = "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity"


class QueueFull(APIError):
    status, type, code = 429, "rate_limit_error", "queue_full"
    default = "The model's queue is full."
    default_retry_s = 1.0
    problem = "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity"


class DeadlineUnmeetable(APIError):
    status, type, code = 429, "rate_limit_error", "deadline_unmeetable"
    default = "The job cannot end before its deadline."
    default_retry_s = 1.0
    problem = "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity"


class BackendFailed(APIError):
    """The backend's own attempts are used up by the time a caller sees this, so it is permanent."""

    status, code, default = 502, "backend_error", "The backend could not complete the job."
    is_permanent = True


class AttemptsExhausted(BackendFailed):
    code, default = "attempts_exhausted", "The job failed on every attempt."


class ModelUnavailable(APIError):
    status, code, default = 503, "model_unavailable", "No worker of this model is up."
    default_retry_s = 5.0
    problem = "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity"


class DependencyUnavailable(APIError):
    status, code, default = 503, "dependency_unavailable", "A service that the gateway needs is not reachable."
    default_retry_s = 2.0


class JobExpired(APIError):
    status, type, code, default = 504, "timeout_error", "job_expired", "The job's deadline passed."
    is_permanent = True


class OnlyIfCached(APIError):
    status, code, default = 504, "only_if_cached", "The answer is not cached, and only-if-cached was asked for."
    is_permanent = True


class InternalError(APIError):
    """The last resort. Every other way to fail has its own row."""


def _tree(root: type[APIError]) -> list[type[APIError]]:
    return [root, *(found for child in root.__subclasses__() for found in _tree(child))]


TABLE: Mapping[str, type[APIError]] = {row.code: row for row in _tree(APIError)} | {"internal_error": InternalError}
"""Code → class."""


def as_dict(error: APIError) -> dict[str, str | None]:
    """OpenAI's error object; its four keys are always there."""
    return {"message": error.message, "type": error.type, "param": error.param, "code": error.code}


def render(error: APIError, *, request_id: str | None = None, accept: str = "", form: "Form | None" = None) -> Response:
    """OpenAI's body, or that of `form`, or RFC 9457's where `accept` names application/problem+json."""
    headers = dict(error.extra_headers)
    if request_id:
        headers["x-request-id"] = request_id
        if form is not None:
            headers["request-id"] = request_id
    if error.is_permanent:
        headers["x-should-retry"] = "false"
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
        headers["retry-after-ms"] = str(max(1, math.ceil(error.retry_after_s * 1000)))
    status, body, media_type = error.status, {"error": as_dict(error)}, "application/json"
    if "application/problem+json" in accept.lower():
        body, media_type = _problem(error, request_id), "application/problem+json"
    elif form is not None:
        status, body = form(error, request_id)
    return Response(orjson.dumps(body), status, headers, media_type)


def stream_error(error: APIError) -> bytes:
    """The SSE event that ends a stream badly. No `[DONE]` follows it."""
    return b"data: " + orjson.dumps({"error": as_dict(error)}) + b"\n\n"


def from_job(error: Mapping[str, Any]) -> APIError:
    """The error a job ended with, `{code, message, param?}`, as its caller sees it. A code that is not
    in the table, or that would blame the gateway, becomes backend_error."""
    found = TABLE.get(str(error.get("code")), BackendFailed)
    row = BackendFailed if found.status == 500 else found
    return row(error.get("message"), param=error.get("param"))


def _problem(error: APIError, request_id: str | None) -> dict[str, Any]:
    title = HTTPStatus(error.status).phrase
    body = {"type": error.problem, "title": title, "status": error.status, "detail": error.message}
    known = {"code": error.code, "param": error.param, "request_id": request_id}
    return body | {name: value for name, value in known.items() if value is not None}
