"""Batches with OpenAI's own client, over real processes."""

import json
import time
from collections.abc import Iterator
from typing import Any, get_args

import httpx
import openai
import pytest
from openai.types import Batch

from api import schemas
from api.schemas.jobs import JobRequest
from tests.conftest import running
from tests.e2e.test_keys import make
from tests.stack import Stack

pytestmark = pytest.mark.e2e

CONFIG = """
backends:
  echo: {runtime: echo, concurrency: 64}
  slow: {runtime: echo, concurrency: 4}
  nobody: {runtime: echo}
models:
  echo: {path: echo, backends: [echo], context_length: 4096}
  slow: {path: echo, backends: [slow], context_length: 4096, auto: false}
  away: {path: echo, backends: [nobody], auto: false}
limits: {body_bytes: 4096, batch_lines: 200}
"""
FINAL = {"completed", "failed", "expired", "cancelled"}


@pytest.fixture(scope="module")
def stack(server_urls: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    for made in running(server_urls, tmp_path_factory.mktemp("batches"), CONFIG, ["echo"]):
        made.start_worker("slow", slots=4)
        made.start_batcher()
        yield made


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.secret, max_retries=0) as made:
        yield made


def line(number: int, endpoint: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    asked = {"model": "echo", "prompt": f"line {number}"} | body
    return {"custom_id": f"id-{number}", "method": "POST", "url": endpoint, "body": asked}


def start(client: openai.OpenAI, lines: list[Any] | bytes, endpoint: Any = "/v1/completions", **fields: Any) -> Batch:
    content = lines if isinstance(lines, bytes) else "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("input.jsonl", content), purpose="batch")
    window: Any = fields.pop("completion_window", "24h")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window=window, **fields)


def finish(client: openai.OpenAI, batch: Batch, within_s: float = 60) -> Batch:
    deadline = time.monotonic() + within_s
    while batch.status not in FINAL:
        assert time.monotonic() < deadline, batch
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    return batch


def read(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    """The lines of an output file by custom_id, each there once."""
    if file_id is None:
        return {}
    lines = [json.loads(text) for text in client.files.content(file_id).text.splitlines()]
    found = {one["custom_id"]: one for one in lines}
    assert len(found) == len(lines)
    return found


def counts(batch: Batch) -> tuple[int, int, int]:
    assert batch.request_counts is not None
    return batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed


def test_a_batch_from_file_to_file(client: openai.OpenAI) -> None:
    made = start(client, [line(n) for n in range(100)], metadata={"job": "nightly"})
    assert (made.object, made.status, made.endpoint, made.completion_window) == (
        "batch", "validating", "/v1/completions", "24h",
    )  # fmt: skip
    assert made.expires_at == made.created_at + 86_400
    assert (made.output_file_id, made.error_file_id, made.errors, counts(made)) == (None, None, None, (0, 0, 0))
    done = finish(client, made)
    assert (done.status, counts(done), done.error_file_id, done.model) == ("completed", (100, 100, 0), None, "echo")
    assert done.metadata == {"job": "nightly"}
    assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at  # type: ignore[operator]
    assert (done.failed_at, done.expired_at, done.cancelling_at, done.cancelled_at) == (None,) * 4
    output = read(client, done.output_file_id)
    assert set(output) == {f"id-{n}" for n in range(100)}
    answer = output["id-7"]
    assert set(answer) == {"id", "custom_id", "response", "error"}
    assert (answer["error"], answer["response"]["status_code"]) == (None, 200)
    assert answer["id"] == answer["response"]["request_id"]
    assert answer["id"].startswith("batch_req_")
    assert answer["response"]["body"]["choices"][0]["text"] == "line 7"
    spent = [one["response"]["body"]["usage"] for one in output.values()]
    assert done.usage is not None
    assert done.usage.input_tokens == sum(one["prompt_tokens"] for one in spent)
    assert done.usage.output_tokens == sum(one["completion_tokens"] for one in spent)
    assert done.usage.total_tokens == sum(one["total_tokens"] for one in spent)
    file = client.files.retrieve(done.output_file_id or "")
    assert (file.purpose, file.filename) == ("batch_output", f"{done.id}_output.jsonl")
    assert file.expires_at == file.created_at + 2_592_000


ENDPOINTS: list[tuple[str, dict[str, Any], Any]] = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, "choices"),
    ("/v1/completions", {"prompt": "x"}, "choices"),
    ("/v1/embeddings", {"input": ["x", "y"]}, "data"),
    ("/v1/classify", {"input": "x"}, "data"),
    ("/v1/rerank", {"query": "x", "documents": ["x", "y"]}, "results"),
    ("/v1/score", {"queries": "x", "documents": ["x", "y"]}, "data"),
    ("/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}, "content"),
    ("/embed", {"inputs": "x"}, 0),
    ("/predict", {"inputs": "x"}, 0),
    ("/rerank", {"query": "x", "texts": ["x", "y"]}, 0),
]
"""With a body, and where its answer has something."""


