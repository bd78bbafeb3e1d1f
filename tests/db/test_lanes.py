"""Lanes: batching, order, errors, and a Postgres that goes away."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psycopg2
import pytest

from db import request_log, session
from db.lanes import Lane, LaneDown
from db.session import Cursor
from local import servers
from tests.faults.proxy import Mode, Proxy


async def test_what_arrives_while_busy_becomes_one_statement(database_url: str) -> None:
    gate, batches = threading.Event(), []

    def statement(cursor: Cursor, items: Sequence[int]) -> list[int]:
        gate.wait(10)
        batches.append(list(items))
        cursor.execute("SELECT n * 2 FROM unnest(%s) WITH ORDINALITY AS t (n, o) ORDER BY o", (list(items),))
        return [row[0] for row in cursor.fetchall()]

    lane = Lane(database_url, statement)
    futures = [lane.submit(number) for number in range(100)]
    gate.set()
    assert await asyncio.gather(*futures) == [number * 2 for number in range(100)]
    assert len(batches) <= 3
    assert [item for batch in batches for item in batch] == list(range(100))
    await lane.close()


async def test_a_refused_item_stands_alone(database_url: str) -> None:
    def statement(cursor: Cursor, items: Sequence[int]) -> list[int]:
        cursor.execute("SELECT 10 / n FROM unnest(%s) AS n", (list(items),))
        return [row[0] for row in cursor.fetchall()]

    lane = Lane(database_url, statement)
    answers = await asyncio.gather(*[lane.submit(number) for number in (1, 2, 0, 5)], return_exceptions=True)
    assert [answers[0], answers[1], answers[3]] == [10, 5, 2]
    assert isinstance(answers[2], psycopg2.errors.DivisionByZero)
    await lane.close()


async def test_a_lane_outlives_a_restart_of_postgres_and_gives_up_in_time(tmp_path: Path) -> None:
    def statement(cursor: Cursor, items: Sequence[int]) -> list[int]:
        cursor.execute("SELECT 1")
        return list(items)

    with servers.start_postgres(tmp_path, durable=False) as server:
        patient, hasty = Lane(server.url, statement, patience_s=20), Lane(server.url, statement, patience_s=0.3)
        assert (await patient.submit(1), await hasty.submit(1)) == (1, 1)
        await asyncio.to_thread(server.kill)
        waiting = patient.submit(2)
        with pytest.raises(LaneDown):
            await asyncio.wait_for(hasty.submit(2), 5)
        await asyncio.to_thread(server.restart)
        assert await asyncio.wait_for(waiting, 20) == 2
        assert await asyncio.wait_for(hasty.submit(3), 5) == 3
        await patient.close()
        await hasty.close()


async def test_only_a_kept_lane_connects_unasked_and_stays(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(cursor: Cursor, items: Sequence[int]) -> list[int]:
        return list(items)

    def guest(cursor: Cursor, items: Sequence[int]) -> list[int]:
        return list(items)

    def connected() -> set[str]:
        watcher.execute("SELECT application_name FROM pg_stat_activity WHERE application_name LIKE 'switchyard-%%'")
        return {row[0] for row in watcher.fetchall()} & {"switchyard-kept", "switchyard-guest"}

    async def until(names: set[str]) -> None:
        for _ in range(500):
            if connected() == names:
                return
            await asyncio.sleep(0.02)
        raise AssertionError(connected())

    monkeypatch.setattr("db.lanes._IDLE_S", 0.3)
    with contextlib.closing(session.connect(database_url, "tests")) as connection, connection.cursor() as watcher:
        lanes = Lane(database_url, kept, is_kept=True), Lane(database_url, guest)
        await until({"switchyard-kept"})
        for number in range(2):
            assert [await lane.submit(number) for lane in lanes] == [number, number]
            await until({"switchyard-kept", "switchyard-guest"})
            await until({"switchyard-kept"})
        for lane in lanes:
            await lane.close()
        await until(set())


async def test_a_cancelled_caller_disturbs_nobody(database_url: str) -> None:
    def statement(cursor: Cursor, items: Sequence[int]) -> list[int]:
        cursor.execute("SELECT pg_sleep(0.05)")
        return list(items)

    lane = Lane(database_url, statement)
    futures = [lane.submit(number) for number in range(20)]
    for future in futures[::2]:
        future.cancel()
    assert await asyncio.gather(*futures[1::2]) == list(range(1, 20, 2))
    assert await lane.submit(99) == 99
    await lane.close()


def test_a_statement_cannot_hang(database_url: str) -> None:
    connection = session.connect(database_url, "tests")
    with connection.cursor() as cursor:
        cursor.execute("SHOW statement_timeout")
        assert cursor.fetchone() == ("5s",)
    connection.close()


def test_log_entries_arrive_as_they_are(database_url: str) -> None:
    odd = 'tab\t newline\n return\r backslash \\ \\N "quotes" ünïcödé 😀'
    connection = session.connect(database_url, "tests")
    with connection.cursor() as cursor:
        cursor.execute("TRUNCATE request_log")
        entries = [
            request_log.Entry(request_id="a", endpoint="/x", prompt=odd, status_code=200, is_stream=True, ttft_ms=1.5),
            request_log.Entry(request_id="\\N", endpoint="", tenant=None),
        ]
        request_log.append(cursor, entries)
        cursor.execute("SELECT request_id, endpoint, tenant, prompt, is_stream, ttft_ms FROM request_log ORDER BY id")
        assert cursor.fetchall() == [("a", "/x", None, odd, True, 1.5), ("\\N", "", None, None, False, None)]
    connection.close()


async def test_a_server_that_says_nothing_is_given_up(database_url: str) -> None:
    """Neither dead nor answering: libpq alone would wait for ever."""
    parts = urlsplit(database_url)
    assert parts.port is not None
    with contextlib.closing(Proxy(parts.port)) as proxy:
        netloc = parts.netloc.rpartition(":")[0] + f":{proxy.port}"
        lane = Lane(urlunsplit(parts._replace(netloc=netloc)), _echo, patience_s=1, silence_s=1)
        assert await lane.submit(1) == 1
        proxy.set(Mode.HANG)
        for longest_s in (5.0, 3.5):  # the second asks a server known to be away: one try
            started = time.monotonic()
            with pytest.raises(LaneDown):
                await lane.submit(2)
            assert time.monotonic() - started < longest_s
        proxy.set(Mode.PASS)
        await asyncio.sleep(1.1)
        assert await lane.submit(3) == 3
        await lane.close()


def _echo(cursor: Cursor, items: Sequence[int]) -> list[int]:
    cursor.execute("SELECT unnest(%s)", (list(items),))
    return [row[0] for row in cursor.fetchall()]
