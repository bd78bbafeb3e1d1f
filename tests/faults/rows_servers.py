"""Families C, D and E: Redis, Postgres, and the lines to them."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psycopg2
from redis.exceptions import RedisError

from db import session
from tests.faults.lab import Lab
from tests.faults.proxy import Mode
from tests.faults.rows import row

_ALL_POSTGRES = ("gateway-postgres", "worker-postgres", "reconciler-postgres")
_ALL_REDIS = ("gateway-redis", "worker-redis")


@contextlib.contextmanager
def _again_and_again(period_s: float, work: Callable[[], object]) -> Iterator[None]:
    """Do `work` every so often during the block; what it breaks may break it."""
    is_over = threading.Event()

    def loop() -> None:
        while not is_over.wait(period_s):
            with contextlib.suppress(RedisError, OSError, psycopg2.Error):
                work()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@contextlib.contextmanager
def _through(
    lab: Lab, names: tuple[str, ...], mode: Mode, *, delay_s: float = 0.0, marker: bytes = b""
) -> Iterator[None]:
    is_severed = "gateway-postgres" in names and mode is not Mode.DELAY
    with lab.severed() if is_severed else contextlib.nullcontext():
        for name in names:
            lab.proxies[name].set(mode, delay_s=delay_s, marker=marker)
        try:
            yield
        finally:
            for name in names:
                lab.proxies[name].set(Mode.PASS)


def _command(broker: Any, *words: str) -> None:
    """A Redis command that the client has no method for."""
    broker.execute_command(*words)


def accepts_all(lab: Lab, since: float) -> None:
    """Whether every submission from then on (harness's clock) was accepted (or, with a known key, found its
    ended job): Redis is not needed for that."""
    refused = [
        record
        for record in lab.history.records
        if record.kind == "submit" and record.type != "invoke" and record.at > since and record.status not in {200, 202} and 422 not in record.allowed
    ]  # fmt: skip
    assert not refused, f"{len(refused)} submissions refused, first with {refused[0].status or refused[0].error}"


# C. Redis


def _redis_restarts(lab: Lab, stop: Callable[[], None], down_s: float) -> list[float]:
    found = []
    for _ in range(lab.times(2, 20)):
        with lab.supervised(), lab.traffic():
            since = time.monotonic()
            stop()
            time.sleep(down_s)
            lab.valkey.restart()
            found += lab.answers_again()
        accepts_all(lab, since)
    return found


@row("F30", "clean restart of Redis, empty", "I1 I11 I20", within_s=10)
def redis_restart(lab: Lab) -> list[float]:
    return _redis_restarts(lab, lab.valkey.stop, 2)


@row("F31", "kill -9 of Redis, its data gone", "I20", within_s=10)
def redis_kill(lab: Lab) -> list[float]:
    def kill() -> None:
        lab.valkey.kill()
        lab.num_kills += 1

    return _redis_restarts(lab, kill, 0.5)


@row("F32", "FLUSHALL every 2 s under traffic", "I1 I20", within_s=10)
def flushes(lab: Lab) -> list[float]:
    with lab.redis() as broker:
        since = time.time()
        with lab.supervised(), lab.traffic(rate=lab.rate * 1.5), _again_and_again(2, broker.flushall):
            time.sleep(lab.times(10, 60))
    rows = lab.query(
        "SELECT extract(epoch FROM started_at - created_at)::float8 FROM jobs "
        "WHERE created_at > to_timestamp(%s) AND started_at IS NOT NULL AND attempt = 1",
        since,
    )
    return [float(seconds) for (seconds,) in rows]


@row("F33", "CLIENT PAUSE ALL for 4 s", "I9 I10", within_s=8)
def redis_paused(lab: Lab) -> list[float]:
    with lab.redis() as broker, lab.supervised(), lab.traffic():
        since = time.monotonic()
        _command(broker, "CLIENT", "PAUSE", "4000", "ALL")
        time.sleep(4)
        found = lab.answers_again()
    accepts_all(lab, since)
    return found


@row("F34", "SIGSTOP of Redis", "I9 I11", within_s=10)
def redis_frozen(lab: Lab) -> list[float]:
    with lab.supervised(), lab.traffic():
        since = time.monotonic()
        os.kill(lab.valkey.process.pid, signal.SIGSTOP)
        time.sleep(lab.times(5, 30))
        os.kill(lab.valkey.process.pid, signal.SIGCONT)
        found = lab.answers_again()
    accepts_all(lab, since)
    return found


@row("F35", "slow Redis: 500 ms a chunk", "I9 I12", within_s=10)
def redis_slow(lab: Lab) -> list[float]:
    with lab.supervised(), lab.traffic(rate=lab.rate / 2):
        since = time.monotonic()
        for delay_s in (0.5, 2.0, 25.0) if lab.is_long else (0.25,):
            with _through(lab, _ALL_REDIS, Mode.DELAY, delay_s=delay_s):
                time.sleep(5)
        found = lab.answers_again()
    accepts_all(lab, since)
    return found


@row("F36", "Redis is full (maxmemory, noeviction)", "I1 I11", within_s=30)
def redis_full(lab: Lab) -> list[float]:
    with lab.redis() as broker, lab.supervised(), lab.traffic():
        since = time.monotonic()
        broker.config_set("maxmemory", "100kb")
        try:
            time.sleep(lab.times(5, 10))
        finally:
            broker.config_set("maxmemory", "0")
        found = lab.answers_again()
    accepts_all(lab, since)
    return found


@row("F37", "every Redis connection is killed once a second", "I11", within_s=10)
def redis_reset_storm(lab: Lab) -> list[float]:
    with lab.redis() as broker, lab.supervised(), lab.traffic():

        def storm() -> None:
            for kind in ("normal", "pubsub"):
                _command(broker, "CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")

        with _again_and_again(1, storm):
            time.sleep(lab.times(6, 60))
        return lab.answers_again()


@row("F38", "Redis takes no new connections (maxclients)", "I9", within_s=10, is_long=True)
def redis_maxclients(lab: Lab) -> list[float]:
    with lab.redis() as broker, lab.supervised(), lab.traffic():
        since = time.monotonic()
        broker.config_set("maxclients", "1")
        for kind in ("normal", "pubsub"):
            _command(broker, "CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
        time.sleep(3)
        broker.config_set("maxclients", "1000")
        found = lab.answers_again()
    accepts_all(lab, since)
    return found


@row("F39", "the queue's key has a wrong type, its bindings are gone", "I1", within_s=20)
def redis_wrong_type(lab: Lab) -> list[float]:
    with lab.redis() as broker, lab.supervised(), lab.traffic():
        since = time.monotonic()
        bindings = broker.keys("_kombu.binding.*")
        broker.delete("echo", *bindings)
        broker.set("echo", "not a list")
        time.sleep(3)
        broker.delete("echo")
        found = lab.answers_again()
    accepts_all(lab, since)
    return found


@row("F40", "Redis is demoted (READONLY), then asks for another password", "I10", within_s=20, is_long=True)
def redis_readonly(lab: Lab) -> list[float]:
    with lab.redis() as broker, lab.supervised(), lab.traffic():
        since = time.monotonic()
        _command(broker, "REPLICAOF", "127.0.0.1", "1")
        time.sleep(3)
        _command(broker, "REPLICAOF", "NO", "ONE")
        right = lab.valkey.spec.password
        broker.config_set("requirepass", "another")
        _command(broker, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        time.sleep(2)
        broker.config_set("requirepass", right)
        found = lab.answers_again()
    accepts_all(lab, since)
    return found


# D. Postgres


@row("F50", "fast restart of Postgres", "I1 I9 I10 I22", within_s=6)
def postgres_restart(lab: Lab) -> list[float]:
    found = []
    for _ in range(lab.times(1, 10)):
        with lab.supervised(), lab.traffic():
            lab.postgres.stop()
            time.sleep(1)
            lab.postgres.restart()
            found += lab.answers_again()
    return found


@row("F51", "kill -9 of Postgres under traffic", "I1 I2", within_s=10)
def postgres_kill(lab: Lab) -> list[float]:
    found = []
    for _ in range(lab.times(3, 20)):
        with lab.supervised(), lab.traffic(rate=lab.rate * 1.5):
            lab.postgres.kill()
            lab.num_kills += 1
            since = time.monotonic()
            lab.postgres.restart()
            up = time.monotonic() - since
            found += [up + more for more in lab.answers_again()]
    return found


@row("F52", "connections to Postgres are terminated at random, five a second", "I9 I15", within_s=3)
def terminations(lab: Lab) -> list[float]:
    sql = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'switchyard-%%' "
        "AND pid <> pg_backend_pid() ORDER BY random() LIMIT 1"
    )
    since = time.monotonic()
    with lab.supervised(), lab.traffic():
        with _again_and_again(0.2, lambda: lab.query(sql)):
            time.sleep(lab.times(8, 60))
        found = lab.answers_again()
    answered = [record for record in lab.history.records if record.at > since and record.kind in ("submit", "ask", "wait", "result") and record.type != "invoke"]  # fmt: skip
    share = sum(record.type == "ok" or record.status in record.allowed for record in answered) / len(answered)
    assert share >= 0.95, f"only {share:.1%} of {len(answered)} requests were answered"
    assert lab.query("SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%%'") == [(0,)]
    return found


@row("F53", "commit ambiguity: the insert commits, its reply is lost", "I1 I7", within_s=3)
def commit_ambiguity(lab: Lab) -> list[float]:
    proxy = lab.proxies["gateway-postgres"]
    before = proxy.num_dropped
    mix = {"job": 1.0, "keyed": 1.0}
    with lab.supervised(), lab.traffic(rate=10, mix=mix):
        for _ in range(lab.times(10, 200)):
            proxy.set(Mode.DROP_REPLY, marker=b"INSERT INTO jobs")
            time.sleep(0.25)
            proxy.set(Mode.PASS)
            time.sleep(0.15)
        found = lab.answers_again()
    assert proxy.num_dropped > before, "no reply was dropped"
    return found


@row("F55", "LOCK TABLE jobs for longer than a statement may take", "I5 I9", within_s=6)
def table_lock(lab: Lab) -> list[float]:
    with lab.supervised(), lab.traffic():
        with lab.severed(), lab.locked("jobs", "ACCESS EXCLUSIVE MODE"):
            time.sleep(lab.times(5, 20))
        return lab.answers_again()


@row("F55s", "slow Postgres: 300 ms a chunk", "I5 I9", within_s=6)
def postgres_slow(lab: Lab) -> list[float]:
    since = time.time()
    with lab.supervised(), lab.traffic(rate=lab.rate / 2):
        with _through(lab, _ALL_POSTGRES, Mode.DELAY, delay_s=0.15):
            time.sleep(5)
        found = lab.answers_again()
    assert not lab.restarts(since), "slowness was taken for death"
    return found


@row("F57", "Postgres has no connection left", "I10", within_s=6)
def no_connections(lab: Lab) -> list[float]:
    pids = {name: lab.stack.processes[name].pid for name in ("worker-a", "worker-b")}
    with lab.supervised(), lab.traffic(), contextlib.ExitStack() as held:
        lab.query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'switchyard-%%'")
        for _ in range(250):
            with contextlib.suppress(*session.DependencyDown):
                held.enter_context(contextlib.closing(session.connect(lab.url, "hoarder")))
        time.sleep(3)
        held.close()
        found = lab.answers_again()
    # A worker that was taken for dead, as its lock went with its connection, would have been replaced.
    assert pids == {name: lab.stack.processes[name].pid for name in pids}, "a worker died of it"
    return found


@row("F58", "Postgres is read-only", "I10", within_s=6)
def read_only(lab: Lab) -> list[float]:
    with lab.supervised(), lab.traffic():
        for value in ("on", "off"):
            lab.query(f"ALTER SYSTEM SET default_transaction_read_only = {value}")
            lab.query("SELECT pg_reload_conf()")
            time.sleep(3)
        return lab.answers_again()


# E. The network


def _unreachable(lab: Lab, name: str, mode: Mode, seconds: float) -> list[float]:
    with lab.supervised(), lab.traffic():
        with _through(lab, (name,), mode):
            time.sleep(seconds)
        return lab.answers_again()


@row("F65b", "gateways lose Redis (nothing comes back)", "I9 I11", within_s=10)
def gateway_loses_redis(lab: Lab) -> list[float]:
    since = time.monotonic()
    found = _unreachable(lab, "gateway-redis", Mode.HANG, lab.times(5, 30))
    accepts_all(lab, since)
    return found


@row("F65c", "gateways lose Postgres (reset)", "I9 I10 I22", within_s=6)
def gateway_loses_postgres(lab: Lab) -> list[float]:
    url = f"http://127.0.0.1:{lab.ports['gateway-a']}/readyz"
    with lab.supervised(), lab.traffic():
        with _through(lab, ("gateway-postgres",), Mode.RESET):
            lab.until(lambda: httpx.get(url, timeout=5).status_code == 503, "503 from /readyz", 5.5)
            time.sleep(2)
        lab.until(lambda: httpx.get(url, timeout=5).status_code == 200, "200 from /readyz", 5.5)
        return lab.answers_again()


@row("F65h", "gateways lose Postgres (nothing comes back)", "I9 I10 I22", within_s=12)
def gateway_hangs_on_postgres(lab: Lab) -> list[float]:
    return _unreachable(lab, "gateway-postgres", Mode.HANG, lab.times(5, 30))


@row("F65d", "a worker loses Redis", "I1 I11", within_s=15)
def worker_loses_redis(lab: Lab) -> list[float]:
    with lab.supervised(), lab.traffic():
        with _through(lab, ("worker-redis",), Mode.RESET):
            time.sleep(lab.times(4, 30))
        since = time.monotonic()
        lab.until(lambda: lab.works("worker-a"), "work of worker-a", 20)
        return [time.monotonic() - since]


@row("F65e", "a worker loses Postgres for longer than its lease", "I5", within_s=10, is_long=True)
def worker_loses_postgres(lab: Lab) -> list[float]:
    with lab.supervised(), lab.traffic(mix={"long": 1, "stream": 0.5}):
        since = time.time()
        with _through(lab, ("worker-postgres",), Mode.HANG):
            time.sleep(8)
        time.sleep(2)
    found = lab.restarts(since)
    assert found, "no job was taken back"
    return found


@row("F65f", "the leading reconciler loses Postgres", "I1", within_s=15)
def reconciler_loses_postgres(lab: Lab) -> list[float]:
    # Only reconciler-a stands behind the proxy: make it the leader.
    lab.stack.stop("reconciler-b")
    time.sleep(1)
    lab.start("reconciler-b")
    with lab.redis() as broker, _through(lab, ("reconciler-postgres",), Mode.HANG):
        with lab.frozen("worker-a", "worker-b"):
            started = [lab.clients.begin(lab.clients.job()) for _ in range(10)]
            time.sleep(1)
            since = time.time()
            broker.delete("echo")
        sql = "SELECT count(*) FROM jobs WHERE status = 'queued'"
        lab.until(lambda: lab.query(sql) == [(0,)], "start of the jobs whose messages were lost", 20)
    ids = [future.result(90) for future in started]
    return lab.starts(since, [job_id for job_id in ids if job_id is not None])
