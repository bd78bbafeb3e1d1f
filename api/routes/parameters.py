"""Kinds of query parameters that several routes share."""

from typing import Any

from fastapi import Query

LAST_SECOND = 253_402_300_799
"""Unix seconds of the end of the year 9999, the last that Python and Postgres agree about."""


def text(max_length: int) -> Any:
    """A text to compare rows with: NUL, which no row can hold, is refused as Postgres's driver would, but earlier."""
    return Query(max_length=max_length, pattern=r"^[^\x00]*$")
