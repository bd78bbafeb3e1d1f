"""Answers in a given form, from real models through the clients that people have.

SmolLM2 is too small to answer sensibly; that its answers have the form is the grammar's doing alone.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field, SecretStr

from tests.conftest import running
from tests.stack import ROOT, Stack

pytestmark = [pytest.mark.long, pytest.mark.e2e, pytest.mark.models, pytest.mark.vllm, pytest.mark.timeout(400)]

CONFIG = """
backends:
  echo: {{runtime: echo}}
  gpt: {{runtime: gpt, concurrency: 16, options: {{dtype: float32, max_batch_size: 16}}}}
  vllm: {{runtime: vllm, concurrency: 16, options: {{dtype: float32, max_num_seqs: 8, kv_cache_memory_gib: 0.25}}}}
models:
  echo: {{path: echo, backends: [echo]}}
  on-gpt: {{path: {model}, backends: [gpt], context_length: 1024}}
  on-vllm: {{path: {model}, backends: [vllm], context_length: 1024, auto: false}}
"""
TEMPLATE = """\
{% if tools %}<|im_start|>system\nYou may call these functions: {{ tools | tojson }}<|im_end|>\n{% endif %}\
{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"""
"""SmolLM2's own has no place for tools."""
MODELS = ["on-gpt", "on-vllm"]
NO_STORE = {"Cache-Control": "no-store"}


class Trade(BaseModel):
    """Anthropic's client takes bounds of numbers and lengths out of a schema, so this has none."""

    trade: Literal["baker", "smith", "miller"]
    is_open: bool


class Person(BaseModel):
    """A person and what they do."""

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)
    trade: Literal["baker", "smith", "miller"]


@pytest.fixture(scope="module")
def stack(server_urls: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    model = tmp_path_factory.mktemp("structured-model")
    for file in Path(ROOT / "models/smollm2-135m-instruct").iterdir():
        (model / file.name).symlink_to(file.resolve())
    (model / "chat_template.jinja").unlink(missing_ok=True)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    folder = tmp_path_factory.mktemp("structured")
    yield from running(server_urls, folder, CONFIG.format(model=model), ["echo", "gpt", "vllm"])


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.secret, max_retries=0, timeout=120) as made:
        yield made


def asked(model: str, text: str = "Tell me about a person.", **fields: Any) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 120,
        **fields,
    }


@pytest.mark.parametrize("model", MODELS)
def test_openais_parse(client: openai.OpenAI, model: str) -> None:
    choice = client.chat.completions.parse(**asked(model), response_format=Person).choices[0]
    assert choice.message.parsed is not None
    assert 0 <= choice.message.parsed.age <= 120
    assert choice.finish_reason == "stop"
    with client.chat.completions.stream(**asked(model), response_format=Person, extra_headers=NO_STORE) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.message.parsed == choice.message.parsed