def test_every_inference_endpoint(client: openai.OpenAI) -> None:
    assert [endpoint for endpoint, _, _ in ENDPOINTS] == list(schemas.ENDPOINTS)
    fields: dict[str, Any] = {"output_expires_after": {"anchor": "created_at", "seconds": 7200}}
    started = []
    for endpoint, body, _ in ENDPOINTS:
        asked = {"custom_id": "a", "method": "POST", "url": endpoint, "body": {"model": "auto"} | body}
        wrong = asked | {"custom_id": "b", "body": {"model": "auto", "no_such_field": 1} | body}
        started.append(start(client, [asked, wrong], endpoint, **fields))
    for made, (endpoint, _, key) in zip(started, ENDPOINTS, strict=True):
        done = finish(client, made)
        assert (done.status, counts(done), done.model) == ("completed", (2, 1, 1), "auto"), endpoint
        answer = read(client, done.output_file_id)["a"]["response"]
        assert (answer["status_code"], bool(answer["body"][key])) == (200, True)
        refused = read(client, done.error_file_id)["b"]["response"]
        assert refused["status_code"] in (400, 422)
        assert refused["body"]["error"]
        file = client.files.retrieve(done.output_file_id or "")
        assert file.expires_at == file.created_at + 7200


def test_the_endpoints_of_batches_are_those_of_jobs() -> None:
    assert list(schemas.ENDPOINTS) == list(get_args(JobRequest.model_fields["endpoint"].annotation))


def test_lines_that_fail_stand_in_the_error_file(client: openai.OpenAI) -> None:
    lines = [
        line(1),
        line(2, prompt=""),
        line(3, no_such_field=1),
        line(4, stream=True),
        line(5, options={"fail": "error"}),
        line(6, prompt="x" * 5, max_tokens=5000),
        line(7, model="slow"),
    ]
    done = finish(client, start(client, lines))
    assert (done.status, counts(done), done.model) == ("completed", (7, 2, 5), None)
    assert set(read(client, done.output_file_id)) == {"id-1", "id-7"}
    failures = read(client, done.error_file_id)
    assert {name: (one["response"]["status_code"], one["response"]["body"]["error"]["code"])
            for name, one in failures.items()} == {
        "id-2": (400, "invalid_prompt"), "id-3": (400, "unknown_field"), "id-4": (400, "unsupported_parameter"),
        "id-5": (502, "attempts_exhausted"), "id-6": (400, "context_length_exceeded"),
    }  # fmt: skip


def good(n: int) -> bytes:
    return json.dumps(line(n)).encode()


