"""OpenAI's Responses API."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request, Response

from api import auth, response_answers, schemas
from api.routes import parameters
from db.api_keys import ApiKey

router = APIRouter(prefix="/v1/responses", tags=["responses"])

Caller = Annotated[ApiKey, Depends(auth.authenticate)]


@router.post("", openapi_extra=schemas.openapi_extra("/v1/responses"))
async def create_response(request: Request, caller: Caller) -> Response:
    """Generate an answer; streamed where `stream` is true, queued and answered at once where `background` is."""
    return await response_answers.create(request, caller)


@router.get("/{response_id}")
async def get_response(
    request: Request,
    caller: Caller,
    response_id: str,
    stream: bool = False,
    starting_after: Annotated[int | None, Query(ge=0)] = None,
) -> Response:
    """The response as it stands; its events with `stream`, from the start or after event `starting_after`."""
    if stream:
        return await response_answers.stream(request, caller, response_id, starting_after)
    return await response_answers.get(request, caller, response_id)


@router.post("/{response_id}/cancel")
async def cancel_response(request: Request, caller: Caller, response_id: str) -> Response:
    """Cancel a background response. May be repeated; one that has ended stays as it is."""
    return await response_answers.cancel(request, caller, response_id)


@router.delete("/{response_id}")
async def delete_response(request: Request, caller: Caller, response_id: str) -> Response:
    """Remove the response and everything stored of it."""
    return await response_answers.delete(request, caller, response_id)


@router.get("/{response_id}/input_items")
async def list_input_items(
    request: Request,
    caller: Caller,
    response_id: str,
    after: Annotated[str | None, parameters.text(64)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """The messages that the response was made from, those of the responses before it included."""
    return await response_answers.input_items(request, caller, response_id, after, limit, is_ascending=order == "asc")
