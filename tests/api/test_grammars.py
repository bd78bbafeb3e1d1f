"""What a text may be asked to look like, and what it costs a gateway to find out."""

import asyncio
import json
import resource
import time
from collections.abc import AsyncIterator
from typing import Any

import llguidance
import psutil
import pytest
import pytest_asyncio

from api import errors, grammar_checks, grammars, schemas
from api.grammar_checks import GrammarChecks
from api.schemas.responses import ResponseRequest
from tasks.call import Call

CHAT = "/v1/chat/completions"


@pytest_asyncio.fixture
async def checks() -> AsyncIterator[GrammarChecks]:
    made = GrammarChecks()
    yield made
    await made.close()


def call(grammar: str | None) -> Call:
    params = {} if grammar is None else {"grammar": grammar}
    return Call(
        endpoint=CHAT, task="generate", model="m", params=params, format={"constrained_by": "structured_outputs"}
    )


def asked(**fields: Any) -> Call:
    return schemas.parse(CHAT, {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields})


def schema_format(schema: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **fields}}


def follows(grammar: str, text: str) -> bool:
    """Whether the whole text is one that the grammar describes."""
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, llguidance.grammar_from("grammar", grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


PERSON = {
    "$defs": {"Name": {"type": "string"}},
    "type": "object",
    "properties": {"name": {"$ref": "#/$defs/Name"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_a_schema() -> None:
    grammar = asked(response_format=schema_format(PERSON, strict=True)).params["grammar"]
    assert follows(grammar, '{"name": "Ada", "age": 36}')
    assert follows(grammar, '{"name":"Ada","age":36}')
    assert not follows(grammar, '{"name": "Ada"}')
    assert not follows(grammar, '{"name": "Ada", "age": 36, "more": 1}')
    assert not follows(grammar, '{"name": "Ada",      "age": 36}'), "white space without an end"


OPEN = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("schema", "text", "is_open"),
    [
        (OPEN, '{"a": 1, "more": 2}', False),
        ({"type": "array", "items": OPEN}, '[{"a": 1, "more": 2}]', False),
        ({"$defs": {"o": OPEN}, "anyOf": [{"$ref": "#/$defs/o"}, {"type": "null"}]}, '{"a": 1, "more": 2}', False),
        ({"type": "object", "properties": {"properties": OPEN}}, '{"properties": {"a": 1, "more": 2}}', False),
        (OPEN | {"additionalProperties": True}, '{"a": 1, "more": 2}', True),
        (OPEN | {"additionalProperties": {"type": "integer"}}, '{"a": 1, "more": 2}', True),
        ({"allOf": [OPEN, {"type": "object", "properties": {"more": {}}, "required": ["more"]}]},
         '{"a": 1, "more": 2}', True),
        ({"type": "object"}, '{"more": 2}', True),
    ],
)  # fmt: skip
def test_objects_are_closed_unless_something_else_is_said(schema: dict[str, Any], text: str, is_open: bool) -> None:
    grammar = asked(response_format=schema_format(schema)).params["grammar"]
    assert follows(grammar, text) is is_open
    if not is_open:
        assert follows(grammar, text.replace(', "more": 2', ""))


def test_any_object() -> None:
    grammar = asked(response_format={"type": "json_object"}).params["grammar"]
    assert follows(grammar, '{"a": [1, {"b": null}]}')
    assert not follows(grammar, "[1]")
    assert asked(structured_outputs={"json_object": True}).params["grammar"] == grammar
    assert asked(response_format=schema_format({"type": "object"})).params["grammar"] == grammar
    assert asked(structured_outputs={"json": '{"type": "object"}'}).params["grammar"] == grammar


@pytest.mark.parametrize("text", ['he said "x"\\n', "a/b", "é☃\n\ttab", "100%", "", "start: /x/"])
def test_choices_are_taken_literally(text: str) -> None:
    grammar = asked(structured_outputs={"choice": [text, "other"]}).params["grammar"]
    assert follows(grammar, text)
    assert follows(grammar, "other")
    assert not follows(grammar, text + "x")


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        ("[0-9]{4}/[0-9]{2}", "2024/05", "2024-05"),
        (r"[0-9]{4}\/[0-9]{2}", "2024/05", "2024"),
        (r"\\/x", "\\/x", "/x"),
        ("a|b", "b", "ab"),
        ("line\nbreak", "line\nbreak", "line break"),
    ],
)
def test_a_regular_expression_matches_as_a_whole(pattern: str, good: str, bad: str) -> None:
    grammar = asked(structured_outputs={"regex": pattern}).params["grammar"]
    assert follows(grammar, good)
    assert not follows(grammar, bad)
    assert not follows(grammar, f"{good}.")


WEATHER = {"name": "weather", "parameters": {k: v for k, v in PERSON.items() if k != "type"}, "strict": True}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": {"name": "now"}}]


def test_calls_of_tools() -> None:
    weather = '<tool_call>{"name": "weather", "arguments": {"name": "x", "age": 1}}</tool_call>'
    now = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    several = asked(tools=TOOLS, tool_choice="required").params["grammar"]
    assert all(follows(several, text) for text in (weather, now, f"{weather}\n{now}"))
    assert not any(follows(several, text) for text in ("", "text", f"text {now}", now.replace("now", "then")))
    single = asked(tools=TOOLS, tool_choice="required", parallel_tool_calls=False).params["grammar"]
    assert follows(single, now)
    assert not follows(single, f"{weather}\n{now}")
    named = asked(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "weather"}})
    assert named.constrained_by == "tool_choice"
    assert follows(named.params["grammar"], weather)
    assert not follows(named.params["grammar"], now)
    assert "grammar" not in asked(tools=TOOLS[1:], tool_choice="auto").params