BAD_INPUTS: list[tuple[bytes, Any]] = [
    (b"MARKER", [("invalid_json_line", None, 1)]),
    (good(1) + b"\n{]\n\n" + good(2)[:-1], [("invalid_json_line", None, 2), ("invalid_json_line", None, 4)]),
    (b"[]\n" + b'"MARKER"\n7\nnull', [("invalid_json_line", None, n) for n in (1, 2, 3, 4)]),
    (b"\x00\xff\xfe\x89PNG\r\n\x1a\n", [("invalid_encoding", None, 1), ("invalid_json_line", None, 2)]),
    (b"\xef\xbb\xbf" + good(1), [("invalid_encoding", None, 1)]),
    (good(1) + b"\n" + good(2) + b"\n" + good(1), [("duplicate_custom_id", "custom_id", 3)]),
    (b"\n \n", [("empty_file", None, None)]),
    (b"\n".join(map(good, range(201))), [("too_many_tasks", None, None)]),
    (good(1) + b"\n" + json.dumps(line(2, prompt="x" * 9000)).encode() + b"\n{}",
     [("line_too_long", None, 2), ("missing_required_parameter", "custom_id", 3)]),
    (b'{"custom_id":"a","custom_id":"b"}', [("duplicate_key", None, 1)]),
    (b'{"custom_id":"a","x":' + b"[" * 50 + b"]" * 50 + b"}", [("json_too_deep", None, 1)]),
    *[(json.dumps({k: v for k, v in line(1).items() if k != name}).encode(),
       [("missing_required_parameter", name, 1)]) for name in ("custom_id", "method", "url", "body")],
    *[(json.dumps(line(1) | change).encode(), [(code, param, 1)]) for change, code, param in (
        ({"method": "GET"}, "invalid_method", "method"),
        ({"url": "/v1/embeddings"}, "invalid_url", "url"),
        ({"url": "http://MARKER/v1/completions"}, "invalid_url", "url"),
        ({"custom_id": ""}, "invalid_custom_id", "custom_id"),
        ({"custom_id": 7}, "invalid_custom_id", "custom_id"),
        ({"custom_id": "x" * 513}, "invalid_custom_id", "custom_id"),
        ({"body": "MARKER"}, "invalid_request", "body"),
        ({"body": {}}, "missing_required_parameter", "body.model"),
        ({"body": {"model": 7}}, "missing_required_parameter", "body.model"),
        ({"body": {"model": "MARKER"}}, "model_not_found", "body.model"),
        ({"MARKER": 1}, "unknown_field", None),
    )],
]  # fmt: skip


def test_a_bad_input_fails_with_the_lines_that_are_wrong(client: openai.OpenAI, stack: Stack) -> None:
    before = stack.query("SELECT count(*) FROM jobs")
    started = [start(client, content) for content, _ in BAD_INPUTS]
    for made, (content, wanted) in zip(started, BAD_INPUTS, strict=True):
        done = finish(client, made)
        assert done.status == "failed", content
        assert done.errors is not None
        assert [(one.code, one.param, one.line) for one in done.errors.data or []] == wanted, content
        assert "MARKER" not in done.model_dump_json()
        assert (counts(done), done.output_file_id, done.error_file_id) == ((0, 0, 0), None, None)
        assert (done.failed_at is not None, done.in_progress_at) == (True, None)
    assert stack.query("SELECT count(*) FROM jobs") == before
    assert stack.query("SELECT count(*) FROM batch_items") == [(0,)]


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"input_file_id": "file-" + "0" * 32}, 404, "file_not_found", "input_file_id"),
        ({"input_file_id": "MARKER"}, 404, "file_not_found", "input_file_id"),
        ({"input_file_id": 7}, 400, "validation_error", "input_file_id"),
        ({"endpoint": "/v1/MARKER"}, 400, "validation_error", "endpoint"),
        ({"endpoint": "/v1/tokenize"}, 400, "validation_error", "endpoint"),
        ({"endpoint": None}, 400, "validation_error", "endpoint"),
        ({"completion_window": "1d"}, 400, "validation_error", "completion_window"),
        ({"metadata": {"a": 1}}, 400, "validation_error", "metadata"),
        ({"webhook": {"url": "ftp://MARKER"}}, 400, "validation_error", "webhook.url"),
        ({"webhook": {"url": "http://127.0.0.1/"}}, 400, "validation_error", "webhook.url"),
        ({"webhook": {"url": "https://example.com/"}}, 400, "webhook_secret_missing", "webhook"),
        ({"MARKER": 1}, 400, "unknown_field", "MARKER"),
    ],
)  # fmt: skip
def test_bad_batches_are_refused(
    client: openai.OpenAI, stack: Stack, change: dict[str, Any], status: int, code: str, param: str
) -> None:
    file = client.files.create(file=("x", b"1"), purpose="batch")
    body = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h"} | change
    with stack.client() as raw:
        response = raw.post("/v1/batches", json={name: value for name, value in body.items() if value is not None})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert "MARKER" not in error["message"]
    client.files.delete(file.id)


