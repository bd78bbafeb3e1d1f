"""A batch of 50,000 lines on the echo backend: lines a second, memory, and what `kill -9` of the batcher costs.

    python -m benchmarks.batch [--lines 50000] [--repeats 1] [--quick] [--json FILE]

The stack is that of `make up`. The upload streams, and the download is compared line by line with what was
asked, so a lost, doubled or mixed-up line fails the benchmark. In the second batch the batcher is killed
half-way and started again as the supervisor would. Memory is the highest RSS seen, and at rest before.
"""

import contextlib
import http.client
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil

from benchmarks import report, stack
from db import session

_MIB = 2**20
_WATCHED = ("gateway0", "batcher", "worker-echo0")
_KILL_AT = 0.5
_LIMIT_S = 1800.0


class BatchError(Exception):
    """The batch came out wrong: what is said of its speed would mean nothing."""


@dataclass(slots=True)
class Memory:
    """RSS in MiB, by process."""

    idle: dict[str, float] = field(default_factory=dict)
    most: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one batch."""

    upload: float
    validate: float
    run: float
    download: float
    resume: float | None = None
    """From the kill to the next answered line."""


def main() -> None:
    parser = report.parser("batch", __doc__)
    parser.set_defaults(repeats=1)
    parser.add_argument("--lines", type=int, default=50_000, help="requests in the batch (50,000)")
    args = parser.parse_args()
    num_lines = min(args.lines, 2000) if args.quick else args.lines
    made = report.start("batch")
    plain: list[Times] = []
    killed: list[Times] = []
    memory = Memory()
    with contextlib.ExitStack() as exits:
        report.say("starting the stack")
        running = exits.enter_context(stack.running(stack.ECHO))
        exits.enter_context(_watching(running, memory))
        for repeat in range(args.repeats):
            report.say(f"{repeat + 1}/{args.repeats}: {num_lines:,} lines")
            plain.append(_batch(running, num_lines, f"plain {repeat}"))
            report.say(f"{repeat + 1}/{args.repeats}: {num_lines:,} lines, the batcher killed half-way")
            killed.append(_batch(running, num_lines, f"killed {repeat}", is_killed=True))
        runs = _runs(running)
    if runs != (2 * args.repeats * num_lines,) * 2:
        raise BatchError(f"(jobs, runs) are {runs}")
    made.add(_speed(num_lines, plain, killed))
    made.add(_memory(memory))
    made.save(args.json)


def _batch(running: stack.Stack, num_lines: int, name: str, *, is_killed: bool = False) -> Times:
    began = time.monotonic()
    file = _upload(running, num_lines, name)
    uploaded = time.monotonic()
    asked = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch = _json(running, "POST", "/v1/batches", asked)
    batch = _until(running, batch["id"], lambda one: one["status"] != "validating")
    begun = time.monotonic()
    resume = None
    if is_killed:
        _until(running, batch["id"], lambda one: _answered(one) >= _KILL_AT * num_lines)
        resume = _kill(running, batch["id"])
    batch = _until(running, batch["id"], lambda one: one["status"] not in {"in_progress", "finalizing"})
    ended = time.monotonic()
    if (batch["status"], batch["request_counts"]["completed"]) != ("completed", num_lines):
        raise BatchError(f"{batch['status']}: {batch['request_counts']}")
    _compare(running, batch["output_file_id"], num_lines, name)
    return Times(uploaded - began, begun - uploaded, ended - begun, time.monotonic() - ended, resume)


def _line(number: int, name: str) -> bytes:
    body = {"model": "echo", "messages": [{"role": "user", "content": f"{name}: what is in line {number}?"}]}
    line = {"custom_id": f"id-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(line).encode() + b"\n"


def _upload(running: stack.Stack, num_lines: int, name: str) -> dict[str, Any]:
    def form() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="bench.jsonl"\r\n\r\n'
        for first in range(0, num_lines, 500):
            yield b"".join(_line(number, name) for number in range(first, min(first + 500, num_lines)))
        yield b"\r\n--b--\r\n"

    headers = running.headers() | {"content-type": "multipart/form-data; boundary=b"}
    with _connection(running) as connection:
        connection.request("POST", "/v1/files", form(), headers, encode_chunked=True)
        found: dict[str, Any] = json.loads(connection.getresponse().read())
    if "error" in found:
        raise BatchError(str(found["error"]))
    return found


def _compare(running: stack.Stack, file_id: str, num_lines: int, name: str) -> None:
    """Every line must be there once, with the answer to its own question."""
    missing = set(range(num_lines))
    with _connection(running) as connection:
        connection.request("GET", f"/v1/files/{file_id}/content", headers=running.headers())
        for text in connection.getresponse():
            line = json.loads(text)
            number = int(line["custom_id"].removeprefix("id-"))
            said = line["response"]["body"]["choices"][0]["message"]["content"]
            if number not in missing or said != f"user: {name}: what is in line {number}?\n":
                raise BatchError(f"line {number} is there twice, or has another's answer")
            missing.discard(number)
    if missing:
        raise BatchError(f"{len(missing)} lines have no answer")


def _kill(running: stack.Stack, batch_id: str) -> float:
    """Kill the batcher, start another, and wait for its first answer; how long that took."""
    old = running.processes["batcher"]
    old.kill()
    old.wait()
    killed = time.monotonic()
    known = _answered(_json(running, "GET", f"/v1/batches/{batch_id}"))
    running.restart("batcher")
    _until(running, batch_id, lambda one: _answered(one) > known)
    return time.monotonic() - killed


def _answered(batch: dict[str, Any]) -> int:
    counts = batch["request_counts"]
    return int(counts["completed"] + counts["failed"])


def _until(running: stack.Stack, batch_id: str, condition: Any) -> dict[str, Any]:
    deadline = time.monotonic() + _LIMIT_S
    while not condition(batch := _json(running, "GET", f"/v1/batches/{batch_id}")):
        if time.monotonic() > deadline:
            raise BatchError(f"after {_LIMIT_S:g} s: {batch}")
        time.sleep(0.1)
    return batch


def _json(running: stack.Stack, method: str, path: str, body: Any = None) -> dict[str, Any]:
    headers = running.headers() | {"content-type": "application/json"}
    with _connection(running) as connection:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        found: dict[str, Any] = json.loads(connection.getresponse().read())
    return found


@contextlib.contextmanager
def _connection(running: stack.Stack) -> Iterator[http.client.HTTPConnection]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", running.port, timeout=120)) as connection:
        yield connection


def _runs(running: stack.Stack) -> tuple[int, int]:
    """How many jobs there are, and how often one was run."""
    connection = session.connect(running.database_url, "switchyard-bench")
    with contextlib.closing(connection), connection.cursor() as cursor:
        cursor.execute("SELECT count(*), sum(attempt) FROM jobs")
        row = cursor.fetchone()
    assert row is not None
    return int(row[0]), int(row[1])


@contextlib.contextmanager
def _watching(running: stack.Stack, memory: Memory) -> Iterator[None]:
    """Note the highest memory of each process, several times a second."""
    stop = threading.Event()
    memory.idle |= {name: _rss(running.processes[name]) for name in _WATCHED}

    def watch() -> None:
        while not stop.wait(0.2):
            for name in _WATCHED:
                memory.most[name] = max(memory.most.get(name, 0.0), _rss(running.processes[name]))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _rss(process: "subprocess.Popen[bytes]") -> float:
    with contextlib.suppress(psutil.Error):
        return float(psutil.Process(process.pid).memory_info().rss) / _MIB
    return 0.0


def _speed(num_lines: int, plain: list[Times], killed: list[Times]) -> report.Table:
    rows: list[tuple[report.Cell, ...]] = [
        (
            name,
            report.spread([num_lines / one.run for one in times]),
            report.spread([one.upload for one in times], 1),
            report.spread([one.validate for one in times], 1),
            report.spread([one.run for one in times], 1),
            report.spread([one.download for one in times], 1),
            report.spread([one.resume for one in times if one.resume is not None], 1) if times is killed else None,
        )
        for name, times in (("undisturbed", plain), ("batcher killed half-way", killed))
    ]
    columns = ("", "lines/s", "upload s", "validate s", "run s", "download and compare s", "resumed after s")
    notes = ("every line answered once, every job run once: checked", "lines/s from the first line to the last")
    return report.Table(f"A batch of {num_lines:,} lines, echo", columns, rows, notes)


def _memory(memory: Memory) -> report.Table:
    rows: list[tuple[report.Cell, ...]] = [
        (name, round(memory.idle[name]), round(memory.most.get(name, 0.0))) for name in _WATCHED
    ]
    return report.Table("Memory, RSS in MiB", ("", "before", "highest"), rows)


if __name__ == "__main__":
    main()
