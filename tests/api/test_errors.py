"""The table of errors and its rendering: status, body, headers, and nothing of the request."""

import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from structlog.testing import capture_logs

from api import error_handlers, errors

EXPECTED = {
    "invalid_json": 400,
    "invalid_encoding": 400,
    "json_too_deep": 400,
    "duplicate_key": 400,
    "non_finite_number": 400,
    "number_out_of_range": 400,
    "payload_too_large": 413,
    "invalid_http": 400,
    "headers_too_large": 431,
    "unsupported_media_type": 415,
    "unsupported_content_encoding": 415,
    "validation_error": 400,
    "response_not_found": 404,
    "delivery_not_found": 404,
    "webhook_secret_missing": 400,
    "previous_response_not_found": 400,
    "unknown_field": 400,
    "unsupported_parameter": 400,
    "invalid_prompt": 400,
    "context_length_exceeded": 400,
    "model_not_found": 404,
    "job_not_found": 404,
    "file_not_found": 404,
    "batch_not_found": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "invalid_api_key": 401,
    "permission_denied": 403,
    "key_not_found": 404,
    "tenant_not_found": 404,
    "conflict_state": 409,
    "job_cancelled": 409,
    "idempotency_key_reuse": 422,
    "quarantined": 409,
    "stream_interrupted": 502,
    "gateway_stopping": 503,
    "rate_limit_exceeded": 429,
    "deadline_unmeetable": 429,
    "insufficient_quota": 429,
    "queue_full": 429,
    "too_many_uploads": 429,
    "backend_error": 502,
    "attempts_exhausted": 502,
    "model_unavailable": 503,
    "dependency_unavailable": 503,
    "job_expired": 504,
    "only_if_cached": 504,
    "internal_error": 500,
}


@pytest.mark.parametrize(("code", "status"), EXPECTED.items())
def test_rendered_as_openai_does(code: str, status: int) -> None:
    response = errors.render(errors.TABLE[code](param="some.field"), request_id="req-1")
    body = json.loads(bytes(response.body))
    assert response.status_code == status
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == code
    assert body["error"]["param"] == "some.field"
    assert body["error"]["message"]
    assert body["error"]["type"].endswith("_error") or body["error"]["type"] == code == "insufficient_quota"
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"] == "req-1"


@pytest.mark.parametrize(("code", "status"), EXPECTED.items())
def test_rendered_as_a_problem(code: str, status: int) -> None:
    accept = "text/html, Application/Problem+JSON;q=0.9"
    response = errors.render(errors.TABLE[code](), request_id="req-1", accept=accept)
    body = json.loads(bytes(response.body))
    assert response.status_code == body["status"] == status
    assert body["code"] == code
    assert all(body[member] for member in ("title", "detail", "type"))
    assert body["request_id"] == "req-1"
    assert "param" not in body
    assert response.headers["content-type"] == "application/problem+json"


def test_table_has_every_row_once() -> None:
    assert set(EXPECTED) | {"invalid_request"} == set(errors.TABLE)
    rows = [row for row in errors._tree(errors.APIError) if row not in {errors.APIError, errors.InternalError}]
    assert len({row.code for row in rows}) == len(rows)


def test_only_the_last_resort_is_a_500() -> None:
    assert [code for code, row in errors.TABLE.items() if row.status == 500] == ["internal_error"]


@pytest.mark.parametrize(
    ("seconds", "header", "milliseconds"), [(0.0, "1", "1"), (0.2, "1", "200"), (1.0, "1", "1000"), (2.1, "3", "2100")]
)
def test_retry_after_is_whole_seconds_and_never_zero(seconds: float, header: str, milliseconds: str) -> None:
    headers = errors.render(errors.QueueFull(retry_after_s=seconds)).headers
    assert (headers["Retry-After"], headers["retry-after-ms"]) == (header, milliseconds)


@pytest.mark.parametrize(
    "row", [errors.RateLimited, errors.QueueFull, errors.ModelUnavailable, errors.DependencyUnavailable]
)
def test_passing_troubles_say_when_to_come_back(row: type[errors.APIError]) -> None:
    headers = errors.render(row()).headers
    assert int(headers["Retry-After"]) >= 1
    assert "x-should-retry" not in headers


