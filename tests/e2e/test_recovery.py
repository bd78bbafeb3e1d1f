"""What is accepted gets one right answer, whatever dies."""

import base64
import contextlib
import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import redis

from tests.conftest import running
from tests.stack import Stack

pytestmark = pytest.mark.e2e

CONFIG = """
backends: {echo: {runtime: echo, concurrency: 64}}
models: {echo: {path: echo, backends: [echo]}}
"""


@pytest.fixture
def stack(server_urls: tuple[str, str], tmp_path: Path) -> Iterator[Stack]:
    yield from running(server_urls, tmp_path, CONFIG, ["echo"])


def submit(client: httpx.Client, text: str, **options: float) -> str:
    body = {"model": "echo", "prompt": text, "max_tokens": 1000, "options": options}
    response = client.post("/v1/jobs", json={"endpoint": "/v1/completions", "body": body})
    assert response.status_code == 202
    return str(response.headers["location"])


def answers(client: httpx.Client, paths: list[str]) -> list[str]:
    for path in paths:
        job = client.get(path, params={"wait": 60}).json()
        assert job["status"] == "succeeded", job
    return [client.get(f"{path}/result").json()["choices"][0]["text"] for path in paths]


def test_a_killed_workers_jobs_are_run_again_and_stored_once(stack: Stack) -> None:
    with stack.client(timeout_s=90) as client:
        paths = [submit(client, f"job {number} " * 5, token_ms=40) for number in range(20)]
        stack.wait_until(lambda: client.get(paths[-1]).json()["status"] == "running", "running jobs")
        stack.kill("echo")
        stack.start_worker("echo")
        assert answers(client, paths) == [f"job {number} " * 5 for number in range(20)]
        attempts = [client.get(path).json()["attempt"] for path in paths]
    assert set(attempts) == {2}
    assert stack.query("SELECT count(*), count(DISTINCT job_id) FROM job_results") == [(20, 20)]
    assert stack.query("SELECT DISTINCT attempts -> 0 ->> 'outcome' FROM jobs") == [("worker_died",)]


def test_a_stream_goes_on_where_the_dead_worker_stopped(stack: Stack) -> None:
    text = "the quick brown fox jumps over the lazy dög €uro 😀 " * 2
    body = {"model": "echo", "prompt": text, "max_tokens": 1000, "options": {"token_ms": 25}}
    stream = stack.read_stream("/v1/completions", body)
    stream.wait_for(30)
    stack.kill("echo")
    stack.start_worker("echo")
    assert stream.text() == text
    assert stack.query("SELECT attempt, (usage ->> 'completion_tokens')::int FROM jobs") == [(2, len(text.encode()))]


def test_a_stream_goes_on_when_its_worker_is_replaced(stack: Stack) -> None:
    stack.environment["SWITCHYARD_DRAIN_S"] = "0.3"
    stack.stop("echo")
    stack.start_worker("echo", "old")
    text = "a text that outlasts the drain " * 10
    body = {"model": "echo", "prompt": text, "max_tokens": 1000, "options": {"token_ms": 30}}
    stream = stack.read_stream("/v1/completions", body)
    stream.wait_for(30)
    stack.start_worker("echo", "new")
    assert stack.stop("old") == 0
    assert stream.text() == text
    assert stack.query("SELECT attempt, jsonb_array_length(attempts) FROM jobs") == [(1, 1)]


def test_a_frozen_worker_that_comes_back_writes_nothing_into_the_stream(stack: Stack) -> None:
    text = "thawed in the middle of its successor's work " * 9
    body = {"model": "echo", "prompt": text, "max_tokens": 1000, "options": {"token_ms": 30}}
    stream = stack.read_stream("/v1/completions", body)
    stream.wait_for(30)
    stack.start_worker("echo", "second")
    stack.kill("echo", signal.SIGSTOP)
    attempts = "SELECT attempt FROM jobs WHERE status = 'running'"
    stack.wait_until(lambda: stack.query(attempts) == [(2,)], "second attempt")
    stack.kill("echo", signal.SIGCONT)
    assert stream.text() == text
    assert stack.query("SELECT attempt, (usage ->> 'completion_tokens')::int FROM jobs") == [(2, len(text))]


def test_a_job_that_kills_its_worker_every_time_ends_as_exhausted(stack: Stack) -> None:
    with stack.client(timeout_s=90) as client:
        body = {"model": "echo", "prompt": "poison", "options": {"fail": "exit", "fail_after": 2}}
        path = client.post("/v1/jobs", json={"endpoint": "/v1/completions", "body": body}).headers["location"]
        for _ in range(3):
            stack.processes.pop("echo").wait(20)
            # A worker that is being killed as it starts is what this test is about.
            with contextlib.suppress(AssertionError):
                stack.start_worker("echo", wait_s=10)
        job = client.get(path, params={"wait": 30}).json()
    assert (job["status"], job["attempt"], job["error"]["code"]) == ("failed", 3, "attempts_exhausted")


