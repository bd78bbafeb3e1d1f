"""The response cache, as its tenant sees it."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from api import auth, cache_answers
from api.routes import parameters
from db.api_keys import ApiKey

router = APIRouter(prefix="/v1/cache", tags=["cache"])

Caller = Annotated[ApiKey, Depends(auth.authenticate)]


@router.get("")
async def get_cache_stats(request: Request, caller: Caller) -> Response:
    """Entries, bytes and hits by model."""
    return await cache_answers.stats(request, caller)


@router.delete("")
async def purge_cache(
    request: Request, caller: Caller, model: Annotated[str | None, parameters.text(256)] = None
) -> Response:
    """Remove a model's entries, or all."""
    return await cache_answers.purge(request, caller, None, model)


@router.delete("/{key}")
async def purge_cache_entry(request: Request, caller: Caller, key: str) -> Response:
    """Remove one entry, by the key that `x-cache-key` or the job shows."""
    return await cache_answers.purge(request, caller, key, None)
