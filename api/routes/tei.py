"""The routes of text-embeddings-inference, for its clients. Errors have its form."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response

from api import answers, auth, model_answers, schemas
from db.api_keys import ApiKey

router = APIRouter(tags=["text-embeddings-inference"], route_class=auth.CallerRoute)
descriptions = APIRouter(tags=["text-embeddings-inference"])

Caller = Annotated[ApiKey, Depends(auth.authenticate)]


@router.post("/embed", openapi_extra=schemas.openapi_extra("/embed"))
async def embed(request: Request, caller: Caller) -> Response:
    """One vector per text."""
    return await answers.infer(request, "/embed", caller)


@router.post("/predict", openapi_extra=schemas.openapi_extra("/predict"))
async def predict(request: Request, caller: Caller) -> Response:
    """Labels by falling score, per text or pair."""
    return await answers.infer(request, "/predict", caller)


@router.post("/rerank", openapi_extra=schemas.openapi_extra("/rerank"))
async def rerank_texts(request: Request, caller: Caller) -> Response:
    """Texts by falling relevance."""
    return await answers.infer(request, "/rerank", caller)


@descriptions.get("/info")
async def info(
    request: Request, caller: Caller, model: Annotated[str, Query(min_length=1, max_length=256)] = "auto"
) -> Response:
    """A model, as text-embeddings-inference describes its one: here the named, or the first encoder."""
    return model_answers.info(request, caller, model)
