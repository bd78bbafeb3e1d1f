"""Requests that join a job instead of making one: identical ones, repeated keys, SDK retries."""

import json
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import redis

from tests.conftest import running
from tests.stack import Stack

pytestmark = pytest.mark.e2e

CONFIG = """
backends: {echo: {runtime: echo, concurrency: 64}}
models: {echo: {path: echo, backends: [echo]}}
"""


@pytest.fixture(scope="module")
def stack(server_urls: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    yield from running(server_urls, tmp_path_factory.mktemp("joining"), CONFIG, ["echo"])


def completion(**fields: Any) -> dict[str, Any]:
    """A cacheable request that no other test makes."""
    return {"model": "echo", "prompt": f"{uuid.uuid4()} ", "temperature": 0, "max_tokens": 1000, **fields}


def runs(stack: Stack) -> int:
    """How many attempts workers have made so far."""
    return int(stack.query("SELECT coalesce(sum(attempt), 0) FROM jobs WHERE leader_id IS NULL")[0][0])


def test_identical_requests_share_one_run_and_keep_their_own_jobs(stack: Stack) -> None:
    body = completion(options={"first_token_ms": 1500})
    before = runs(stack)
    with stack.client(timeout_s=60) as client, ThreadPoolExecutor(50) as pool:
        responses = list(pool.map(lambda _: client.post("/v1/completions", json=body), range(50)))
    assert {response.status_code for response in responses} == {200}
    assert len({response.content for response in responses}) == 1
    assert len({response.headers["x-job-id"] for response in responses}) == 50
    verdicts = [response.headers["x-cache"].split(";")[0] for response in responses]
    assert sorted(set(verdicts)) == ["COALESCED", "MISS"]
    assert verdicts.count("MISS") == 1
    assert runs(stack) - before == 1
    with stack.client() as client:
        follower = responses[verdicts.index("COALESCED")].headers["x-job-id"]
        leader = responses[verdicts.index("MISS")].headers["x-job-id"]
        job = client.get(f"/v1/jobs/{follower}").json()
        assert (job["status"], job["leader"], job["attempt"]) == ("succeeded", leader, 1)
        assert client.get(f"/v1/jobs/{follower}/result").content == responses[0].content


def test_a_late_stream_gets_the_shared_run_from_its_start(stack: Stack) -> None:
    body = completion(prompt=f"{uuid.uuid4()} a text long enough to be joined " * 2, options={"token_ms": 20})
    before = runs(stack)
    first = stack.read_stream("/v1/completions", body)
    first.wait_for(20)
    late = [stack.read_stream("/v1/completions", body) for _ in range(5)]
    assert {one.text() for one in (first, *late)} == {body["prompt"]}
    assert runs(stack) - before == 1


def test_a_shared_run_outlives_its_worker(stack: Stack) -> None:
    body = completion(prompt="shared and then interrupted " * 5, options={"token_ms": 20})
    streams = [stack.read_stream("/v1/completions", body) for _ in range(3)]
    for one in streams:
        one.wait_for(20)
    stack.kill("echo")
    stack.start_worker("echo")
    assert {one.text() for one in streams} == {body["prompt"]}


def test_a_cancelled_leader_hands_its_run_over(stack: Stack) -> None:
    body = completion(prompt="handed over in the middle " * 6, options={"token_ms": 25})
    first = stack.read_stream("/v1/completions", body)
    first.wait_for(20)
    second = stack.read_stream("/v1/completions", body)
    second.wait_for(20)
    leader = stack.query("SELECT id FROM jobs WHERE num_followers > 0 AND status = 'running'")[0][0]
    with stack.client() as client:
        assert client.post(f"/v1/jobs/{leader}/cancel").status_code == 200
    assert second.text() == body["prompt"]
    numbers = [line for line in second.lines if line.startswith("id: ")]
    assert len(numbers) == len(set(numbers))
    with pytest.raises(AssertionError):
        first.finish()
    assert "job_cancelled" in first.lines[-2]


def test_what_is_not_cacheable_is_not_shared(stack: Stack) -> None:
    before = runs(stack)
    with stack.client() as client, ThreadPoolExecutor(4) as pool:
        sampled = completion(temperature=1.0, options={"first_token_ms": 500})
        unstored = completion(options={"first_token_ms": 500})
        calls = [(sampled, {}), (sampled, {}), (unstored, {"Cache-Control": "no-store"}),
                 (unstored, {"Cache-Control": "no-store"})]  # fmt: skip
        list(pool.map(lambda call: client.post("/v1/completions", json=call[0], headers=call[1]), calls))
    assert runs(stack) - before == 4


def test_an_idempotency_key_makes_one_job(stack: Stack) -> None:
    body = completion(temperature=1.0, options={"first_token_ms": 300})
    key = {"Idempotency-Key": f'"{uuid.uuid4()}"'}
    with stack.client() as client, ThreadPoolExecutor(20) as pool:
        responses = list(pool.map(lambda _: client.post("/v1/completions", json=body, headers=key), range(20)))
        assert {(response.status_code, response.content) for response in responses} == {(200, responses[0].content)}
        assert len({response.headers["x-job-id"] for response in responses}) == 1
        assert sum("idempotent-replayed" in response.headers for response in responses) == 19
        spelled = {"Idempotency-Key": key["Idempotency-Key"].strip('"'), "content-type": "application/json"}
        again = client.post("/v1/completions", content=json.dumps(body, indent=2), headers=spelled)
        assert (again.content, again.headers["idempotent-replayed"]) == (responses[0].content, "true")
        other = client.post("/v1/completions", json=body | {"max_tokens": 7}, headers=key)
        assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reuse")
        streamed = stack.read_stream("/v1/completions", body, **{"Idempotency-Key": str(uuid.uuid4())})
        assert streamed.text() == body["prompt"]


def test_what_the_gateway_decides_for_a_request_does_not_make_it_another(stack: Stack) -> None:
    body = {"model": "auto", "prompt": str(uuid.uuid4())}
    key = {"Idempotency-Key": str(uuid.uuid4())}
    with stack.client() as client:
        first, again = (client.post("/v1/completions", json=body, headers=key) for _ in range(2))
    assert (again.status_code, again.content) == (200, first.content)
    assert again.headers["idempotent-replayed"] == "true"


def test_an_idempotency_key_belongs_to_its_api_key(stack: Stack) -> None:
    key, body = {"Idempotency-Key": "mine"}, completion(temperature=1.0)
    with stack.client() as client, stack.client(stack.create_key("another")) as other:
        mine = client.post("/v1/completions", json=body, headers=key)
        theirs = other.post("/v1/completions", json=body, headers=key)
    assert theirs.status_code == 200
    assert mine.headers["x-job-id"] != theirs.headers["x-job-id"]


def test_a_submitted_job_with_a_key_is_found_again(stack: Stack) -> None:
    key = {"Idempotency-Key": str(uuid.uuid4())}
    job = {"endpoint": "/v1/completions", "body": completion(temperature=1.0)}
    with stack.client() as client:
        first = client.post("/v1/jobs", json=job, headers=key)
        client.get(first.headers["location"], params={"wait": 10})
        second = client.post("/v1/jobs", json=job, headers=key)
        third = client.post("/v1/jobs", json=job | {"metadata": {"a": "b"}}, headers=key)
    assert (first.status_code, second.status_code, third.status_code) == (202, 200, 422)
    assert first.headers["location"] == second.headers["location"]
    assert second.json()["status"] == "succeeded"


@pytest.mark.parametrize("key", ["", "ü" * 3, "x" * 256, "a b"])
def test_a_malformed_key_is_refused(stack: Stack, key: str) -> None:
    with stack.client() as client:
        response = client.post("/v1/completions", json=completion(), headers=[(b"Idempotency-Key", key.encode())])
    assert (response.status_code, response.json()["error"]["code"]) == (400, "validation_error")


def test_an_sdk_retry_joins_the_job_of_its_first_try(stack: Stack) -> None:
    """The stock client gives up on its first try, sends again by itself, and gets that try's answer."""
    before = runs(stack)
    body = completion(temperature=1.0, seed=None, options={"first_token_ms": 2500})
    extra = {"options": body.pop("options")}
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.secret, timeout=1.2, max_retries=4) as client:
        answer = client.completions.create(**body, extra_body=extra)
    assert answer.choices[0].text == body["prompt"]
    assert runs(stack) - before == 1


