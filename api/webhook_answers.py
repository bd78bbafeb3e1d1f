"""What leaves the webhook routes, and what a webhook must have before a job with it is accepted."""

from typing import Any
from uuid import UUID

import orjson
from starlette.requests import Request
from starlette.responses import Response

from api import errors, views
from api.gateway import Gateway
from db.api_keys import ApiKey
from db.lanes import LaneDown
from db.webhooks import Filter, Secret
from tasks import webhook_post

JSON = dict[str, Any]


async def check(gateway: Gateway, caller: ApiKey, url: str) -> None:
    """Refuse what could never be delivered: a URL that may not be called, a tenant that cannot sign."""
    try:
        webhook_post.check(url, gateway.webhook_networks)
    except webhook_post.Refused as refusal:
        raise errors.InvalidValue(f"webhook.url {refusal}.", param="webhook.url") from None
    try:
        living = await gateway.ledger.webhook_secrets.submit(caller.tenant)
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    if not living:
        raise errors.WebhookSecretMissing(param="webhook")


async def create_secret(request: Request, caller: ApiKey) -> Response:
    gateway: Gateway = request.app.state.gateway
    try:
        made, text = await gateway.ledger.new_webhook_secrets.submit(caller.tenant)
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    return _json(_secret(made) | {"secret": text}, 201)


async def list_secrets(request: Request, caller: ApiKey) -> Response:
    gateway: Gateway = request.app.state.gateway
    try:
        living = await gateway.ledger.webhook_secrets.submit(caller.tenant)
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    return _json({"object": "list", "data": [_secret(one) for one in living]})


async def page(request: Request, wanted: Filter) -> Response:
    gateway: Gateway = request.app.state.gateway
    try:
        found = await gateway.ledger.webhook_pages.submit(wanted)
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    shown = found[: wanted.limit]
    return _json({
        "object": "list",
        "data": [views.delivery(one) for one in shown],
        "first_id": str(shown[0].id) if shown else None,
        "last_id": str(shown[-1].id) if shown else None,
        "has_more": len(found) > len(shown),
    })  # fmt: skip


async def redeliver(request: Request, caller: ApiKey, delivery_id: UUID) -> Response:
    gateway: Gateway = request.app.state.gateway
    try:
        again = await gateway.ledger.redeliveries.submit((delivery_id, None if caller.is_admin else caller.tenant))
    except LaneDown:
        raise errors.DependencyUnavailable() from None
    if again is None:
        raise errors.DeliveryNotFound()
    return _json(views.delivery(again), 202)


def _secret(one: Secret) -> JSON:
    return {
        "id": str(one.id),
        "object": "webhook.secret",
        "created_at": views.seconds(one.created_at),
        "expires_at": views.seconds(one.expires_at),
    }


def _json(body: JSON, status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")
