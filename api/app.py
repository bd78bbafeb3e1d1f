"""create_app(): lifespan, middleware, error handlers, routers; nothing else."""

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI

import settings
from api import description, error_forms, error_handlers
from api.auth import Keys
from api.batch_answers import Batches
from api.files import Files
from api.gateway import Gateway
from api.request_log import RequestLog
from api.routes import (
    admin,
    batches,
    cache,
    files,
    health,
    inference,
    jobs,
    messages,
    models,
    responses,
    tei,
    usage,
    webhooks,
)

VERSION = "0.1.0"


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    config = settings.load()
    app.state.is_stopping = False
    app.state.keys = Keys(config.database_url)
    app.state.gateway = Gateway(config)
    app.state.files = Files(config.database_url)
    app.state.batches = Batches(config.database_url)
    yield
    await app.state.batches.close()
    await app.state.files.close()
    await app.state.gateway.close()
    await app.state.keys.close()


def create_app() -> FastAPI:
    """The ASGI application of one gateway process."""
    app = FastAPI(title="Switchyard", version=VERSION, lifespan=_lifespan, docs_url="/docs", redoc_url=None)
    for family in (inference, responses, messages, tei, jobs, files, batches, webhooks, models, cache, usage):
        app.include_router(family.router)
    for more in (inference.aliases, models.aliases, tei.descriptions, admin.router, health.router):
        app.include_router(more)
    error_handlers.install(app, error_forms.FORMS)
    app.add_middleware(RequestLog)
    description.install(app)
    return app
