"""Tool calls are found however the text is cut, and text that is none is shown whole."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import tool_calls
from tasks.call import Call
from tasks.tool_calls import ToolCall, Visible, join, split

CALL = Call(endpoint="/v1/chat/completions", task="generate", model="m", format={"tools": True})
ONE = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
WEATHER = ToolCall("weather", {"city": "Paris"})

calls = st.builds(
    ToolCall,
    st.text("abc_", min_size=1, max_size=4),
    st.dictionaries(st.text("ab<>", max_size=3), st.text("</t>", max_size=3), max_size=2),
)


@pytest.mark.parametrize(
    ("text", "content", "found"),
    [
        ("no call", "no call", []),
        (ONE, "", [WEATHER]),
        ("Let me see. " + ONE + "\n" + ONE, "Let me see. ", [WEATHER, WEATHER]),
        (ONE.removesuffix("</tool_call>"), "", [WEATHER]),
        ('<tool_call>{"name": "f"}</tool_call>', "", [ToolCall("f", {})]),
        ("<tool_call>not json</tool_call>", "<tool_call>not json</tool_call>", []),
        (ONE + "<tool_call>[1]</tool_call>", ONE + "<tool_call>[1]</tool_call>", []),
        (ONE[:30], ONE[:30], []),
        ('<tool_call>{"name": 7}</tool_call>', '<tool_call>{"name": 7}</tool_call>', []),
        ('<tool_call>{"name": "f", "arguments": "x"}', '<tool_call>{"name": "f", "arguments": "x"}', []),
    ],
)
def test_examples(text: str, content: str, found: list[ToolCall]) -> None:
    assert split(text) == (content, found)


@given(st.text("ab {", max_size=6), st.lists(calls, max_size=3))
def test_what_is_joined_is_split_into_the_same(content: str, made: list[ToolCall]) -> None:
    assert split(join(content, made)) == (content, made)


@given(st.text("ab<tool_c", max_size=8), st.lists(calls, max_size=2), st.text("<x", max_size=4), st.data())
def test_a_stream_shows_what_the_answer_says(
    content: str, made: list[ToolCall], tail: str, data: st.DataObject
) -> None:
    text = join(content, made) + tail
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    visible = Visible(CALL)
    shown = [visible.push(piece) for piece in pieces]
    rest, found = visible.finish()
    assert ("".join(shown) + rest, found) == split(text)
    if found:
        assert rest == "", "what stands before a call is shown before it"


def test_one_call_where_parallel_calls_are_not_wanted() -> None:
    one = Call(endpoint="", task="generate", model="m", format={"tools": True, "most_tool_calls": 1})
    assert tool_calls.of(one, ONE + ONE) == ("", [WEATHER])
    assert tool_calls.of(Call(endpoint="", task="generate", model="m"), ONE) == (ONE, [])