def test_a_strangers_batch_is_unknown(client: openai.OpenAI, stack: Stack) -> None:
    made = start(client, [line(1)])
    with stack.client(stack.create_key("stranger")) as other:
        unknown = other.get("/v1/batches/batch_" + "0" * 32)
        assert unknown.json()["error"]["code"] == "batch_not_found"
        for path in (f"/v1/batches/{made.id}", "/v1/batches/nonsense"):
            assert (other.get(path).status_code, other.get(path).content) == (404, unknown.content)
        assert other.post(f"/v1/batches/{made.id}/cancel").status_code == 404
        assert other.get("/v1/batches").json()["data"] == []
        body = {"input_file_id": made.input_file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
        assert other.post("/v1/batches", json=body).json()["error"]["code"] == "file_not_found"
    finish(client, made)


def test_batches_are_listed_page_by_page(client: openai.OpenAI) -> None:
    started = [start(client, [line(n)]) for n in range(3)]
    made = [finish(client, batch).id for batch in started]
    assert [batch.id for batch in client.batches.list(limit=2)][:3] == made[::-1], "the pages follow each other"
    assert client.batches.list(after=made[1], limit=1).data[0].id == made[0]


def test_cancelling_stops_what_runs_and_keeps_what_is_answered(client: openai.OpenAI, stack: Stack) -> None:
    lines = [line(n, model="slow", options={"first_token_ms": 1 if n < 4 else 60_000}) for n in range(40)]
    made = start(client, lines)
    stack.wait_until(lambda: counts(client.batches.retrieve(made.id))[1] == 4, "four answers", 60)
    with pytest.raises(openai.ConflictError):
        client.files.delete(made.input_file_id)
    cancelled = client.batches.cancel(made.id)
    assert (cancelled.status, cancelled.cancelling_at is not None) == ("cancelling", True)
    done = finish(client, made)
    assert (done.status, counts(done)) == ("cancelled", (40, 4, 36))
    assert set(read(client, done.output_file_id)) == {f"id-{n}" for n in range(4)}
    left = read(client, done.error_file_id)
    assert set(left) == {f"id-{n}" for n in range(4, 40)}
    assert {(one["response"], one["error"]["code"]) for one in left.values()} == {(None, "batch_cancelled")}
    mine = stack.query("SELECT status, count(*) FROM jobs WHERE metadata ->> 'batch_id' = %s GROUP BY 1", made.id)
    assert dict(mine)["succeeded"] == 4
    assert dict(mine)["cancelled"] <= 6, "what was queued or running, and no more"
    assert set(dict(mine)) == {"succeeded", "cancelled"}
    assert client.batches.cancel(made.id).status == "cancelled"
    finished = finish(client, start(client, [line(1)]))
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(finished.id)
    assert client.files.delete(made.input_file_id).deleted


def test_what_is_not_answered_when_the_window_ends_is_expired(client: openai.OpenAI, stack: Stack) -> None:
    lines = [line(n, model="slow", options={"first_token_ms": 1 if n < 4 else 60_000}) for n in range(20)]
    made = start(client, lines, completion_window="1h")
    assert made.expires_at == made.created_at + 3600
    stack.wait_until(lambda: counts(client.batches.retrieve(made.id))[1] == 4, "four answers", 60)
    stack.query("UPDATE batches SET expires_at = clock_timestamp() WHERE status = 'in_progress'")
    done = finish(client, made)
    assert (done.status, counts(done), done.expired_at is not None) == ("expired", (20, 4, 16), True)
    assert set(read(client, done.output_file_id)) == {f"id-{n}" for n in range(4)}
    assert {one["error"]["code"] for one in read(client, done.error_file_id).values()} == {"batch_expired"}


def test_a_batch_leaves_the_slots_to_others(client: openai.OpenAI, stack: Stack) -> None:
    """Four slots: with others in all of them the batch waits; with others in two it takes two and one ahead."""
    slow = {"model": "slow", "prompt": "x", "options": {"first_token_ms": 60_000}}
    with stack.client() as other:
        jobs = [
            other.post("/v1/jobs", json={"endpoint": "/v1/completions", "body": slow | {"prompt": f"other {n}"}}).json()
            for n in range(4)
        ]
        live = "SELECT count(*) FROM jobs WHERE status IN ('queued', 'running') AND metadata ->> 'batch_id' IS NULL"
        stack.wait_until(lambda: stack.query(live)[0][0] == 4, "four jobs of others", 60)
        made = start(client, [line(n, model="slow", options={"first_token_ms": 60_000}) for n in range(20)])
        stack.wait_until(lambda: client.batches.retrieve(made.id).status == "in_progress", "a batch in progress", 60)
        mine = "SELECT count(*) FROM jobs WHERE metadata ->> 'batch_id' = %s"
        quick = finish(client, start(client, [line(1)]))  # many passes of the batcher
        assert quick.status == "completed"
        assert stack.query(mine, made.id) == [(0,)]
        for job in jobs[:2]:
            other.post(f"{job['urls']['get']}/cancel")
        stack.wait_until(lambda: stack.query(mine, made.id) == [(3,)], "jobs of the batch", 60)
        finish(client, start(client, [line(2)]))
        assert stack.query(mine, made.id) == [(3,)]
        assert stack.query("SELECT DISTINCT priority FROM jobs WHERE metadata ->> 'batch_id' = %s", made.id) == [(3,)]
        client.batches.cancel(made.id)
        for job in jobs[2:]:
            other.post(f"{job['urls']['get']}/cancel")
    finish(client, made)


def test_the_same_request_twice_runs_once(client: openai.OpenAI, stack: Stack) -> None:
    lines = [line(n, prompt="asked twice in one batch", temperature=0) for n in range(10)]
    done = finish(client, start(client, lines))
    assert counts(done) == (10, 10, 0)
    ran = "SELECT count(*) FROM jobs WHERE metadata ->> 'batch_id' = %s AND leader_id IS NULL"
    assert stack.query(ran, done.id) == [(1,)]
    again = finish(client, start(client, lines))
    assert counts(again) == (10, 10, 0)
    assert stack.query(ran, again.id) == [(0,)], "the cache has it"


def test_jobs_of_a_batch_name_it(client: openai.OpenAI, stack: Stack) -> None:
    done = finish(client, start(client, [line(1, prompt="named")]))
    with stack.client() as raw:
        jobs = raw.get("/v1/jobs", params={"limit": 100}).json()["data"]
    assert [job["metadata"] for job in jobs if job["metadata"].get("batch_id") == done.id] == [{"batch_id": done.id}]
    assert httpx.get(f"{stack.url}/v1/batches/{done.id}").status_code == 401


@pytest.fixture(scope="module")
def admin(stack: Stack) -> Iterator[httpx.Client]:
    with stack.client(stack.create_key("operators", is_admin=True)) as made:
        yield made


def limited(stack: Stack, admin: httpx.Client, **fields: Any) -> tuple[dict[str, Any], openai.OpenAI]:
    """A key and a client of it."""
    key = make(admin, tenant=fields.pop("tenant", "limited"), **fields)
    return key, openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key["key"], max_retries=0)


