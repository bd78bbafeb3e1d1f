"""The Responses API through OpenAI's own client, over real processes."""

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.stack import Stack

pytestmark = pytest.mark.e2e


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with connected(stack) as made:
        yield made


@contextlib.contextmanager
def connected(stack: Stack, secret: str | None = None, url: str | None = None) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url or stack.url}/v1", api_key=secret or stack.secret, max_retries=0) as made:
        yield made


def slowly(token_ms: float) -> dict[str, Any]:
    return {"options": {"token_ms": token_ms}}


def wait_for(client: openai.OpenAI, response_id: str, status: str, within_s: float = 30) -> Any:
    deadline = time.monotonic() + within_s
    while (found := client.responses.retrieve(response_id)).status != status:
        assert time.monotonic() < deadline, found.status
        time.sleep(0.05)
    return found


def numbers(events: list[Any]) -> list[int]:
    return [event.sequence_number for event in events]


def test_a_response_is_made_stored_and_goes_on(client: openai.OpenAI, stack: Stack) -> None:
    first = client.responses.create(model="echo", input="hello", instructions="be brief", metadata={"k": "v"})
    assert (first.status, first.output_text) == ("completed", "system: be brief\nuser: hello\n")
    assert (first.instructions, first.metadata, first.background) == ("be brief", {"k": "v"}, False)
    assert first.usage is not None
    assert first.usage.total_tokens == first.usage.input_tokens + first.usage.output_tokens > 0
    assert first.completed_at is not None
    assert client.responses.retrieve(first.id) == first
    second = client.responses.create(
        model="echo",
        previous_response_id=first.id,
        input=[
            {
                "role": "user",
                "content": [{"type": "input_text", "text": "and "}, {"type": "input_text", "text": "then"}],
            }
        ],
    )
    # Instructions are not carried over; the turns are.
    assert second.output_text == f"user: hello\nassistant: {first.output_text}\nuser: and then\n"
    items: list[Any] = client.responses.input_items.list(second.id, order="asc").data
    assert [(item.role, item.content[0].text) for item in items] == [
        ("user", "hello"), ("assistant", first.output_text), ("user", "and then")
    ]  # fmt: skip
    paged = list(client.responses.input_items.list(second.id, limit=1))
    assert [item.id for item in paged] == [item.id for item in reversed(items)]
    # An answer's items can be sent back as they are.
    third = client.responses.create(model="echo", input=[*second.output, {"role": "user", "content": "x"}])  # type: ignore[list-item]
    assert third.output_text == f"assistant: {second.output_text}\nuser: x\n"
    with stack.client() as raw:
        assert raw.get(f"/v1/jobs/{first.id.removeprefix('resp_')}/result").json() == json.loads(
            first.to_json(exclude_unset=True)
        )


def test_text_is_kept_of_stored_responses_only(client: openai.OpenAI, stack: Stack) -> None:
    made = client.responses.create(model="echo", input="unforgettable", instructions="vanishing", store=False)
    assert made.output_text == "system: vanishing\nuser: unforgettable\n"
    payload = bytes(stack.query("SELECT payload FROM jobs WHERE id = %s", made.id.removeprefix("resp_"))[0][0])
    assert b"unforgettable" not in payload
    assert b"vanishing" not in payload
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="echo", input="x", previous_response_id=made.id)
    assert caught.value.code == "previous_response_not_found"


def test_one_that_is_not_stored_may_come_from_the_cache_under_its_own_id(client: openai.OpenAI) -> None:
    def ask(**fields: Any) -> Any:
        return client.responses.with_raw_response.create(model="echo", input="same", temperature=0, **fields)

    first, second = ask(store=False), ask(store=False)
    assert [one.headers["x-cache"].split(";")[0] for one in (first, second)] == ["MISS", "HIT"]
    assert first.parse().output == [
        item.model_copy(update={"id": first.parse().output[0].id}) for item in second.parse().output
    ]
    assert first.parse().id != second.parse().id
    assert ask().headers["x-cache"].startswith("BYPASS")
    with client.responses.create(model="echo", input="same", temperature=0, store=False, stream=True) as stream:
        events = list(stream)
    assert events[-1].type == "response.completed"
    assert numbers(events) == list(range(len(events)))