def test_losing_redis_loses_no_job(stack: Stack, redis_url: str) -> None:
    with stack.client(timeout_s=90) as client, contextlib.closing(redis.Redis.from_url(redis_url)) as broker:
        paths = [submit(client, f"number {number}", first_token_ms=300) for number in range(200)]
        broker.flushdb()
        paths += [submit(client, f"number {number}") for number in range(200, 220)]
        assert answers(client, paths) == [f"number {number}" for number in range(220)]
    assert stack.query("SELECT max(attempt) FROM jobs") == [(1,)]


def test_a_lost_message_is_sent_again(stack: Stack, redis_url: str) -> None:
    with stack.client(timeout_s=60) as client, contextlib.closing(redis.Redis.from_url(redis_url)) as broker:
        stack.stop("echo")
        path = submit(client, "lost")
        assert broker.lpop("echo") is not None
        stack.start_worker("echo")
        assert answers(client, [path]) == ["lost"]


def test_a_repeated_message_runs_nothing_twice(stack: Stack, redis_url: str) -> None:
    with stack.client(timeout_s=60) as client, contextlib.closing(redis.Redis.from_url(redis_url)) as broker:
        stack.stop("echo")
        paths = [submit(client, f"often {number}") for number in range(50)]
        messages = broker.lrange("echo", 0, -1)
        broker.lpush("echo", *messages * 4)
        stack.start_worker("echo")
        answers(client, paths)
    assert stack.query("SELECT max(attempt), sum(jsonb_array_length(attempts)) FROM jobs") == [(1, 0)]


PICKLED = {
    "body": "AAAA",
    "content-type": "application/x-python-serialize",
    "content-encoding": "binary",
    "headers": {"task": "switchyard.generate", "id": "x"},
    "properties": {
        "delivery_tag": "1",
        "delivery_info": {"exchange": "", "routing_key": "echo"},
        "body_encoding": "base64",
    },
}


@pytest.mark.parametrize("message", [b"not json at all", b"[]", json.dumps(PICKLED).encode()])
def test_garbage_in_the_queue_harms_nobody(stack: Stack, redis_url: str, message: bytes) -> None:
    with stack.client(timeout_s=60) as client, contextlib.closing(redis.Redis.from_url(redis_url)) as broker:
        broker.lpush("echo", message)
        stack.wait_until(lambda: broker.llen("echo") == 0, "message taken")
        assert answers(client, [submit(client, "still alive")]) == ["still alive"]
        assert stack.processes["echo"].poll() is None


def test_a_draining_worker_finishes_or_gives_back_without_counting(stack: Stack) -> None:
    stack.start_worker("echo", "echo-b")
    with stack.client(timeout_s=90) as client, ThreadPoolExecutor(1) as pool:
        paths = [submit(client, f"drain {number}", first_token_ms=800) for number in range(30)]
        assert pool.submit(stack.stop, "echo").result() == 0
        assert answers(client, paths) == [f"drain {number}" for number in range(30)]
    assert stack.query("SELECT max(attempt) FROM jobs") == [(1,)]


def test_a_dead_backend_takes_its_worker_down_and_no_job_with_it(stack: Stack) -> None:
    with stack.client(timeout_s=60) as client:
        paths = [submit(client, f"bystander {number}", first_token_ms=2000) for number in range(5)]
        stack.wait_until(lambda: client.get(paths[-1]).json()["status"] == "running", "running jobs")
        killer = submit(client, "x", fail="dead")  # type: ignore[arg-type]
        assert stack.processes.pop("echo").wait(20) == 70
        # The killer's attempt counted, the others were given back.
        assert stack.query("SELECT attempt FROM jobs ORDER BY attempt") == [(0,)] * 5 + [(1,)]
        assert client.post(f"{killer}/cancel").status_code == 200
        stack.start_worker("echo")
        assert answers(client, paths) == [f"bystander {number}" for number in range(5)]


def test_a_hung_backend_is_noticed_and_its_jobs_go_on(stack: Stack) -> None:
    stack.environment["SWITCHYARD_STALL_S"] = "1.5"
    stack.stop("echo")
    stack.start_worker("echo")
    with stack.client(timeout_s=60) as client:
        bystander = submit(client, "bystander", first_token_ms=6000)
        hanging = submit(client, "x", fail="hang")  # type: ignore[arg-type]
        assert stack.processes.pop("echo").wait(20) == 70
        # Which of them made it hang nobody knows: the attempt counts for both.
        assert stack.query("SELECT DISTINCT attempt, attempts -> 0 ->> 'outcome' FROM jobs") == [(1, "backend_stalled")]
        assert client.post(f"{hanging}/cancel").status_code == 200
        stack.start_worker("echo")
        assert answers(client, [bystander]) == ["bystander"]


