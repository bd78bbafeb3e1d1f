"""Anthropic's own client, unchanged, against a running stack."""

import json
from typing import Any

import anthropic
import httpx
import pytest

from tests.stack import Stack

pytestmark = pytest.mark.e2e

TOOL: Any = {"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'


def asked(text: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "echo", "max_tokens": 500, "messages": [{"role": "user", "content": text}], **fields}


def also(**fields: Any) -> dict[str, Any]:
    """Fields that this client has no arguments for."""
    return {"extra_body": {"temperature": 0, **fields}}


def client_of(stack: Stack, **options: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=stack.url, api_key=stack.secret, max_retries=0, **options)


def test_a_message(stack: Stack) -> None:
    with client_of(stack) as client:
        raw = client.messages.with_raw_response.create(**asked("grüße", system="be kind", metadata={"user_id": "u"}))
        message = raw.parse()
        assert raw.headers["request-id"] == raw.headers["x-request-id"] == message._request_id
        assert message.id == "msg_" + raw.headers["x-job-id"].replace("-", "")
        assert (message.type, message.role, message.model) == ("message", "assistant", "echo")
        assert [(block.type, block.text) for block in message.content if block.type == "text"] == [
            ("text", "system: be kind\nuser: grüße\n")
        ]
        assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
        assert message.usage.input_tokens == message.usage.output_tokens == 30
        short = client.messages.create(**asked("x" * 50) | {"max_tokens": 3})
        assert (short.stop_reason, short.usage.output_tokens) == ("max_tokens", 3)
        stopped = client.messages.create(**asked("one two three", stop_sequences=["zzz", "two"]))
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "two")
        assert stopped.content[0].type == "text"
        assert stopped.content[0].text == "user: one "


def test_tokens_are_counted_without_a_job(stack: Stack) -> None:
    before = stack.query("SELECT count(*) FROM jobs")
    with client_of(stack) as client:
        message = asked("grüße", system="be kind")
        del message["max_tokens"]
        assert client.messages.count_tokens(**message).input_tokens == 30
        assert client.messages.count_tokens(**message, tools=[TOOL]).input_tokens > 60
        with pytest.raises(anthropic.NotFoundError):
            client.messages.count_tokens(**message | {"model": "none"})
    assert stack.query("SELECT count(*) FROM jobs") == before


def test_a_stream_has_anthropics_events_and_says_what_the_message_says(stack: Stack) -> None:
    slow = {"token_ms": 2}
    with client_of(stack) as client:
        whole = client.messages.create(**asked("a € sign and an 😀", stop_sequences=["no"]), **also(options=slow))
        with client.messages.stream(**asked("a € sign and an 😀", stop_sequences=["no"]),
                                    extra_body={"options": slow}) as stream:  # fmt: skip
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
    assert [block.text for block in whole.content if block.type == "text"] == [text]
    assert [block.text for block in final.content if block.type == "text"] == [text]
    assert (final.stop_reason, final.usage) == (whole.stop_reason, whole.usage)
    with stack.client() as plain:
        response = plain.post("/v1/messages", json=asked("once", options=slow, stream=True))
        again = plain.get(f"/v1/jobs/{response.headers['x-job-id']}/stream")
        rest = plain.get(f"/v1/jobs/{response.headers['x-job-id']}/stream", headers={"Last-Event-ID": "5"})
    names = [line.removeprefix("event: ") for line in response.text.splitlines() if line.startswith("event: ")]
    assert names[:4] == ["message_start", "content_block_start", "ping", "content_block_delta"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[3:-3]) == {"content_block_delta"}
    numbers = [int(line.removeprefix("id: ")) for line in response.text.splitlines() if line.startswith("id: ")]
    assert numbers == list(range(1, len(numbers) + 1))
    assert "[DONE]" not in response.text
    assert again.text == response.text
    assert response.text.endswith(rest.text)
    assert 0 < len(rest.text) < len(response.text)


async def test_the_asynchronous_client(stack: Stack) -> None:
    async with anthropic.AsyncAnthropic(base_url=stack.url, api_key=stack.secret) as client:
        message = await client.messages.create(**asked("hello"))
        assert message.content[0].type == "text"
        async with client.messages.stream(**asked("hello")) as stream:
            pieces = [piece async for piece in stream.text_stream]
    assert "".join(pieces) == message.content[0].text == "user: hello\n"


