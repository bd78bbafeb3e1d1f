"""A batch answers each line once, whatever dies meanwhile."""

import json
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from openai.types import Batch

from tests.conftest import running
from tests.stack import Stack

pytestmark = pytest.mark.e2e

CONFIG = """
backends: {echo: {runtime: echo, concurrency: 32}}
models: {echo: {path: echo, backends: [echo], context_length: 4096}}
"""
NUM_LINES = 150
SLOTS = 16
LONG = range(61, 61 + SLOTS)
"""Numbers of lines of some seconds, so that somebody surely is in the middle of one when it is killed."""


@pytest.fixture(scope="module")
def shared(server_urls: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    yield from running(server_urls, tmp_path_factory.mktemp("recovery"), CONFIG, [])


@pytest.fixture
def stack(shared: Stack) -> Stack:
    """Whole again, whatever a test before this one left of it."""
    if "gateway" not in shared.processes:
        shared.start_gateway()
    if "echo" not in shared.processes:
        shared.start_worker("echo", slots=SLOTS)
    if "second" in shared.processes:
        shared.kill("second")
    if "batcher" not in shared.processes:
        shared.start_batcher()
    return shared


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.secret, max_retries=0) as made:
        yield made


def plain(number: int) -> float:
    return 60


def with_long_lines(number: int) -> float:
    return 2000 if number + 1 in LONG else 10


def begin(client: openai.OpenAI, delay_ms: Callable[[int], float] = plain) -> Batch:
    lines = [
        {"custom_id": f"id-{n}", "method": "POST", "url": "/v1/completions",
         "body": {"model": "echo", "prompt": f"line {n}", "options": {"first_token_ms": delay_ms(n)}}}
        for n in range(NUM_LINES)
    ]  # fmt: skip
    file = client.files.create(file=("x.jsonl", "\n".join(map(json.dumps, lines)).encode()), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")


def id_of(batch: Batch) -> uuid.UUID:
    return uuid.UUID(batch.id.removeprefix("batch_"))


def num_answered(stack: Stack, batch: Batch) -> int:
    return int(stack.query("SELECT num_completed FROM batches WHERE id = %s", id_of(batch))[0][0])


def wait_for(stack: Stack, batch: Batch, num_lines: int) -> None:
    stack.wait_until(lambda: num_answered(stack, batch) >= num_lines, f"{num_lines} answers", 60)


def wait_for_long_lines(stack: Stack, batch: Batch) -> None:
    wait_for(stack, batch, LONG.start - 1)
    ids = [uuid.uuid5(id_of(batch), str(number)) for number in LONG]
    running = "SELECT count(*) FROM jobs WHERE status = 'running' AND id = ANY(%s)"
    stack.wait_until(lambda: stack.query(running, ids)[0][0] >= SLOTS // 2, "long lines under way", 60)


def jobs(stack: Stack, batch: Batch, what: str) -> Any:
    return stack.query(f"SELECT {what} FROM jobs WHERE metadata ->> 'batch_id' = %s", batch.id)


def check(stack: Stack, client: openai.OpenAI, batch: Batch) -> None:
    """Every line is answered, by its own answer, once; and no job was made twice."""
    stack.wait_until(lambda: client.batches.retrieve(batch.id).status == "completed", "a completed batch", 90)
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
    assert jobs(stack, batch, "count(*), count(DISTINCT payload)") == [(NUM_LINES, NUM_LINES)]
    assert stack.query("SELECT count(*) FROM batch_items") == [(0,)]


def runs(stack: Stack, batch: Batch) -> int:
    """How often a job of the batch was run."""
    return int(jobs(stack, batch, "sum(attempt)")[0][0])


def test_a_batcher_goes_on_where_the_one_before_it_was(stack: Stack, client: openai.OpenAI) -> None:
    batch = begin(client)
    wait_for(stack, batch, 30)
    stack.kill("batcher")
    stack.start_batcher()
    wait_for(stack, batch, 90)
    assert stack.stop("batcher") == 0
    stack.start_batcher()
    check(stack, client, batch)
    assert runs(stack, batch) == NUM_LINES, "nothing ran twice"


def test_a_killed_worker_costs_only_what_it_was_running(stack: Stack, client: openai.OpenAI) -> None:
    batch = begin(client, with_long_lines)
    wait_for_long_lines(stack, batch)
    stack.kill("echo")
    stack.start_worker("echo", slots=SLOTS)
    check(stack, client, batch)
    assert NUM_LINES < runs(stack, batch) <= NUM_LINES + SLOTS


def test_a_killed_gateway_and_one_of_two_batchers_are_not_missed(stack: Stack, client: openai.OpenAI) -> None:
    stack.start_batcher("second")
    batch = begin(client)
    wait_for(stack, batch, 30)
    stack.kill("batcher")
    stack.kill("gateway")
    wait_for(stack, batch, NUM_LINES)
    stack.start_gateway()
    check(stack, client, batch)
    assert runs(stack, batch) == NUM_LINES


def test_what_was_answered_while_the_batcher_was_away_is_kept_when_it_is_cancelled(
    stack: Stack, client: openai.OpenAI
) -> None:
    batch = begin(client, with_long_lines)
    wait_for_long_lines(stack, batch)
    stack.kill("batcher")
    live = "SELECT count(*) FROM jobs WHERE status IN ('queued', 'running')"
    stack.wait_until(lambda: stack.query(live) == [(0,)], "jobs that end without it", 60)
    succeeded = jobs(stack, batch, "count(*) FILTER (WHERE status = 'succeeded')")[0][0]
    assert succeeded > num_answered(stack, batch)
    client.batches.cancel(batch.id)
    stack.start_batcher()
    stack.wait_until(lambda: client.batches.retrieve(batch.id).status == "cancelled", "a cancelled batch", 60)
    done: Any = client.batches.retrieve(batch.id)
    assert (done.request_counts.completed, done.request_counts.failed) == (succeeded, NUM_LINES - succeeded)
