"""Who can write to Redis sends a worker what he likes: it stays alive, loads nothing but JSON, and runs nothing but
queued jobs that exist, once."""

import base64
import contextlib
import json
import os
import pickle
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tasks import celery, transport
from tasks.call import VERSION
from tests.conftest import ECHO, running
from tests.stack import Stack

pytestmark = pytest.mark.e2e

NOBODYS = uuid.UUID("01a20979-8744-7650-870c-0098b145d576")


@pytest.fixture(scope="module")
def stack(server_urls: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    yield from running(server_urls, tmp_path_factory.mktemp("forged"), ECHO, ["echo"])


@pytest.fixture
def client(stack: Stack) -> Iterator["redis.Redis"]:
    with contextlib.closing(redis.Redis.from_url(stack.redis_url)) as made:
        yield made


def envelope(body: Any = None, *, raw: bytes | None = None, headers: dict[str, Any] | None = None,
             properties: dict[str, Any] | None = None, kind: str = "application/json", encoding: str = "utf-8") -> bytes:  # fmt: skip
    """A message as our gateway writes it, with another body and other fields."""
    made = json.loads(celery.message(NOBODYS, "generate", "echo"))
    if raw is None and body is not None:
        raw = json.dumps(body).encode()
    if raw is not None:
        made["body"] = base64.b64encode(raw).decode()
    made["headers"] |= headers or {}
    made["properties"] |= properties or {}
    return json.dumps(made | {"content-type": kind, "content-encoding": encoding}).encode()


EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def arguments(*values: Any, **named: Any) -> list[Any]:
    return [list(values), named, EMBED]


ID = str(NOBODYS)
MALFORMED: dict[str, bytes] = {
    "no arguments": envelope(arguments()),
    "one argument": envelope(arguments(ID)),
    "three arguments": envelope(arguments(ID, VERSION, 1)),
    "named arguments": envelope(arguments(job_id=ID, version=VERSION)),
    "no list": envelope({}),
    "a number": envelope(7),
    "null": envelope(raw=b"null"),
    "an empty list": envelope([]),
    "a string": envelope("x"),
    "id a number": envelope(arguments(7, VERSION)),
    "id null": envelope(arguments(None, VERSION)),
    "id a list": envelope(arguments([ID], VERSION)),
    "id an object": envelope(arguments({"$ne": None}, VERSION)),
    "id of SQL": envelope(arguments("' OR 1=1; DROP TABLE jobs; --", VERSION)),
    "id with NUL": envelope(arguments("\0" * 36, VERSION)),
    "id too long": envelope(arguments(ID * 1000, VERSION)),
    "version null": envelope(arguments(ID, None)),
    "version a word": envelope(arguments(ID, "newest")),
    "version a list": envelope(arguments(ID, [VERSION])),
    "version not finite": envelope(raw=f'[["{ID}", Infinity], {{}}, {{}}]'.encode()),
    "version not a number": envelope(raw=f'[["{ID}", NaN], {{}}, {{}}]'.encode()),
    "not JSON": envelope(raw=b"\xff\xfe{"),
    "half JSON": envelope(raw=b'[["x", 1]'),
    "deep JSON": envelope(raw=b"[" * 100_000),
    "a megabyte": envelope(arguments("x" * 1_000_000, VERSION)),
}
UNKNOWN = {
    "a job of nobody": envelope(),
    "version of another time": envelope(arguments(ID, VERSION + 7)),
    "negative version": envelope(arguments(ID, -1)),
    "huge version": envelope(arguments(ID, 10**30)),
    "an unknown task": envelope(headers={"task": "os.system"}),
    "a task of Celery": envelope(headers={"task": "celery.backend_cleanup"}),
    "a task of Celery that calls others": envelope(
        [["x"], {}, EMBED], headers={"task": "celery.chord_unlock"}
    ),
    "task a number": envelope(headers={"task": 7}),
    "no task": envelope(headers={"task": None}),
    "huge headers": envelope(headers={"x": "y" * 1_000_000}),
    "many headers": envelope(headers={f"x{number}": number for number in range(20_000)}),
    "retries": envelope(headers={"retries": 10**9}),
    "an old expiry": envelope(headers={"expires": "1970-01-01T00:00:00+00:00"}),
    "an expiry of words": envelope(headers={"expires": "tomorrow"}),
    "a time limit": envelope(headers={"timelimit": [0.001, 0.001]}),
    "a reply to a queue": envelope(properties={"reply_to": "nobody"}),
    "what shall follow": envelope([[ID, VERSION], {}, EMBED | {"chain": [{"task": "switchyard.generate", "args": [ID, VERSION]}],
                                                             "callbacks": [{"task": "switchyard.embed", "args": []}]}]),
    "another encoding": envelope(encoding="utf-7"),
    "encoding of binary": envelope(encoding="binary"),
    "an unknown type of content": envelope(kind="application/x-unknown"),
    "YAML": envelope(raw=b"!!python/object/apply:os.system ['true']", kind="application/x-yaml"),
}  # fmt: skip


def num_malformed(stack: Stack, name: str) -> int:
    return (stack.logs / f"{name}.log").read_text().count("message.malformed")


def settled(stack: Stack, client: "redis.Redis") -> None:
    """Everything sent is consumed, and the same worker process runs what comes behind it."""
    pid = stack.processes["echo"].pid
    with stack.client(timeout_s=60) as http:
        answer = http.post("/v1/completions", json={"model": "echo", "prompt": f"alive {uuid.uuid4()}"})
    assert answer.status_code == 200, answer.text
    stack.wait_until(lambda: client.llen("echo") == 0, "the end of the queue")
    assert stack.processes["echo"].pid == pid
    assert stack.processes["echo"].poll() is None


def ledger(stack: Stack) -> list[tuple[Any, ...]]:
    return stack.query(
        "SELECT id, status, attempt FROM jobs WHERE backend <> 'echo' OR status <> 'succeeded' ORDER BY id"
    )


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_messages_are_dropped(stack: Stack, client: "redis.Redis", name: str) -> None:
    before = ledger(stack)
    client.lpush("echo", MALFORMED[name])
    settled(stack, client)
    assert ledger(stack) == before


@pytest.mark.parametrize("name", UNKNOWN)
def test_messages_of_nothing_run_nothing(stack: Stack, client: "redis.Redis", name: str) -> None:
    before = ledger(stack), client.llen("nobody")
    client.lpush("echo", UNKNOWN[name])
    settled(stack, client)
    assert (ledger(stack), client.llen("nobody")) == before


def test_nothing_but_json_is_loaded(stack: Stack, client: "redis.Redis", tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    bomb = pickle.dumps([[Bomb(trace)], {}, {}])
    for kind in ("application/x-python-serialize", "application/json", "application/data", "pickle"):
        for encoding in ("binary", "utf-8"):
            client.lpush("echo", envelope(raw=bomb, kind=kind, encoding=encoding))
    client.lpush("echo", envelope(headers={"task": "switchyard.generate", "x": base64.b64encode(bomb).decode()}))
    settled(stack, client)
    assert not trace.exists()


def test_a_job_whose_message_is_forged_many_times_runs_once(stack: Stack, client: "redis.Redis") -> None:
    with stack.client(timeout_s=60) as http:
        job = {"endpoint": "/v1/completions", "body": {"model": "echo", "prompt": "once", "options": {"token_ms": 20}}}
        job_id = http.post("/v1/jobs", json=job).json()["id"]
        for _ in range(50):
            client.lpush("echo", celery.message(uuid.UUID(job_id), "generate", "echo"))
            client.lpush("echo", celery.message(uuid.UUID(job_id), "embed", "echo"))
        done = http.get(f"/v1/jobs/{job_id}?wait=30").json()
        assert (done["status"], done["attempt"]) == ("succeeded", 1)
        settled(stack, client)
        assert http.get(f"/v1/jobs/{job_id}").json() == done


def test_a_message_on_the_wrong_queue_runs_nothing_there(stack: Stack, client: "redis.Redis") -> None:
    """The job is of another backend: this worker has not its model."""
    with stack.client(timeout_s=60) as http:
        job = {"endpoint": "/v1/completions", "body": {"model": "away", "prompt": "elsewhere"}}
        job_id = http.post("/v1/jobs", json=job).json()["id"]
        client.lpush("echo", celery.message(uuid.UUID(job_id), "generate", "echo"))
        settled(stack, client)
        assert http.get(f"/v1/jobs/{job_id}").json()["status"] == "queued"
        http.post(f"/v1/jobs/{job_id}/cancel").raise_for_status()


def test_what_is_published_by_others_ends_nothing(stack: Stack, client: "redis.Redis") -> None:
    """News of an end only makes a gateway look into the ledger; nonsense is passed over."""
    with stack.client(timeout_s=60) as http:
        body = {"model": "echo", "prompt": "x" * 20, "options": {"token_ms": 50}}
        job_id = http.post("/v1/jobs", json={"endpoint": "/v1/completions", "body": body}).json()["id"]
        client.publish(transport.DONE_CHANNEL, json.dumps([[job_id, "succeeded"]]))
        for channel, listener in ((transport.DONE_CHANNEL, "gateway"), (transport.STOP_CHANNEL, "echo")):
            for nonsense in (b"", b"{", b"null", b"7", b"[1]", b'{"a": 1}', b"\xff"):
                before = num_malformed(stack, listener)
                client.publish(channel, nonsense)
                # It listens on, or it would not tell of the next.
                stack.wait_until(lambda: num_malformed(stack, listener) > before, f"{listener} to pass over it")
        done = http.get(f"/v1/jobs/{job_id}?wait=30").json()
        assert (done["status"], done["attempt"]) == ("succeeded", 1)
        settled(stack, client)


def test_a_stream_that_others_write_into_ends_with_an_error_or_the_answer(stack: Stack, client: "redis.Redis") -> None:
    with stack.client(timeout_s=60) as http:
        body = {"model": "echo", "prompt": "abcdefghij", "stream": True, "options": {"token_ms": 100}}
        with http.stream("POST", "/v1/completions", json=body) as answer:
            key = transport.chunks_key(answer.headers["x-job-id"])
            for nonsense in (b"", b"{", b"null", b"7", b"[1]", b'[{"seq": "x"}]', b'{"token": 0}', b"\xff"):
                client.publish(key, nonsense)
            assert answer.read().endswith(b"data: [DONE]\n\n")
        settled(stack, client)
