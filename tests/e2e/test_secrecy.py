"""Words that stand for what callers trust us with, followed through a whole session: each is found where it is meant
to be kept, and nowhere else: no log, no metric, no message, no page of Flower, no account of a request."""

import base64
import contextlib
import json
import re
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from db.models import Base
from tasks import transport
from tests.conftest import ECHO, running
from tests.stack import Stack, free_port

pytestmark = pytest.mark.e2e

CHUNKS = transport.CHUNKS.format("")
KEPT: dict[str, set[str]] = {
    # What a caller said and was answered is what jobs, their results and the cache are for. The echo backend
    # answers with its prompt.
    "prompt": {"jobs", "job_results", "response_cache", f"redis {CHUNKS}"},
    "metadata": {"jobs", "batches"},
    "file": {"files"},
    "line": {"file_chunks", "jobs", "job_results", "response_cache", f"redis {CHUNKS}"},
    "custom id": {"file_chunks"},
    "user": set(),
    # Where a webhook goes and what it says: the job's object, with its metadata.
    "address": {"jobs", "webhook_deliveries"},
    "idempotency": {"idempotency_keys"},
    "refused": set(),
    "header": set(),
    "query": set(),
    "key": set(),
    "wrong key": set(),
    "admin's key": set(),
    # Signing needs it (SECURITY.md).
    "webhook secret": {"webhook_secrets"},
}
"""Word → tables of Postgres, and kinds of Redis keys, that may hold it."""


@dataclass
class Session:
    """The words, and everything that passed through Redis meanwhile."""

    words: dict[str, str]
    flower: str
    commands: list[tuple[str, str]] = field(default_factory=list)
    """Name and first key, and the whole command."""


