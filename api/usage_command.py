"""`switchyard usage`."""

import datetime
import uuid
from typing import Annotated

import typer

from api import views
from api.terminal import Json, fail, ledger, show
from db import usage
from db.usage import GROUPINGS, Grouping, Wanted

_DATE = ["%Y-%m-%d"]


def show_usage(
    by: Annotated[str, typer.Option(help=f"Some of {', '.join(GROUPINGS)}.")] = "day,tenant,model",
    start: Annotated[datetime.datetime | None, typer.Option("--from", formats=_DATE, help="First day, UTC.")] = None,
    end: Annotated[datetime.datetime | None, typer.Option("--to", formats=_DATE, help="Last day, UTC.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Of this tenant alone.")] = None,
    key: Annotated[uuid.UUID | None, typer.Option(help="Of the API key with this id alone.")] = None,
    model: Annotated[str | None, typer.Option(help="Of this model alone.")] = None,
    as_json: Json = False,
) -> None:
    """Requests by how they ended, tokens and cost; of the last 30 days where none are named."""
    last = end.date() if end else datetime.datetime.now(datetime.UTC).date()
    first = start.date() if start else last - datetime.timedelta(days=29)
    names = by.split(",")
    grouping: tuple[Grouping, ...] = tuple(name for name in GROUPINGS if name in names)
    if len(grouping) != len(names):
        fail(f"--by takes some of {', '.join(GROUPINGS)}, each once")
    wanted = Wanted(start=first, end=last, by=grouping, tenant=tenant, api_key_id=key, model=model, limit=10_000)
    with ledger() as cursor:
        found = usage.find(cursor, [wanted])[0]
    rows = [views.usage(one) for one in found]
    for row in rows:
        del row["object"]
        row["cost"] = f"{row['cost']:.6f}"
    show(rows, as_json)
