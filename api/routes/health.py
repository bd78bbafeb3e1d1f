"""Health and metrics. `/healthz` and `/readyz` are open; `/metrics` needs a key."""

from typing import Annotated

import orjson
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import PlainTextResponse

from api import auth, errors, metrics
from api.gateway import Gateway
from db.api_keys import ApiKey

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> Response:
    """200 while the process answers."""
    return Response(b'{"status":"ok"}', media_type="application/json")


@router.get("/readyz")
async def readyz(request: Request) -> Response:
    """200 while Postgres answers, with the state of every model; 503 otherwise and while stopping."""
    gateway: Gateway = request.app.state.gateway
    is_ready = gateway.survey.is_fresh and not request.app.state.is_stopping
    models = {name: gateway.survey.model_state(model) for name, model in gateway.catalog.models.items()}
    body = orjson.dumps({"status": "ready" if is_ready else "unavailable", "models": models})
    return Response(body, 200 if is_ready else 503, media_type="application/json")


@router.get("/metrics", response_class=PlainTextResponse)
async def prometheus(request: Request, caller: Annotated[ApiKey, Depends(auth.authenticate)]) -> Response:
    """Prometheus's text format."""
    gateway: Gateway = request.app.state.gateway
    try:
        page = metrics.page(gateway.survey.loads)
    except (OSError, ValueError):
        # The folder that processes share is gone; jobs do not need it.
        raise errors.DependencyUnavailable("The metrics cannot be read.") from None
    return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")
