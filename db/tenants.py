"""Tenants: who owns keys, jobs and cache entries, and what all their keys together may use."""

import dataclasses
import datetime
from dataclasses import dataclass

from db.session import Cursor


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a key, or all keys of a tenant together, may use. None: without limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    """Jobs queued or running at a time."""
    daily_tokens: int | None = None
    """Per day (UTC)."""
    daily_cost_nano: int | None = None
    """In 1e-9 of the currency that the catalog's prices are in."""

    @property
    def have_rate(self) -> bool:
        return self.requests_per_minute is not None or self.tokens_per_minute is not None

    @property
    def have_budget(self) -> bool:
        """Whether each job must be held against them in the ledger."""
        return not (self.max_concurrent is None and self.daily_tokens is None and self.daily_cost_nano is None)


LIMITS = [field.name for field in dataclasses.fields(Limits)]
NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant as its row says."""

    name: str
    weight: float
    """Its share where tenants compete."""
    created_at: datetime.datetime
    limits: Limits


_COLUMNS = f"name, weight, created_at, {', '.join(LIMITS)}"


def ensure(cursor: Cursor, name: str) -> None:
    """Make the tenant if it is new."""
    cursor.execute("INSERT INTO tenants (name) VALUES (%s) ON CONFLICT DO NOTHING", (name,))


def change(cursor: Cursor, name: str, changes: dict[str, float | int | None]) -> Tenant:
    """Set these columns (of `LIMITS`, weight), making the tenant if it is new. Gateways follow
    within two seconds."""
    assert changes.keys() <= {*LIMITS, "weight"}
    ensure(cursor, name)
    assignments = ", ".join(["name = name", *(f"{column} = %({column})s" for column in changes)])
    cursor.execute(
        f"UPDATE tenants SET {assignments} WHERE name = %(tenant)s RETURNING {_COLUMNS}",  # noqa: S608
        {**changes, "tenant": name},
    )
    row = cursor.fetchone()
    assert row is not None
    return _tenant(*row)


def find(cursor: Cursor, name: str | None = None) -> list[Tenant]:
    """Every tenant, or the one of that name."""
    cursor.execute(
        f"SELECT {_COLUMNS} FROM tenants WHERE %(name)s IS NULL OR name = %(name)s ORDER BY name",  # noqa: S608
        {"name": name},
    )
    return [_tenant(*row) for row in cursor.fetchall()]


def _tenant(name: str, weight: float, created_at: datetime.datetime, *limits: int | None) -> Tenant:
    return Tenant(name, weight, created_at, Limits(**dict(zip(LIMITS, limits, strict=True))))
