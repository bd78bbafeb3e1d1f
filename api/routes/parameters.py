"""Kinds of query parameters that several routes share."""

from typing import Any

from fastapi import Query


def text(max_length: int) -> Any:
    """A text to compare rows with: NUL, which no row can hold, is refused as Postgres's driver would, but earlier."""
    return Query(max_length=max_length, pattern=r"^[^\x00]*$")
