"""Connections to Postgres.

Bounds are part of the connection, so no statement can hang a caller: 2 s to connect, 5 s a statement,
2 s for a lock, and a dead peer is noticed within 10 s.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import psycopg2
import psycopg2.errors
import psycopg2.extensions
import psycopg2.extras

DependencyDown = (psycopg2.OperationalError, psycopg2.InterfaceError, psycopg2.errors.ReadOnlySqlTransaction)
"""What psycopg2 raises when Postgres cannot be reached, restarts, takes no writes, or runs out of
connections, disk or time."""

_OPTIONS = "-c statement_timeout=5000 -c lock_timeout=2000 -c idle_in_transaction_session_timeout=10000"
_NETWORK: dict[str, Any] = {"connect_timeout": 2, "tcp_user_timeout": 10_000, "keepalives_idle": 5}

psycopg2.extras.register_uuid()  # type: ignore[no-untyped-call]


class Cursor(psycopg2.extensions.cursor):
    """A cursor whose transactions begin with their first statement: BEGIN takes no round trip of its own."""

    is_beginning = False

    def execute(self, query: Any, values: Any = None) -> None:
        if self.is_beginning:
            self.is_beginning = False
            query = b"BEGIN;" + query if isinstance(query, bytes) else "BEGIN;" + query
        super().execute(query, values)


class Connection(psycopg2.extensions.connection):
    """One whose cursors are ours."""

    def cursor(self) -> Cursor:  # type: ignore[override]
        return super().cursor(cursor_factory=Cursor)


def connect(url: str, application_name: str, *, is_durable: bool = True, idle_s: float = 0.0) -> Connection:
    """An autocommit connection. `is_durable=False` commits without waiting for the disk: a crash of
    Postgres itself may lose its last half second, so use it only for what can be done again. `idle_s`: the
    server ends a session, and frees its locks, that says nothing for so long (0: never)."""
    commit = "on" if is_durable else "off"
    silence = f" -c idle_session_timeout={int(idle_s * 1000)}" if idle_s else ""
    connection: Connection = psycopg2.connect(
        url,
        connection_factory=Connection,
        application_name=application_name,
        options=f"{_OPTIONS} -c synchronous_commit={commit} -c plan_cache_mode=force_generic_plan -c jit=off{silence}",
        **_NETWORK,
    )
    connection.autocommit = True
    return connection


@contextlib.contextmanager
def transaction(cursor: Cursor) -> Iterator[None]:
    """What happens inside is committed together, or not at all."""
    cursor.is_beginning = True
    try:
        yield
    except BaseException:
        cursor.execute("ROLLBACK")
        raise
    cursor.execute("COMMIT")


def count(cursor: Cursor, application_name: str) -> int:
    """How many sessions of that name this database has."""
    cursor.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND datname = current_database()",
        (application_name,),
    )
    row = cursor.fetchone()
    assert row is not None
    return int(row[0])


def clock(cursor: Cursor) -> float:
    """Postgres's time, in Unix seconds."""
    cursor.execute("SELECT extract(epoch FROM clock_timestamp())::float8")
    row = cursor.fetchone()
    assert row is not None
    return float(row[0])


def server_setting(cursor: Cursor, name: str) -> str:
    """What the server runs with."""
    cursor.execute("SELECT current_setting(%s)", (name,))
    row = cursor.fetchone()
    assert row is not None
    return str(row[0])
