"""Transactions whose BEGIN travels with their first statement, and what opening connections loads."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator

import psycopg2
import pytest
from psycopg2.extensions import TRANSACTION_STATUS_IDLE, TRANSACTION_STATUS_INTRANS
from psycopg2.extras import execute_values

from db import session
from db.session import Cursor


@pytest.fixture
def cursor(database_url: str) -> Iterator[Cursor]:
    with contextlib.closing(session.connect(database_url, "tests")) as connection, connection.cursor() as made:
        made.execute("CREATE TEMPORARY TABLE kept (number int UNIQUE)")
        yield made


def numbers(cursor: Cursor) -> list[int]:
    cursor.execute("SELECT number FROM kept ORDER BY number")
    return [row[0] for row in cursor.fetchall()]


def test_the_first_statement_begins_the_transaction_and_has_its_own_answer(cursor: Cursor) -> None:
    with session.transaction(cursor):
        rows = execute_values(cursor, "INSERT INTO kept VALUES %s RETURNING number", [(1,), (2,)], fetch=True)
        assert rows == [(1,), (2,)]
        assert cursor.connection.info.transaction_status == TRANSACTION_STATUS_INTRANS
        cursor.execute("INSERT INTO kept VALUES (%s)", (3,))
    assert cursor.connection.info.transaction_status == TRANSACTION_STATUS_IDLE
    assert numbers(cursor) == [1, 2, 3]


@pytest.mark.parametrize("broken", ["INSERT INTO kept VALUES (1)", "INSERT INTO nowhere VALUES (1)", "no statement"])
@pytest.mark.parametrize("is_first", [True, False])
def test_what_fails_takes_all_with_it_and_leaves_no_transaction(cursor: Cursor, broken: str, is_first: bool) -> None:
    cursor.execute("INSERT INTO kept VALUES (1)")
    with pytest.raises(psycopg2.Error), session.transaction(cursor):
        if not is_first:
            cursor.execute("INSERT INTO kept VALUES (2)")
        cursor.execute(broken)
    assert cursor.connection.info.transaction_status == TRANSACTION_STATUS_IDLE
    assert numbers(cursor) == [1]


def test_a_transaction_without_a_statement_leaves_none_behind(cursor: Cursor) -> None:
    with session.transaction(cursor):
        pass
    cursor.execute("INSERT INTO kept VALUES (1)")
    assert cursor.connection.info.transaction_status == TRANSACTION_STATUS_IDLE
    assert numbers(cursor) == [1]


def test_only_a_migration_loads_sqlalchemy() -> None:
    """It would be half of what a reconciler's start takes."""
    code = "import sys, api.server, api.batcher, tasks.reconciler, tasks.worker; print('sqlalchemy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
