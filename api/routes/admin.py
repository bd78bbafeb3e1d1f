"""Administration: keys and tenants. For admins' keys, and only where SWITCHYARD_ADMIN_API serves it."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Path, Query, Request, Response

from api import admin_answers, auth, schemas
from api.routes import parameters
from api.schemas.admin import TENANT

router = APIRouter(prefix="/admin/v1", tags=["admin"], dependencies=[Depends(auth.authenticate_admin)])

Tenant = Annotated[str, Path(pattern=TENANT)]


@router.post("/keys", status_code=201, openapi_extra=schemas.openapi_extra("/admin/v1/keys"))
async def create_key(request: Request) -> Response:
    """Make a key. Its secret is in this answer and nowhere else."""
    return await admin_answers.create_key(request)


@router.get("/keys")
async def list_keys(request: Request, tenant: Annotated[str | None, parameters.text(64)] = None) -> Response:
    """Every key, or a tenant's, newest first."""
    return await admin_answers.list_keys(request, tenant)


@router.get("/keys/{key_id}")
async def get_key(request: Request, key_id: UUID) -> Response:
    """One key, living or not."""
    return await admin_answers.get_key(request, key_id)


@router.patch("/keys/{key_id}", openapi_extra=schemas.openapi_extra("/admin/v1/keys/{id}"))
async def change_key(request: Request, key_id: UUID) -> Response:
    """Change a key's scopes, models, limits or expiry. Gateways follow within two seconds."""
    return await admin_answers.change_key(request, key_id)


@router.post("/keys/{key_id}/rotate")
async def rotate_key(
    request: Request, key_id: UUID, grace_s: Annotated[float, Query(ge=0, le=2_592_000)] = 86_400
) -> Response:
    """A new secret for the key; the old one stays valid for `grace_s` seconds."""
    return await admin_answers.rotate_key(request, key_id, grace_s)


@router.post("/keys/{key_id}/revoke")
async def revoke_key(request: Request, key_id: UUID) -> Response:
    """Revoke the key. Gateways refuse it within two seconds."""
    return await admin_answers.revoke_key(request, key_id)


@router.get("/tenants")
async def list_tenants(request: Request) -> Response:
    """Every tenant with its limits."""
    return await admin_answers.list_tenants(request)


@router.get("/tenants/{name}")
async def get_tenant(request: Request, name: Tenant) -> Response:
    """One tenant."""
    return await admin_answers.get_tenant(request, name)


@router.patch("/tenants/{name}", openapi_extra=schemas.openapi_extra("/admin/v1/tenants/{id}"))
async def change_tenant(request: Request, name: Tenant) -> Response:
    """Change a tenant's limits or weight, making it if it is new. Gateways follow within two seconds."""
    return await admin_answers.change_tenant(request, name)