@pytest.mark.parametrize("code", [code for code, row in errors.TABLE.items() if row.status in {409, 502, 504}])
def test_lasting_troubles_stop_the_sdk(code: str) -> None:
    headers = errors.render(errors.TABLE[code]()).headers
    assert headers["x-should-retry"] == "false"
    assert "Retry-After" not in headers


def test_unauthorized_names_the_scheme() -> None:
    assert errors.render(errors.Unauthorized()).headers["WWW-Authenticate"] == "Bearer"


def test_stream_error_is_one_event() -> None:
    event = errors.stream_error(errors.BackendFailed("line\nbreak"))
    assert event.endswith(b"\n\n")
    assert event.count(b"\n") == 2
    assert json.loads(event.removeprefix(b"data: "))["error"]["code"] == "backend_error"


@pytest.mark.parametrize(
    ("stored", "code", "status"),
    [
        ({"code": "attempts_exhausted", "message": "m"}, "attempts_exhausted", 502),
        ({"code": "job_cancelled", "message": "m"}, "job_cancelled", 409),
        ({"code": "context_length_exceeded", "message": "m", "param": "messages"}, "context_length_exceeded", 400),
        ({"code": "never heard of", "message": "m"}, "backend_error", 502),
        ({"code": "internal_error", "message": "m"}, "backend_error", 502),
        ({}, "backend_error", 502),
    ],
)
def test_from_job(stored: dict[str, Any], code: str, status: int) -> None:
    error = errors.from_job(stored)
    assert (error.code, error.status, error.param) == (code, status, stored.get("param"))
    assert error.message == stored.get("message", errors.BackendFailed.default)


@pytest.fixture
async def client() -> httpx.AsyncClient:
    app = FastAPI()

    @app.get("/known")
    async def known() -> None:
        raise errors.ModelUnavailable("Nobody home.", retry_after_s=7)

    @app.get("/crash")
    async def crash() -> None:
        raise RuntimeError("SECRET")

    @app.get("/crash-late")
    async def crash_late() -> Response:
        async def pieces() -> Any:
            yield b"data: 1\n\n"
            raise RuntimeError("SECRET")

        return StreamingResponse(pieces())

    @app.get("/typed")
    async def typed(number: int) -> int:
        return number

    @app.middleware("http")
    async def with_id(request: Request, following: Any) -> Response:
        request.state.request_id = "req-9"
        if request.url.path == "/middleware":
            raise ValueError("SECRET")
        response: Response = await following(request)
        return response

    error_handlers.install(app)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=True), base_url="http://test")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/known", 503, "model_unavailable"),
        ("GET", "/nowhere", 404, "not_found"),
        ("DELETE", "/known", 405, "method_not_allowed"),
        ("GET", "/typed?number=SECRET", 400, "validation_error"),
        ("GET", "/crash", 500, "internal_error"),
        ("GET", "/middleware", 500, "internal_error"),
    ],
)
async def test_installed_handlers(client: httpx.AsyncClient, method: str, path: str, status: int, code: str) -> None:
    with capture_logs() as logs:
        response = await client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert response.headers["x-request-id"] == "req-9"
    assert "SECRET" not in response.text
    assert "SECRET" not in str(logs)
    assert ("internal_error" in str(logs)) == (status == 500)


async def test_handlers_name_the_field_and_the_methods(client: httpx.AsyncClient) -> None:
    assert (await client.get("/typed?number=x")).json()["error"]["param"] == "number"
    assert (await client.delete("/known")).headers["allow"] == "GET"
    assert (await client.get("/known")).headers["retry-after"] == "7"


async def test_problem_form_is_negotiated(client: httpx.AsyncClient) -> None:
    response = await client.get("/known", headers={"accept": "application/problem+json"})
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["code"] == "model_unavailable"


async def test_a_crash_is_logged_by_type_and_place(client: httpx.AsyncClient) -> None:
    with capture_logs() as logs:
        await client.get("/crash")
    (entry,) = logs
    assert entry["error"] == "RuntimeError"
    assert entry["place"].startswith("test_errors.py:")


async def test_a_crash_after_the_first_byte_ends_the_answer_unfinished() -> None:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("SECRET")

    async def keep(message: Any) -> None:
        sent.append(message)

    await error_handlers._LastResort(app)({"type": "http", "headers": []}, None, keep)  # type: ignore[arg-type]
    assert [message["type"] for message in sent] == ["http.response.start"]
