"""The API's description of itself, as `/openapi.json` gives it: FastAPI's, with keys and errors as they are here."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from api.error_forms import FORMS, Form, anthropic, tei
from api.schemas import ENDPOINTS, request_body

Schema = dict[str, Any]

OPEN = {"/healthz", "/readyz"}
"""Paths that ask for no key."""

_STREAMED = {
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/responses/{response_id}",
    "/v1/jobs/{job_id}/stream",
}  # fmt: skip
"""Paths that answer with server-sent events, always or where they are asked for."""
_LATER = {*ENDPOINTS, "/v1/responses", "/v1/jobs/{job_id}", "/v1/jobs/{job_id}/result"}
"""Paths that answer 202 and the job while it has not ended."""

_TEXT: Schema = {"type": "string"}
_TEXT_OR_NULL: Schema = {"type": ["string", "null"]}


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "required": list(properties), "properties": properties}


_ERRORS = {
    "Error": _object(error=_object(message=_TEXT, type=_TEXT, param=_TEXT_OR_NULL, code=_TEXT)),
    "AnthropicError": _object(type={"const": "error"}, error=_object(type=_TEXT, message=_TEXT)),
    "TextEmbeddingsError": _object(error=_TEXT, error_type=_TEXT),
    "Problem": _object(type=_TEXT, title=_TEXT, status={"type": "integer"}, detail=_TEXT, code=_TEXT),
}
_FORM_NAMES: dict[Form, str] = {anthropic: "AnthropicError", tei: "TextEmbeddingsError"}


def install(app: FastAPI) -> None:
    """Make `app` describe itself so."""

    def openapi() -> Schema:
        if app.openapi_schema is None:
            app.openapi_schema = _described(get_openapi(title=app.title, version=app.version, routes=app.routes))
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _described(document: Schema) -> Schema:
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if isinstance(body := operation.get("requestBody"), str):
                operation["requestBody"] = request_body(body)
            _add_answers(path, operation["responses"])
            operation["responses"].pop("422", None)  # FastAPI's own answer to bad parameters, which none here gives
            refused = {"description": "Refused.", "content": _refusal(path)}
            failed = {"description": "Failed, or a service is away.", "content": _refusal(path)}
            operation["responses"] |= {"4XX": refused, "5XX": failed}
            if path in OPEN:
                operation["security"] = []
    components = document.setdefault("components", {})
    components["schemas"] = _ERRORS
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"key": []}]
    return document


def _add_answers(path: str, answers: Schema) -> None:
    if path in _STREAMED:
        answers["200"]["content"]["text/event-stream"] = {"schema": _TEXT}
    if path in _LATER:
        job = {"schema": {"type": "object"}}
        answers["202"] = {"description": "The job goes on by itself.", "content": {"application/json": job}}


def _refusal(path: str) -> Schema:
    form = FORMS.get(path)
    name = "Error" if form is None else _FORM_NAMES[form]
    return {
        "application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}},
        "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}},
    }
