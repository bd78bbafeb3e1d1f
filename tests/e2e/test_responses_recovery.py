"""A response's stream survives whatever carries it."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conftest import running
from tests.stack import Stack, free_port

pytestmark = pytest.mark.e2e

CONFIG = """
backends: {echo: {runtime: echo, concurrency: 64}}
models: {echo: {path: echo, backends: [echo], context_length: 4096}}
"""
SLOWLY = {"options": {"token_ms": 25}}


@pytest.fixture
def stack(server_urls: tuple[str, str], tmp_path: Path) -> Iterator[Stack]:
    yield from running(server_urls, tmp_path, CONFIG, ["echo"])


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.secret, max_retries=0) as made:
        yield made


def numbers(events: list[Any]) -> list[int]:
    return [event.sequence_number for event in events]


def collect(client: openai.OpenAI, events: list[Any], **fields: Any) -> Callable[[], None]:
    """Read a stream in a thread; the function that is returned waits for its end."""

    def read() -> None:
        with contextlib.suppress(openai.APIError, Exception):
            with client.responses.create(model="echo", stream=True, **fields) as stream:
                events.extend(stream)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return lambda: thread.join(60)


def test_a_stream_goes_on_after_its_worker_was_killed(client: openai.OpenAI, stack: Stack) -> None:
    events: list[Any] = []
    text = "the quick brown fox jumps over the lazy dög €uro 😀 " * 2
    finish = collect(client, events, input=text, background=True, extra_body=SLOWLY)
    stack.wait_until(lambda: len(events) > 30, "events")
    stack.kill("echo")
    stack.start_worker("echo")
    finish()
    assert numbers(events) == list(range(len(events)))
    assert events[-1].response.output_text == f"user: {text}\n"
    assert stack.query("SELECT attempt FROM jobs") == [(2,)]
    with client.responses.retrieve(events[-1].response.id, stream=True) as again:
        assert list(again) == events


def test_a_stream_is_resumed_from_another_gateway(client: openai.OpenAI, stack: Stack) -> None:
    port = free_port()
    stack.start_gateway("gateway-2", port)
    events: list[Any] = []
    text = "said before and after the gateway's death " * 3
    finish = collect(client, events, input=text, background=True, extra_body=SLOWLY)
    stack.wait_until(lambda: len(events) > 30, "events")
    stack.kill("gateway")
    finish()
    response_id, seen = events[0].response.id, events[-1].sequence_number
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=stack.secret, max_retries=0) as other:
        with other.responses.retrieve(response_id, stream=True, starting_after=seen) as rest:
            events += list(rest)
        assert numbers(events) == list(range(len(events)))
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert "".join(deltas) == f"user: {text}\n" == other.responses.retrieve(response_id).output_text
