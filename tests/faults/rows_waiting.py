"""Rows about what many ask at once: limits without Redis, waiters without news, an entry of the cache that expires,
and two releases side by side."""

import asyncio
import contextlib
import ctypes
import io
import itertools
import json
import os
import socket
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil

from db import api_keys, session
from db.tenants import Limits
from tests.faults.history import completion
from tests.faults.lab import Lab
from tests.faults.proxy import Mode
from tests.faults.rows import row
from tests.stack import ROOT

_PER_MINUTE = 40


@row("F41", "Redis is down while a limited key calls and calls", "I9 I10", within_s=6)
def limits_without_redis(lab: Lab) -> list[float]:
    connection = session.connect(lab.url, "lab")
    with contextlib.closing(connection), connection.cursor() as cursor:
        limits = Limits(requests_per_minute=_PER_MINUTE)
        secret, _ = api_keys.create(cursor, "limited", f"limited-{time.monotonic_ns()}", limits=limits)
    headers = {"Authorization": f"Bearer {secret}"}

    async def storm() -> list[httpx.Response]:
        async with httpx.AsyncClient(headers=headers, timeout=10) as client:
            answers = []
            for number in range(160):
                url = lab.clients.urls[number % 2]
                body = {"endpoint": "/v1/completions", "body": completion(lab.clients.nonce(), {})}
                answers.append(asyncio.create_task(client.post(f"{url}/v1/jobs", json=body)))
                await asyncio.sleep(0.02)
            return await asyncio.gather(*answers)

    with lab.supervised():
        # A gateway counts its peers once somebody has a limit.
        for url in lab.clients.urls:
            httpx.get(f"{url}/v1/models", headers=headers)
        time.sleep(1.2)
        lab.valkey.kill()
        lab.num_kills += 1
        answers = lab.clients.run(storm())
        census = {status: sum(answer.status_code == status for answer in answers) for status in (202, 429)}
        assert sum(census.values()) == len(answers), {answer.status_code for answer in answers}
        assert 2 <= census[202] <= _PER_MINUTE * 1.02, f"{census[202]} accepted of at most {_PER_MINUTE} a minute"
        silent = [answer for answer in answers if answer.headers.get("x-ratelimit-policy") != "degraded"]
        assert not silent, f"{len(silent)} answers do not say that limits are degraded"
        lab.valkey.restart()
        since = time.monotonic()
        for url in lab.clients.urls:
            lab.until(
                lambda url=url: "x-ratelimit-policy" not in httpx.get(f"{url}/v1/models", headers=headers).headers,  # type: ignore[misc]
                "whole limits",
            )
        took = time.monotonic() - since
        lab.answers_again()
    return [took]


@row("F60", "no gateway hears any news of jobs that ended", "I9", within_s=2.5)
def no_news(lab: Lab) -> list[float]:
    """How long after each end its waiter knew."""
    client, proxy = lab.clients, lab.proxies["gateway-redis"]
    before = proxy.num_dropped

    async def wait_for_one() -> tuple[str, float]:
        nonce = client.nonce()
        made = await client.submit(nonce, "default", {"token_ms": 20})
        assert made.job_id is not None, made.code
        assert await client.wait(made.job_id, nonce) == "succeeded"
        return made.job_id, time.time()

    proxy.set(Mode.DROP_REPLY, marker=b"SUBSCRIBE")
    try:
        proxy.cut()
        lab.until(lambda: proxy.num_dropped > before, "a subscription that was cut")
        waiting = [client.begin(wait_for_one()) for _ in range(lab.times(40, 400))]
        knew = dict(future.result(60) for future in waiting)
    finally:
        proxy.set(Mode.PASS)
    ended = lab.query(
        "SELECT id::text, extract(epoch FROM finished_at)::float8 FROM jobs WHERE id = ANY(%s::uuid[])", list(knew)
    )
    return [knew[job_id] - at for job_id, at in ended]


@row("F91", "an entry of the cache expires while many ask for it", "I3 I5", within_s=3)
def expiring_entry(lab: Lab) -> list[float]:
    body = {**completion(lab.clients.nonce(), {"token_ms": 20}), "temperature": 0}
    expire = (
        "UPDATE response_cache SET expires_at = clock_timestamp() WHERE job_id = %s::uuid RETURNING encode(key, 'hex')"
    )
    runs = (
        "SELECT extract(epoch FROM started_at)::float8, extract(epoch FROM finished_at)::float8 FROM jobs "
        "WHERE cache_key = decode(%s, 'hex') AND leader_id IS NULL AND attempt > 0 ORDER BY started_at"
    )
    headers = {"Authorization": f"Bearer {lab.stack.secret}"}

    async def ask_all(seconds: float) -> list[httpx.Response]:
        async with httpx.AsyncClient(headers=headers, timeout=20) as client:
            answers: list[asyncio.Task[httpx.Response]] = []
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                url = lab.clients.urls[len(answers) % 2]
                answers.append(asyncio.create_task(client.post(f"{url}/v1/completions", json=body)))
                await asyncio.sleep(0.01)
            return await asyncio.gather(*answers)

    with lab.stack.client() as client:
        job_id = client.post("/v1/completions", json=body).headers["x-job-id"]
    known = 1
    for _ in range(lab.times(2, 20)):
        asking = lab.clients.begin(ask_all(4))
        time.sleep(0.5)
        key = lab.query(expire, job_id)[0][0]
        answers = asking.result(60)
        assert {answer.status_code for answer in answers} == {200}, {answer.status_code for answer in answers}
        spans = lab.query(runs, key)
        # Who looked before the run's end and inserted after it runs again, never beside it.
        assert 1 <= len(spans) - known <= 2, f"{len(spans) - known} runs after one expiry"
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans)), f"runs side by side: {spans}"
        known = len(spans)
        job_id = lab.query("SELECT job_id::text FROM response_cache WHERE encode(key, 'hex') = %s", key)[0][0]
    return lab.answers_again()