def test_one_idempotency_key_makes_one_batch(stack: Stack, client: openai.OpenAI) -> None:
    file = client.files.create(file=("x", json.dumps(line(1)).encode()), purpose="batch")
    body = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h"}
    headers = {"Idempotency-Key": "one-batch"}
    with stack.client() as raw:
        nothing = raw.post("/v1/batches", json=body | {"input_file_id": "file-" + "0" * 32}, headers=headers)
        assert nothing.status_code == 404, "and the key is free"
        first = raw.post("/v1/batches", json=body, headers=headers)
        assert (first.status_code, "idempotent-replayed" in first.headers) == (200, False)
        made = finish(client, Batch.model_validate(first.json()))
        again = raw.post("/v1/batches", json=body, headers=headers)
        assert (again.status_code, again.headers["idempotent-replayed"]) == (200, "true")
        assert (again.json()["id"], again.json()["status"]) == (made.id, "completed")
        other = raw.post("/v1/batches", json=body | {"completion_window": "1h"}, headers=headers)
        assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reuse")
        job = {"endpoint": "/v1/completions", "body": {"model": "echo", "prompt": "x"}}
        assert raw.post("/v1/jobs", json=job, headers=headers).status_code == 422
        assert raw.post("/v1/batches", json=body, headers={"Idempotency-Key": "one batch"}).status_code == 400
    assert stack.query("SELECT count(*) FROM batches WHERE input_file_id = %s", file.id[5:]) == [(1,)]


def test_a_model_outside_the_keys_scope_does_not_exist(stack: Stack, admin: httpx.Client) -> None:
    _, client = limited(stack, admin, models=["echo"])
    with client:
        failed = finish(client, start(client, [line(1), line(2, model="slow")]))
        assert failed.errors is not None
        assert [(one.code, one.line) for one in failed.errors.data or []] == [("model_not_found", 2)]
        done = finish(client, start(client, [line(1), line(2, model="auto")]))
        assert counts(done) == (2, 2, 0)


