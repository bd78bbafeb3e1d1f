"""What the ledger went through: triggers that the harness puts into its own database, and a look at all rows.

Each worker connects as a Postgres role of its own, so the audit knows who wrote a row, whatever the row says.
"""

import datetime
from dataclasses import dataclass, field
from typing import Any

from db import session

_TERMINAL = "('succeeded', 'failed', 'cancelled', 'expired')"

_TRIGGERS = f"""
CREATE TABLE job_transitions (
    seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, job_id uuid NOT NULL, was text, became text NOT NULL,
    attempt int NOT NULL, worker_id bigint, role text NOT NULL DEFAULT session_user,
    at timestamptz NOT NULL DEFAULT clock_timestamp());
CREATE TABLE result_writes (
    seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, job_id uuid NOT NULL, sha256 text NOT NULL);

CREATE FUNCTION audit_job() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO job_transitions (job_id, was, became, attempt, worker_id)
    VALUES (NEW.id, CASE TG_OP WHEN 'UPDATE' THEN OLD.status END, NEW.status, NEW.attempt, NEW.worker_id);
    RETURN NULL; END $$;
CREATE FUNCTION audit_result() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO result_writes (job_id, sha256) VALUES (NEW.job_id, encode(sha256(NEW.body), 'hex'));
    RETURN NULL; END $$;

CREATE TRIGGER audit_created AFTER INSERT ON jobs FOR EACH ROW EXECUTE FUNCTION audit_job();
CREATE TRIGGER audit_moved AFTER UPDATE ON jobs FOR EACH ROW
    WHEN (OLD.status IS DISTINCT FROM NEW.status) EXECUTE FUNCTION audit_job();
CREATE TRIGGER audit_final AFTER UPDATE ON jobs FOR EACH ROW
    WHEN (OLD.status = NEW.status AND OLD.status IN {_TERMINAL} AND (OLD.finished_at, OLD.error, OLD.usage)
          IS DISTINCT FROM (NEW.finished_at, NEW.error, NEW.usage)) EXECUTE FUNCTION audit_job();
CREATE TRIGGER audit_stored AFTER INSERT OR UPDATE ON job_results FOR EACH ROW EXECUTE FUNCTION audit_result();
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A row of `jobs` with its result."""

    id: str
    tenant: str
    status: str
    attempt: int
    outcomes: tuple[str, ...] = ()
    """How each attempt ended that did not end the job."""
    finished_at: datetime.datetime | None = None
    code: str | None = None
    usage: str | None = None
    leader_id: str | None = None
    stored_sha256: str | None = None
    """As stored with the result."""
    sha256: str | None = None
    """Of the stored result, worked out by Postgres."""
    text: str | None = None
    """The answer's text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """A change of state; from None where the row was made."""

    job_id: str
    was: str | None
    became: str
    attempt: int
    worker_id: int | None
    role: str
    at: float
    """Unix seconds by Postgres's clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Everything there is, in one look. Transitions are in the order in which they happened."""

    jobs: dict[str, Job]
    transitions: list[Transition] = field(default_factory=list)
    writes: list[tuple[str, str]] = field(default_factory=list)
    """(job id, sha256) of every time that a result was stored."""


def install(url: str) -> None:
    """Put the triggers into an empty, migrated database."""
    _run(url, _TRIGGERS)


def make_role(url: str, name: str, through: str) -> str:
    """`url` as a role of that name, which is made over `through` if need be."""
    password = url.split("://", 1)[1].split("@", 1)[0].split(":", 1)[1]
    if not _run(through, "SELECT 1 FROM pg_roles WHERE rolname = %s", name):
        _run(through, f"CREATE ROLE \"{name}\" SUPERUSER LOGIN PASSWORD '{password}'")
    return f"postgresql://{name}:{password}@{url.split('@', 1)[1]}"


def look(url: str) -> Ledger:
    """Read it all."""
    jobs = _run(
        url,
        """
        SELECT j.id::text, tenant, status, attempt, ARRAY(SELECT jsonb_array_elements(attempts) ->> 'outcome'),
               finished_at, error ->> 'code', usage::text, to_jsonb(j) ->> 'leader_id', encode(r.sha256, 'hex'),
               encode(sha256(r.body), 'hex'),
               CASE WHEN j.endpoint = '/v1/completions'
                    THEN convert_from(r.body, 'UTF8')::jsonb #>> '{choices,0,text}' END
        FROM jobs j LEFT JOIN job_results r ON r.job_id = j.id
        """,
    )
    transitions = _run(
        url,
        "SELECT job_id::text, was, became, attempt, worker_id, role, extract(epoch FROM at)::float8 "
        "FROM job_transitions ORDER BY seq",
    )
    names = ("id", "tenant", "status", "attempt", "outcomes", "finished_at", "code", "usage", "leader_id",
             "stored_sha256", "sha256", "text")  # fmt: skip
    return Ledger(
        jobs={row[0]: Job(**{**dict(zip(names, row, strict=True)), "outcomes": tuple(row[4])}) for row in jobs},
        transitions=[
            Transition(**dict(zip(("job_id", "was", "became", "attempt", "worker_id", "role", "at"), row, strict=True)))
            for row in transitions
        ],
        writes=_run(url, "SELECT job_id::text, sha256 FROM result_writes ORDER BY seq"),
    )


def _run(url: str, sql: str, *values: Any) -> list[Any]:
    connection = session.connect(url, "audit")
    try:
        with connection.cursor() as cursor:
            cursor.execute("SET statement_timeout = '60s'")
            cursor.execute(sql, values or None)
            return cursor.fetchall() if cursor.description else []
    finally:
        connection.close()
