"""Families A and B: gateways and workers die, freeze, drain and run dry."""

import contextlib
import os
import signal
import socket
import time
from concurrent.futures import Future

import psutil

from tests.faults.history import Record
from tests.faults.lab import Lab
from tests.faults.rows import row

_DIE = "import os, signal\ndef die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)\n"
"""For patches: the process ends at exactly this point of the code."""


def _streams(lab: Lab, number: int) -> list["Future[Record]"]:
    return [lab.clients.begin(lab.clients.stream(token_ms=40)) for _ in range(number)]


def _jobs(lab: Lab, number: int, token_ms: float = 40.0) -> list["Future[str | None]"]:
    return [lab.clients.begin(lab.clients.job(token_ms=token_ms)) for _ in range(number)]


def _ids(started: list["Future[str | None]"]) -> list[str]:
    return [job_id for future in started if (job_id := future.result(120)) is not None]


def _at_point(lab: Lab, patch: str) -> tuple[Record, float]:
    """Submit one job to a gateway that dies at the patched point; what the client saw, and when it died."""
    name = "gateway-c"
    lab.stack.patches[name] = _DIE + patch
    lab.start(name)
    url = f"http://127.0.0.1:{lab.ports[name]}"
    nonce = lab.clients.nonce()
    key = f"key-{nonce}"
    seen = lab.clients.run(lab.clients.submit(nonce, "default", {}, key=key, url=url))
    lab.reap(name)
    died = time.time()
    again = lab.clients.run(lab.clients.submit(nonce, "default", {}, key=key))
    assert again.job_id is not None, "a retry with the same key was not taken"
    lab.clients.run(lab.clients.wait(again.job_id, nonce))
    return seen, died


@row("F01", "kill -9 of a gateway before the row is committed", "I1 I7", within_s=1)
def before_commit(lab: Lab) -> list[float]:
    for _ in range(lab.times(1, 20)):
        rows = lab.query("SELECT count(*) FROM jobs")[0][0]
        seen, _ = _at_point(lab, "import db.accept\ndb.accept.insert = db.accept.insert_once = die")
        assert seen.type == "info", f"answered {seen.status} before the commit"
        made = lab.query("SELECT count(*) FROM jobs")[0][0] - rows
        assert made == 1, f"{made} rows"
    return [0.0]


@row("F02", "kill -9 of a gateway after the commit, before the message", "I1 I7 I20 M1", within_s=6)
def before_message(lab: Lab) -> list[float]:
    found = []
    for _ in range(lab.times(2, 20)):
        since = time.time()
        seen, died = _at_point(lab, "import tasks.inference\ntasks.inference.enqueue = die")
        assert seen.type == "info"
        sql = "SELECT id::text FROM jobs WHERE created_at > to_timestamp(%s)"
        made = [job_id for (job_id,) in lab.query(sql, since)]
        assert len(made) == 1, f"{len(made)} rows"
        lab.until(lambda made=made: bool(lab.starts(died, made)), "start of the job without a message")  # type: ignore[misc]
        found += lab.starts(died, made)
    for gateway in ("gateway-a", "gateway-b"):
        lab.peek(gateway)
    return found


@row("F03", "kill -9 of a gateway after the message, before the 202", "I5 I7", within_s=4)
def before_answer(lab: Lab) -> list[float]:
    patch = (
        "import api.answers\nimport asyncio\n"
        "async def late(*_, **__):\n    await asyncio.sleep(0.2)\n    die()\napi.answers.accepted = late"
    )
    found = []
    for _ in range(lab.times(1, 20)):
        since = time.time()
        seen, died = _at_point(lab, patch)
        assert seen.type == "info"
        sql = "SELECT id::text FROM jobs WHERE created_at > to_timestamp(%s)"
        made = [job_id for (job_id,) in lab.query(sql, since)]
        assert len(made) == 1, f"{len(made)} rows"
        lab.until(lambda: lab.count("queued") + lab.count("running") == 0, "end of the job")
        assert lab.query("SELECT attempt FROM jobs WHERE id = %s::uuid", made[0]) == [(1,)]
        found += lab.starts(died, made)
    return found