def test_a_cached_message_is_replayed_as_a_stream(stack: Stack) -> None:
    with client_of(stack) as client:
        first = client.messages.create(**asked("keep me"), **also())
        with client.messages.stream(**asked("keep me"), **also()) as stream:
            final = stream.get_final_message()
            assert stream.response.headers["x-cache"] == "HIT"
    assert final.model_dump() == first.model_dump()


@pytest.mark.parametrize("options", [{}, {"token_ms": 1}])
def test_tool_use_whole_and_streamed(stack: Stack, options: dict[str, Any]) -> None:
    """Echo repeats the call that it is shown, after the definitions."""
    with client_of(stack) as client:
        body = asked(f"go {CALL}", tools=[TOOL])
        message = client.messages.create(**body, **also(options=options))
        with client.messages.stream(**body, **also(options=options),
                                    extra_headers={"Cache-Control": "no-store"}) as stream:  # fmt: skip
            final = stream.get_final_message()
        with client.messages.stream(**body, **also(options=options)) as stream:
            cached = stream.get_final_message()
        results = [{"type": "tool_result", "tool_use_id": message.content[1].id, "content": "sunny"}]
        messages = [
            *body["messages"],
            {"role": "assistant", "content": message.content},
            {"role": "user", "content": results},
        ]
        answer = client.messages.create(**body | {"messages": messages, "tools": []})
    text, use = message.content
    assert text.type == "text"
    assert text.text.startswith("tools: [")
    assert text.text.endswith("user: go ")
    assert use.type == "tool_use"
    assert (use.name, use.input) == ("weather", {"city": "Paris"})
    assert message.stop_reason == "tool_use"
    assert cached.model_dump() == message.model_dump()
    assert final.content[0].type == "text"
    assert final.content[0].text == text.text
    assert final.content[1].type == "tool_use"
    assert (final.content[1].name, final.content[1].input, final.stop_reason) == (use.name, use.input, "tool_use")
    assert answer.content[0].type == "text"
    assert answer.content[0].text.endswith("tool: sunny\n")


def test_errors_have_anthropics_form(stack: Stack) -> None:
    with client_of(stack) as client:
        with pytest.raises(anthropic.BadRequestError) as refused:
            client.messages.create(**asked("x"), **also(thinking={"type": "enabled"}))
        assert refused.value.body == {
            "type": "error",
            "error": {"type": "invalid_request_error", "message": "thinking is not supported."},
            "request_id": refused.value.request_id,
        }
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(**asked("x") | {"model": "none"})
        with pytest.raises(anthropic.APIStatusError) as away:
            client.messages.create(**asked("x") | {"model": "away"})
        assert away.value.status_code == 503
        with pytest.raises(anthropic.APIStatusError, match="error") as failed:
            with client.messages.stream(**asked("x"), **also(options={"fail": "error"})) as stream:
                stream.get_final_message()
        assert failed.value.body["error"]["type"] == "api_error"  # type: ignore[index]
        with pytest.raises(anthropic.BadRequestError, match="anthropic-version"):
            client.messages.create(**asked("x"), extra_headers={"anthropic-version": "latest"})
    with anthropic.Anthropic(base_url=stack.url, api_key="sk-sy-wrong") as stranger:
        with pytest.raises(anthropic.AuthenticationError):
            stranger.messages.create(**asked("x"))
    bare = httpx.post(f"{stack.url}/v1/messages", json=asked("x"), headers={"Authorization": f"Bearer {stack.secret}"})
    assert bare.json()["content"][0]["text"] == "user: x\n"


def test_a_message_can_be_a_job(stack: Stack) -> None:
    with stack.client() as client:
        path = client.post("/v1/jobs", json={"endpoint": "/v1/messages", "body": asked("later")}).headers["location"]
        assert client.get(path, params={"wait": 10}).json()["usage"]["completion_tokens"] == 12
        assert client.get(f"{path}/result").json()["type"] == "message"
        frames = client.get(f"{path}/stream").text
    assert json.loads(frames.splitlines()[1].removeprefix("data: "))["type"] == "message_start"
