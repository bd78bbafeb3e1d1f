"""`switchyard tenants`."""

from typing import Annotated

import typer

from api import key_views, limit_options
from api.limit_options import DailyCost, DailyTokens, MaxConcurrent, RequestsPerMinute, TokensPerMinute
from api.terminal import Json, console, fail, ledger, show
from db import tenants

app = typer.Typer(help="Tenants: what all keys of one together may use.", no_args_is_help=True)


@app.command("list")
def list_tenants(as_json: Json = False) -> None:
    """List tenants with their limits."""
    with ledger() as cursor:
        found = tenants.find(cursor)
    if as_json:
        show([key_views.tenant(one) for one in found], as_json=True)
        return
    show([{"name": one.name, "weight": one.weight, **key_views.limits(one.limits)} for one in found])


@app.command("set")
def change(
    name: Annotated[str, typer.Argument(help="Made if it is new.")],
    weight: Annotated[float | None, typer.Option(help="Its share where tenants compete.")] = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    max_concurrent: MaxConcurrent = None,
    daily_tokens: DailyTokens = None,
    daily_cost: DailyCost = None,
) -> None:
    """Change what a tenant's keys together may use; gateways follow within two seconds."""
    changes: dict[str, float | int | None] = limit_options.changes(
        requests_per_minute, tokens_per_minute, max_concurrent, daily_tokens, daily_cost
    )
    if weight is not None:
        if weight <= 0:
            fail("--weight must be above 0")
        changes["weight"] = weight
    with ledger() as cursor:
        tenants.change(cursor, name, changes)
    console.print("changed")