@row("F04", "kill -9 of a gateway with waiters", "I1 I9", within_s=2)
def waiters(lab: Lab) -> list[float]:
    found = []
    for number in range(lab.times(2, 20)):
        name = ("gateway-a", "gateway-b")[number % 2]
        with lab.traffic():
            started = _jobs(lab, 20)
            time.sleep(0.7)
            lab.kill(name)
            killed = time.monotonic()
            _ids(started)
            again = [
                record
                for record in lab.history.records
                if record.kind == "wait" and record.at > killed and record.type == "ok"
            ]
            found.append(min(record.at for record in again) - killed)
        lab.heal()
    return found


@row("F05", "kill -9 of a gateway in the middle of streams", "I14", within_s=3)
def streaming_gateway(lab: Lab) -> list[float]:
    found = []
    for number in range(lab.times(2, 20)):
        name = ("gateway-a", "gateway-b")[number % 2]
        url = f"http://127.0.0.1:{lab.ports[name]}"
        streams = _streams(lab, 25)
        time.sleep(1.2)
        lab.kill(name)
        killed = time.monotonic()
        ends = [future.result(90) for future in streams]
        assert all(end.end == "done" for end in ends), {end.end for end in ends}
        cut = {
            record.op
            for record in lab.history.records
            if record.kind == "stream" and record.url == url and record.at > killed - 0.5 and record.type == "info"
        }
        firsts = [
            record.at
            for record in lab.history.records
            if record.kind == "stream" and record.type == "ok" and record.op in cut and record.at > killed
        ]
        assert firsts, "no stream was cut"
        resumed = [
            record.at
            for record in lab.history.records
            if record.kind == "stream" and record.type == "invoke" and record.op in cut and record.after
        ]
        found += [at - killed for at in resumed if at > killed]
        lab.heal()
    return found


@row("F06", "SIGTERM of a gateway under traffic", "I9 I24", within_s=15)
def gateway_drains(lab: Lab) -> list[float]:
    with lab.traffic():
        time.sleep(1)
        url = f"http://127.0.0.1:{lab.ports['gateway-a']}"
        process = lab.stack.processes.pop("gateway-a")
        asked = time.monotonic()
        process.terminate()
        process.wait(20)
        took = time.monotonic() - asked
        broken = [
            record
            for record in lab.history.records
            if record.url == url and record.kind in ("ask", "submit") and record.error in ("ReadError", "RemoteProtocolError")
            and record.at - record.seconds < asked < record.at
        ]  # fmt: skip
        assert not broken, f"{len(broken)} requests in flight were cut: {broken[0].kind} {broken[0].error}"
        lab.start("gateway-a")
    return [took]


@row("F07", "SIGSTOP of a gateway for longer than a sweep, then SIGCONT", "I7 I9", within_s=3)
def frozen_gateway(lab: Lab) -> list[float]:
    with lab.traffic():
        with lab.frozen("gateway-a"):
            time.sleep(lab.times(3, 20))
        return lab.answers_again()


@row("F09", "a gateway runs out of file descriptors", "I9 I11 I15", within_s=5)
def out_of_descriptors(lab: Lab) -> list[float]:
    process = psutil.Process(lab.stack.processes["gateway-a"].pid)
    before = process.rlimit(psutil.RLIMIT_NOFILE)
    with lab.traffic(mix={"job": 1}), contextlib.ExitStack() as sockets:
        process.rlimit(psutil.RLIMIT_NOFILE, (process.num_fds() + 10, before[1]))
        for _ in range(200):
            with contextlib.suppress(OSError):
                address = ("127.0.0.1", lab.ports["gateway-a"])
                sockets.enter_context(socket.create_connection(address, 0.2))
        time.sleep(2)
        process.rlimit(psutil.RLIMIT_NOFILE, before)
        sockets.close()
        return lab.answers_again()