def test_what_killed_every_worker_is_refused_for_a_while(stack: Stack) -> None:
    body = {"model": "echo", "prompt": "poison", "options": {"fail": "exit"}}
    with stack.client(timeout_s=60) as client:
        path = client.post("/v1/jobs", json={"endpoint": "/v1/completions", "body": body}).headers["location"]
        for _ in range(3):
            stack.processes.pop("echo").wait(20)
            with contextlib.suppress(AssertionError):
                stack.start_worker("echo", wait_s=10)
        assert client.get(path, params={"wait": 30}).json()["error"]["code"] == "attempts_exhausted"
        good = body | {"prompt": "good", "options": {}}
        stack.wait_until(lambda: client.post("/v1/completions", json=good).status_code == 200, "worker is back", 60)
        time.sleep(1.5)  # gateways hear of it with their next survey
        refused = client.post("/v1/completions", json=body)
        assert (refused.json()["error"]["code"], refused.headers["x-should-retry"]) == ("quarantined", "false")
        assert client.post("/v1/completions", json=good).status_code == 200


def test_bystanders_outlive_a_job_that_kills_its_workers(stack: Stack) -> None:
    with stack.client(timeout_s=120) as client:
        paths = [submit(client, f"bystander {number}", first_token_ms=2500) for number in range(6)]
        poison = submit(client, "poison", fail="exit", first_token_ms=800)  # type: ignore[arg-type]
        for _ in range(3):
            stack.processes.pop("echo").wait(60)
            with contextlib.suppress(AssertionError):
                stack.start_worker("echo", wait_s=10)
        assert client.get(poison, params={"wait": 30}).json()["error"]["code"] == "attempts_exhausted"
        assert answers(client, paths) == [f"bystander {number}" for number in range(6)]


def test_a_message_of_an_unknown_version_is_parked_and_its_job_runs(stack: Stack, redis_url: str) -> None:
    with stack.client(timeout_s=60) as client, contextlib.closing(redis.Redis.from_url(redis_url)) as broker:
        stack.stop("echo")
        path = submit(client, "from the future")
        message = json.loads(broker.rpop("echo"))  # type: ignore[arg-type]
        job_id = message["headers"]["id"]
        message["body"] = base64.b64encode(json.dumps([[job_id, 99], {}, {}]).encode()).decode()
        broker.lpush("echo", json.dumps(message))
        stack.start_worker("echo")
        assert answers(client, [path]) == ["from the future"]
        assert [json.loads(one) for one in broker.lrange("switchyard:parked", 0, -1)] == [[job_id, 99]]
        broker.delete("switchyard:parked")


TWO = """
backends: {one: {runtime: echo, concurrency: 8}, two: {runtime: echo, concurrency: 8, max_queued_tokens: 400}}
models: {echo: {path: echo, backends: [one, two]}, only-two: {path: echo, backends: [two], auto: false}}
"""


@pytest.fixture
def two(server_urls: tuple[str, str], tmp_path: Path) -> Iterator[Stack]:
    yield from running(server_urls, tmp_path, TWO, ["one"])


def test_jobs_of_a_backend_without_workers_move_to_another(two: Stack) -> None:
    with two.client(timeout_s=60) as client:
        paths = [submit(client, f"moved {number}", first_token_ms=3000) for number in range(8)]
        two.wait_until(lambda: client.get(paths[-1]).json()["status"] == "running", "running jobs")
        two.kill("one")
        two.start_worker("two")
        assert answers(client, paths) == [f"moved {number}" for number in range(8)]
        explained = client.get(f"{paths[0]}/explain").json()
    assert explained["backend"] == "two"
    assert explained["decision"]["reason"] == "moved: no worker of one was up"
    assert explained["decision"]["before"]["chosen"]["backend"] == "one"


def test_a_queue_that_is_full_of_tokens_refuses_with_a_time(two: Stack) -> None:
    body = {"model": "only-two", "prompt": "x" * 300, "options": {}}
    with two.client() as client:
        for _ in range(2):
            accepted = client.post("/v1/jobs", json={"endpoint": "/v1/completions", "body": body})
            assert accepted.status_code == 202
        two.start_worker("two", slots=1)
        blocker = body | {"options": {"first_token_ms": 3000}}
        for number in range(4):
            client.post("/v1/jobs", json={"endpoint": "/v1/completions", "body": blocker | {"seed": number}})
        refused = client.post("/v1/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
