"""Files: upload, list, read, delete."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response

from api import auth, file_answers
from api.routes import parameters
from db.api_keys import ApiKey

router = APIRouter(prefix="/v1/files", tags=["files"])

Caller = Annotated[ApiKey, Depends(auth.authenticate)]
_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
                    },
                }
            }
        },
    }
}


@router.post("", openapi_extra=_FORM)
async def create_file(request: Request, caller: Caller) -> Response:
    """Upload a file, as a form; it is stored as it arrives."""
    return await file_answers.create(request, caller)


@router.get("")
async def list_files(
    request: Request,
    caller: Caller,
    purpose: Annotated[str | None, parameters.text(64)] = None,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """The caller's files, newest first; `after` is the last id of the page before."""
    return await file_answers.page(request, caller, purpose, after, limit, order)


@router.get("/{file_id}")
async def get_file(request: Request, caller: Caller, file_id: str) -> Response:
    """One file, without its bytes."""
    return await file_answers.get(request, caller, file_id)


@router.get("/{file_id}/content")
async def get_file_content(request: Request, caller: Caller, file_id: str) -> Response:
    """A file's bytes."""
    return await file_answers.content(request, caller, file_id)


@router.delete("/{file_id}")
async def delete_file(request: Request, caller: Caller, file_id: str) -> Response:
    """Delete a file, unless a batch that has not ended reads it."""
    return await file_answers.delete(request, caller, file_id)
