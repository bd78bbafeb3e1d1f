"""Families A and B again: processes that run out of something, hang, fail to load, or are not listened to."""

import contextlib
import functools
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from local import spawn, supervisor
from tests.faults.lab import MEMORY_GROUPS, Lab
from tests.faults.rows import row
from tests.stack import CELERY_OPTIONS, ROOT


@contextlib.contextmanager
def _memory_group(limit_bytes: int) -> Iterator[Path]:
    """A control group that may use so much memory more than its processes have when they join."""
    group = MEMORY_GROUPS / f"switchyard-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
        yield group
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            (MEMORY_GROUPS / "cgroup.procs").write_text(pid)
        group.rmdir()


@row("F08", "the kernel kills a gateway that is out of memory", "I1 I11", within_s=10, needs="cgroups")
def out_of_memory(lab: Lab) -> list[float]:
    address = ("127.0.0.1", lab.ports["gateway-a"])
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {lab.stack.secret}\r\nContent-Type: application/json\r\nContent-Length: 262000\r\n\r\n".encode()  # fmt: skip
    process = lab.stack.processes["gateway-a"]
    with lab.traffic(mix={"job": 1, "long": 1}), contextlib.ExitStack() as open_sockets:
        with _memory_group(24 << 20) as group:
            (group / "cgroup.procs").write_text(str(process.pid))
            for _ in range(400):
                # Bodies that are within the limit and never end, until there is no room for one more.
                with contextlib.suppress(OSError):
                    raw = open_sockets.enter_context(socket.create_connection(address, 0.5))
                    raw.settimeout(0.5)
                    raw.sendall(head + b" " * 260_000)
                if process.poll() is not None:
                    break
            lab.until(lambda: process.poll() is not None, "kill by the kernel", 10)
        assert process.returncode == -9, f"the gateway ended with {process.returncode}"
        lab.num_kills += 1
        since = time.monotonic()
        lab.start("gateway-a")
        return [time.monotonic() - since + more for more in lab.answers_again()]


_LAME = """
import pathlib, backends.echo_backend
async def start(self):
    if not pathlib.Path({mended!r}).exists():
        raise RuntimeError("the weights are damaged")
backends.echo_backend.EchoBackend.start = start
import runpy
runpy.run_module("celery", run_name="__main__", alter_sys=True)
"""


@row("F15", "a backend that cannot load: its worker is restarted, its jobs wait", "I1 I22", within_s=15)
def lame_backend(lab: Lab) -> list[float]:
    home = lab.folder / "supervisor"
    shutil.rmtree(home, ignore_errors=True)
    (home / "logs").mkdir(parents=True)
    mended = home / "mended"
    argv = [sys.executable, "-c", _LAME.format(mended=str(mended)), "-A", "tasks", "worker", "-P", "custom", "-c", "8",
            "-Q", "lame", "-n", "lame@%h", "-E", *CELERY_OPTIONS]  # fmt: skip
    environment = {"SWITCHYARD_BACKEND": "lame", "SWITCHYARD_WORKER_NAME": "lame"}
    supervisor.write_plan(home, [supervisor.Spec("lame", argv, lab.stack.environment | environment)])
    process = spawn.spawn(
        [sys.executable, "-m", "local.supervisor", str(home)], env=lab.stack.environment, cwd=ROOT, log=home / "log"
    )
    body = {"endpoint": "/v1/completions", "body": {"model": "lame", "prompt": "wait", "max_tokens": 9}}
    try:
        with lab.stack.client() as client:
            early = client.post("/v1/jobs", json=body | {"timeout_s": 2}).json()["id"]
            late = client.post("/v1/jobs", json=body).json()["id"]
            lab.until(lambda: _num_restarts(home) >= 2, "second restart", 30)
            assert client.get(f"/v1/jobs/{early}").json()["status"] == "expired"
            assert client.get(f"/v1/jobs/{late}").json()["status"] == "queued"
            states = httpx.get(f"{lab.stack.url}/readyz", timeout=5).json()["models"]
            assert states["lame"] != "ready", states
            assert states["echo"] == "ready", states
            mended.touch()
            since = time.monotonic()
            lab.until(
                lambda: client.get(f"/v1/jobs/{late}").json()["status"] == "succeeded", "answer of the mended worker"
            )
            took = time.monotonic() - since
        runs = lab.query(
            "SELECT job_id::text, count(*) FROM job_transitions WHERE became = 'running' AND job_id = ANY(%s::uuid[]) GROUP BY 1",
            [early, late],
        )
        assert runs == [(late, 1)], runs
    finally:
        process.terminate()
        process.wait(40)
    return [took]


def _num_restarts(home: Path) -> int:
    children = supervisor.read_state(home).get("children", [])
    return sum(int(child["restarts"]) for child in children)