@pytest.mark.parametrize("choice", [{}, {"tool_choice": "auto"}])
def test_a_strict_function_is_called_validly_where_it_is_called(choice: dict[str, Any]) -> None:
    weather = '<tool_call>{"name": "weather", "arguments": {"name": "x", "age": 1}}</tool_call>'
    loose = '<tool_call>{"name": "now", "arguments": {"any": [1]}}</tool_call>'
    call = asked(tools=TOOLS, **choice)
    grammar = call.params["grammar"]
    assert call.constrained_by == "tools"
    said = ("", "Well.\n<b>", "a <tool_cal", weather, f"So: {weather}", f"\n{loose}\n{weather}")
    assert all(follows(grammar, text) for text in said)
    wrong = (
        "<tool_call>",
        "a <tool_call>b",
        weather.replace("1", '"1"'),
        weather.replace("weather", "then"),
        f"{weather} b",
    )
    assert not any(follows(grammar, text) for text in wrong)
    single = asked(tools=TOOLS, parallel_tool_calls=False, **choice).params["grammar"]
    assert follows(single, f"x {weather}")
    assert not follows(single, f"{weather}\n{weather}")
    assert "grammar" not in asked(tools=TOOLS, tool_choice="none").params


def test_forms_of_responses_are_the_same() -> None:
    def response(**fields: Any) -> Call:
        return schemas.read(ResponseRequest, {"model": "m", "input": "x", **fields}).to_call()

    tools = [{**function, "type": "function"} for function in (WEATHER, {"name": "now"})]
    for choice in ("auto", "required"):
        made = response(tools=tools, tool_choice=choice)
        same = asked(tools=TOOLS, tool_choice=choice)
        assert (made.params["grammar"], made.constrained_by) == (same.params["grammar"], same.constrained_by)
        assert made.format["tools"] == same.format["tools"]
    made = response(tools=tools, tool_choice={"type": "function", "name": "now"})
    chosen = {"type": "function", "function": {"name": "now"}}
    assert made.params["grammar"] == asked(tools=TOOLS, tool_choice=chosen).params["grammar"]


def test_anthropics_forms_are_the_same() -> None:
    tools: list[dict[str, Any]] = [
        {"name": "weather", "input_schema": WEATHER["parameters"]}, {"name": "now", "input_schema": {}}
    ]  # fmt: skip
    body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}], "tools": tools}
    any_ = schemas.parse("/v1/messages", body | {"tool_choice": {"type": "any"}})
    assert any_.params["grammar"] == asked(tools=TOOLS, tool_choice="required").params["grammar"]
    one = schemas.parse("/v1/messages", body | {"tool_choice": {"type": "tool", "name": "now"}})
    named = {"type": "function", "function": {"name": "now"}}
    assert one.params["grammar"] == asked(tools=TOOLS, tool_choice=named).params["grammar"]
    assert one.constrained_by == "tool_choice"
    strict = schemas.parse("/v1/messages", {**body, "tools": [{**tools[0], "strict": True}, tools[1]]})
    assert strict.params["grammar"] == asked(tools=TOOLS).params["grammar"]
    form = {"output_config": {"format": {"type": "json_schema", "schema": PERSON}}}
    answer = schemas.parse("/v1/messages", {name: value for name, value in body.items() if name != "tools"} | form)
    assert answer.params["grammar"] == asked(response_format=schema_format(PERSON)).params["grammar"]
    assert answer.constrained_by == "output_config"


def test_what_is_asked_for_is_part_of_what_is_cached() -> None:
    forms: list[dict[str, Any]] = [
        {},
        {"response_format": {"type": "json_object"}},
        {"response_format": schema_format(PERSON)},
        {"structured_outputs": {"choice": ["a", "b"]}},
        {"structured_outputs": {"choice": ["b", "c"]}},
        {"structured_outputs": {"regex": "a|b"}},
    ]
    assert len({json.dumps(asked(**form).canonical()) for form in forms}) == len(forms)
    assert asked(response_format={"type": "text"}).canonical() == asked().canonical()
    assert asked(response_format=None, structured_outputs=None).canonical() == asked().canonical()


