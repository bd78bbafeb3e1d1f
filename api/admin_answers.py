"""What leaves the admin API: keys, tenants."""

import datetime
import functools
from collections.abc import Callable
from typing import Any, TypeVar
from uuid import UUID

import orjson
from starlette.requests import Request
from starlette.responses import Response

from api import decoding, errors, key_views, schemas
from api.gateway import Gateway
from api.schemas.admin import KeyChange, KeyRequest, TenantChange
from api.schemas.fields import WireModel
from db import api_keys, tenants
from db.lanes import LaneDown
from db.session import Cursor
from db.tenants import Limits

Result = TypeVar("Result")
Body = TypeVar("Body", bound=WireModel)


async def create_key(request: Request) -> Response:
    """201 and the key with its secret, which is not shown again."""
    wanted = await _body(request, KeyRequest)
    make = functools.partial(
        api_keys.create,
        name=wanted.name,
        tenant=wanted.tenant,
        is_admin="admin" in wanted.scopes,
        expires_in_s=wanted.expires_in_s,
        timeout_s=wanted.timeout_s,
        scopes=_without_admin(wanted.scopes),
        models=wanted.models,
        limits=Limits(**wanted.limits.columns()),
    )
    secret, key = await _ask(request, make)
    return _json(key_views.key(key) | {"key": secret}, 201)


async def list_keys(request: Request, tenant: str | None) -> Response:
    found = await _ask(request, lambda cursor: api_keys.find(cursor, tenant))
    return _json({"object": "list", "data": [key_views.key(key) for key in found]})


async def get_key(request: Request, key_id: UUID) -> Response:
    key = await _ask(request, lambda cursor: api_keys.get(cursor, key_id))
    if key is None:
        raise errors.KeyNotFound()
    return _json(key_views.key(key))


async def change_key(request: Request, key_id: UUID) -> Response:
    wanted = await _body(request, KeyChange)
    changes = wanted.model_dump(exclude_unset=True, exclude={"limits", "expires_at"}) | wanted.limits.columns()
    if "scopes" in changes:
        changes |= {"is_admin": "admin" in wanted.scopes, "scopes": _without_admin(wanted.scopes)}
    if "expires_at" in wanted.model_fields_set:
        at = wanted.expires_at
        changes["expires_at"] = None if at is None else datetime.datetime.fromtimestamp(at, datetime.UTC)
    key = await _ask(request, lambda cursor: api_keys.change(cursor, key_id, changes))
    if key is None:
        raise errors.KeyNotFound()
    return _json(key_views.key(key))


async def rotate_key(request: Request, key_id: UUID, grace_s: float) -> Response:
    made = await _ask(request, lambda cursor: api_keys.rotate(cursor, key_id, grace_s))
    if made is None:
        raise errors.KeyNotFound()
    return _json(key_views.key(made[1]) | {"key": made[0]})


async def revoke_key(request: Request, key_id: UUID) -> Response:
    if not await _ask(request, lambda cursor: api_keys.revoke(cursor, str(key_id))):
        raise errors.KeyNotFound()
    return await get_key(request, key_id)


async def list_tenants(request: Request) -> Response:
    found = await _ask(request, tenants.find)
    return _json({"object": "list", "data": [key_views.tenant(tenant) for tenant in found]})


async def get_tenant(request: Request, name: str) -> Response:
    found = await _ask(request, lambda cursor: tenants.find(cursor, name))
    if not found:
        raise errors.TenantNotFound()
    return _json(key_views.tenant(found[0]))


async def change_tenant(request: Request, name: str) -> Response:
    wanted = await _body(request, TenantChange)
    changes = wanted.model_dump(exclude_unset=True, exclude={"limits"}) | wanted.limits.columns()
    return _json(key_views.tenant(await _ask(request, lambda cursor: tenants.change(cursor, name, changes))))


def _without_admin(scopes: list[Any]) -> list[str]:
    """An admin's key is one by a property of its own."""
    return [scope for scope in api_keys.SCOPES if scope in scopes]


async def _ask(request: Request, work: Callable[[Cursor], Result]) -> Result:
    gateway: Gateway = request.app.state.gateway
    try:
        result: Result = await gateway.ledger.admin.submit(work)
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    return result


async def _body(request: Request, model: type[Body]) -> Body:
    gateway: Gateway = request.app.state.gateway
    limits = gateway.catalog.limits
    return schemas.read(model, decoding.decode(await decoding.read_body(request, limits), limits))


def _json(body: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")
