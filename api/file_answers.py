"""What leaves the file routes. Another tenant's file and an unknown one get the same 404."""

from typing import Any
from urllib.parse import quote

import orjson
from starlette.requests import Request
from starlette.responses import Response

from api import answers, errors, ids
from api.files import Files
from db.api_keys import ApiKey
from db.files import FileFilter, StoredFile
from db.lanes import LaneDown

PREFIX = "file-"


def as_dict(stored: StoredFile) -> dict[str, Any]:
    """OpenAI's file object."""
    expires = stored.expires_at
    return {
        "id": ids.to_wire(PREFIX, stored.id),
        "object": "file",
        "bytes": stored.num_bytes,
        "created_at": int(stored.created_at.timestamp()),
        "expires_at": None if expires is None else int(expires.timestamp()),
        "filename": stored.filename,
        "purpose": stored.purpose,
        "status": "processed",
        "status_details": None,
    }


async def create(request: Request, caller: ApiKey) -> Response:
    limits = request.app.state.gateway.catalog.limits
    return _json(as_dict(await _files(request).upload(request, caller.tenant, limits.file_bytes)))


async def page(request: Request, caller: ApiKey, purpose: str | None, after: str | None, limit: int,
               order: str) -> Response:  # fmt: skip
    start = None
    if after is not None and (start := ids.from_wire(PREFIX, after)) is None:
        raise errors.InvalidValue("after must be the id of a file.", param="after")
    wanted = FileFilter(tenant=caller.tenant, purpose=purpose, after=start, limit=limit, is_ascending=order == "asc")
    try:
        found = await _files(request).pages.submit(wanted)
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    shown = [as_dict(stored) for stored in found[:limit]]
    return _json(
        {
            "object": "list",
            "data": shown,
            "first_id": shown[0]["id"] if shown else None,
            "last_id": shown[-1]["id"] if shown else None,
            "has_more": len(found) > len(shown),
        }
    )


async def get(request: Request, caller: ApiKey, wire_id: str) -> Response:
    return _json(as_dict(await _view(request, caller, wire_id)))


async def content(request: Request, caller: ApiKey, wire_id: str) -> Response:
    stored = await _view(request, caller, wire_id)
    headers = {
        "Content-Length": str(stored.num_bytes),
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(stored.filename, safe='')}",
        "X-Content-Type-Options": "nosniff",
    }
    pieces = _files(request).content(stored.id, stored.num_bytes)
    return answers.EventStream(pieces, 200, headers, "application/octet-stream")


async def delete(request: Request, caller: ApiKey, wire_id: str) -> Response:
    file_id = ids.from_wire(PREFIX, wire_id)
    if file_id is None:
        raise errors.FileNotFound()
    try:
        is_gone = await _files(request).deletes.submit((file_id, caller.tenant))
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    if is_gone is None:
        raise errors.FileNotFound()
    if not is_gone:
        raise errors.ConflictState("A batch that has not ended reads this file.")
    return _json({"id": wire_id, "object": "file", "deleted": True})


async def _view(request: Request, caller: ApiKey, wire_id: str) -> StoredFile:
    file_id = ids.from_wire(PREFIX, wire_id)
    if file_id is None:
        raise errors.FileNotFound()
    try:
        stored = await _files(request).views.submit((file_id, caller.tenant))
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    if stored is None:
        raise errors.FileNotFound()
    return stored


def _files(request: Request) -> Files:
    found: Files = request.app.state.files
    return found


def _json(body: dict[str, Any]) -> Response:
    return Response(orjson.dumps(body), 200, None, "application/json")
