"""What every command of `switchyard` needs: the ledger, tables and JSON, and a way to give up."""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

import settings
from db import session
from db.session import Cursor
from local import servers

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)


@contextlib.contextmanager
def ledger() -> Iterator[Cursor]:
    """A cursor on the Postgres of this installation."""
    config = settings.load()
    url = config.database_url or servers.urls(config.home)[0]
    with contextlib.closing(session.connect(url, "switchyard-cli")) as connection, connection.cursor() as cursor:
        yield cursor


def show(rows: Sequence[dict[str, Any]], as_json: bool = False) -> None:
    """Rows as a table; columns are those of the first."""
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    if not rows:
        console.print("nothing to show")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in rows[0]:
        table.add_column(column, no_wrap=column == "id")
    for row in rows:
        table.add_row(*[_text(value) for value in row.values()])
    console.print(table)


def _text(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def fail(message: str) -> NoReturn:
    """Say what went wrong and exit."""
    print(f"switchyard: {message}", file=sys.stderr)
    raise SystemExit(1)
