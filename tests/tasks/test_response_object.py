"""Events of a response: numbered without a gap, the same live and replayed, from every number on."""

import uuid
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response
from pydantic import TypeAdapter

from api.schemas.responses import ResponseRequest
from backends.base import Chunk, FinishReason
from tasks import replay, response_object, responses, stream
from tasks.call import Call
from tasks.identity import RESPONSES, Identity, usage_of
from tasks.output import Output
from tasks.response_object import Origin, ResponseFrames


class Outbox:
    """Takes nothing anywhere."""

    def add_source(self, drain: object) -> None: ...

    def wake(self) -> None: ...


def origin(**fields: Any) -> Origin:
    call: Call = ResponseRequest.model_validate({"model": "m", "input": "x"} | fields).to_call()
    return Origin(Identity(RESPONSES, uuid.uuid4(), "m", 7), call, {"k": "v"})


def generated(of: Origin, pieces: list[str], reason: FinishReason, run: int = 0) -> tuple[stream.Writer, Output]:
    """What a worker made of the pieces that a backend gave it."""
    writer = stream.Writer(of.identity.job_id, stream.Broadcaster(Outbox()), run=run)  # type: ignore[arg-type]
    output = Output([], [])
    for step, piece in enumerate(pieces):
        writer.write(0, output.push(Chunk((step,), piece, reason if step == len(pieces) - 1 else None)))
    return writer, output


def made(frames: ResponseFrames, events: Any, usage: dict[str, int]) -> list[bytes]:
    joined = frames.begin() + b"".join(map(frames.event, events)) + frames.end(usage, 9)
    return [part + b"\n\n" for part in joined.split(b"\n\n")[:-1]]


def numbers(frames: list[bytes]) -> list[int]:
    return [orjson.loads(one.split(b"data: ")[1])["sequence_number"] for one in frames]


@given(
    pieces=st.lists(st.text(alphabet="ab é😀", max_size=4), min_size=1, max_size=10),
    reason=st.sampled_from(["stop", "length"]),
    is_background=st.booleans(),
    run=st.sampled_from([0, 2]),
)
def test_replayed_events_are_the_live_ones(
    pieces: list[str], reason: FinishReason, is_background: bool, run: int
) -> None:
    of = origin(background=is_background)
    writer, output = generated(of, pieces, reason, run)
    usage = usage_of(of.call, [output])
    live = made(ResponseFrames(of), writer.pending, usage)
    body = responses.generated(of.identity, of.call, [output])
    stored = replay.encode(writer.first, writer.marks)
    assert made(ResponseFrames(of), replay.events(of.call, body, stored), usage) == live
    if run == 0:
        assert numbers(live) == list(range(len(live)))
    final = orjson.loads(live[-1].split(b"data: ")[1])
    assert final["response"] == response_object.answered(of, body, 9)
    assert final["type"] == ("response.completed" if reason == "stop" else "response.incomplete")


TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}}


@pytest.mark.parametrize("reason", ["stop", "length"])
@pytest.mark.parametrize("is_background", [True, False])
@pytest.mark.parametrize(
    "pieces",
    [
        ["So: ", "<tool", '_call>{"name": "f", ', '"arguments": {"a": 1}}', "</tool_call>"],
        [
            '<tool_call>{"name": "f", "arguments": {}}</tool_call>',
            '<tool_call>{"name": "g", "arguments": {}}</tool_call>',
        ],
        ["never ", "<tool_call>", "read"],
        ["<tool_cal", "l"],
    ],
)
def test_calls_are_items_behind_the_message(pieces: list[str], reason: FinishReason, is_background: bool) -> None:
    of = origin(tools=[TOOL], background=is_background)
    writer, output = generated(of, pieces, reason)
    usage = usage_of(of.call, [output])
    live = made(ResponseFrames(of), writer.pending, usage)
    body = responses.generated(of.identity, of.call, [output])
    again = made(ResponseFrames(of), replay.events(of.call, body, replay.encode(writer.first, writer.marks)), usage)
    assert again == live
    assert numbers(live) == list(range(len(live)))
    events = [orjson.loads(frame.split(b"data: ")[1]) for frame in live]
    whole = response_object.answered(of, body, 9)
    assert events[-1]["response"] == whole
    assert [event["item"] for event in events if event["type"] == "response.output_item.done"] == whole["output"]
    message, *calls = whole["output"]
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == message["content"][0]["text"]
    text = "".join(pieces)
    assert message["content"][0]["text"] == (text.partition("<tool_call>")[0] if calls else text)
    assert len(calls) == text.count("</tool_call>")
    assert whole["status"] == ("incomplete" if reason == "length" and not calls else "completed")
    parsed = TypeAdapter(Response).validate_python(whole, strict=False)
    assert [item.type for item in parsed.output] == ["message", *["function_call"] * len(calls)]


def test_a_turn_with_calls_goes_through_items_and_back() -> None:
    items = [
        {"type": "message", "role": "assistant", "content": "So:"},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a":1}'},
        {"type": "function_call", "call_id": "c2", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        {"type": "function_call", "call_id": "c3", "name": "f", "arguments": "{}"},
    ]
    shown = response_object.input_items(origin(input=items))
    kept = [{name: item[name] for name in given} for item, given in zip(shown, items, strict=True)]
    assert kept[1:] == items[1:]
    assert kept[0]["content"][0]["text"] == "So:"
    assert len({item["id"] for item in shown}) == len(shown)
    again = [{"type": "message", "role": "user", "content": "hi"}, *shown]
    asked = origin(input=again).asked["input"]
    assert asked == [{"role": "user", "content": "hi"}, *origin(input=items).asked["input"]]
    answer = asked[1]
    assert [call["id"] for call in answer["tool_calls"]] == ["c1", "c2"]
    assert response_object.turn_of(shown[:3]) == answer


def test_a_reader_gets_what_it_does_not_have_yet() -> None:
    of = origin()
    output = Output([], [])
    output.push(Chunk((1,), "text", "stop"))
    body, usage = responses.generated(of.identity, of.call, [output]), usage_of(of.call, [output])
    whole = made(ResponseFrames(of), replay.events(of.call, body, None), usage)
    for seen in (-1, 0, 1, 2, 3):
        assert (
            made(ResponseFrames(of, seen), replay.events(of.call, body, None), usage)[: len(whole) - seen - 1]
            == whole[seen + 1 :]
        )


@pytest.mark.parametrize("status", ["queued", "running", "cancelled"])
def test_every_state_has_openais_form(status: str) -> None:
    for shown in (
        response_object.pending(origin(), status),
        response_object.failed(origin(), {"code": "x", "message": "m"}),
    ):
        parsed = TypeAdapter(Response).validate_python(shown, strict=False)
        assert parsed.metadata == {"k": "v"}


def test_what_fails_before_any_event_is_told_as_the_next_one() -> None:
    frames = ResponseFrames(origin(background=True), seen=1)
    assert frames.begin() == b""
    told = orjson.loads(frames.failed({"code": "c", "message": "m", "param": None}, "failed").split(b"data: ")[1])
    assert (told["sequence_number"], told["type"], told["response"]["error"]["code"]) == (
        2,
        "response.failed",
        "server_error",
    )
    lost = orjson.loads(frames.failed({"code": "c", "message": "m", "param": None}).split(b"data: ")[1])
    assert (lost["type"], lost["code"]) == ("error", "c")
