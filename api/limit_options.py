"""The options by which commands set limits of keys and tenants."""

import math
from typing import Annotated, Any

import typer

from api.key_views import NANO
from api.terminal import fail

RequestsPerMinute = Annotated[
    str | None, typer.Option("--requests-per-minute", help="Or `none`.", rich_help_panel="Limits")
]
TokensPerMinute = Annotated[
    str | None, typer.Option("--tokens-per-minute", help="Prompt and max_tokens. Or `none`.", rich_help_panel="Limits")
]
MaxConcurrent = Annotated[
    str | None,
    typer.Option("--max-concurrent", help="Jobs queued or running at a time. Or `none`.", rich_help_panel="Limits"),
]
DailyTokens = Annotated[
    str | None, typer.Option("--daily-tokens", help="Per day (UTC). Or `none`.", rich_help_panel="Limits")
]
DailyCost = Annotated[
    str | None,
    typer.Option("--daily-cost", help="Per day, in the currency of the prices. Or `none`.", rich_help_panel="Limits"),
]


def changes(requests_per_minute: str | None, tokens_per_minute: str | None, max_concurrent: str | None,
            daily_tokens: str | None, daily_cost: str | None) -> dict[str, Any]:  # fmt: skip
    """The columns to set. Options that were not given are not in it; `none` lifts a limit."""
    whole = {
        "requests_per_minute": (requests_per_minute, 2**31 - 1),
        "tokens_per_minute": (tokens_per_minute, 2**31 - 1),
        "max_concurrent": (max_concurrent, 2**31 - 1),
        "daily_tokens": (daily_tokens, 2**53),
    }
    made: dict[str, Any] = {
        name: None if given == "none" else _whole(name, given, most)
        for name, (given, most) in whole.items()
        if given is not None
    }
    if daily_cost is not None:
        made["daily_cost_nano"] = None if daily_cost == "none" else _nano(daily_cost)
    return made


def _whole(name: str, given: str, most: int) -> int:
    if not given.isdecimal() or int(given) > most:
        fail(f"--{name.replace('_', '-')} must be a whole number or `none`")
    return int(given)


def _nano(given: str) -> int:
    try:
        cost = float(given)
    except ValueError:
        cost = math.nan
    if not 0 <= cost <= 1e9:
        fail("--daily-cost must be a number or `none`")
    return round(cost * NANO)
