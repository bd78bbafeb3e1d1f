"""A batch answers each line once, whatever dies meanwhile."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Batch

from tests.conftest import running
from tests.stack import Stack, free_port

pytestmark = pytest.mark.e2e

CONFIG = """
backends: {echo: {runtime: echo, concurrency: 32}}
models: {echo: {path: echo, backends: [echo], context_length: 4096}}
"""
NUM_LINES = 300


@pytest.fixture
def stack(server_urls: tuple[str, str], tmp_path: Path) -> Iterator[Stack]:
    for made in running(server_urls, tmp_path, CONFIG, []):
        made.start_worker("echo", slots=16)
        made.start_batcher()
        yield made


def client_of(stack: Stack, port: int | None = None) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port or stack.port}/v1", api_key=stack.secret, max_retries=0)


def begin(client: openai.OpenAI, delay_ms: float = 150) -> Batch:
    lines = [
        {"custom_id": f"id-{n}", "method": "POST", "url": "/v1/completions",
         "body": {"model": "echo", "prompt": f"line {n}", "options": {"first_token_ms": delay_ms}}}
        for n in range(NUM_LINES)
    ]  # fmt: skip
    file = client.files.create(file=("x.jsonl", "\n".join(map(json.dumps, lines)).encode()), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")


def num_answered(stack: Stack) -> int:
    return int(stack.query("SELECT num_completed FROM batches")[0][0])


def wait_for(stack: Stack, num_lines: int) -> None:
    stack.wait_until(lambda: num_answered(stack) >= num_lines, f"{num_lines} answers", 60)


def check(stack: Stack, client: openai.OpenAI, batch: Batch) -> None:
    """Every line is answered, by its own answer, once; and no job was made twice."""
    stack.wait_until(lambda: client.batches.retrieve(batch.id).status == "completed", "a completed batch", 60)
    done = client.batches.retrieve(batch.id)
    assert done.request_counts is not None
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (
        NUM_LINES, NUM_LINES, 0,
    )  # fmt: skip
    assert (done.error_file_id, bool(done.output_file_id)) == (None, True)
    output = [json.loads(line) for line in client.files.content(done.output_file_id or "").text.splitlines()]
    texts = {one["custom_id"]: one["response"]["body"]["choices"][0]["text"] for one in output}
    assert len(output) == NUM_LINES
    assert texts == {f"id-{n}": f"line {n}" for n in range(NUM_LINES)}
    assert stack.query("SELECT count(*), count(DISTINCT payload) FROM jobs") == [(NUM_LINES, NUM_LINES)]
    assert stack.query("SELECT count(*) FROM batch_items") == [(0,)]


def runs(stack: Stack) -> int:
    """How often a job of the batch was run."""
    return int(stack.query("SELECT sum(attempt) FROM jobs")[0][0])


def test_a_killed_batcher_goes_on_where_it_was(stack: Stack) -> None:
    with client_of(stack) as client:
        batch = begin(client)
        for reached in (50, 150, 250):
            wait_for(stack, reached)
            stack.kill("batcher")
            stack.start_batcher()
        check(stack, client, batch)
    assert runs(stack) == NUM_LINES, "nothing ran twice"


def test_a_killed_worker_costs_only_what_it_was_running(stack: Stack) -> None:
    with client_of(stack) as client:
        batch = begin(client)
        wait_for(stack, 100)
        stack.kill("echo")
        stack.start_worker("echo", slots=16)
        check(stack, client, batch)
    assert NUM_LINES < runs(stack) <= NUM_LINES + 16


def test_a_killed_gateway_is_not_missed(stack: Stack) -> None:
    port = free_port()
    with client_of(stack) as client:
        batch = begin(client)
        wait_for(stack, 100)
        stack.kill("gateway")
        answered = num_answered(stack)
        wait_for(stack, answered + 50)
        stack.start_gateway("gateway2", port)
    with client_of(stack, port) as client:
        check(stack, client, batch)
    assert runs(stack) == NUM_LINES


def test_two_batchers_do_the_work_of_one(stack: Stack) -> None:
    stack.start_batcher("second")
    with client_of(stack) as client:
        batch = begin(client)
        wait_for(stack, 100)
        stack.kill("batcher")
        check(stack, client, batch)
    assert runs(stack) == NUM_LINES


def test_a_stopped_batcher_hands_over(stack: Stack) -> None:
    with client_of(stack) as client:
        batch = begin(client)
        wait_for(stack, 100)
        assert stack.stop("batcher") == 0
        stack.start_batcher()
        check(stack, client, batch)
    assert runs(stack) == NUM_LINES


def test_what_was_answered_while_the_batcher_was_away_is_kept_when_it_is_cancelled(stack: Stack) -> None:
    with client_of(stack) as client:
        batch = begin(client, 300)
        wait_for(stack, 32)
        stack.kill("batcher")
        live = "SELECT count(*) FROM jobs WHERE status IN ('queued', 'running')"
        stack.wait_until(lambda: stack.query(live) == [(0,)], "jobs that end without it")
        succeeded = stack.query("SELECT count(*) FROM jobs WHERE status = 'succeeded'")[0][0]
        assert succeeded > num_answered(stack)
        client.batches.cancel(batch.id)
        stack.start_batcher()
        stack.wait_until(lambda: client.batches.retrieve(batch.id).status == "cancelled", "a cancelled batch")
        done: Any = client.batches.retrieve(batch.id)
    assert (done.request_counts.completed, done.request_counts.failed) == (succeeded, NUM_LINES - succeeded)


def test_a_killed_batcher_validates_again(stack: Stack) -> None:
    """The first one dies in the middle of the input."""
    stack.kill("batcher")
    stack.patches["batcher"] = (
        "import os; from db import batches; add = batches.add_items\n"
        "def half(cursor, groups):\n"
        "    add(cursor, [groups[0][:200]]); os._exit(9)\n"
        "batches.add_items = half\n"
    )
    with client_of(stack) as client:
        batch = begin(client, 1)
        stack.start_batcher()
        assert stack.processes["batcher"].wait(30) == 9
        assert stack.query("SELECT status, (SELECT count(*) FROM batch_items) FROM batches") == [("validating", 200)]
        stack.patches.clear()
        stack.start_batcher()
        check(stack, client, batch)
    assert runs(stack) == NUM_LINES
