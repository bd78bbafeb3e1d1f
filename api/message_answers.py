"""What leaves Anthropic's routes."""

import re

import orjson
from starlette.requests import Request
from starlette.responses import Response

from api import answers, decoding, errors, schemas
from api.gateway import Gateway
from api.schemas.messages import CountTokensRequest
from db.api_keys import ApiKey
from tasks.identity import MESSAGES

_VERSION = re.compile(r"20\d\d-\d\d-\d\d")


async def create(request: Request, caller: ApiKey) -> Response:
    _check_version(request)
    return _named(request, await answers.infer(request, MESSAGES, caller))


async def count_tokens(request: Request, caller: ApiKey) -> Response:
    _check_version(request)
    gateway: Gateway = request.app.state.gateway
    limits = gateway.catalog.limits
    wanted = schemas.read(CountTokensRequest, decoding.decode(await decoding.read_body(request, limits), limits))
    model = gateway.catalog_for(caller).model(wanted.model)
    if model is None or "generate" not in model.tasks:
        raise errors.ModelNotFound(param="model")
    count = await gateway.prompts.count_chat(wanted.chat(), wanted.tool_definitions(), model)
    return _named(request, Response(orjson.dumps({"input_tokens": count}), media_type="application/json"))


def _check_version(request: Request) -> None:
    """Every version is answered in the same form: fields that a client does not know, it passes over."""
    version = request.headers.get("anthropic-version")
    if version is not None and not _VERSION.fullmatch(version):
        raise errors.InvalidValue("anthropic-version must be a date, as 2023-06-01.")


def _named(request: Request, response: Response) -> Response:
    """Anthropic's clients read the request's id from a header of that name."""
    response.headers["request-id"] = request.state.request_id
    return response
