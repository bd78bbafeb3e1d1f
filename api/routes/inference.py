"""Inference routes. All take `Prefer: respond-async, wait=n` and `Cache-Control`."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from api import answers, auth, schemas
from db.api_keys import ApiKey

router = APIRouter(prefix="/v1", tags=["inference"], route_class=auth.CallerRoute)
aliases = APIRouter(tags=["inference"], route_class=auth.CallerRoute)

Caller = Annotated[ApiKey, Depends(auth.authenticate)]


@router.post("/chat/completions", openapi_extra=schemas.openapi_extra("/v1/chat/completions"))
async def create_chat_completion(request: Request, caller: Caller) -> Response:
    """Generate the next message of a conversation; streamed where `stream` is true."""
    return await answers.infer(request, "/v1/chat/completions", caller)


@router.post("/completions", openapi_extra=schemas.openapi_extra("/v1/completions"))
async def create_completion(request: Request, caller: Caller) -> Response:
    """Continue a text; streamed where `stream` is true."""
    return await answers.infer(request, "/v1/completions", caller)


@router.post("/embeddings", openapi_extra=schemas.openapi_extra("/v1/embeddings"))
async def create_embeddings(request: Request, caller: Caller) -> Response:
    """One vector per text."""
    return await answers.infer(request, "/v1/embeddings", caller)


@router.post("/classify", openapi_extra=schemas.openapi_extra("/v1/classify"))
async def classify(request: Request, caller: Caller) -> Response:
    """Label probabilities per text."""
    return await answers.infer(request, "/v1/classify", caller)


@router.post("/rerank", openapi_extra=schemas.openapi_extra("/v1/rerank"))
async def rerank(request: Request, caller: Caller) -> Response:
    """Documents by relevance to a query."""
    return await answers.infer(request, "/v1/rerank", caller)


@aliases.post("/v2/rerank", openapi_extra=schemas.openapi_extra("/v1/rerank"), operation_id="rerank_alias")
async def rerank_as_cohere(request: Request, caller: Caller) -> Response:
    """`/v1/rerank` under the path that Cohere's clients use."""
    return await answers.infer(request, "/v1/rerank", caller)


@router.post("/score", openapi_extra=schemas.openapi_extra("/v1/score"))
async def score(request: Request, caller: Caller) -> Response:
    """How relevant each document is to its query."""
    return await answers.infer(request, "/v1/score", caller)
