"""Rows about what many ask at once: limits without Redis, waiters without news, an entry of the cache that expires,
and two releases side by side."""

import asyncio
import contextlib
import io
import itertools
import subprocess
import tarfile
import time
from pathlib import Path

import httpx

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