_HERE, _THERE = "10.217.19.1", "10.217.19.2"


@contextlib.contextmanager
def _another_host(name: str) -> Iterator[Callable[[int], socket.socket]]:
    """A network of its own behind a cable; what is given connects from there to a port of this host."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    ip("netns", "add", name)
    try:
        ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("addr", "add", f"{_HERE}/30", "dev", name)
        ip("link", "set", name, "up")
        ip("-n", name, "addr", "add", f"{_THERE}/30", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")

        def connect(port: int) -> socket.socket:
            made: list[socket.socket] = []

            def there() -> None:
                # A socket belongs to the network in which its thread was when it was made.
                with Path(f"/var/run/netns/{name}").open() as network:
                    assert ctypes.CDLL(None, use_errno=True).setns(network.fileno(), 0) == 0, ctypes.get_errno()
                made.append(socket.create_connection((_HERE, port), 5))

            thread = threading.Thread(target=there)
            thread.start()
            thread.join()
            return made[0]

        yield connect
    finally:
        subprocess.run(["ip", "link", "del", name], check=False, capture_output=True)
        ip("netns", "del", name)


@row("F65a", "clients vanish without a word: their cable is cut", "I15", within_s=35, needs="networks", is_long=True)
def vanished_clients(lab: Lab) -> list[float]:
    """How long the gateway keeps the sockets of idle, waiting and streaming clients that are gone."""
    name = f"sy{os.getpid() % 100_000}"
    head = f"HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {lab.stack.secret}\r\nContent-Type: application/json\r\n"
    body = json.dumps({**completion("vanished " * 9, {"token_ms": 400}), "stream": True})
    asked = f"POST /v1/completions {head}Content-Length: {len(body)}\r\n\r\n{body}".encode()
    lab.start("gateway-c", SWITCHYARD_HOST="0.0.0.0")
    gateway = psutil.Process(lab.stack.processes["gateway-c"].pid)

    def num_open() -> int:
        return sum(bool(link.raddr) and link.raddr.ip == _THERE for link in gateway.net_connections())

    try:
        with _another_host(name) as connect:
            clients = [connect(lab.ports["gateway-c"]) for _ in range(15)]
            for number, client in enumerate(clients):
                if number % 3 == 0:
                    client.sendall(asked)
                elif number % 3 == 1:
                    client.sendall(f"GET /healthz {head}\r\n".encode())
            lab.until(lambda: num_open() == 15, "fifteen connections")
            time.sleep(1)
            subprocess.run(["ip", "link", "set", name, "down"], check=True)
            took = lab.until(lambda: num_open() == 0, "end of half-open connections", 60)
            for client in clients:
                client.close()
    finally:
        lab.kill("gateway-c")
    return [took]


_PREVIOUS = "2d96aec"
"""The merge of files and batches: the same schema and version of messages, older code on both sides."""


@row("F20v", "two releases side by side, streams across the death of a worker", "I1 I14 I24", within_s=6,
     needs="history", is_long=True)  # fmt: skip
def two_releases(lab: Lab) -> list[float]:
    packed = subprocess.run(["git", "-C", str(ROOT), "archive", _PREVIOUS], check=True, capture_output=True)
    old = lab.folder / "previous"
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(old, filter="data")
    found = []
    for names in (("worker-a", "worker-b"), ("gateway-a", "gateway-b"), ("worker-a", "gateway-b", "reconciler-a")):
        for name in names:
            lab.stack.roots[name] = old
            lab.restart(name)
        try:
            for name in names:
                where = Path(f"/proc/{lab.stack.processes[name].pid}/cwd").readlink()
                assert where == old, f"{name} runs {where}"
            with lab.traffic():
                streams = [lab.clients.begin(lab.clients.stream(token_ms=40)) for _ in range(15)]
                time.sleep(1)
                since = time.time()
                lab.kill("worker-a")
                lab.start("worker-a")
                ends = {future.result(90).end for future in streams}
                assert ends == {"done"}, ends
            found += lab.restarts(since)
        finally:
            for name in names:
                del lab.stack.roots[name]
                lab.restart(name)
    return found
