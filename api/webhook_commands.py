"""`switchyard webhooks`."""

import uuid
from typing import Annotated

import typer

from api import views
from api.terminal import Json, console, fail, ledger, show
from db import webhooks

app = typer.Typer(help="Webhooks of every tenant.", no_args_is_help=True)


@app.command("secret")
def create_secret(tenant: Annotated[str, typer.Option(help="Whose webhooks it signs.")] = "default") -> None:
    """Make a signing secret. It is shown once; the one before it signs beside it for a day."""
    with ledger() as cursor:
        print(webhooks.create_secret(cursor, [tenant])[0][1])


@app.command("list")
def list_deliveries(
    tenant: Annotated[str | None, typer.Option()] = None,
    status: Annotated[str | None, typer.Option(help="pending, delivered, failed or disabled")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 20,
    as_json: Json = False,
) -> None:
    """Deliveries, newest first."""
    with ledger() as cursor:
        found = webhooks.find(cursor, [webhooks.Filter(tenant=tenant, status=status, limit=limit)])[0]
    shown = [views.delivery(one) for one in found[:limit]]
    names = ("id", "type", "url", "status", "attempts", "last_status_code", "last_error")
    show(shown if as_json else [{name: one[name] for name in names} for one in shown], as_json=as_json)


@app.command("redeliver")
def redeliver(delivery_id: uuid.UUID) -> None:
    """Deliver again, under the same event id; a URL that was disabled is called again."""
    with ledger() as cursor:
        again = webhooks.redeliver(cursor, [(delivery_id, None)])[0]
    if again is None:
        fail(f"no delivery {delivery_id}")
    console.print("queued again")