def test_a_model_that_goes_while_the_batch_runs_is_refused_by_name(stack: Stack, admin: httpx.Client) -> None:
    key, client = limited(stack, admin)
    with client:
        made = start(client, [line(1), *[line(n, model="away") for n in range(2, 100)]])
        stack.wait_until(lambda: counts(client.batches.retrieve(made.id))[1] == 1, "the line that can be run", 60)
        admin.patch(f"/admin/v1/keys/{key['id']}", json={"models": ["echo"]}).raise_for_status()
        done = finish(client, made)
        assert (done.status, counts(done)) == ("completed", (99, 1, 98))
        left = read(client, done.error_file_id).values()
        assert {one["response"]["body"]["error"]["code"] for one in left} == {"model_not_found"}


def test_lines_over_a_limit_wait_for_it_and_are_charged_once(
    stack: Stack, client: openai.OpenAI, admin: httpx.Client
) -> None:
    rated, rate = limited(stack, admin, limits={"requests_per_minute": 5})
    bounded, budget = limited(stack, admin, tenant="budget", limits={"daily_tokens": 85})
    _, narrow = limited(stack, admin, tenant="narrow", limits={"max_concurrent": 2})
    with rate, budget, narrow:
        few = start(rate, [line(n) for n in range(12)])
        # Each of ten tokens, answered with as many: four fit.
        poor = start(budget, [line(n, prompt=f"line {n:05}", max_tokens=10) for n in range(12)])
        slow = start(narrow, [line(n, options={"first_token_ms": 20}) for n in range(20)])
        stack.wait_until(lambda: counts(rate.batches.retrieve(few.id))[1] == 5, "as many as the rate allows", 60)
        stack.wait_until(lambda: counts(budget.batches.retrieve(poor.id))[1] == 4, "as many as the budget allows", 60)
        finish(client, start(client, [line(1)]))  # others are not held up
        assert counts(rate.batches.retrieve(few.id)) == (12, 5, 0)
        assert counts(budget.batches.retrieve(poor.id)) == (12, 4, 0)
        for key, limits in ((rated, {"requests_per_minute": 100}), (bounded, {"daily_tokens": 1000})):
            admin.patch(f"/admin/v1/keys/{key['id']}", json={"limits": limits}).raise_for_status()
        for owner, made, num_lines in ((rate, few, 12), (budget, poor, 12), (narrow, slow, 20)):
            done = finish(owner, made)
            assert (done.status, counts(done)) == ("completed", (num_lines, num_lines, 0))
    unsettled = "SELECT 1 FROM jobs WHERE reserved_tokens IS NOT NULL AND NOT is_settled"
    stack.wait_until(lambda: not stack.query(unsettled), "settling", 60)
    spent = "SELECT sum(spent_tokens), sum(num_live), sum(reserved_tokens) FROM budget_days WHERE tenant = 'budget'"
    assert stack.query(spent) == [(12 * 20, 0, 0)]


def test_what_no_budget_ever_holds_is_expired_and_what_no_minute_holds_is_refused(
    stack: Stack, admin: httpx.Client
) -> None:
    _, poor = limited(stack, admin, tenant="poor", limits={"daily_tokens": 5})
    _, slow = limited(stack, admin, tenant="slow", limits={"tokens_per_minute": 50})
    with poor, slow:
        waits = start(poor, [line(n) for n in range(3)])
        done = finish(slow, start(slow, [line(1, max_tokens=100), line(2, max_tokens=20)]))
        assert (done.status, counts(done)) == ("completed", (2, 1, 1))
        refused = read(slow, done.error_file_id)["id-1"]["response"]
        assert (refused["status_code"], refused["body"]["error"]["code"]) == (429, "rate_limit_exceeded")
        assert poor.batches.retrieve(waits.id).status == "in_progress"
        stack.query("UPDATE batches SET expires_at = clock_timestamp() WHERE tenant = 'poor'")
        late = finish(poor, waits)
        assert (late.status, counts(late)) == ("expired", (3, 0, 3))
        assert {one["error"]["code"] for one in read(poor, late.error_file_id).values()} == {"batch_expired"}


def test_a_keys_default_timeout_is_not_for_lines_that_nobody_waits_for(stack: Stack, admin: httpx.Client) -> None:
    _, mine = limited(stack, admin, tenant="hasty", timeout_s=0.2)
    with mine:
        done = finish(mine, start(mine, [line(1, options={"first_token_ms": 600})]))
        assert (done.status, counts(done)) == ("completed", (1, 1, 0))