@row("F10", "kill -9 of an idle worker", "I11", within_s=15)
def idle_worker(lab: Lab) -> list[float]:
    lab.kill("worker-b")
    since = time.monotonic()
    lab.start("worker-b")
    lab.until(lambda: lab.works("worker-b"), "work of the new worker")
    return [time.monotonic() - since]


@row("F11", "kill -9 of a worker between taking the message and the claim", "I1 I20", within_s=8, is_long=True)
def before_claim(lab: Lab) -> list[float]:
    found = []
    for _ in range(lab.times(2, 30)):
        lab.stack.stop("worker-a")
        lab.stack.patches["worker-b"] = _DIE + "import db.jobs\ndb.jobs.claim = die"
        lab.restart("worker-b")
        started = _jobs(lab, 10, 0)
        lab.reap("worker-b")
        died = time.time()
        del lab.stack.patches["worker-b"]
        lab.start("worker-a")
        found += lab.starts(died, _ids(started))
        lab.start("worker-b")
    return found


@row("F12", "kill -9 of a worker in the middle of generating", "I1 I5 I6 I21", within_s=6)
def generating_worker(lab: Lab) -> list[float]:
    found = []
    for number in range(lab.times(6, 300)):
        name = ("worker-a", "worker-b")[number % 2]
        with lab.traffic(lead_s=0.2):
            started = _jobs(lab, 20)
            time.sleep(lab.clients.rng.uniform(0.5, 1.2))
            since = time.time()
            lab.kill(name)
            lab.start(name)
            _ids(started)
        found += lab.restarts(since)
    assert found, "no job was running on a worker that was killed"
    return found


@row("F13", "kill -9 of a worker after the result is committed, before it says so", "I2 I5", within_s=5, is_long=True)
def after_result(lab: Lab) -> list[float]:
    patch = (
        "import db.jobs\nfinish = db.jobs.finish\n"
        "def finish_and_die(cursor, outcomes):\n    finish(cursor, outcomes)\n    die()\ndb.jobs.finish = finish_and_die"
    )
    found = []
    for _ in range(lab.times(2, 30)):
        lab.stack.stop("worker-a")
        lab.stack.patches["worker-b"] = _DIE + patch
        lab.restart("worker-b")
        started = _jobs(lab, 10, 0)
        lab.reap("worker-b")
        died = time.monotonic()
        del lab.stack.patches["worker-b"]
        lab.start("worker-a")
        _ids(started)
        found.append(time.monotonic() - died)
        lab.start("worker-b")
    return found


@row("F14", "a backend dies and takes its worker along", "I1 I6 I11", within_s=8)
def dead_backend(lab: Lab) -> list[float]:
    with lab.supervised(), lab.traffic(mix={"long": 1}):
        since = time.time()
        killer = lab.clients.begin(lab.clients.job(fail="dead", fail_after=1))
        time.sleep(4)
        job_id = killer.result(90)
        row = lab.query("SELECT status, attempt FROM jobs WHERE id = %s::uuid", job_id)
        assert row == [("failed", 3)], row
    return lab.restarts(since)


@row("F16a", "SIGSTOP of a worker for less than its lease", "I5", within_s=4)
def short_freeze(lab: Lab) -> list[float]:
    since = time.time()
    started = _jobs(lab, 20)
    time.sleep(0.6)
    with lab.frozen("worker-a"):
        time.sleep(1.5)
    thawed = time.monotonic()
    _ids(started)
    assert not lab.restarts(since), "a job was run again"
    return [time.monotonic() - thawed]


@row("F16b", "SIGSTOP of a worker for longer than its lease, SIGCONT after the re-run", "I2 I5", within_s=8)
def long_freeze(lab: Lab) -> list[float]:
    found = []
    for number in range(lab.times(2, 20)):
        name = ("worker-a", "worker-b")[number % 2]
        with lab.supervised():
            started = _jobs(lab, 20)
            time.sleep(0.6)
            since = time.time()
            # Once while the re-run still runs, once after it has finished.
            with lab.frozen(name):
                lab.until(lambda since=since: bool(lab.restarts(since)), "a re-run")  # type: ignore[misc]
                time.sleep(0.2 if number % 2 else 3)
            _ids(started)
            found += lab.restarts(since)
            time.sleep(1.5)
    return found


