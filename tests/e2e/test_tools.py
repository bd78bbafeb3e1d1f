"""Tools through OpenAI's and LangChain's clients. Echo repeats the call that it is shown, after the definitions."""

import json
from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import SecretStr

from tests.stack import Stack

pytestmark = pytest.mark.e2e

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: Any = {"type": "function", "function": {"name": "weather", "description": "Weather.", "parameters": PARAMETERS}}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'


def asked(text: str, **fields: Any) -> dict[str, Any]:
    return {
        "model": "echo",
        "messages": [{"role": "user", "content": text}],
        "tools": [TOOL],
        "max_tokens": 900,
        **fields,
    }


def client_of(stack: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.secret, max_retries=0)


@pytest.mark.parametrize("options", [{}, {"token_ms": 1}])
def test_a_call_whole_and_streamed(stack: Stack, options: dict[str, Any]) -> None:
    with client_of(stack) as client:
        body = asked(f"go {CALL} {CALL}", temperature=0)
        choice = client.chat.completions.create(**body, extra_body={"options": options}).choices[0]
        live = list(client.chat.completions.create(**body, stream=True, extra_body={"options": options},
                                                   extra_headers={"Cache-Control": "no-store"}))  # fmt: skip
        cached = list(client.chat.completions.create(**body, stream=True, extra_body={"options": options}))
        one = client.chat.completions.create(**body, parallel_tool_calls=False).choices[0]
        none = client.chat.completions.create(**body, tool_choice="none").choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is not None
    assert choice.message.content.startswith("tools: [")
    assert choice.message.tool_calls is not None
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]
    assert calls == [("weather", {"city": "Paris"})] * 2
    assert len({call.id for call in choice.message.tool_calls}) == 2
    assert one.message.tool_calls is not None
    assert len(one.message.tool_calls) == 1
    assert (none.message.tool_calls, none.finish_reason) == (None, "stop")
    assert none.message.content == f"user: go {CALL} {CALL}\n"
    for chunks in (live, cached):
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert "".join(delta.content or "" for delta in deltas) == choice.message.content
        streamed = [call for delta in deltas for call in delta.tool_calls or ()]
        assert [(call.index, call.function.name) for call in streamed if call.function] == [
            (0, "weather"),
            (1, "weather"),
        ]
        assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_conversation_with_a_tool(stack: Stack) -> None:
    with client_of(stack) as client:
        body = asked(f"go {CALL}")
        message = client.chat.completions.create(**body).choices[0].message
        assert message.tool_calls
        body["messages"] += [
            message,
            {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"},
        ]
        answer = client.chat.completions.create(**body | {"tools": openai.NOT_GIVEN}).choices[0].message
    assert answer.content is not None
    assert answer.content.endswith('{"name": "weather", "arguments": {"city": "Paris"}}\ntool: sunny\n')


def test_langchain(stack: Stack) -> None:
    @tool
    def weather(city: str) -> str:
        """Weather of a city."""
        return "sunny"

    model = ChatOpenAI(model="echo", base_url=f"{stack.url}/v1", api_key=SecretStr(stack.secret), temperature=0,
                       max_completion_tokens=900)  # fmt: skip
    try:
        assert model.invoke("hello").content == "user: hello\n"
        assert "".join(str(chunk.content) for chunk in model.stream("hello again")) == "user: hello again\n"
        bound = model.bind_tools([weather])
        message = bound.invoke(f"go {CALL}")
        assert isinstance(message, AIMessage)
        assert [(call["name"], call["args"]) for call in message.tool_calls] == [("weather", {"city": "Paris"})]
        streamed: Any = None
        for chunk in bound.stream(f"go {CALL}"):
            streamed = chunk if streamed is None else streamed + chunk
        assert isinstance(streamed, AIMessage)
        assert [call["args"] for call in streamed.tool_calls] == [{"city": "Paris"}]
        history = [HumanMessage("go"), message, ToolMessage("sunny", tool_call_id=message.tool_calls[0]["id"])]
        assert str(model.invoke(history).content).endswith("tool: sunny\n")
        options: dict[str, Any] = {"base_url": f"{stack.url}/v1", "api_key": SecretStr(stack.secret)}
        embeddings = OpenAIEmbeddings(model="echo", check_embedding_ctx_length=False, **options)
        assert [len(vector) for vector in embeddings.embed_documents(["a", "b"])] == [16, 16]
    finally:
        model.root_client.close()
