"""Events on their way: what a writer says is what a reader understands, and what a browser would."""

import json
from contextlib import suppress
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tasks import stream
from tasks.identity import frame
from tasks.output import Piece
from tasks.stream import Batch, Event
from tests.properties import examples

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    ["\n\ndata: [DONE]\n\n", "\r\n\r\n", "\r", "id: 7\n", "event: error", "\u2028\u2029\x85\x00", ": keep-alive"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
)


def parsed(text: str) -> list[dict[str, str]]:
    """As the HTML standard's event stream interpretation reads it."""
    events: list[dict[str, str]] = []
    fields: dict[str, str] = {}
    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        if not line:
            if "data" in fields:
                events.append(fields)
            fields = {}
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        fields[name] = f"{fields['data']}\n{value}" if name == "data" and "data" in fields else value
    return events


@examples(100)
@given(
    st.lists(
        st.tuples(
            st.dictionaries(texts, values, max_size=3),
            st.none() | st.integers(1, 2**40),
            st.sampled_from([None, "error"]),
        ),
        max_size=4,
    )
)
def test_a_browser_reads_the_frames_that_were_written(
    frames: list[tuple[dict[str, Any], int | None, str | None]],
) -> None:
    wire = b"".join(frame(body, seq, name) for body, seq, name in frames).decode()
    read = [(json.loads(event["data"]), event.get("id"), event.get("event")) for event in parsed(wire)]
    assert read == [(body, None if seq is None else str(seq), name) for body, seq, name in frames]


pieces = st.builds(
    Piece,
    text=texts,
    token_ids=st.lists(st.integers(0, 2**31), max_size=3).map(tuple),
    logprobs=st.lists(st.dictionaries(texts, values, max_size=2), max_size=2),
    finish_reason=st.none() | st.sampled_from(["stop", "length"]),
    held=texts,
)
events = st.builds(
    Event,
    seq=st.integers(1, 2**40),
    choice=st.integers(0, 99),
    piece=st.none() | pieces,
    status=st.none() | st.sampled_from(["succeeded", "failed"]),
)


@examples(100)
@given(st.builds(Batch, token=st.integers(0, 2**45), events=st.lists(events, max_size=3)))
def test_a_batch_comes_back_as_it_was(batch: Batch) -> None:
    assert stream.decode(stream.encode(batch)) == batch


@examples(100)
@given(st.binary(max_size=60) | values.map(lambda value: json.dumps(value).encode()))
def test_what_is_no_batch_is_refused_as_readers_expect(data: bytes) -> None:
    with suppress(ValueError, TypeError, KeyError, AttributeError):
        assert all(type(event.seq) is int for event in stream.decode(data).events)
