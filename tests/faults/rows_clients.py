"""Families F and G: clocks and delivery; clients that misbehave, and more of them than there is room for."""

import asyncio
import contextlib
import json
import random
import socket
import statistics
import time
from typing import Any

import httpx
import psutil

from tests.faults.history import Record, completion, prompt_of
from tests.faults.lab import Lab
from tests.faults.rows import ROWS, row

_SKEW = "import time\nreal = time.time\ntime.time = lambda: real() + ({0})\nreal_ns = time.time_ns\ntime.time_ns = lambda: real_ns() + ({0}) * 10**9\n"
"""For patches: this process's wall clock is off by that many seconds."""

# F. Clocks and delivery


@row("F70", "wall clocks of gateway +1 h, worker -1 h, reconciler +1 h", "I18", within_s=5, is_long=True)
def skewed_clocks(lab: Lab) -> list[float]:
    skews = {"gateway-a": 3600, "worker-a": -3600, "reconciler-a": 3600}
    lab.stack.stop("reconciler-b")
    for name, seconds in skews.items():
        lab.stack.patches[name] = _SKEW.format(seconds)
        lab.restart(name)
    try:
        with lab.traffic():
            time.sleep(lab.times(5, 30))
    finally:
        for name in skews:
            del lab.stack.patches[name]
            lab.restart(name)
    return lab.answers_again()


@row("F75", "every message five times, to two workers", "I5", within_s=10)
def repeated_messages(lab: Lab) -> list[float]:
    number = lab.times(100, 350)
    with lab.redis() as broker:
        with lab.frozen("worker-a", "worker-b"):
            broker.delete("echo")
            started = [lab.clients.begin(lab.clients.job()) for _ in range(number)]
            lab.until(lambda: broker.llen("echo") >= number * 0.9, "messages in the queue")
            broker.lpush("echo", *broker.lrange("echo", 0, -1) * 4)
        since = time.monotonic()
        ids = [job_id for future in started if (job_id := future.result(90)) is not None]
    took = time.monotonic() - since
    runs = lab.query("SELECT count(*), count(DISTINCT job_id) FROM job_transitions WHERE became = 'running' AND job_id = ANY(%s::uuid[])", ids)  # fmt: skip
    assert runs == [(len(ids), len(ids))], f"{runs[0][0]} runs of {len(ids)} jobs"
    return [took]


def _rubbish(job_id: str) -> list[bytes]:
    """Messages that are not ours, or not any more."""

    def envelope(args: Any, **changes: Any) -> bytes:
        made = {
            "body": json.dumps([args, {}, {}]),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {"task": "switchyard.generate", "id": "x", "lang": "py"},
            "properties": {
                "delivery_tag": "1",
                "delivery_info": {"exchange": "", "routing_key": "echo"},
                "body_encoding": "",
            },
        }
        return json.dumps({**made, **changes}).encode()

    unknown = "01900000-0000-7000-8000-000000000000"
    pickled = {"body": "gASVIAAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOUjAV0b3VjaJSFlFKULg==", "content-type": "application/x-python-serialize", "content-encoding": "binary"}  # fmt: skip
    return [
        b"", b"not json", b"[]", b"{}", b"null", b"\xff\xfe", b'{"body": 1}',
        envelope([unknown, 1]), envelope([job_id, 1]), envelope([job_id, 99]), envelope([job_id]), envelope([]),
        envelope(["no uuid", 1]), envelope([None, None]), envelope("text"), envelope([job_id, "1e9"]),
        envelope([job_id, 1], headers={"task": "os.system", "id": "x"}), envelope([job_id, 1], headers={}),
        envelope([job_id, 1], properties={}), envelope([job_id, 1], **pickled), envelope(["x" * 5_000_000, 1]),
        envelope([job_id, 1], **{"content-type": "application/x-yaml"}), envelope([job_id, 1], body="!!not base64"),
    ]  # fmt: skip