async def test_what_can_be_kept_passes(checks: GrammarChecks) -> None:
    await checks.check(call(None))
    for grammar in (
        grammars.of_schema(PERSON),
        grammars.of_regex(r"\w+@\w+\.com"),
        grammars.of_choice(["a"]),
        'root ::= "yes" | "no"',
        "start: WORD\n%import common.WORD",
    ):
        await checks.check(call(grammar))


DOUBLING = {"type": "object", "additionalProperties": False}
for _ in range(16):
    DOUBLING = {"type": "object", "properties": {"a": DOUBLING, "b": DOUBLING}, "additionalProperties": False}


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (grammars.of_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (grammars.of_schema({"not": {"const": "hunter2"}}), "not"),
        (grammars.of_schema({"type": "hunter2"}), "not a valid"),
        (grammars.of_schema({"$ref": "http://hunter2/x"}), "not a valid"),
        (grammars.of_schema({"oneOf": [{"type": "string"}, {"minLength": 7}]}), "oneOf"),
        (grammars.of_schema({"$ref": "#/$defs/hunter2"}), "not a valid"),
        (grammars.of_regex("(hunter2"), "not a valid"),
        (grammars.of_regex("(?=hunter2)x"), "not a valid"),
        (grammars.of_regex("x\\"), "not a valid"),
        ("hunter2", "not a valid"),
        ("start: hunter2", "not a valid"),
        ("root ::= " + "(" * 20_000, "not a valid"),
        ("start: <|im_start|>", "not a valid"),
        (f"start: %json {json.dumps(DOUBLING)}", "too costly"),
    ],
)
async def test_what_cannot_be_kept_is_refused_without_an_echo(checks: GrammarChecks, grammar: str, said: str) -> None:
    started = time.monotonic()
    with pytest.raises(errors.InvalidValue, match=r"^structured_outputs") as caught:
        await checks.check(call(grammar))
    assert time.monotonic() - started < 5
    assert caught.value.param == "structured_outputs"
    assert said in caught.value.message.replace("asks for a form that is ", "")
    assert "hunter2" not in caught.value.message
    await checks.check(call('start: "afterwards"'))


async def test_the_loop_goes_on_while_grammars_are_compiled(checks: GrammarChecks) -> None:
    costly = [f"start: %json {json.dumps(DOUBLING | {'title': str(number)})}" for number in range(4)]
    waiting = asyncio.gather(*[checks.check(call(grammar)) for grammar in costly], return_exceptions=True)
    longest = 0.0
    while not waiting.done():
        before = time.monotonic()
        await asyncio.sleep(0.005)
        longest = max(longest, time.monotonic() - before)
    assert all(isinstance(answer, errors.InvalidValue) for answer in await waiting)
    assert longest < 0.25
    assert len(checks._all) <= 2


async def test_an_answer_is_remembered(checks: GrammarChecks) -> None:
    good, bad = grammars.of_schema(PERSON), f"start: %json {json.dumps(DOUBLING)}"
    await checks.check(call(good))
    with pytest.raises(errors.InvalidValue):
        await checks.check(call(bad))
    await checks.close()
    assert not checks._all
    await checks.check(call(good))
    with pytest.raises(errors.InvalidValue):
        await checks.check(call(bad))
    assert not checks._all, "nothing was started to answer again"


async def test_a_process_that_dies_is_replaced(checks: GrammarChecks) -> None:
    await checks.check(call('start: "one"'))
    (process,) = checks._all
    process.kill()
    await process.wait()
    await checks.check(call('start: "two"'))
    assert process not in checks._all


async def test_a_process_ends_with_its_gateway(checks: GrammarChecks) -> None:
    await checks.check(call('start: "one"'))
    (process,) = checks._all
    assert process.stdin is not None
    process.stdin.close()  # as when the gateway is killed
    assert await asyncio.wait_for(process.wait(), 5) == 0


async def test_a_process_without_memory_says_too_costly(checks: GrammarChecks) -> None:
    """The limit is made small instead of the grammar large."""
    await checks.check(call('start: "one"'))
    (process,) = checks._all
    used = psutil.Process(process.pid).memory_info().vms
    resource.prlimit(process.pid, resource.RLIMIT_AS, (used + 2**20, used + 2**20))
    large = grammars.of_schema({"enum": [f"value number {number}" for number in range(3000)]})
    with pytest.raises(errors.InvalidValue, match="costly"):
        await checks.check(call(large))
    await checks.check(call('start: "two"'))


async def test_who_waits_too_long_is_asked_to_come_again(
    monkeypatch: pytest.MonkeyPatch, checks: GrammarChecks
) -> None:
    good = grammars.of_schema(PERSON)
    with monkeypatch.context() as patched:
        patched.setattr(grammar_checks, "_PATIENCE_S", 0.05)
        costly = [f"start: %json {json.dumps(DOUBLING | {'title': str(number)})}" for number in range(3)]
        waiting = [checks.check(call(grammar)) for grammar in (*costly, good)]
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(answer, errors.DependencyUnavailable) for answer in answers)
        assert all(answer.retry_after_s for answer in answers if isinstance(answer, errors.APIError))
    assert not checks._all, "whoever was busy is gone"
    await checks.check(call(good))
