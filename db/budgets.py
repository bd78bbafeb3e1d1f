"""Budgets: what jobs hold of their key's and tenant's limits while they live, and what they used of them.

A job reserves the most that it can use, in the transaction that accepts it. Its end needs no word about that:
a job that has ended and is not settled is itself the note that its reservation has become what its row says
it used. Whoever wants to know what is left settles such jobs first, under the tenant's lock, so accounts are
exact whenever they are asked, and no way to end a job can forget them. Locks are taken in this order: tenants
(by hash), then jobs (by id); nothing that moves a job takes a tenant's.
"""

import datetime
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from psycopg2.extras import execute_values

from db import accept, jobs
from db.accept import Idempotency, Inserted, NewJob, Reserved
from db.session import Cursor, transaction
from db.tenants import NO_LIMITS, Limits

_LOCK_CLASS = 0x5358
"""First half of the advisory lock key of every tenant; the second is its name's hash."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A job that a limit does not hold."""

    limit: Literal["max_concurrent", "daily_tokens", "daily_cost"]
    of: Literal["key", "tenant"]
    is_spent: bool
    """Even the end of all jobs that live would not make room today."""
    renewed_in_s: float
    """Until the next day's budget."""


@dataclass(slots=True)
class _Account:
    """What one key, or one tenant, holds and has used today."""

    limits: Limits = NO_LIMITS
    live: int = 0
    tokens: int = 0
    cost: int = 0
    spent_tokens: int = 0
    spent_cost: int = 0

    def refusal(
        self, tokens: int, cost: int
    ) -> tuple[Literal["max_concurrent", "daily_tokens", "daily_cost"], bool] | None:
        """The limit that does not hold so much more, and whether that is for the whole day."""
        of = self.limits
        if of.daily_tokens is not None and self.spent_tokens + self.tokens + tokens > of.daily_tokens:
            return "daily_tokens", self.spent_tokens + tokens > of.daily_tokens
        if of.daily_cost_nano is not None and self.spent_cost + self.cost + cost > of.daily_cost_nano:
            return "daily_cost", self.spent_cost + cost > of.daily_cost_nano
        if of.max_concurrent is not None and self.live >= of.max_concurrent:
            return "max_concurrent", False
        return None

    def add(self, tokens: int, cost: int) -> None:
        self.live += 1
        self.tokens += tokens
        self.cost += cost


@dataclass(frozen=True, slots=True)
class _Wish:
    """What one job wants to hold."""

    job_id: uuid.UUID
    tenant: str
    api_key_id: uuid.UUID
    tokens: int
    cost: int


@dataclass(slots=True)
class _Books:
    """The accounts of the tenants whose locks are held."""

    day: datetime.date
    renewed_in_s: float
    tenants: dict[str, _Account] = field(default_factory=dict)
    keys: dict[uuid.UUID, _Account] = field(default_factory=dict)


def insert(cursor: Cursor, wanted: Sequence[NewJob]) -> list[Inserted | Refused]:
    """As `accept.insert`, for jobs with `reserved_tokens`: recorded and reserved for, or refused."""
    with transaction(cursor):
        _lock(cursor, {job.tenant for job in wanted})
        refused, admitted = _admit(cursor, wanted)
        made = {one.id: one for one in accept.insert(cursor, admitted)} if admitted else {}
    return [refused.get(job.id) or made[job.id] for job in wanted]


def insert_once(cursor: Cursor, wanted: Sequence[tuple[Idempotency, NewJob]]) -> list[Reserved | Refused]:
    """As `accept.insert_once`, for jobs with `reserved_tokens`. A refused one leaves its key free."""
    with transaction(cursor):
        _lock(cursor, {job.tenant for _, job in wanted})
        # Under the tenant's lock nobody else can use a key of its meanwhile.
        held = accept.find_key(cursor, [(one.api_key_id, one.key) for one, _ in wanted])
        first = {(one.api_key_id, one.key): job.id for one, job in reversed(wanted)}
        new = [
            job
            for (one, job), known in zip(wanted, held, strict=True)
            if known is None and first[one.api_key_id, one.key] == job.id
        ]
        refused, admitted = _admit(cursor, new)
        ready = {job.id: job for job in admitted}
        rest = [(one, ready.get(job.id, job)) for one, job in wanted if first[one.api_key_id, one.key] not in refused]
        answers = iter(accept.insert_keyed(cursor, rest) if rest else [])
    return [refused.get(first[one.api_key_id, one.key]) or next(answers) for one, _ in wanted]


