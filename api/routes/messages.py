"""Anthropic's routes, for its clients. Errors have its form; the key may come as `x-api-key`."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from api import auth, message_answers, schemas
from db.api_keys import ApiKey

router = APIRouter(prefix="/v1/messages", tags=["messages"], route_class=auth.CallerRoute)

Caller = Annotated[ApiKey, Depends(auth.authenticate)]


@router.post("", openapi_extra=schemas.openapi_extra("/v1/messages"))
async def create_message(request: Request, caller: Caller) -> Response:
    """Generate the next message of a conversation; streamed where `stream` is true."""
    return await message_answers.create(request, caller)


@router.post("/count_tokens", openapi_extra=schemas.openapi_extra("/v1/messages/count_tokens"))
async def count_message_tokens(request: Request, caller: Caller) -> Response:
    """How many tokens the prompt of such a request has."""
    return await message_answers.count_tokens(request, caller)
