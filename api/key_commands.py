"""`switchyard keys`."""

import datetime
import json
import uuid
from typing import Annotated, Any

import typer

from api import key_views, limit_options
from api.limit_options import DailyCost, DailyTokens, MaxConcurrent, RequestsPerMinute, TokensPerMinute
from api.terminal import Json, console, fail, ledger, show
from db import api_keys
from db.session import Cursor
from db.tenants import Limits

app = typer.Typer(help="API keys.", no_args_is_help=True)

_KEY = typer.Argument(help="Its id or prefix.")
_SCOPES = typer.Option("--scopes", help="Any of submit, read, cancel, separated by commas.")
_MODELS = typer.Option("--models", help="Names and aliases that it may use, separated by commas; `all`: every model.")


@app.command("create")
def create(
    name: Annotated[str, typer.Option(help="What the key is for.")],
    tenant: Annotated[str, typer.Option(help="Whose jobs and cache it reaches.")] = "default",
    admin: Annotated[bool, typer.Option("--admin", help="May administrate, and see and purge across tenants.")] = False,
    scopes: Annotated[str | None, _SCOPES] = None,
    models: Annotated[str | None, _MODELS] = None,
    expires_in_days: Annotated[float | None, typer.Option(help="No limit by default.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds until its jobs expire, unless they say so.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Revoke the tenant's keys of this name.")] = False,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    max_concurrent: MaxConcurrent = None,
    daily_tokens: DailyTokens = None,
    daily_cost: DailyCost = None,
    as_json: Json = False,
) -> None:
    """Make a key. It is shown once and stored only as a hash."""
    limits = limit_options.changes(requests_per_minute, tokens_per_minute, max_concurrent, daily_tokens, daily_cost)
    with ledger() as cursor:
        secret, key = api_keys.create(
            cursor,
            name,
            tenant,
            is_admin=admin,
            expires_in_s=None if expires_in_days is None else expires_in_days * 86_400,
            timeout_s=timeout,
            is_replacing=replace,
            scopes=api_keys.SCOPES if scopes is None else _scopes(scopes),
            models=None if models is None else _models(models),
            limits=Limits(**limits),
        )
    if as_json:
        print(json.dumps({"id": str(key.id), "key": secret, "name": name, "tenant": tenant}))
    else:
        _show_secret(secret, key.prefix)


@app.command("list")
def list_keys(as_json: Json = False) -> None:
    """List keys, newest first, without their secrets."""
    with ledger() as cursor:
        found = api_keys.find(cursor)
    if as_json:
        show([key_views.key(key) for key in found], as_json=True)
        return
    show(
        [
            {
                "id": str(key.id),
                "prefix": key.prefix,
                "name": key.name,
                "tenant": key.tenant,
                "scopes": key_views.key(key)["scopes"],
                "models": "all" if key.models is None else list(key.models),
                "limits": [
                    f"{name} {value}" for name, value in key_views.limits(key.limits).items() if value is not None
                ],
                "created": key.created_at.isoformat(timespec="seconds"),
                "state": key_views.state(key),
            }
            for key in found
        ]
    )


@app.command("set")
def change(
    key: Annotated[str, _KEY],
    scopes: Annotated[str | None, _SCOPES] = None,
    models: Annotated[str | None, _MODELS] = None,
    expires_in_days: Annotated[float | None, typer.Option(help="From now.")] = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    max_concurrent: MaxConcurrent = None,
    daily_tokens: DailyTokens = None,
    daily_cost: DailyCost = None,
) -> None:
    """Change what a key may do and use; gateways follow within two seconds."""
    changes: dict[str, Any] = limit_options.changes(
        requests_per_minute, tokens_per_minute, max_concurrent, daily_tokens, daily_cost
    )
    if scopes is not None:
        changes["scopes"] = _scopes(scopes)
    if models is not None:
        changes["models"] = _models(models)
    if expires_in_days is not None:
        changes["expires_at"] = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=expires_in_days)
    if not changes:
        fail("say what to change; see `switchyard keys set --help`")
    with ledger() as cursor:
        if api_keys.change(cursor, _find(cursor, key), changes) is None:
            fail("the key has expired")
    console.print("changed")


@app.command("rotate")
def rotate(
    key: Annotated[str, _KEY],
    grace: Annotated[float, typer.Option(min=0, help="Seconds for which the old secret stays valid.")] = 86_400,
    as_json: Json = False,
) -> None:
    """Give a key a new secret; the old one stays valid for a while, so that callers can change over."""
    with ledger() as cursor:
        made = api_keys.rotate(cursor, _find(cursor, key), grace)
    if made is None:
        fail("the key has expired")
    if as_json:
        print(json.dumps({"id": str(made[1].id), "key": made[0]}))
    else:
        _show_secret(made[0], made[1].prefix)


@app.command("revoke")
def revoke(key: Annotated[str, _KEY]) -> None:
    """Revoke a key; gateways refuse it within two seconds."""
    with ledger() as cursor:
        if not api_keys.revoke(cursor, key):
            fail(_unknown(key))
    console.print("revoked")


def _find(cursor: Cursor, key: str) -> uuid.UUID:
    found = api_keys.resolve(cursor, key)
    return found if found is not None else fail(_unknown(key))


def _unknown(key: str) -> str:
    return f"no single living key has the id or prefix {key}; see `switchyard keys list`"


def _scopes(given: str) -> list[str]:
    scopes = [scope.strip() for scope in given.split(",") if scope.strip()]
    if not scopes or not set(scopes) <= set(api_keys.SCOPES):
        fail(f"--scopes takes {', '.join(api_keys.SCOPES)}; --admin makes an admin's key")
    return scopes


def _models(given: str) -> list[str] | None:
    return None if given == "all" else [name.strip() for name in given.split(",") if name.strip()]


def _show_secret(secret: str, prefix: str) -> None:
    console.print(
        f"{secret}\n\nKeep it now: it cannot be shown again. Revoke it with `switchyard keys revoke {prefix}`."
    )
