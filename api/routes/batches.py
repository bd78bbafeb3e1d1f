"""Batches: many requests in a file, answered within hours into other files."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response

from api import auth, batch_answers, schemas
from db.api_keys import ApiKey

router = APIRouter(prefix="/v1/batches", tags=["batches"])

Caller = Annotated[ApiKey, Depends(auth.authenticate)]


@router.post("", openapi_extra=schemas.openapi_extra("/v1/batches"))
async def create_batch(request: Request, caller: Caller) -> Response:
    """Run the requests of an uploaded file."""
    return await batch_answers.create(request, caller)


@router.get("")
async def list_batches(
    request: Request,
    caller: Caller,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Response:
    """The caller's batches, newest first; `after` is the last id of the page before."""
    return await batch_answers.page(request, caller, after, limit)


@router.get("/{batch_id}")
async def get_batch(request: Request, caller: Caller, batch_id: str) -> Response:
    """One batch, and how far it is."""
    return await batch_answers.get(request, caller, batch_id)


@router.post("/{batch_id}/cancel")
async def cancel_batch(request: Request, caller: Caller, batch_id: str) -> Response:
    """Start nothing more of it and stop what runs; what is answered by then is kept."""
    return await batch_answers.cancel(request, caller, batch_id)
