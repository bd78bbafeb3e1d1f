"""Usage: what each key asked of each model on each day, and what that cost.

A trigger writes an entry in the transaction that ends a job, whichever statement ends it, so nothing is counted
twice or forgotten, and removing the job changes nothing. Entries are added up into days now and then; whoever
reads sums both. A job that was retried has ended more than once, and counts each time.
"""

import datetime
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from psycopg2.extras import execute_values

from db.session import Cursor

OUTCOMES = ("succeeded", "failed", "cancelled", "expired", "shared", "cached")
"""How a request ended. `shared`: with the answer of another job's run; `cached`: from the cache."""
_FIGURES = (*(f"num_{name}" for name in OUTCOMES), "prompt_tokens", "completion_tokens", "cost_nano")

Grouping = Literal["day", "tenant", "api_key_id", "model"]
GROUPINGS: tuple[Grouping, ...] = get_args(Grouping)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which usage, from the first day to the last (UTC), one sum for each combination of `by`."""

    start: datetime.date
    end: datetime.date
    by: tuple[Grouping, ...]
    tenant: str | None = None
    """None: every tenant's."""
    api_key_id: uuid.UUID | None = None
    model: str | None = None
    limit: int = 1000


@dataclass(frozen=True, slots=True)
class Usage:
    """One sum: what it is of, how many requests ended how, and what they used. Requests that were shared, cached
    or not successful use nothing."""

    of: dict[str, str]
    num: dict[str, int]
    prompt_tokens: int
    completion_tokens: int
    cost_nano: int


def find(cursor: Cursor, wanted: Sequence[Wanted]) -> list[list[Usage]]:
    """The sums, exact to the last committed end, the latest days first; one more than `limit` says that there are
    more."""
    return [_find(cursor, one) for one in wanted]


def _find(cursor: Cursor, wanted: Wanted) -> list[Usage]:
    conditions = ["day BETWEEN %(start)s AND %(end)s"]
    conditions += [f"{name} = %({name})s" for name in ("tenant", "api_key_id", "model") if getattr(wanted, name)]
    where = " AND ".join(conditions)
    groups = ", ".join(wanted.by)
    cursor.execute(
        f"""
        SELECT {", ".join(f"{name}::text" for name in wanted.by)}, {_SUMS}
        FROM (SELECT {_DAY_COLUMNS} FROM usage_days WHERE {where}
              UNION ALL SELECT {_AS_DAY} FROM usage_entries WHERE {where}) u
        GROUP BY {groups} ORDER BY {groups.replace("day", "day DESC")} LIMIT %(limit)s + 1
        """,  # noqa: S608 - names from this file alone
        {name: getattr(wanted, name) for name in Wanted.__slots__},
    )
    found = []
    for row in cursor.fetchall():
        of, figures = row[: len(wanted.by)], [int(figure) for figure in row[len(wanted.by) :]]
        num = dict(zip(OUTCOMES, figures, strict=False))
        found.append(Usage(dict(zip(wanted.by, of, strict=True)), num, *figures[len(OUTCOMES) :]))
    return found


_DAY_COLUMNS = ", ".join(("tenant", "day", "api_key_id", "model", *_FIGURES))
_AS_DAY = ", ".join((
    "tenant", "day", "api_key_id", "model",
    *(f"CASE outcome WHEN '{name}' THEN num ELSE 0 END AS num_{name}" for name in OUTCOMES), *_FIGURES[len(OUTCOMES) :],
))  # fmt: skip
_SUMS = ", ".join(f"sum({name})" for name in _FIGURES)


def add_hits(cursor: Cursor, hits: Mapping[tuple[str | None, uuid.UUID | None, str | None], int]) -> None:
    """Count answers from the cache: (tenant, API key, model) → how many."""
    if hits:
        execute_values(
            cursor,
            "INSERT INTO usage_entries (day, tenant, api_key_id, model, outcome, num) VALUES %s",
            [(tenant, key_id, model, "cached", num) for (tenant, key_id, model), num in hits.items()],
            template="((clock_timestamp() AT TIME ZONE 'UTC')::date, %s, %s::uuid, %s, %s, %s)",
        )


def add_up(cursor: Cursor, limit: int = 200_000) -> int:
    """Move entries into the sums of their days, in one statement; answers how many. Two at once share the work."""
    cursor.execute(
        f"""
        WITH gone AS (DELETE FROM usage_entries WHERE ctid = ANY (ARRAY(
                SELECT ctid FROM usage_entries LIMIT %s FOR UPDATE SKIP LOCKED)) RETURNING *),
        added AS (INSERT INTO usage_days AS d ({_DAY_COLUMNS})
            SELECT tenant, day, api_key_id, model, {_SUMS}
            FROM (SELECT {_AS_DAY} FROM gone) e GROUP BY tenant, day, api_key_id, model
            ORDER BY tenant, day, api_key_id, model
            ON CONFLICT (tenant, day, api_key_id, model) DO UPDATE SET
                {", ".join(f"{name} = d.{name} + excluded.{name}" for name in _FIGURES)})
        SELECT count(*) FROM gone
        """,  # noqa: S608 - names from this file alone
        (limit,),
    )
    row = cursor.fetchone()
    assert row is not None
    return int(row[0])
