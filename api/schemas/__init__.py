"""The wire, one file per API family: JSON objects in, calls out.

`parse` is the second thing that can refuse a call, after decoding: it knows every field of every
endpoint, and answers each refusal with the field's path and what is expected there, never with the
value that was sent.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import orjson
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from api import errors
from api.schemas import tei
from api.schemas.admin import KeyChange, KeyRequest, TenantChange
from api.schemas.batches import BatchRequest
from api.schemas.chat import ChatRequest
from api.schemas.classify import ClassifyRequest
from api.schemas.completions import CompletionRequest
from api.schemas.embeddings import EmbeddingRequest
from api.schemas.fields import CallModel, WireModel
from api.schemas.jobs import JobRequest
from api.schemas.messages import CountTokensRequest, MessagesRequest
from api.schemas.rerank import RerankRequest
from api.schemas.responses import ResponseRequest
from api.schemas.score import ScoreRequest
from api.schemas.tokenize import DetokenizeRequest, TokenizeRequest
from catalog import LimitsEntry
from tasks.call import Call

ENDPOINTS: Mapping[str, type[CallModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/v1/classify": ClassifyRequest,
    "/v1/rerank": RerankRequest,
    "/v1/score": ScoreRequest,
    "/v1/messages": MessagesRequest,
    "/embed": tei.EmbedRequest,
    "/predict": tei.PredictRequest,
    "/rerank": tei.RerankRequest,
}
"""Inference endpoint → what it reads."""

BODIES: Mapping[str, type[WireModel]] = {
    **ENDPOINTS,
    "/v1/jobs": JobRequest,
    "/v1/responses": ResponseRequest,
    "/v1/batches": BatchRequest,
    "/v1/tokenize": TokenizeRequest,
    "/v1/detokenize": DetokenizeRequest,
    "/admin/v1/keys": KeyRequest,
    "/admin/v1/keys/{id}": KeyChange,
    "/admin/v1/tenants/{id}": TenantChange,
    "/tokenize": TokenizeRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
    "/detokenize": DetokenizeRequest,
}
"""Every route with a JSON body → what it reads."""

_DEFAULT_LIMITS = LimitsEntry()
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_SUBJECT = re.compile(r"^(Value error, )?(Value|Input|String|List|Dictionary|Tuple) should")
_COUNT = re.compile(r" after validation, not .*")
_CALLERS_KEYS = {"metadata", "logit_bias"}
_RANGE_ERRORS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "int_parsing_size"}

AnyWireModel = TypeVar("AnyWireModel", bound=WireModel)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSubmission:
    """What POST /v1/jobs asks for."""

    call: Call
    metadata: dict[str, str] = field(default_factory=dict)
    timeout_s: float | None = None
    deadline: float | None = None
    priority: str = "default"
    webhook: dict[str, Any] | None = None
    result_ttl_s: int | None = None


def parse(endpoint: str, body: dict[str, Any], limits: LimitsEntry = _DEFAULT_LIMITS) -> Call:
    """The call that `body` asks for at `endpoint` (one of ENDPOINTS). Raises APIError."""
    call = read(ENDPOINTS[endpoint], body).to_call()
    _check_limits(call, limits)
    return call


def parse_job(body: dict[str, Any], limits: LimitsEntry = _DEFAULT_LIMITS) -> JobSubmission:
    """As `parse`, for the body of POST /v1/jobs. Refused fields of the inner body are `body.<path>`."""
    job = read(JobRequest, body)
    try:
        call = parse(job.endpoint, job.body, limits)
    except errors.APIError as error:
        raise type(error)(error.message, param=f"body.{error.param}" if error.param else "body") from None
    return JobSubmission(
        call=call,
        metadata=job.metadata or {},
        timeout_s=job.timeout_s,
        deadline=job.deadline,
        priority=job.priority,
        webhook=job.webhook.kept() if job.webhook else None,
        result_ttl_s=job.result_ttl_s,
    )


def read(model: type[AnyWireModel], body: dict[str, Any]) -> AnyWireModel:
    """`body` as a `model`. Raises APIError. Fields that ask for nothing (`tools: []`) are passed over."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
    if all(problem["type"] != "extra_forbidden" for problem in problems):
        raise _refusal(model, problems[0])
    cleaned = _without_idle_fields(model, body, problems)
    try:
        return model.model_validate(cleaned)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
    raise _refusal(model, problems[0])