def test_a_response_in_the_background(client: openai.OpenAI) -> None:
    made = client.responses.create(model="echo", input="a while", background=True, extra_body=slowly(20))
    assert (made.status, made.background, made.output) == ("queued", True, [])
    wait_for(client, made.id, "in_progress")
    done = wait_for(client, made.id, "completed")
    assert done.output_text == "user: a while\n"
    cancelled = client.responses.cancel(made.id)
    assert cancelled == done


def test_cancelling_is_for_background_responses_and_may_be_repeated(client: openai.OpenAI) -> None:
    made = client.responses.create(model="echo", input="long " * 200, background=True, extra_body=slowly(50))
    for _ in range(2):
        assert client.responses.cancel(made.id).status == "cancelled"
    assert client.responses.retrieve(made.id).status == "cancelled"
    front = client.responses.create(model="echo", input="x")
    with pytest.raises(openai.ConflictError):
        client.responses.cancel(front.id)


def test_a_token_limit_makes_a_response_incomplete_and_a_failure_failed(client: openai.OpenAI) -> None:
    short = client.responses.create(model="echo", input="far too long", max_output_tokens=4)
    assert (short.status, short.output_text) == ("incomplete", "user")
    assert short.incomplete_details is not None
    assert short.incomplete_details.reason == "max_output_tokens"
    with client.responses.create(model="echo", input="far too long", max_output_tokens=4, stream=True) as stream:
        assert [event.type for event in stream][-1] == "response.incomplete"
    failing = {"options": {"fail": "invalid"}}
    made = client.responses.create(model="echo", input="x", background=True, extra_body=failing)
    failed = wait_for(client, made.id, "failed")
    assert failed.error is not None
    assert failed.error.code == "invalid_prompt"
    with client.responses.create(model="echo", input="x", stream=True, extra_body=failing) as stream:
        assert [event.type for event in stream][-1] == "response.failed"
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model="echo", input="x", extra_body=failing)


