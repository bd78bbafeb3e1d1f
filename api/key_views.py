"""Keys, tenants and limits as JSON: in the admin API and in the output of commands."""

import datetime
from typing import Any

from db.api_keys import ApiKey
from db.tenants import Limits, Tenant

JSON = dict[str, Any]
NANO = 1_000_000_000


def key(one: ApiKey) -> JSON:
    """A key without its secret. Times are Unix seconds."""
    return {
        "id": str(one.id),
        "object": "api_key",
        "prefix": one.prefix,
        "name": one.name,
        "tenant": one.tenant,
        "state": state(one),
        "scopes": [*one.scopes, *(["admin"] if one.is_admin else [])],
        "models": None if one.models is None else list(one.models),
        "limits": limits(one.limits),
        "timeout_s": one.timeout_s,
        "created_at": _seconds(one.created_at),
        "expires_at": _seconds(one.expires_at),
        "revoked_at": _seconds(one.revoked_at),
        "previous_secret_until": _seconds(one.previous_until),
    }


def state(one: ApiKey) -> str:
    if one.revoked_at is not None:
        return "revoked"
    is_over = one.expires_at is not None and one.expires_at <= datetime.datetime.now(datetime.UTC)
    return "expired" if is_over else "active"


def tenant(one: Tenant) -> JSON:
    return {
        "name": one.name,
        "object": "tenant",
        "weight": one.weight,
        "limits": limits(one.limits),
        "created_at": _seconds(one.created_at),
    }


def limits(of: Limits) -> JSON:
    """Null: without limit. The cost is in the currency of the catalog's prices."""
    return {
        "requests_per_minute": of.requests_per_minute,
        "tokens_per_minute": of.tokens_per_minute,
        "max_concurrent": of.max_concurrent,
        "daily_tokens": of.daily_tokens,
        "daily_cost": None if of.daily_cost_nano is None else of.daily_cost_nano / NANO,
    }


def _seconds(moment: datetime.datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())