def openapi_extra(path: str) -> dict[str, Any]:
    """Names the body of a route that reads it itself, for FastAPI's `openapi_extra`. The API's description puts
    `request_body` there when it is asked for: all of them take a tenth of a gateway's start."""
    return {"requestBody": path}


def request_body(path: str) -> dict[str, Any]:
    """OpenAPI's Request Body Object of `openapi_extra(path)`."""
    schema = BODIES[path].model_json_schema()
    definitions = schema.pop("$defs", {})
    content = {"application/json": {"schema": _inlined(schema, definitions)}}
    return {"required": True, "content": content}


def _check_limits(call: Call, limits: LimitsEntry) -> None:
    if call.n > limits.n:
        raise errors.NumberOutOfRange(f"n must be less than or equal to {limits.n}.", param="n")
    num_inputs = len(call.inputs) - (call.num_queries if call.task == "rerank" else 0)
    if num_inputs * call.n > limits.inputs:
        param = ENDPOINTS[call.endpoint].text_fields[-1]
        raise errors.InvalidValue(f"{param} must have at most {limits.inputs // call.n} items.", param=param)


def _without_idle_fields(
    model: type[WireModel], body: dict[str, Any], problems: Sequence[ErrorDetails]
) -> dict[str, Any]:
    """A copy of `body` without the refused fields whose value asks for nothing."""
    cleaned: dict[str, Any] = orjson.loads(orjson.dumps(body))
    for problem in problems:
        if problem["type"] != "extra_forbidden":
            continue
        *path, name = problem["loc"]
        idle_values = model.no_effect.get(_path(problem["loc"]))
        if not idle_values:  # also where the path names a member of a union, which the body does not
            continue
        holder: Any = cleaned
        for part in path:
            holder = holder[part]
        if any(type(holder[name]) is type(idle) and holder[name] == idle for idle in idle_values):
            del holder[name]
    return cleaned


def _refusal(model: type[WireModel], problem: ErrorDetails) -> errors.APIError:
    kind, loc = problem["type"], problem["loc"]
    param = _param(loc)
    if kind.startswith("at:"):  # a model validator of a part of the body names the field
        param = f"{param}.{kind.removeprefix('at:')}"
    row: type[errors.APIError]
    if kind == "extra_forbidden":
        if _path(loc) in model.no_effect:
            return errors.UnsupportedParameter(f"{param} is not supported.", param=param)
        return errors.UnknownField(param=param)
    if not loc:
        # A model validator names the field by its error's type.
        prefix, _, param = kind.rpartition(":")
        row = errors.UnsupportedParameter if prefix else errors.InvalidValue
    else:
        row = errors.NumberOutOfRange if kind in _RANGE_ERRORS else errors.TABLE.get(kind, errors.InvalidValue)
    return row(f"{param or 'The body'} {_expectation(problem)}.", param=param)


def _expectation(problem: ErrorDetails) -> str:
    if problem["type"] == "missing":
        return "is required"
    return _SUBJECT.sub("must", _COUNT.sub("", problem["msg"]))


def _path(loc: Sequence[str | int]) -> str:
    return ".".join(part for part in loc if isinstance(part, str))


def _param(loc: Sequence[str | int]) -> str | None:
    """The dotted path, as far as it is made of names that are not the caller's own keys."""
    parts: list[str] = []
    for part in loc:
        if (parts and parts[-1] in _CALLERS_KEYS) or (isinstance(part, str) and not _NAME.fullmatch(part)):
            break
        parts.append(str(part))
    return ".".join(parts) or None


def _inlined(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """Without `$ref`s, which point to the document's root, OpenAPI's own here, and without defaults of null."""
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
    return {key: _inlined(value, definitions) for key, value in schema.items() if (key, value) != ("default", None)}
