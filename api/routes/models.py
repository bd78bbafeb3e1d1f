"""What can be asked, and tokens without a job."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from api import auth, model_answers, schemas
from db.api_keys import ApiKey

router = APIRouter(prefix="/v1", tags=["models"])
aliases = APIRouter(tags=["models"])
"""vLLM's own paths of the same routes."""

Caller = Annotated[ApiKey, Depends(auth.authenticate)]


@router.get("/models")
async def list_models(request: Request, caller: Caller) -> Response:
    """Every model, with its tasks, context length and state."""
    return model_answers.everything(request, caller)


@router.get("/models/{model}")
async def get_model(request: Request, caller: Caller, model: str) -> Response:
    """One model."""
    return model_answers.one(request, caller, model)


@aliases.post("/tokenize", openapi_extra=schemas.openapi_extra("/tokenize"), operation_id="tokenize_alias")
@router.post("/tokenize", openapi_extra=schemas.openapi_extra("/v1/tokenize"))
async def tokenize(request: Request, caller: Caller) -> Response:
    """The tokens of a prompt or of a chat."""
    return await model_answers.tokenize(request, caller)


@aliases.post("/detokenize", openapi_extra=schemas.openapi_extra("/detokenize"), operation_id="detokenize_alias")
@router.post("/detokenize", openapi_extra=schemas.openapi_extra("/v1/detokenize"))
async def detokenize(request: Request, caller: Caller) -> Response:
    """The text of tokens."""
    return await model_answers.detokenize(request, caller)