def test_a_stream_has_openais_events_and_can_be_read_again(client: openai.OpenAI) -> None:
    with client.responses.create(
        model="echo", input="grüße", background=True, stream=True, extra_body=slowly(5)
    ) as stream:
        events: list[Any] = list(stream)
    assert numbers(events) == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:5] == [
        "response.created", "response.queued", "response.in_progress", "response.output_item.added",
        "response.content_part.added",
    ]  # fmt: skip
    assert set(kinds[5:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed"
    ]  # fmt: skip
    assert "".join(event.delta for event in events[5:-4]) == "user: grüße\n" == events[-4].text
    final = events[-1].response
    assert final == client.responses.retrieve(final.id)
    for after in range(-1, len(events)):
        with client.responses.retrieve(
            final.id, stream=True, starting_after=after if after >= 0 else openai.omit
        ) as again:
            assert list(again) == events[after + 1 :], after


FUNCTION: Any = {
    "type": "function", "name": "weather", "description": "Weather.", "strict": None,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}  # fmt: skip
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
"""Echo repeats the call that it is shown, behind the definitions."""


def test_functions_are_called_and_answer(client: openai.OpenAI) -> None:
    asked: Any = {"model": "echo", "input": f"go {CALL}", "tools": [FUNCTION], "max_output_tokens": 900}
    first = client.responses.create(**asked)
    message, call = first.output
    assert first.status == "completed"
    assert first.output_text.startswith("tools: [")
    assert first.output_text.endswith("go ")
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", {"city": "Paris"})
    assert [tool.name for tool in first.tools if tool.type == "function"] == ["weather"]
    assert client.responses.retrieve(first.id) == first
    outcome: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    on = client.responses.create(model="echo", previous_response_id=first.id, input=[outcome], max_output_tokens=900)
    assert on.output_text.endswith('go {"name": "weather", "arguments": {"city": "Paris"}}\ntool: sunny\n')
    items: list[Any] = client.responses.input_items.list(on.id, order="asc").data
    assert [item.type for item in items] == ["message", "message", "function_call", "function_call_output"]
    assert items[2].call_id == items[3].call_id == call.call_id
    # The same without a stored response: a client's own history.
    history: Any = [{"role": "user", "content": asked["input"]}, message, call, outcome]
    alone = client.responses.create(model="echo", input=history, store=False, max_output_tokens=900)
    assert alone.output_text == on.output_text


def test_a_stream_tells_calls_and_can_be_read_again(client: openai.OpenAI) -> None:
    asked: Any = {"model": "echo", "input": f"go {CALL} {CALL}", "tools": [FUNCTION], "max_output_tokens": 900}
    with client.responses.create(**asked, background=True, stream=True, extra_body=slowly(1)) as stream:
        events: list[Any] = list(stream)
    assert numbers(events) == list(range(len(events)))
    final = events[-1].response
    assert [item.type for item in final.output] == ["message", "function_call", "function_call"]
    assert final == client.responses.retrieve(final.id)
    for after in (0, 3, len(events) // 2, len(events) - 5, len(events) - 1):
        with client.responses.retrieve(final.id, stream=True, starting_after=after) as again:
            assert list(again) == events[after + 1 :], after
    one = client.responses.create(**asked, parallel_tool_calls=False)
    assert [item.type for item in one.output] == ["message", "function_call"]
    with client.responses.stream(**asked) as accumulated:
        whole = accumulated.get_final_response()
    calls: list[Any] = [item for item in whole.output if item.type == "function_call"]
    assert [json.loads(call.arguments) for call in calls] == [{"city": "Paris"}] * 2
    assert whole.output_text == final.output_text


def test_the_clients_own_accumulation_agrees(client: openai.OpenAI) -> None:
    with client.responses.stream(model="echo", input="collected", extra_body=slowly(2)) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text == "user: collected\n"


def test_a_deleted_response_is_gone_and_a_strangers_looks_the_same(client: openai.OpenAI, stack: Stack) -> None:
    done = client.responses.create(model="echo", input="x")
    running_one = client.responses.create(model="echo", input="y " * 500, background=True, extra_body=slowly(50))
    with connected(stack, stack.create_key("stranger")) as stranger:
        for act in (stranger.responses.retrieve, stranger.responses.cancel, stranger.responses.delete,
                    stranger.responses.input_items.list):  # fmt: skip
            messages = set()
            for response_id in (done.id, "resp_" + "0" * 32, "resp_x", "nonsense"):
                with pytest.raises(openai.NotFoundError) as caught:
                    act(response_id)
                messages.add(json.dumps(caught.value.body))
            assert len(messages) == 1
    for response_id in (done.id, running_one.id):
        client.responses.delete(response_id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response_id)
        job_id = response_id.removeprefix("resp_")
        assert stack.query("SELECT FROM jobs WHERE id = %s", job_id) == []
        assert stack.query("SELECT FROM job_results WHERE job_id = %s", job_id) == []


def test_an_idempotency_key_leads_to_the_same_response(client: openai.OpenAI) -> None:
    header = {"Idempotency-Key": "k1"}
    first = client.responses.create(model="echo", input="once", background=True, extra_headers=header)
    wait_for(client, first.id, "completed")
    again = client.responses.create(model="echo", input="once", background=True, extra_headers=header)
    assert (again.id, again.status) == (first.id, "completed")


def test_a_background_response_waits_for_a_worker_that_is_away(client: openai.OpenAI) -> None:
    made = client.responses.create(model="away", input="x", background=True)
    assert client.responses.retrieve(made.id).status == "queued"
    assert client.responses.cancel(made.id).status == "cancelled"