@pytest.fixture(scope="module")
def stack(server_urls: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    for made in running(server_urls, tmp_path_factory.mktemp("secrecy"), ECHO, ["echo"]):
        made.start_batcher()
        yield made


@pytest.fixture(scope="module")
def session(stack: Stack) -> Session:
    port = free_port()
    options = ["--address=127.0.0.1", f"--port={port}", "--read-only"]
    stack._start(
        "flower", ["-m", "celery", "-A", "tasks", "flower", *options], {"FLOWER_BASIC_AUTH": "watcher:watching"}
    )
    made = Session({name: f"canary{secrets.token_hex(12)}" for name in KEPT}, f"http://127.0.0.1:{port}")
    with httpx.Client(base_url=made.flower, auth=("watcher", "watching")) as flower:
        stack.wait_until(lambda: _knows_worker(flower), "Flower that knows the worker", 60)
    with listening(stack, made):
        play(stack, made.words)
        # What is sent last is written last: the account of this request follows all others.
        with stack.client() as client:
            last = client.get("/v1/models").headers["x-request-id"]
        line = "SELECT 1 FROM request_log WHERE request_id = %s"
        stack.wait_until(lambda: bool(stack.query(line, last)), "the account of the last request")
    return made


def _knows_worker(flower: httpx.Client) -> bool:
    try:
        return b"echo@" in flower.get("/workers?json=1").content + flower.get("/api/workers").content
    except httpx.TransportError:
        return False


@contextlib.contextmanager
def listening(stack: Stack, session: Session) -> Iterator[None]:
    """Keep every command that Redis is sent, its publications included."""
    client = redis.Redis.from_url(stack.redis_url, socket_timeout=30)
    has_begun = threading.Event()
    mark = f"end{secrets.token_hex(8)}"

    def listen() -> None:
        with client.monitor() as monitor:  # type: ignore[no-untyped-call]
            has_begun.set()
            for entry in monitor.listen():
                name, _, rest = entry["command"].partition(" ")
                session.commands.append((f"{name} {rest.partition(' ')[0]}", entry["command"]))
                if mark in entry["command"]:
                    return

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    assert has_begun.wait(30)
    try:
        yield
    finally:
        with contextlib.closing(redis.Redis.from_url(stack.redis_url)) as other:
            other.echo(mark)
        thread.join(30)
        client.close()


def play(stack: Stack, words: dict[str, str]) -> None:
    """Everything that a caller can do, well and badly, with those words in it."""
    words["key"] = stack.create_key("canaries")
    words["admin's key"] = stack.create_key("operators", is_admin=True)
    prompt = words["prompt"]
    chat = {"model": "echo", "messages": [{"role": "user", "content": prompt}], "user": words["user"]}
    text = {"model": "echo", "prompt": prompt}
    with stack.client(words["key"]) as client:
        words["webhook secret"] = client.post("/v1/webhooks/secrets").json()["secret"]
        for _ in range(2):  # the second comes from the cache
            client.post("/v1/chat/completions", json=chat | {"temperature": 0}).raise_for_status()
        for path, body in {
            "/v1/completions": text | {"temperature": 1, "metadata": {"note": words["metadata"]}},
            "/v1/embeddings": {"model": "echo", "input": [prompt]},
            "/v1/classify": {"model": "echo", "input": [prompt]},
            "/v1/rerank": {"model": "echo", "query": prompt, "documents": [prompt, "x"]},
            "/v1/messages": {"model": "echo", "max_tokens": 99, "messages": chat["messages"]},
            "/v1/responses": {"model": "echo", "input": prompt, "instructions": prompt},
            "/v1/tokenize": text,
            "/embed": {"model": "echo", "inputs": prompt},
        }.items():
            client.post(path, json=body, headers={"Idempotency-Key": words["idempotency"] + path}).raise_for_status()
        for options in ({}, {"token_ms": 1}):
            asked = chat | {"stream": True, "options": options, "temperature": 1}
            with client.stream("POST", "/v1/chat/completions", json=asked) as answer:
                assert answer.read().endswith(b"data: [DONE]\n\n")
        with client.stream("POST", "/v1/completions", json=text | {"stream": True, "options": {"token_ms": 500}},
                           headers={"X-Cancel-On-Disconnect": "true"}) as answer:  # fmt: skip
            next(answer.iter_lines())
        ended = [
            submit(client, words, text),
            submit(client, words, text | {"options": {"fail": "error", "fail_after": 5}}),
            submit(client, words, text | {"options": {"fail": "invalid"}}),
            submit(client, words, text | {"options": {"token_ms": 500}}),
            submit(client, words, text | {"model": "away"}),
        ]
        for job in ended[-2:]:
            client.post(f"/v1/jobs/{job}/cancel").raise_for_status()
        states = [client.get(f"/v1/jobs/{job}?wait=60").json()["status"] for job in ended]
        assert states == ["succeeded", "failed", "failed", "cancelled", "cancelled"]
        submit(client, words, text | {"model": "away"})  # its message stays in the queue
        run_batch(stack, client, words)
        misbehave(client, words)
    with stack.client(words["admin's key"]) as admin:
        admin.get(f"/v1/jobs/{ended[0]}/explain").raise_for_status()
        admin.get("/admin/v1/keys").raise_for_status()


def submit(client: httpx.Client, words: dict[str, str], body: dict[str, Any]) -> str:
    job = {"endpoint": "/v1/completions", "body": body, "metadata": {"note": words["metadata"]},
           "webhook": {"url": f"https://{words['address']}.invalid/"}}  # fmt: skip
    response = client.post("/v1/jobs", json=job)
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def run_batch(stack: Stack, client: httpx.Client, words: dict[str, str]) -> None:
    body = {"model": "echo", "prompt": words["line"]}
    line = {"custom_id": words["custom id"], "method": "POST", "url": "/v1/completions"}
    failing = body | {"options": {"fail": "invalid"}}
    lines = [json.dumps(line | {"body": body}), json.dumps(line | {"custom_id": "2", "body": failing})]
    form: Any = {"files": {"file": (words["file"], "\n".join(lines))}, "data": {"purpose": "batch"}}
    file = client.post("/v1/files", **form).raise_for_status().json()["id"]
    asked = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = client.post("/v1/batches", json=asked | {"metadata": {"note": words["metadata"]}}).json()["id"]

    def is_done() -> bool:
        counts = client.get(f"/v1/batches/{batch}").json()["request_counts"]
        return bool(counts == {"total": 2, "completed": 1, "failed": 1})

    stack.wait_until(is_done, "the batch")


def misbehave(client: httpx.Client, words: dict[str, str]) -> None:
    bad = words["refused"]
    refused = [
        client.post("/v1/chat/completions", content=f'{{"model": "echo", "prompt": "{bad}'),
        client.post("/v1/completions", json={"model": "echo", "prompt": {"text": bad}}),
        client.post("/v1/completions", json={"model": "echo", "prompt": bad, f"{bad} ": bad}),
        client.post("/v1/completions", json={"model": "echo", "prompt": bad * 1000}),
        client.post("/v1/embeddings", json={"model": "echo", "input": bad, "dimensions": bad}),
        client.post("/v1/jobs", json={"endpoint": bad, "body": {}}),
        client.get(f"/v1/jobs/{bad}"),
        client.get(f"/{bad}"),
        client.get(f"/v1/jobs?limit={words['query']}"),
        client.get(f"/v1/models/x?q={words['query']}"),
        client.get("/v1/models", headers={"Authorization": f"Bearer sk-sy-{words['wrong key']}"}),
        client.get("/v1/models", headers={"Authorization": f"Basic {words['wrong key']}"}),
        client.post("/v1/completions", json={}, headers={"Idempotency-Key": f"{words['header']} x"}),
        client.post("/v1/completions", json={}, headers={"Cache-Control": f"max-age={words['header']}"}),
    ]
    for response in refused:
        assert 400 <= response.status_code < 500
        assert not [name for name, word in words.items() if word in response.text]
    client.get(
        "/v1/models", headers={"User-Agent": words["header"], "Cookie": words["header"], "Referer": words["header"]}
    )


def forms(word: str) -> list[bytes]:
    """The word as it is, and as the encodings on the way would show it."""
    shifted = [base64.b64encode(b"x" * shift + word.encode())[4 if shift else 0 : -4] for shift in range(3)]
    return [word.encode(), word.encode().hex().encode(), *shifted]


def found(session: Session, text: bytes, allowed: str = "") -> list[str]:
    return [name for name, word in session.words.items()
            if allowed not in KEPT[name] and any(form in text for form in forms(word))]  # fmt: skip


@pytest.mark.parametrize("table", sorted(Base.metadata.tables))
def test_tables(stack: Stack, session: Session, table: str) -> None:
    rows = stack.query(f'SELECT t::text FROM "{table}" t')
    text = "\n".join(row for (row,) in rows).encode()
    assert found(session, text, table) == []
    if table in ("jobs", "webhook_deliveries", "idempotency_keys", "webhook_secrets"):
        # Else the search itself would be blind.
        assert [
            name for name in KEPT if table in KEPT[name] and any(form in text for form in forms(session.words[name]))
        ]


def test_logs(stack: Stack, session: Session) -> None:
    files = [path for path in Path(stack.logs).rglob("*.log") if path.stat().st_size]
    assert {"gateway.log", "echo.log", "batcher.log"} <= {path.name for path in files}
    for path in files:
        assert found(session, path.read_bytes()) == [], path.name


def test_metrics(stack: Stack, session: Session) -> None:
    with stack.client() as client:
        page = client.get("/metrics").content
    assert b"switchyard_requests_total" in page
    assert found(session, page) == []


def test_redis(stack: Stack, session: Session) -> None:
    """Every key as it lies, and every command and publication on its way."""
    with contextlib.closing(redis.Redis.from_url(stack.redis_url)) as client:
        keys = [key.decode(errors="replace") for key in client.scan_iter()]
        for key in keys:
            kind = f"redis {CHUNKS}" if key.startswith(CHUNKS) else "redis"
            assert found(session, key.encode() + lying(client, key), kind) == [], key
        assert client.llen("nobody"), "no message lies in a queue to be looked at"
    assert any(key.startswith(CHUNKS) for key in keys)
    names = {name.partition(" ")[0].upper() for name, _ in session.commands}
    assert {"LPUSH", "PUBLISH", "XADD"} <= names
    assert any(found(session, command.encode()) == ["prompt"] for _, command in session.commands)
    for name, command in session.commands:
        is_output = re.match(rf"(XADD|PUBLISH) {re.escape(CHUNKS)}", name, re.IGNORECASE)
        assert found(session, command.encode(), f"redis {CHUNKS}" if is_output else "redis") == [], name
        for encoded in re.findall(r'"body": ?"([A-Za-z0-9+/=]+)"', command.replace("\\", "")):
            assert found(session, base64.b64decode(encoded)) == []


def lying(client: "redis.Redis", key: str) -> bytes:
    kind: Any = client.type(key)
    read: dict[bytes, Any] = {
        b"string": lambda: client.get(key),
        b"list": lambda: client.lrange(key, 0, -1),
        b"set": lambda: client.smembers(key),
        b"zset": lambda: client.zrange(key, 0, -1),
        b"hash": lambda: client.hgetall(key),
        b"stream": lambda: client.xrange(key),
        b"none": lambda: b"",
    }
    value = read[kind]()
    text = repr(value).encode()
    for encoded in re.findall(rb'"body": ?"([A-Za-z0-9+/=]+)"', text):
        text += base64.b64decode(encoded)
    return text


def test_flower(stack: Stack, session: Session) -> None:
    (job,) = stack.query("SELECT id::text FROM jobs WHERE status = 'succeeded' LIMIT 1")[0]
    with httpx.Client(base_url=session.flower, auth=("watcher", "watching")) as client:
        assert httpx.get(f"{session.flower}/api/tasks").status_code == 401
        stack.wait_until(lambda: job.encode() in client.get("/api/tasks?limit=1000").content, "the job in Flower")
        for path in ("/", "/workers", "/workers?json=1", "/tasks", "/broker", "/api/tasks?limit=1000", "/api/workers",
                     "/api/queues/length", "/api/task/types", f"/task/{job}", f"/api/task/info/{job}", "/metrics"):  # fmt: skip
            response = client.get(path)
            assert response.status_code < 500, path
            assert found(session, response.content) == [], path