@row("F17", "a backend hangs while its worker's heart beats", "I1 I9 I11", within_s=10, is_long=True)
def hung_backend(lab: Lab) -> list[float]:
    lab.stack.environment["SWITCHYARD_STALL_S"] = "1.5"
    try:
        for name in ("worker-a", "worker-b"):
            lab.restart(name)
        with lab.supervised(), lab.traffic(rate=8, mix={"job": 1, "long": 1}):
            began = time.time()
            job_id = lab.clients.run(lab.clients.job(fail="hang", fail_after=2))
        found = lab.restarts(began)
        rows = lab.query("SELECT status, attempt FROM jobs WHERE id = %s::uuid", job_id)
        assert rows == [("failed", 3)], rows
        others = lab.query(
            "SELECT count(*) FROM jobs WHERE status = 'failed' AND id <> %s::uuid AND created_at > to_timestamp(%s)",
            job_id,
            began,
        )
        assert others == [(0,)], f"{others[0][0]} bystanders failed with the one that hung"
    finally:
        del lab.stack.environment["SWITCHYARD_STALL_S"]
        for name in ("worker-a", "worker-b"):
            if name in lab.stack.processes:
                lab.restart(name)
    return found


_STARVED = """
import backends.echo_backend
generate = backends.echo_backend.EchoBackend.generate
async def starve(self, call):
    always = call.params.max_tokens == 499
    async for chunk in generate(self, call):
        if always or call.request_id.split("-")[-2] == "1" and hash(call.request_id) % 2:
            bytearray(1 << 62)
        yield chunk
backends.echo_backend.EchoBackend.generate = starve
"""


@row("F18", "a backend finds no memory for an attempt", "I1 I6 I21", within_s=5, is_long=True)
def starved_backend(lab: Lab) -> list[float]:
    for name in ("worker-a", "worker-b"):
        lab.stack.patches[name] = _STARVED
        lab.restart(name)
    try:
        since = time.time()
        with lab.traffic(mix={"job": 2, "long": 1, "stream": 1}), lab.stack.client() as client:
            time.sleep(3)
            body = {"model": "echo", "prompt": "too large for ever", "max_tokens": 499}
            refused = client.post("/v1/completions", json=body)
        found = lab.restarts(since)
    finally:
        for name in ("worker-a", "worker-b"):
            del lab.stack.patches[name]
            lab.restart(name)
    assert (refused.status_code, refused.json()["error"]["code"]) == (502, "attempts_exhausted"), refused.text
    failed = lab.query(
        "SELECT count(*), max(attempt) FROM jobs WHERE status = 'failed' AND created_at > to_timestamp(%s)", since
    )
    assert failed == [(1, 3)], f"{failed[0][0]} jobs failed, after {failed[0][1]} attempts"
    assert found, "no attempt failed"
    return found


@row("F23", "nobody reads a worker's log: its pipe is full", "I9 I11", within_s=5, is_long=True)
def unread_log(lab: Lab) -> list[float]:
    reader, writer = os.pipe()
    lab.stack.outputs["worker-a"] = writer
    try:
        lab.stack.stop("worker-a")
        # Its only worker must go on, or nobody answers.
        lab.stack.stop("worker-b")
        lab.start("worker-a", SWITCHYARD_LOG_LEVEL="DEBUG")
        with lab.traffic():
            lab.until(functools.partial(_is_full, reader), "full pipe", 25)
            since = time.monotonic()
            time.sleep(1)
            found = lab.answers_again(10)
            assert lab.works("worker-a"), f"no work {time.monotonic() - since:.0f} s after its pipe was full"
    finally:
        del lab.stack.outputs["worker-a"]
        # Whoever reads again, or is gone, must not matter either.
        os.close(reader)
        os.close(writer)
        lab.restart("worker-a")
        lab.start("worker-b")
    return found


def _is_full(reader: int) -> bool:
    """Whether less than a line fits into the pipe: 64 KiB, of which a page may be left."""
    import fcntl
    import termios

    waiting = fcntl.ioctl(reader, termios.FIONREAD, b"\0" * 4)
    return int.from_bytes(waiting, sys.byteorder) > 56_000


@row("F95", "metrics: a scraper that hangs, a shared folder that is gone", "I9", within_s=3, is_long=True)
def no_metrics(lab: Lab) -> list[float]:
    folder = lab.folder / "metrics"
    folder.mkdir(exist_ok=True)
    names = ("gateway-a", "worker-a")
    for name in names:
        lab.stack.stop(name)
        lab.start(name, PROMETHEUS_MULTIPROC_DIR=str(folder))
    request = f"GET /metrics HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {lab.stack.secret}\r\n\r\n".encode()
    with lab.traffic(), contextlib.ExitStack() as scrapers:
        with lab.stack.client() as client:
            assert client.get("/metrics").status_code == 200
        for _ in range(20):
            raw = scrapers.enter_context(socket.socket())
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            raw.connect(("127.0.0.1", lab.ports["gateway-a"]))
            raw.sendall(request * 5)
        time.sleep(1)
        shutil.rmtree(folder)
        with lab.stack.client() as client:
            answer = client.get("/metrics")
        assert answer.status_code == 503, answer.status_code
        time.sleep(1)
        found = lab.answers_again()
    for name in names:
        lab.restart(name)
    return found