@row("F19", "poison jobs that kill whoever runs them, among good ones", "I6 I11", within_s=30, is_long=True)
def poison(lab: Lab) -> list[float]:
    with lab.supervised(), lab.traffic(rate=10, mix={"job": 1, "long": 1}):
        began, since = time.time(), time.monotonic()
        bad = [lab.clients.begin(lab.clients.job(fail="exit", fail_after=2)) for _ in range(lab.times(2, 5))]
        ids = _ids(bad)
        took = time.monotonic() - since
    rows = lab.query("SELECT status, attempt, error ->> 'code' FROM jobs WHERE id = ANY(%s::uuid[])", ids)
    assert set(rows) == {("failed", 3, "attempts_exhausted")}, rows
    others = lab.query(
        "SELECT count(*) FROM jobs WHERE status = 'failed' AND NOT id = ANY(%s::uuid[]) "
        "AND created_at > to_timestamp(%s)",
        ids,
        began,
    )
    assert others == [(0,)], f"{others[0][0]} bystanders failed with the poison"
    return [took]


@row("F19q", "poison sent again is refused", "I6", within_s=1)
def quarantined(lab: Lab) -> list[float]:
    body = {"endpoint": "/v1/completions", "body": {"model": "echo", "prompt": f"poison {lab.clients.nonce()}", "max_tokens": 9, "options": {"fail": "exit"}}}  # fmt: skip
    with lab.stack.client() as client, lab.supervised():
        path = client.post("/v1/jobs", json=body).headers["location"]
        lab.until(lambda: client.get(path, params={"wait": 5}).json().get("status") == "failed", "its end", 40)
        time.sleep(1)  # two surveys of a gateway
        again = client.post("/v1/jobs", json=body)
    assert (again.status_code, again.json()["error"]["code"]) == (409, "quarantined"), again.text
    return [again.elapsed.total_seconds()]


@row("F20", "rolling restart of all workers under traffic", "I1 I6 I24", within_s=12)
def rolling_restart(lab: Lab) -> list[float]:
    found = []
    with lab.traffic():
        since = time.time()
        for number in range(lab.times(2, 20)):
            name = ("worker-a", "worker-b")[number % 2]
            asked = time.monotonic()
            assert lab.stack.stop(name) == 0
            found.append(time.monotonic() - asked)
            lab.start(name)
    counted = lab.query(
        "SELECT count(*) FROM jobs WHERE created_at > to_timestamp(%s) AND (status = 'failed' OR attempt > 1)", since
    )
    assert counted == [(0,)], f"{counted[0][0]} jobs failed or were charged an attempt"
    return found


@row("F21", "a drain that runs out of time: SIGTERM, then SIGKILL", "I1", within_s=8)
def killed_drain(lab: Lab) -> list[float]:
    with lab.traffic(mix={"long": 1, "stream": 1}):
        started = _jobs(lab, 10, 100)
        time.sleep(0.8)
        os.kill(lab.stack.processes["worker-b"].pid, signal.SIGTERM)
        time.sleep(0.5)
        since = time.time()
        lab.kill("worker-b")
        lab.start("worker-b")
        _ids(started)
    return lab.restarts(since) or [0.0]


@row("F97", "power cut: kill -9 of everything at once, cold start", "I1 I2 I3", within_s=30)
def power_cut(lab: Lab) -> list[float]:
    found = []
    for _ in range(lab.times(1, 20)):
        with lab.traffic():
            time.sleep(1.5)
            for name in list(lab.stack.processes):
                lab.kill(name)
            lab.postgres.kill()
            lab.valkey.kill()
            lab.num_kills += 2
            since = time.monotonic()
            lab.postgres.restart()
            lab.valkey.restart()
            for name in ("reconciler-b", "gateway-a", "gateway-b", "worker-b"):
                lab.start(name)
            found += [time.monotonic() - since + more for more in lab.answers_again()]
        lab.heal()
    return found
