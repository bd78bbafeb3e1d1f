"""What leaves the model routes."""

from dataclasses import asdict

import orjson
from starlette.requests import Request
from starlette.responses import Response

from api import decoding, errors, schemas
from api.gateway import Gateway
from api.schemas.tokenize import DetokenizeRequest, TokenizeRequest
from catalog import ModelSpec
from db.api_keys import ApiKey

_ENCODING = {"embed", "classify", "rerank"}
_CREATED = 1_735_689_600
"""OpenAI's model object has a creation time; ours is fixed, for a folder's own says nothing."""


def everything(request: Request, caller: ApiKey) -> Response:
    gateway: Gateway = request.app.state.gateway
    data = [_model(gateway, model) for model in gateway.catalog_for(caller).models.values()]
    return _json({"object": "list", "data": data})


def one(request: Request, caller: ApiKey, name: str) -> Response:
    gateway: Gateway = request.app.state.gateway
    return _json(_model(gateway, _known(gateway, caller, name)))


def info(request: Request, caller: ApiKey, name: str) -> Response:
    """text-embeddings-inference's answer, as far as it is true of a server of many models."""
    gateway: Gateway = request.app.state.gateway
    served = gateway.catalog_for(caller)
    encoders = [model for model in served.models.values() if model.entry.auto and set(model.tasks) & _ENCODING]
    model = (encoders[0] if encoders else None) if name == "auto" else served.model(name)
    if model is None:
        raise errors.ModelNotFound(param="model")
    backends = [gateway.catalog.backends[backend].entry for backend in model.entry.backends]
    labels = dict(enumerate(model.labels))
    kind: dict[str, object] = {"embedding": {}}
    if "embed" not in model.tasks:
        named = {"id2label": labels, "label2id": {label: number for number, label in labels.items()}}
        kind = {"classifier" if "classify" in model.tasks else "reranker": named}
    body = {
        "model_id": model.name,
        "model_sha": model.revision,
        "model_dtype": str(backends[0].options.get("dtype", "auto")),
        "model_type": kind,
        "max_concurrent_requests": sum(backend.concurrency for backend in backends),
        "max_input_length": model.context_length,
        "max_client_batch_size": gateway.catalog.limits.inputs,
        "auto_truncate": False,
        "version": request.app.version,
    }
    return Response(orjson.dumps(body, option=orjson.OPT_NON_STR_KEYS), media_type="application/json")


async def tokenize(request: Request, caller: ApiKey) -> Response:
    """vLLM's answer."""
    gateway: Gateway = request.app.state.gateway
    wanted = schemas.read(TokenizeRequest, await _body(request, gateway))
    counted = await gateway.prompts.count(wanted, _known(gateway, caller, wanted.model))
    return _json(asdict(counted))


async def detokenize(request: Request, caller: ApiKey) -> Response:
    """vLLM's answer."""
    gateway: Gateway = request.app.state.gateway
    wanted = schemas.read(DetokenizeRequest, await _body(request, gateway))
    return _json({"prompt": await gateway.prompts.detokenize(_known(gateway, caller, wanted.model), wanted.tokens)})


async def _body(request: Request, gateway: Gateway) -> dict[str, object]:
    limits = gateway.catalog.limits
    return decoding.decode(await decoding.read_body(request, limits), limits)


def _known(gateway: Gateway, caller: ApiKey, name: str) -> ModelSpec:
    model = gateway.catalog_for(caller).model(name)
    if model is None:
        raise errors.ModelNotFound(param="model")
    return model


def _model(gateway: Gateway, model: ModelSpec) -> dict[str, object]:
    return {
        "id": model.name,
        "object": "model",
        "created": _CREATED,
        "owned_by": "switchyard",
        "max_model_len": model.context_length,
        "tasks": model.tasks,
        "backends": model.entry.backends,
        "aliases": model.entry.aliases,
        "revision": model.revision,
        "state": gateway.survey.model_state(model),
    }


def _json(body: dict[str, object]) -> Response:
    return Response(orjson.dumps(body), media_type="application/json")
