"""Frames made from the stored answer equal those made from the live events."""

import itertools
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.base import Chunk, FinishReason, TokenLogprob
from tasks import replay, responses, stream
from tasks.call import Call
from tasks.identity import CHAT, COMPLETIONS, MESSAGES, Identity
from tasks.output import Output, Piece
from tasks.stream import Event, Interrupted


class Tokenizer:
    """Names tokens by their numbers."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f"<{one}>" for one in ids)


class Outbox:
    """Takes nothing anywhere."""

    def add_source(self, drain: object) -> None: ...

    def wake(self) -> None: ...


_CALL = '<tool_call>{"name": "f", "arguments": {"a": "é"}}</tool_call>'
texts = st.lists(
    st.text(alphabet="ab é😀STOP", max_size=5) | st.sampled_from([_CALL, _CALL[:20], _CALL[20:], "<tool"]),
    min_size=1,
    max_size=12,
)


@given(
    choices=st.lists(texts, min_size=1, max_size=3),
    endpoint=st.sampled_from([CHAT, COMPLETIONS, MESSAGES]),
    has_tools=st.booleans(),
    wants_logprobs=st.booleans(),
    echoes=st.booleans(),
    run=st.sampled_from([0, 2]),
)
def test_a_replayed_stream_has_the_live_frames(
    choices: list[list[str]], endpoint: str, has_tools: bool, wants_logprobs: bool, echoes: bool, run: int
) -> None:
    if endpoint == MESSAGES:
        choices, wants_logprobs = choices[:1], False
    shape = {"echo": True} if echoes and endpoint == COMPLETIONS else {}
    if has_tools and endpoint != COMPLETIONS:
        shape = {"tools": True}
    call = Call(
        endpoint=endpoint, task="generate", model="m", inputs=["the prompt "], n=len(choices), stop=["STOP"],
        params={"logprobs": 1} if wants_logprobs else {}, token_ids=[[1, 2]],
        format=shape,
    )  # fmt: skip
    identity = Identity(endpoint, uuid.uuid4(), "m", 1)
    writer = stream.Writer(identity.job_id, stream.Broadcaster(Outbox()), run=run)  # type: ignore[arg-type]
    outputs = [Output(call.stop, ["ba"], Tokenizer()) for _ in choices]  # type: ignore[arg-type]
    for step in itertools.count():
        for index, pieces in enumerate(choices):
            if step < len(pieces) and outputs[index].finish_reason is None:
                logprobs = (TokenLogprob(step, -1.0, ((step, -1.0), (9, -2.0))),) if wants_logprobs else ()
                reason: FinishReason | None = "length" if step == len(pieces) - 1 else None
                writer.write(index, outputs[index].push(Chunk((step,), pieces[step], reason, logprobs)))
        if all(output.finish_reason for output in outputs):
            break
    live = responses.frames(identity, call)
    expected = [live.event(event) for event in writer.pending]
    body = responses.generated(identity, call, outputs)
    again = responses.frames(identity, call)
    stored = replay.encode(writer.first, writer.marks)
    assert [again.event(event) for event in replay.events(call, body, stored)] == expected


def test_an_answer_that_was_not_streamed_is_one_event_a_choice() -> None:
    call = Call(endpoint=CHAT, task="generate", model="m", n=2, token_ids=[[1]])
    identity = Identity(CHAT, uuid.uuid4(), "m", 1)
    outputs = [Output([], []) for _ in range(2)]
    for output, text in zip(outputs, ("one", "two"), strict=True):
        output.push(Chunk((1,), text, "stop"))
    events = list(replay.events(call, responses.generated(identity, call, outputs), None))
    assert [(event.seq, event.choice, event.piece.text) for event in events if event.piece] == [
        (1, 0, "one"), (2, 1, "two")
    ]  # fmt: skip


def test_events_of_another_run_are_not_taken_for_a_continuation() -> None:
    first, later = Event(1, 0, Piece("a", (), [])), Event(2 * stream.RUN_STEP + 1, 0, Piece("a", (), []))
    assert first.is_new_to(0)
    assert not first.is_new_to(5)
    assert later.is_new_to(0)
    with pytest.raises(Interrupted):
        later.is_new_to(5)


def test_a_history_with_a_hole_is_no_history() -> None:
    def history(*numbers: int) -> list[Event]:
        return [Event(number, 0, Piece("a", (), [])) for number in numbers]

    step = stream.RUN_STEP
    assert [event.seq for event in stream.latest_run(history(1, 2, 3))] == [1, 2, 3]
    assert stream.latest_run(history(1, 3)) == []
    assert stream.latest_run(history(2, 3)) == []
    assert stream.latest_run([]) == []
    assert [event.seq for event in stream.latest_run(history(4, 5, step + 1, step + 2))] == [step + 1, step + 2]


def test_what_a_fenced_attempt_still_writes_is_passed_over() -> None:
    def entry(token: int, *numbers: int, text: str) -> tuple[bytes, dict[bytes, bytes]]:
        events = [Event(number, 0, Piece(text, (), [])) for number in numbers]
        return b"0-0", {b"events": stream.encode(stream.Batch(token, events))}

    known = stream._in_order([
        entry(0, 1, 2, text="old"), entry(7, text=""), entry(0, 3, 4, text="zombie"), entry(7, 3, text="new"),
        entry(0, 5, text="zombie"),
    ])  # fmt: skip
    assert known.token == 7
    assert [(one.seq, one.piece.text) for one in known.events if one.piece] == [(1, "old"), (2, "old"), (3, "new")]