def retry(cursor: Cursor, wanted: Sequence[tuple[uuid.UUID, str | None]]) -> list[tuple[str, str] | Refused | None]:
    """As `jobs.retry`; a job that had a reservation needs a new one."""
    ids = [job_id for job_id, _ in wanted]
    cursor.execute("SELECT DISTINCT tenant FROM jobs WHERE id = ANY(%s) AND reserved_tokens IS NOT NULL", (ids,))
    tenants = {row[0] for row in cursor.fetchall()}
    if not tenants:
        return list(jobs.retry(cursor, wanted))
    with transaction(cursor):
        _lock(cursor, tenants)
        books = _books(cursor, tenants)
        cursor.execute(
            f"""
            SELECT id, tenant, api_key_id, reserved_tokens, {_RESERVED_COST} FROM jobs
            WHERE id = ANY(%s) AND status IN ('failed', 'expired') AND is_settled ORDER BY id FOR UPDATE
            """,  # noqa: S608
            (ids,),
        )
        asked = dict(wanted)
        wishes = [_Wish(*row) for row in cursor.fetchall() if asked[row[0]] in (None, row[1])]
        refused = _reserve(cursor, books, wishes)
        cursor.execute(
            "UPDATE jobs SET is_settled = false, reserved_on = %s WHERE id = ANY(%s)",
            (books.day, [wish.job_id for wish in wishes if wish.job_id not in refused]),
        )
        rest = [(job_id, tenant) for job_id, tenant in wanted if job_id not in refused]
        found = dict(zip([job_id for job_id, _ in rest], jobs.retry(cursor, rest), strict=True))
    return [refused.get(job_id) or found.get(job_id) for job_id in ids]


def settle(cursor: Cursor) -> int:
    """Settle every job that has ended; answers how many. Nobody waits for this: it keeps the accounts' own
    settling short."""
    cursor.execute(f"SELECT DISTINCT tenant FROM jobs WHERE {_UNSETTLED}")  # noqa: S608
    tenants = sorted(row[0] for row in cursor.fetchall())
    settled = 0
    for tenant in tenants:
        with transaction(cursor):
            _lock(cursor, {tenant})
            settled += _settle(cursor, [tenant])
    return settled


def settle_tenant(cursor: Cursor, tenant: str) -> None:
    """Settle the tenant's jobs that have ended, in the transaction of whoever calls, before it takes locks on jobs."""
    _lock(cursor, {tenant})
    _settle(cursor, [tenant])


def forget(cursor: Cursor, older_than_days: int = 40) -> int:
    """Delete the accounts of days long past that hold nothing; answers how many."""
    cursor.execute(
        "DELETE FROM budget_days WHERE num_live = 0 AND day < (clock_timestamp() AT TIME ZONE 'UTC')::date - %s",
        (older_than_days,),
    )
    return cursor.rowcount


_UNSETTLED = "reserved_tokens IS NOT NULL AND NOT is_settled AND finished_at IS NOT NULL"
_RESERVED_COST = "prompt_tokens * input_price::bigint + (reserved_tokens - prompt_tokens) * output_price"
# Who got the answer of another's run, like one from the cache, has used nothing.
_HAS_USED = "status = 'succeeded' AND leader_id IS NULL"
_PROMPT = "coalesce((usage ->> 'prompt_tokens')::bigint, 0)"
_COMPLETION = "coalesce((usage ->> 'completion_tokens')::bigint, 0)"


def _lock(cursor: Cursor, tenants: set[str]) -> None:
    cursor.execute(
        """
        SELECT pg_advisory_xact_lock(%s, hash) FROM
            (SELECT DISTINCT hashtext(name) AS hash FROM unnest(%s::text[]) name ORDER BY hash) ordered
        """,
        (_LOCK_CLASS, list(tenants)),
    )


def _settle(cursor: Cursor, tenants: Sequence[str]) -> int:
    cursor.execute(
        f"""
        WITH ended AS (SELECT id FROM jobs WHERE tenant = ANY(%s) AND {_UNSETTLED} ORDER BY id FOR UPDATE),
        done AS (UPDATE jobs j SET is_settled = true FROM ended e WHERE j.id = e.id RETURNING j.*),
        sums AS (SELECT api_key_id, reserved_on, count(*) AS n, sum(reserved_tokens) AS tokens,
                sum({_RESERVED_COST}) AS cost,
                coalesce(sum({_PROMPT} + {_COMPLETION}) FILTER (WHERE {_HAS_USED}), 0) AS used_tokens,
                coalesce(sum({_PROMPT} * input_price + {_COMPLETION} * output_price)
                    FILTER (WHERE {_HAS_USED}), 0) AS used_cost
            FROM done GROUP BY api_key_id, reserved_on),
        moved AS (UPDATE budget_days b SET num_live = num_live - n, reserved_tokens = reserved_tokens - tokens,
                reserved_cost = reserved_cost - cost, spent_tokens = spent_tokens + used_tokens,
                spent_cost = spent_cost + used_cost
            FROM sums s WHERE b.api_key_id = s.api_key_id AND b.day = s.reserved_on)
        SELECT count(*) FROM done
        """,  # noqa: S608 - expressions from this file alone
        (list(tenants),),
    )
    row = cursor.fetchone()
    assert row is not None
    return int(row[0])