def test_without_a_retry_header_the_same_request_is_a_new_job(stack: Stack) -> None:
    body = completion(temperature=1.0, options={"first_token_ms": 400})
    with stack.client() as client, ThreadPoolExecutor(2) as pool:
        ids = {r.headers["x-job-id"] for r in pool.map(lambda _: client.post("/v1/completions", json=body), range(2))}
    assert len(ids) == 2


def test_a_failed_job_is_retried_on_request(stack: Stack) -> None:
    failing = completion(options={"fail": "error"})
    with stack.client() as client:
        path = client.post("/v1/jobs", json={"endpoint": "/v1/completions", "body": failing}).headers["location"]
        assert client.get(path, params={"wait": 20}).json()["status"] == "failed"
        again = client.post(f"{path}/retry")
        assert (again.status_code, again.json()["error"]) == (202, None)
        ended = client.get(path, params={"wait": 20}).json()
        assert (ended["status"], ended["attempt"]) == ("failed", 3)
        events = client.get(f"{path}/events").json()["data"]
        tries = ["job.attempt_started", "job.attempt_ended"] * 3
        assert [event["type"] for event in events] == ["job.accepted", *tries, "job.retried", *tries, "job.failed"]
        assert [event["at"] for event in events] == sorted(event["at"] for event in events)
        assert {event["outcome"] for event in events if "outcome" in event} == {"backend_error"}
        letters = client.get("/v1/jobs", params={"status": "failed"}).json()["data"]
        assert letters[0]["error"]["code"] == "attempts_exhausted"
        assert client.post("/v1/jobs/retry", params={"code": "other"}).json()["retried"] == 0
        assert client.post("/v1/jobs/retry", params={"code": "attempts_exhausted"}).json()["retried"] == len(letters)
        done = client.post("/v1/jobs", json={"endpoint": "/v1/completions", "body": completion()}).headers["location"]
        client.get(done, params={"wait": 20})
        accepted, started, *_ = client.get(f"{done}/events").json()["data"]
        assert (accepted["type"], started["type"]) == ("job.accepted", "job.attempt_started")
        assert started["worker_id"] == events[1]["worker_id"]
        refused = client.post(f"{done}/retry")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict_state")