@row("F76", "rubbish, stale and foreign messages in the queue", "I11 I24", within_s=5)
def rubbish(lab: Lab) -> list[float]:
    pids = {name: lab.stack.processes[name].pid for name in ("worker-a", "worker-b")}
    done = lab.clients.run(lab.clients.job())
    assert done is not None
    with lab.traffic(), lab.redis() as broker:
        for message in _rubbish(done):
            broker.lpush("echo", message)
            time.sleep(0.05)
        lab.until(lambda: broker.llen("echo") == 0, "empty queue")
        found = lab.answers_again()
    for name, pid in pids.items():
        assert lab.stack.processes[name].pid == pid, f"{name} was replaced"
        assert lab.stack.processes[name].poll() is None, f"{name} died"
    return found


@row("F77", "a message that is delayed past its job's deadline", "I1", within_s=4)
def late_message(lab: Lab) -> list[float]:
    client = lab.clients
    with lab.frozen("worker-a", "worker-b"):
        nonces = [client.nonce() for _ in range(10)]
        made = [client.run(client.submit(nonce, "default", {}, timeout_s=1.5)) for nonce in nonces]
        since = time.monotonic()
        states = {client.run(client.wait(record.job_id or "", record.nonce)) for record in made}
        took = time.monotonic() - since
    assert states == {"expired"}, states
    ids = [record.job_id for record in made]
    runs = lab.query("SELECT count(*) FROM job_transitions WHERE became = 'running' AND job_id = ANY(%s::uuid[])", ids)
    assert runs == [(0,)], "an expired job was run"
    return [took]


@row("F78", "no reconciler for a while, its backlog lost; then it starts", "I1", within_s=10, is_long=True)
def no_reconciler(lab: Lab) -> list[float]:
    for name in ("reconciler-a", "reconciler-b"):
        lab.stack.stop(name)
    number = lab.times(300, 350)
    with lab.redis() as broker:
        with lab.frozen("worker-a", "worker-b"):
            started = [lab.clients.begin(lab.clients.job()) for _ in range(number)]
            lab.until(lambda: lab.count("queued") >= number * 0.95, "backlog")
            broker.delete("echo")
        time.sleep(1)
        lab.start("reconciler-a")
        lab.start("reconciler-b")
        since = time.time()
        ids = [job_id for future in started if (job_id := future.result(90)) is not None]
    return lab.starts(since, ids)


@row("F80", "two reconcilers that both think they lead", "I5", within_s=6)
def split_brain(lab: Lab) -> list[float]:
    with lab.traffic(mix={"long": 2, "job": 1}):
        for name in ("reconciler-a", "reconciler-b"):
            with lab.frozen(name):
                lab.query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'switchyard-reconciler'")  # fmt: skip
                time.sleep(1.5)
        since = time.time()
        lab.kill("worker-a")
        lab.start("worker-a")
    return lab.restarts(since) or [0.0]


# G. Clients and load