def _books(cursor: Cursor, tenants: set[str]) -> _Books:
    """Exact accounts of these tenants and their keys, whose locks are held."""
    _settle(cursor, list(tenants))
    cursor.execute(
        """
        SELECT day, extract(epoch FROM (day + 1)::timestamp - now)::float8
        FROM (SELECT now, now::date AS day FROM (SELECT clock_timestamp() AT TIME ZONE 'UTC' AS now) t) d
        """
    )
    row = cursor.fetchone()
    assert row is not None
    books = _Books(*row)
    limits = "max_concurrent, {0}.daily_tokens, {0}.daily_cost_nano"
    cursor.execute(
        f"""
        SELECT k.id, k.tenant, k.{limits.format("k")}, t.{limits.format("t")},
            coalesce(b.live, 0)::bigint, coalesce(b.reserved_tokens, 0)::bigint, coalesce(b.reserved_cost, 0)::bigint,
            coalesce(b.spent_tokens, 0)::bigint, coalesce(b.spent_cost, 0)::bigint
        FROM api_keys k LEFT JOIN tenants t ON t.name = k.tenant
        LEFT JOIN (SELECT api_key_id, sum(num_live) AS live,
                sum(reserved_tokens) FILTER (WHERE day = %(day)s) AS reserved_tokens,
                sum(reserved_cost) FILTER (WHERE day = %(day)s) AS reserved_cost,
                sum(spent_tokens) FILTER (WHERE day = %(day)s) AS spent_tokens,
                sum(spent_cost) FILTER (WHERE day = %(day)s) AS spent_cost
            FROM budget_days WHERE tenant = ANY(%(tenants)s) AND (day = %(day)s OR num_live > 0)
            GROUP BY api_key_id) b ON b.api_key_id = k.id
        WHERE k.tenant = ANY(%(tenants)s)
        """,  # noqa: S608
        {"day": books.day, "tenants": list(tenants)},
    )
    for key_id, tenant, *figures in cursor.fetchall():
        books.keys[key_id] = _Account(_limits(figures[:3]), *figures[6:])
        whole = books.tenants.setdefault(tenant, _Account(_limits(figures[3:6])))
        for name, figure in zip(("live", "tokens", "cost", "spent_tokens", "spent_cost"), figures[6:], strict=True):
            setattr(whole, name, getattr(whole, name) + figure)
    return books


def _limits(figures: Sequence[int | None]) -> Limits:
    return Limits(max_concurrent=figures[0], daily_tokens=figures[1], daily_cost_nano=figures[2])


def _admit(cursor: Cursor, wanted: Sequence[NewJob]) -> tuple[dict[uuid.UUID, Refused], list[NewJob]]:
    """Reserve for these jobs: those refused, and the others as they are to be recorded. One that an earlier try
    has recorded already has its reservation."""
    if not wanted:
        return {}, []
    cursor.execute("SELECT id FROM jobs WHERE id = ANY(%s)", ([job.id for job in wanted],))
    known = {row[0] for row in cursor.fetchall()}
    books = _books(cursor, {job.tenant for job in wanted})
    wishes = [_wish(job) for job in wanted if job.id not in known]
    refused = _reserve(cursor, books, wishes)
    return refused, [replace(job, reserved_on=books.day) for job in wanted if job.id not in refused]


def _wish(job: NewJob) -> _Wish:
    assert job.api_key_id is not None
    assert job.reserved_tokens is not None
    cost = job.prompt_tokens * job.input_price + (job.reserved_tokens - job.prompt_tokens) * job.output_price
    return _Wish(job.id, job.tenant, job.api_key_id, job.reserved_tokens, cost)


def _reserve(cursor: Cursor, books: _Books, wishes: Sequence[_Wish]) -> dict[uuid.UUID, Refused]:
    """Hold what there is room for; answers the others."""
    refused: dict[uuid.UUID, Refused] = {}
    held: dict[tuple[uuid.UUID, str], list[int]] = {}
    for wish in wishes:
        accounts: dict[Literal["key", "tenant"], _Account] = {
            "key": books.keys.setdefault(wish.api_key_id, _Account()),
            "tenant": books.tenants.setdefault(wish.tenant, _Account()),
        }
        for of, account in accounts.items():
            if (reason := account.refusal(wish.tokens, wish.cost)) is not None:
                refused[wish.job_id] = Refused(reason[0], of, reason[1], books.renewed_in_s)
                break
        else:
            for account in accounts.values():
                account.add(wish.tokens, wish.cost)
            sums = held.setdefault((wish.api_key_id, wish.tenant), [0, 0, 0])
            sums[:] = [sums[0] + 1, sums[1] + wish.tokens, sums[2] + wish.cost]
    if held:
        execute_values(
            cursor,
            """
            INSERT INTO budget_days AS b (api_key_id, tenant, day, num_live, reserved_tokens, reserved_cost) VALUES %s
            ON CONFLICT (api_key_id, day) DO UPDATE SET num_live = b.num_live + excluded.num_live,
                reserved_tokens = b.reserved_tokens + excluded.reserved_tokens,
                reserved_cost = b.reserved_cost + excluded.reserved_cost
            """,
            [(key_id, tenant, books.day, *sums) for (key_id, tenant), sums in held.items()],
            page_size=1000,
        )
    return refused