@pytest.mark.parametrize("model", MODELS)
def test_vllms_structured_outputs(client: openai.OpenAI, model: str) -> None:
    def content(**form: Any) -> str:
        body = {"extra_body": {"structured_outputs": form}, "max_tokens": 40}
        return client.chat.completions.create(**asked(model) | body).choices[0].message.content or ""

    assert content(choice=["a baker", "a smith"]) in ("a baker", "a smith")
    assert re.fullmatch(r"[A-Z]{2}/[0-9]{3}", content(regex=r"[A-Z]{2}/[0-9]{3}"))
    assert json.loads(content(json={"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 3}))
    assert content(grammar='root ::= "left" | "right"') in ("left", "right")
    form = {"structured_outputs": {"choice": ["x", "yy"]}}
    completed = client.completions.create(model=model, prompt="One:", temperature=0, extra_body=form)
    assert completed.choices[0].text in ("x", "yy")
    several = client.chat.completions.create(**asked(model, n=3, temperature=1.5, seed=4), extra_body=form)
    assert {choice.message.content for choice in several.choices} <= {"x", "yy"}


@pytest.mark.parametrize("model", MODELS)
def test_a_call_is_forced(client: openai.OpenAI, model: str) -> None:
    tools: Any = [openai.pydantic_function_tool(Person, name="remember")]
    message: Any = None
    for choice in ("required", {"type": "function", "function": {"name": "remember"}}):
        body = asked(model, tool_choice=choice, parallel_tool_calls=False)
        message = client.chat.completions.parse(**body, tools=tools).choices[0].message
        assert message.tool_calls
        assert isinstance(message.tool_calls[0].function.parsed_arguments, Person)
        assert message.content is None
    whole = message.tool_calls[0].function.parsed_arguments
    body = asked(model, tool_choice="required", parallel_tool_calls=False, stream=True, tools=tools)
    chunks = list(client.chat.completions.create(**body, extra_headers=NO_STORE))
    streamed = [call.function for chunk in chunks for call in chunk.choices[0].delta.tool_calls or () if call.function]
    assert [one.name for one in streamed] == ["remember"]
    assert Person.model_validate_json(streamed[0].arguments or "") == whole
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("model", MODELS)
def test_a_strict_function_is_called_validly_or_not_at_all(client: openai.OpenAI, model: str) -> None:
    """The model repeats what it is shown, which is no Person."""
    wrong = '<tool_call>{"name": "remember", "arguments": {"name": "%s", "age": "old", "trade": "sailor"}}</tool_call>'
    shown = [
        message
        for name in ("Ann", "Bob", "Eve")
        for message in (
            {"role": "user", "content": f"Remember {name}."},
            {"role": "assistant", "content": wrong % name},
        )
    ]
    messages = [*shown, {"role": "user", "content": "Remember Tom."}]
    loose: Any = openai.pydantic_function_tool(Person, name="remember")
    strict: Any = {"type": "function", "function": loose["function"] | {"strict": True}}
    loose["function"]["strict"] = False
    called = []
    for tool in (loose, strict):
        body = asked(model, messages=messages, tools=[tool], parallel_tool_calls=False)
        choice = client.chat.completions.create(**body).choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls
        called.append(choice.message.tool_calls[0].function.arguments)
    assert json.loads(called[0]) == {"name": "Tom", "age": "old", "trade": "sailor"}
    assert Person.model_validate_json(called[1]).name == "Tom"
    said = client.chat.completions.create(**asked(model, max_tokens=20), tools=[strict]).choices[0]
    assert (said.message.tool_calls, said.finish_reason) == (None, "length")


def test_functions_of_a_response_are_called(client: openai.OpenAI) -> None:
    function: Any = openai.pydantic_function_tool(Person, name="remember")["function"] | {"type": "function"}
    asked_of: Any = {
        "model": "on-gpt",
        "input": "Who?",
        "tools": [function],
        "temperature": 0,
        "max_output_tokens": 120,
    }
    forced = client.responses.parse(**asked_of, tool_choice="required", parallel_tool_calls=False)
    call: Any = forced.output[-1]
    assert call.type == "function_call"
    assert Person.model_validate_json(call.arguments).age >= 0
    with client.responses.stream(**asked_of, tool_choice={"type": "function", "name": "remember"}) as stream:
        streamed: Any = stream.get_final_response().output[-1]
    assert Person.model_validate_json(streamed.arguments).age >= 0


def test_anthropics_parse(stack: Stack) -> None:
    with anthropic.Anthropic(base_url=stack.url, api_key=stack.secret, max_retries=0) as client:
        asked_of = [{"role": "user", "content": "Tell me about a person."}]
        message = client.messages.parse(model="on-gpt", max_tokens=400, messages=asked_of, output_format=Trade)  # type: ignore[arg-type]
    assert isinstance(message.parsed_output, Trade)


def test_a_use_is_forced_through_anthropics_client(stack: Stack) -> None:
    with anthropic.Anthropic(base_url=stack.url, api_key=stack.secret, max_retries=0) as client:
        message = client.messages.create(
            model="on-gpt", max_tokens=120, messages=[{"role": "user", "content": "Who?"}],
            tools=[{"name": "remember", "input_schema": Person.model_json_schema()}],
            tool_choice={"type": "tool", "name": "remember"},
        )  # fmt: skip
    (block,) = message.content
    assert isinstance(block, anthropic.types.ToolUseBlock)
    assert Person.model_validate(block.input).age >= 0
    assert message.stop_reason == "tool_use"


def test_langchain(stack: Stack) -> None:
    model = ChatOpenAI(model="on-gpt", base_url=f"{stack.url}/v1", api_key=SecretStr(stack.secret), temperature=0,
                       max_completion_tokens=120)  # fmt: skip
    methods: list[Literal["json_schema", "function_calling"]] = ["json_schema", "function_calling"]
    try:
        answers = [model.with_structured_output(Person, method=method).invoke("Who is it?") for method in methods]
    finally:
        model.root_client.close()
    assert all(isinstance(answer, Person) for answer in answers)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", {"type": "json_object"}),
        ("structured_outputs", {"regex": "a"}),
        ("tool_choice", "required"),
    ],
)
def test_who_cannot_says_so_and_auto_asks_who_can(stack: Stack, field: str, value: Any) -> None:
    tools = [{"type": "function", "function": {"name": "remember"}}] if field == "tool_choice" else None
    body = asked("echo", max_tokens=60, **{field: value}, tools=tools)
    with stack.client(timeout_s=120) as client:
        refused = client.post("/v1/chat/completions", json=body)
        answered = client.post("/v1/chat/completions", json=body | {"model": "auto"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported_parameter")
    assert refused.json()["error"]["param"] == field
    assert (answered.status_code, answered.headers["x-model-used"]) == (200, "on-gpt")


def test_what_cannot_be_kept_makes_no_job(stack: Stack) -> None:
    before = stack.query("SELECT count(*) FROM jobs")
    schema: dict[str, Any] = {"type": "array", "uniqueItems": True}
    forms: list[dict[str, Any]] = [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
        {"structured_outputs": {"regex": "(hunter2"}},
        {"structured_outputs": {"grammar": "hunter2"}},
    ]
    with stack.client() as client:
        answers = [client.post("/v1/chat/completions", json=asked("on-gpt", **form)) for form in forms]
    assert [answer.status_code for answer in answers] == [400] * 3
    assert [answer.json()["error"]["param"] for answer in answers] == [next(iter(form)) for form in forms]
    assert not any("hunter2" in answer.text for answer in answers)
    assert stack.query("SELECT count(*) FROM jobs") == before


MANY = {"type": "array", "minItems": 8, "maxItems": 8, "items": Person.model_json_schema()}


@pytest.mark.parametrize("backend", ["gpt", "vllm"])
def test_the_form_survives_the_death_of_its_worker(stack: Stack, backend: str) -> None:
    body = asked(f"on-{backend}", max_tokens=600, structured_outputs={"json": MANY})
    with stack.client(timeout_s=200) as client:
        answer = client.post("/v1/chat/completions", json=body, headers=NO_STORE)
    undisturbed = answer.json()["choices"][0]["message"]["content"]
    stream = stack.read_stream("/v1/chat/completions", body, **NO_STORE)
    stream.wait_for(60)
    stack.kill(backend)
    stack.start_worker(backend, wait_s=240)
    text = stream.text(within_s=200)
    assert text == undisturbed
    assert len([Person.model_validate(one) for one in json.loads(text)]) == 8
    assert stack.query("SELECT attempt FROM jobs WHERE is_stream ORDER BY created_at DESC LIMIT 1") == [(2,)]


def test_a_response_is_parsed_and_shows_its_form(client: openai.OpenAI) -> None:
    response = client.responses.parse(
        model="on-gpt", input="Tell me about a person.", temperature=0, max_output_tokens=120, text_format=Person
    )
    assert response.output_parsed is not None
    assert 0 <= response.output_parsed.age <= 120
    shown: Any = client.responses.retrieve(response.id).text
    assert (shown.format.type, shown.format.name) == ("json_schema", "Person")
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="echo", input="x", text={"format": {"type": "json_object"}})
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", "text.format")