@row("F85a", "clients that hang up while they submit", "I1 I7", within_s=3)
def hanging_up(lab: Lab) -> list[float]:
    body = json.dumps({"endpoint": "/v1/completions", "body": completion("half", {})}).encode()
    head = f"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {lab.stack.secret}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()  # fmt: skip
    whole = head + body
    with lab.traffic():
        for number in range(lab.times(60, 600)):
            cut = (len(head) // 2, len(head), len(whole) // 2 + len(head) // 2, len(whole))[number % 4]
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", lab.ports["gateway-a"])) as raw:
                raw.sendall(whole[:cut])
        found = lab.answers_again()
    lab.until(lambda: lab.count("queued") + lab.count("running") == 0, "quiet ledger")
    made = sum(job.text == prompt_of("half") for job in lab.look().jobs.values())
    assert 0 < made <= lab.times(60, 600) / 4, f"{made} jobs of {lab.times(60, 600) // 4} whole requests"
    return found


@row("F85b", "clients that leave a stream, with and without cancel-on-disconnect", "I15 I17", within_s=2, is_long=True)
def leaving_streams(lab: Lab) -> list[float]:
    found = []
    body = {**completion("leaver " * 6, {"token_ms": 60}), "stream": True}
    for does_cancel in (True, False) * lab.times(3, 30):
        headers = {"x-cancel-on-disconnect": "true"} if does_cancel else {}
        with (
            lab.stack.client() as client,
            client.stream("POST", "/v1/completions", json=body, headers=headers) as stream,
        ):
            job_id = stream.headers["x-job-id"]
            for number, _ in enumerate(stream.iter_lines()):
                if number > 10:
                    break
        left = time.monotonic()
        wanted = "cancelled" if does_cancel else "succeeded"
        lab.until(lambda: lab.query("SELECT status FROM jobs WHERE id = %s::uuid", job_id)[0][0] not in ("queued", "running"), "its end")  # fmt: skip
        status = lab.query("SELECT status FROM jobs WHERE id = %s::uuid", job_id)[0][0]
        assert status == wanted, f"{status} instead of {wanted}"
        if does_cancel:
            found.append(time.monotonic() - left)
    return found


@row("F85c", "random cancellations; every answer carries its own nonce", "I4", within_s=3)
def crossed_wires(lab: Lab) -> list[float]:
    async def flurry(number: int) -> list[tuple[str, str]]:
        limits = httpx.Limits(max_connections=50)
        wrong: list[tuple[str, str]] = []
        rng = random.Random(lab.seed)
        async with httpx.AsyncClient(timeout=20, limits=limits) as client:

            async def one(index: int) -> None:
                nonce = f"wire-{index}"
                url = rng.choice(lab.clients.urls)
                headers = {"Authorization": f"Bearer {lab.stack.secret}"}
                body = completion(nonce, {"token_ms": rng.choice((0, 1))})
                with contextlib.suppress(TimeoutError, httpx.HTTPError):
                    async with asyncio.timeout(rng.choice((0.005, 0.02, 0.1, 5))):
                        answer = await client.post(f"{url}/v1/completions", json=body, headers=headers)
                        if answer.status_code == 200 and answer.json()["choices"][0]["text"] != prompt_of(nonce):
                            wrong.append((nonce, answer.text))

            for start in range(0, number, 50):
                await asyncio.gather(*[one(index) for index in range(start, start + 50)])
        return wrong

    wrong = lab.clients.run(flurry(lab.times(600, 10_000)), 300)
    assert not wrong, f"{len(wrong)} answers to another's question, first {wrong[0]}"
    return lab.answers_again()


@row("F86", "one Idempotency-Key, fifty requests at once on two gateways", "I7", within_s=5)
def one_key(lab: Lab) -> list[float]:
    async def race() -> set[str | None]:
        client, nonce = lab.clients, lab.clients.nonce()
        made = await asyncio.gather(
            *[client.submit(nonce, "default", {}, key=f"race-{nonce}", allowed=[409]) for _ in range(50)]
        )
        won = {record.job_id for record in made if record.status == 202}
        # A loser may be told that the first is in flight; asked again, it gets the same id.
        later = await client.submit(nonce, "default", {}, key=f"race-{nonce}")
        foreign = await client.submit(client.nonce(), "other", {}, key=f"race-{nonce}")
        assert foreign.job_id not in won, "a key crossed tenants"
        await client.wait(later.job_id or "", nonce)
        return won | {later.job_id}

    since = time.monotonic()
    for _ in range(lab.times(4, 200)):
        ids = lab.clients.run(race())
        assert len(ids) == 1, f"{len(ids)} jobs of one key"
    return [(time.monotonic() - since) / lab.times(4, 200)]


@row("F87", "the same question, very often, at once; its worker dies", "I3 I5 I8", within_s=30)
def stampede(lab: Lab) -> list[float]:
    number = lab.times(150, 1000)
    question = f"stampede {lab.clients.nonce()}"
    body = {**completion(question, {"token_ms": 40}), "temperature": 0}

    async def all_at_once() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=number)) as client:
            headers = {"Authorization": f"Bearer {lab.stack.secret}"}
            urls = lab.clients.urls
            return await asyncio.gather(
                *[client.post(f"{urls[i % 2]}/v1/completions", json=body, headers=headers) for i in range(number)]
            )

    started = time.monotonic()
    pending = lab.clients.begin(all_at_once())
    with lab.supervised():
        time.sleep(1.5)
        lab.kill("worker-a")
        answers = pending.result(90)
    assert {answer.status_code for answer in answers} == {200}, {answer.status_code for answer in answers}
    assert len({answer.content for answer in answers}) == 1, "the same question got different bytes"
    ids = [answer.headers["x-job-id"] for answer in answers]
    runs = lab.query("SELECT count(*) FROM job_transitions WHERE became = 'running' AND job_id = ANY(%s::uuid[])", ids)[
        0
    ][0]
    assert runs <= 2, f"{runs} generations"
    return [time.monotonic() - started]