def resumed(client: httpx.Client, path: str, after: int, header: bool) -> list[str]:
    params, headers = ({}, {"Last-Event-ID": str(after)}) if header else ({"starting_after": after}, {})
    with client.stream("GET", f"{path}/stream", params=params, headers=headers) as response:
        return [line for line in response.iter_lines() if line]


@pytest.mark.parametrize("lost", [False, True], ids=["in Redis", "lost by Redis"])
@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"echo": True}], ids=str)
def test_a_finished_stream_is_replayed_to_the_byte(stack: Stack, redis_url: str, lost: bool,
                                                   fields: dict[str, Any]) -> None:  # fmt: skip
    body = completion(prompt=f"{uuid.uuid4()} réplay 😀 ", options={"token_ms": 1}, stream_options={"include_usage": True},
                      **fields)  # fmt: skip
    live = stack.read_stream("/v1/completions", body, **{"Cache-Control": "no-store"})
    live.finish()
    lines = [line for line in live.lines if line]
    job_id = stack.query("SELECT id FROM jobs ORDER BY created_at DESC LIMIT 1")[0][0]
    if lost:
        with redis.Redis.from_url(redis_url) as broker:
            assert broker.delete(f"switchyard:chunks:{job_id}") == 1
    with stack.client() as client:
        path = f"/v1/jobs/{job_id}"
        assert resumed(client, path, 0, header=True) == lines
        numbers = [int(line.removeprefix("id: ")) for line in lines if line.startswith("id: ")]
        for after in (1, len(numbers) // 2, len(numbers) - 1):
            expected = lines[lines.index(f"id: {after + 1}") :]
            assert resumed(client, path, after, header=False) == expected
        assert resumed(client, path, len(numbers), header=True) == lines[-2:]


def test_a_stream_whose_events_were_lost_with_its_worker_says_so(stack: Stack, redis_url: str) -> None:
    body = completion(prompt="lost twice over " * 6, options={"token_ms": 30})
    reader = stack.read_stream("/v1/completions", body, **{"Cache-Control": "no-store"})
    reader.wait_for(20)
    job_id = stack.query("SELECT id FROM jobs WHERE status = 'running' AND is_stream")[0][0]
    stack.kill("echo")
    with redis.Redis.from_url(redis_url) as broker:
        broker.delete(f"switchyard:chunks:{job_id}")
    stack.start_worker("echo")
    with pytest.raises(AssertionError):
        reader.finish()
    assert "stream_interrupted" in reader.lines[-2]
    with stack.client() as client:
        fresh = resumed(client, f"/v1/jobs/{job_id}", 0, header=True)
        texts = [json.loads(line[6:])["choices"][0]["text"] for line in fresh if line.startswith("data: {")]
        assert "".join(texts) == body["prompt"]
        assert "stream_interrupted" in resumed(client, f"/v1/jobs/{job_id}", 5, header=True)[-1]


def test_a_connected_stream_outlives_the_loss_of_its_events(stack: Stack, redis_url: str) -> None:
    body = completion(prompt="wiped in the middle " * 5, options={"token_ms": 20})
    reader = stack.read_stream("/v1/completions", body, **{"Cache-Control": "no-store"})
    reader.wait_for(20)
    with redis.Redis.from_url(redis_url) as broker:
        broker.flushdb()
    assert reader.text() == body["prompt"]


def test_a_slow_reader_gets_every_event(stack: Stack) -> None:
    body = completion(prompt="x" * 3000, max_tokens=3000, stream=True)
    lines: list[str] = []
    with stack.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            lines.append(line)
            if len(lines) == 10:
                time.sleep(2)
    frames = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(frame["choices"][0]["text"] for frame in frames) == body["prompt"]
    assert lines[-2] == "data: [DONE]"


def test_a_deadline_may_come_by_header_or_with_the_key(stack: Stack) -> None:
    stuck = completion(options={"first_token_ms": 20_000})
    with stack.client() as client:
        started = time.monotonic()
        response = client.post("/v1/completions", json=stuck, headers={"Cancel-After": "1s"})
        assert (response.status_code, response.json()["error"]["code"]) == (504, "job_expired")
        assert time.monotonic() - started < 5
        bad = client.post("/v1/completions", json=stuck, headers={"Cancel-After": "soon"})
        assert (bad.status_code, bad.json()["error"]["code"]) == (400, "validation_error")


def test_threads_see_their_own_answers_only(stack: Stack) -> None:
    """Shared runs must not cross: every caller gets the text that it sent."""

    def ask(number: int) -> tuple[str, str]:
        text = f"group {number % 7} "
        body = {"model": "echo", "prompt": text, "temperature": 0, "options": {"first_token_ms": 200}}
        with stack.client() as client:
            return text, client.post("/v1/completions", json=body).json()["choices"][0]["text"]

    with ThreadPoolExecutor(28) as pool:
        assert all(asked == answered for asked, answered in pool.map(ask, range(70)))