@row("F88", "far more calls than fit: the queue is full", "I9 I12", within_s=10, is_long=True)
def overload(lab: Lab) -> list[float]:
    async def storm(seconds: float) -> list[Record]:
        client, started = lab.clients, time.monotonic()
        answers: list[asyncio.Task[Record]] = []
        while time.monotonic() - started < seconds:
            answers += [
                asyncio.create_task(client.submit(client.nonce(), "default", {"token_ms": 200})) for _ in range(10)
            ]
            await asyncio.sleep(0.05)
        return await asyncio.gather(*answers)

    answers = lab.clients.run(storm(lab.times(6, 60)), 200)
    census = {
        status: sum(record.status == status for record in answers) for status in {record.status for record in answers}
    }
    assert set(census) <= {202, 429, 503}, census
    refused = [record.seconds for record in answers if record.status != 202]
    assert refused, f"nothing was refused: {census}"
    queued = lab.count("queued")
    assert queued <= 1200, f"{queued} queued jobs of at most 400"
    lab.until(lambda: lab.count("queued") + lab.count("running") == 0, "empty queue", 90)
    assert statistics.median(refused) < 1, f"refusals took {statistics.median(refused):.2f} s"
    return lab.answers_again()


@row("F89", "giant bodies, and a reader that does not read", "I12 I15", within_s=3)
def giants(lab: Lab) -> list[float]:
    process = lab.stack.processes["gateway-a"]
    before = _resident_mib(process.pid)
    with lab.traffic(rate=5):
        for size in (300_000, 2_000_000, 20_000_000):
            body = json.dumps({"model": "echo", "prompt": "x" * size}).encode()
            with lab.stack.client() as client:
                # The connection may be closed before all of it was sent.
                with contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError):
                    refused = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
                    assert refused.status_code == 413, f"{refused.status_code} for {size} bytes"
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            raw.connect(("127.0.0.1", lab.ports["gateway-a"]))
            asked = json.dumps(
                {**completion("slow reader", {"token_ms": 1, "num_tokens": 400}), "stream": True}
            ).encode()
            raw.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {lab.stack.secret}\r\nContent-Type: application/json\r\nContent-Length: {len(asked)}\r\n\r\n".encode() + asked)  # fmt: skip
            time.sleep(2)
            found = lab.answers_again()
    grown = _resident_mib(process.pid) - before
    assert grown < 64, f"the gateway grew by {grown:.0f} MiB"
    return found


def _resident_mib(pid: int) -> float:
    return float(psutil.Process(pid).memory_info().rss) / 2**20


@row("F90", "a storm of clients that retry without pause", "I11", within_s=15)
def retry_storm(lab: Lab) -> list[float]:
    async def stubborn(until: float) -> None:
        client = lab.clients
        while time.monotonic() < until:
            await client.submit(client.nonce(), "default", {"token_ms": 20})

    async def storm(seconds: float) -> None:
        await asyncio.gather(*[stubborn(time.monotonic() + seconds) for _ in range(50)])

    lab.clients.run(storm(lab.times(5, 60)), 200)
    since = time.monotonic()
    lab.until(lambda: lab.count("queued") + lab.count("running") == 0, "empty queue", 60)
    return [time.monotonic() - since + more for more in lab.answers_again()]


_NEMESES = ("F04", "F12", "F16b", "F20", "F30", "F31", "F33", "F37", "F50", "F51", "F52", "F65c", "F65e", "F80")


@row("F98", "a seeded random schedule of other rows", "I1 I2 I5 I6 I14", within_s=60, is_long=True)
def nemesis(lab: Lab) -> list[float]:
    found = []
    was_long, lab.is_long = lab.is_long, False
    try:
        for number in lab.clients.rng.choices(_NEMESES, k=40):
            found += ROWS[number].run(lab)
            lab.heal()
    finally:
        lab.is_long = was_long
    return found
