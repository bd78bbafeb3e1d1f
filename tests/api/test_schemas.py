"""Bodies to calls: equal meaning gives equal calls, other meaning other calls, and every field arrives."""

import json
import random
from contextlib import suppress
from dataclasses import asdict
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api import decoding, errors, schemas
from api.schemas.jobs import JobRequest
from api.schemas.tokenize import DetokenizeRequest, TokenizeRequest
from backends.base import SamplingParams
from catalog import LimitsEntry
from tasks.call import Call

LIMITS = LimitsEntry()
CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": PARAMETERS}}
ANTHROPIC_TOOL = {"name": "weather", "description": "d", "input_schema": PARAMETERS}
MINIMAL: dict[str, dict[str, Any]] = {
    CHAT: {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"model": "m", "prompt": "hi"},
    "/v1/embeddings": {"model": "m", "input": "hi"},
    "/v1/classify": {"model": "m", "input": "hi"},
    "/v1/rerank": {"model": "m", "query": "q", "documents": ["a", "b"]},
    "/v1/score": {"model": "m", "queries": "q", "documents": ["a", "b"]},
    "/v1/messages": {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]},
    "/embed": {"model": "m", "inputs": "hi"},
    "/predict": {"model": "m", "inputs": "hi"},
    "/rerank": {"model": "m", "query": "q", "texts": ["a", "b"]},
}


def parsed(endpoint: str, **given: Any) -> Call:
    return schemas.parse(endpoint, MINIMAL[endpoint] | given, LIMITS)


# Equal meaning, equal call.

sampling_fields: dict[str, Any] = {
    "temperature": st.floats(0, 2) | st.integers(0, 2),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(-1, 100),
    "min_p": st.floats(0, 1),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.1, 2),
    "logit_bias": st.dictionaries(st.integers(0, 50_000).map(str), st.floats(-100, 100), max_size=4),
    "stop": st.text("ab\n", min_size=1) | st.lists(st.text("ab", min_size=1, max_size=3), max_size=4),
    "stop_token_ids": st.lists(st.integers(0, 100), max_size=4),
    "ignore_eos": st.booleans(),
    "max_tokens": st.integers(100, 200),
    "min_tokens": st.integers(0, 50),
    "n": st.integers(1, 4),
    "stream": st.booleans(),
    "user": st.text("u", max_size=4),
    "metadata": st.dictionaries(st.text("k", max_size=3), st.text("v", max_size=3), max_size=2),
    "options": st.fixed_dictionaries({}, optional={"token_ms": st.floats(0, 9), "fail": st.just("error")}),
}
contents = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "developer", "user", "assistant"]), "content": contents}),
    min_size=1,
    max_size=4,
)
chats = st.fixed_dictionaries({"model": st.just("m"), "messages": messages}, optional=sampling_fields)


def rewritten(value: Any, rng: random.Random) -> Any:
    """The same value with the keys of each object in another order."""
    if isinstance(value, dict):
        keys = list(value)
        rng.shuffle(keys)
        return {key: rewritten(value[key], rng) for key in keys}
    return [rewritten(item, rng) for item in value] if isinstance(value, list) else value


@settings(deadline=None)
@given(chats, st.randoms(use_true_random=False), st.sampled_from([None, 0, 2]))
def test_spelling_does_not_matter(body: dict[str, Any], rng: random.Random, indent: int | None) -> None:
    other = rewritten(body, rng)
    for message in other["messages"]:
        message["role"] = {"system": "developer"}.get(message["role"], message["role"])
        if rng.random() < 0.5:
            middle = rng.randint(0, len(message["content"]))
            pieces = [message["content"][:middle], message["content"][middle:]]
            message["content"] = [{"type": "text", "text": piece} for piece in pieces]
    for name in rng.sample(sorted(sampling_fields.keys() - body.keys()), 3) if len(body) < 18 else []:
        other[name] = None
    if isinstance(other.get("stop"), str):
        other["stop"] = [other["stop"], other["stop"]]
    if "max_tokens" in other and rng.random() < 0.5:
        other["max_completion_tokens"] = other.pop("max_tokens")
    idle = {"tools": [], "store": False, "response_format": {"type": "text"}, "tool_choice": "auto"}
    other |= dict(rng.sample(sorted(idle.items(), key=str), 2))
    text = json.dumps(other, indent=indent, ensure_ascii=rng.random() < 0.5).encode()
    assert schemas.parse(CHAT, decoding.decode(text, LIMITS), LIMITS) == schemas.parse(CHAT, body, LIMITS)


@settings(deadline=None)
@given(chats)
def test_params_are_sampling_fields_that_change_something(body: dict[str, Any]) -> None:
    params = schemas.parse(CHAT, body, LIMITS).params
    defaults = asdict(SamplingParams(max_tokens=1))
    assert params.keys() <= body.keys() & defaults.keys()
    assert "max_tokens" not in params
    assert all(value != defaults[name] and value not in ([], {}) for name, value in params.items())
    SamplingParams(max_tokens=1, **params)


EQUAL = [
    (CHAT, {"temperature": 1}, {"temperature": 1.0}),
    (CHAT, {"temperature": 1.0}, {}),
    (CHAT, {"temperature": -0.0}, {"temperature": 0}),
    (CHAT, {"presence_penalty": -0.0}, {}),
    (CHAT, {"top_k": -1}, {"top_k": 0}),
    (CHAT, {"top_k": 0}, {}),
    (CHAT, {"n": 1}, {}),
    (CHAT, {"stop": "a"}, {"stop": ["a"]}),
    (CHAT, {"stop": ["b", "a", "b"]}, {"stop": ["a", "b"]}),
    (CHAT, {"stop": []}, {"stop": None}),
    (CHAT, {"stop_token_ids": [3, 1, 3]}, {"stop_token_ids": [1, 3]}),
    (CHAT, {"stop_token_ids": []}, {}),
    (CHAT, {"logit_bias": {"7": 1, "5": 2}}, {"logit_bias": {"5": 2.0, "7": 1.0}}),
    (CHAT, {"logit_bias": {"7": 0}}, {"logit_bias": {}}),
    (CHAT, {"logit_bias": {}}, {}),
    (CHAT, {"logprobs": False}, {}),
    (CHAT, {"logprobs": True}, {"logprobs": True, "top_logprobs": 0}),
    (CHAT, {"max_tokens": 5}, {"max_completion_tokens": 5}),
    (CHAT, {"max_tokens": 5, "max_completion_tokens": 5}, {"max_tokens": 5}),
    (CHAT, {"ignore_eos": False, "min_tokens": 0}, {}),
    (CHAT, {"user": "u", "metadata": {"a": "b"}, "service_tier": "auto", "safety_identifier": "s"}, {}),
    (CHAT, {"options": {}}, {"options": {"token_ms": None, "fail_after": 0, "first_token_ms": -0.0}}),
    (CHAT, {"messages": [{"role": "developer", "content": "x"}]}, {"messages": [{"role": "system", "content": "x"}]}),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
        {"messages": [{"role": "user", "content": "x"}]},
    ),
    (
        CHAT,
        {"messages": [{"role": "assistant", "content": "x", "refusal": None, "tool_calls": [], "name": None}]},
        {"messages": [{"role": "assistant", "content": "x"}]},
    ),
    ("/v1/completions", {"prompt": ["hi"]}, {"prompt": "hi"}),
    ("/v1/completions", {"prompt": [1, 2]}, {"prompt": [[1, 2]]}),
    ("/v1/completions", {"max_tokens": 16}, {}),
    ("/v1/completions", {"best_of": 1, "echo": False, "suffix": None}, {}),
    ("/v1/completions", {"best_of": 2, "n": 2}, {"n": 2}),
    ("/v1/embeddings", {"input": ["hi"], "encoding_format": "float"}, {}),
    ("/v1/embeddings", {"input": [5, 6]}, {"input": [[5, 6]]}),
    ("/v1/classify", {"input": ["hi"], "use_activation": True}, {}),
    ("/v1/rerank", {"documents": [{"text": "a"}, "b"]}, {}),
    ("/v1/rerank", {"top_n": 0}, {}),
    ("/v1/rerank", {"top_n": 2}, {"top_n": 99}),
    ("/v1/rerank", {"return_documents": True}, {}),
    ("/v1/score", {"queries": ["q"]}, {}),
    ("/v1/score", {"documents": None, "items": ["a", "b"]}, {}),
    ("/v1/score", {"queries": None, "documents": None, "data_1": "q", "data_2": ["a", "b"]}, {}),
    ("/v1/score", {"queries": None, "documents": None, "text_1": "q", "text_2": ["a", "b"]}, {}),
    ("/v1/score", {"documents": "a"}, {"documents": ["a"]}),
    (CHAT, {"tools": [], "tool_choice": "auto", "parallel_tool_calls": False}, {}),
    (CHAT, {"tools": [TOOL], "tool_choice": "none"}, {}),
    (CHAT, {"tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": True}, {"tools": [TOOL]}),
    (MESSAGES, {"temperature": 1.0, "top_k": 0, "top_p": 1}, {}),
    (MESSAGES, {"stop_sequences": ["b", "a", "b"]}, {"stop_sequences": ["a", "b"]}),
    (MESSAGES, {"metadata": {"user_id": "u"}, "service_tier": "auto", "thinking": {"type": "disabled"}}, {}),
    (
        MESSAGES,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]},
        {},
    ),
    (MESSAGES, {"system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}]}, {"system": "s"}),
    (MESSAGES, {"tools": [ANTHROPIC_TOOL], "tool_choice": {"type": "none"}}, {"tools": []}),
    ("/embed", {"inputs": ["hi"], "normalize": True, "truncate": False}, {}),
    ("/predict", {"inputs": ["hi"], "raw_scores": False, "truncation_direction": "right"}, {}),
    ("/rerank", {"return_text": False}, {}),
]

UNEQUAL = [
    (CHAT, {"temperature": 0}, {}),
    (CHAT, {"seed": 0}, {}),
    (CHAT, {"n": 2}, {}),
    (CHAT, {"stop": "a"}, {"stop": "b"}),
    (CHAT, {"logprobs": True}, {}),
    (CHAT, {"logprobs": True, "top_logprobs": 1}, {"logprobs": True}),
    (CHAT, {"logit_bias": {"7": 1}}, {"logit_bias": {"7": 2}}),
    (CHAT, {"max_tokens": 16}, {}),
    (CHAT, {"stream": True}, {}),
    (CHAT, {"options": {"token_ms": 1}}, {}),
    (CHAT, {"messages": [{"role": "user", "content": "hi "}]}, {}),
    (CHAT, {"messages": [{"role": "assistant", "content": "hi"}]}, {}),
    ("/v1/completions", {"prompt": ["hi", "hi"]}, {}),
    ("/v1/completions", {"prompt": [[1], [2]]}, {"prompt": [1, 2]}),
    ("/v1/completions", {"echo": True}, {}),
    ("/v1/completions", {"logprobs": 0}, {}),
    ("/v1/embeddings", {"dimensions": 8}, {}),
    ("/v1/embeddings", {"encoding_format": "base64"}, {}),
    ("/v1/rerank", {"documents": ["b", "a"]}, {}),
    ("/v1/rerank", {"top_n": 1}, {}),
    ("/v1/rerank", {"return_documents": False}, {}),
    ("/v1/score", {"queries": ["q", "r"]}, {}),
    ("/v1/score", {"queries": ["q", "a"], "documents": ["b", "c"]}, {"queries": ["q"], "documents": ["a", "b", "c"]}),
    (CHAT, {"service_tier": "flex"}, {}),
    (CHAT, {"tools": [TOOL]}, {}),
    (CHAT, {"tools": [TOOL], "parallel_tool_calls": False}, {"tools": [TOOL]}),
    (MESSAGES, {"system": "s"}, {}),
    (MESSAGES, {"temperature": 0}, {}),
    (MESSAGES, {"max_tokens": 8}, {}),
    (MESSAGES, {"tools": [ANTHROPIC_TOOL]}, {}),
    ("/embed", {"inputs": ["hi", "hi"]}, {}),
    ("/predict", {"inputs": [["hi"]]}, {}),
    ("/predict", {"inputs": ["hi", "ho"]}, {"inputs": [["hi"], ["ho"]]}),
    ("/predict", {"inputs": ["hi", "ho"]}, {"inputs": [["hi", "ho"]]}),
    ("/rerank", {"return_text": True}, {}),
]


@pytest.mark.parametrize(("endpoint", "one", "other"), EQUAL)
def test_equal(endpoint: str, one: dict[str, Any], other: dict[str, Any]) -> None:
    assert parsed(endpoint, **one) == parsed(endpoint, **other)
    assert parsed(endpoint, **one).encode() == parsed(endpoint, **other).encode()


@pytest.mark.parametrize(("endpoint", "one", "other"), UNEQUAL)
def test_unequal(endpoint: str, one: dict[str, Any], other: dict[str, Any]) -> None:
    assert parsed(endpoint, **one) != parsed(endpoint, **other)


# What arrives.


def test_chat_call_in_full() -> None:
    call = parsed(
        CHAT,
        messages=[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        temperature=0,
        top_p=0.5,
        top_k=7,
        min_p=0.1,
        seed=3,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.5,
        logit_bias={"10": -100, "9": 1},
        stop=["x"],
        stop_token_ids=[2],
        ignore_eos=True,
        max_tokens=9,
        min_tokens=2,
        n=2,
        logprobs=True,
        top_logprobs=3,
        stream=True,
        stream_options={"include_usage": True},
        options={"first_token_ms": 1, "token_ms": 2.5, "num_tokens": 4, "fail": "dead", "fail_after": 2},
    )
    assert call == Call(
        endpoint=CHAT,
        task="generate",
        model="m",
        messages=[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        n=2,
        max_tokens=9,
        params={
            "temperature": 0.0,
            "top_p": 0.5,
            "top_k": 7,
            "min_p": 0.1,
            "seed": 3,
            "presence_penalty": 1.0,
            "frequency_penalty": -1.0,
            "repetition_penalty": 1.5,
            "logit_bias": {9: 1.0, 10: -100.0},
            "logprobs": 3,
            "stop_token_ids": [2],
            "ignore_eos": True,
            "min_tokens": 2,
        },
        stop=["x"],
        stream=True,
        include_usage=True,
        format={"top_logprobs": 3},
        options={"first_token_ms": 1.0, "token_ms": 2.5, "num_tokens": 4, "fail": "dead", "fail_after": 2},
    )
    assert list(call.params["logit_bias"]) == [9, 10]


def test_completion_call() -> None:
    call = parsed("/v1/completions", prompt=["a", "b"], logprobs=2, n=2)
    assert (call.task, call.inputs, call.n, call.max_tokens) == ("generate", ["a", "b"], 2, 16)
    assert (call.params, call.format, call.messages) == ({"logprobs": 2}, {"top_logprobs": 2}, None)
    assert parsed("/v1/completions", echo=True).format == {"echo": True}


def test_encoder_calls() -> None:
    embed = parsed("/v1/embeddings", input=["a", "b"], dimensions=4, encoding_format="base64")
    assert (embed.task, embed.inputs, embed.format) == (
        "embed",
        ["a", "b"],
        {"encoding_format": "base64", "dimensions": 4},
    )
    classify = parsed("/v1/classify", input=[[1, 2], [3]])
    assert (classify.task, classify.inputs, classify.format) == ("classify", [[1, 2], [3]], {})
    rerank = parsed("/v1/rerank", top_n=1)
    assert (rerank.task, rerank.inputs) == ("rerank", ["q", "a", "b"])
    assert rerank.format == {"return_documents": True, "top_n": 1}
    score = parsed("/v1/score", queries=["q", "r"])
    assert (score.task, score.inputs, score.num_queries) == ("rerank", ["q", "r", "a", "b"], 2)
    assert (parsed("/v1/score").num_queries, parsed("/v1/score").format) == (1, {})


def test_tools_and_their_calls_mean_the_same_to_both_apis() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    chat = parsed(
        CHAT,
        tools=[TOOL],
        messages=[
            {"role": "system", "content": "s"},
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
            {"role": "user", "content": "thanks"},
        ],
    )
    message = parsed(
        MESSAGES,
        tools=[ANTHROPIC_TOOL],
        system="s",
        messages=[
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Paris"}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "sunny"}]},
                {"type": "text", "text": "thanks"},
            ]},
        ],
    )  # fmt: skip
    assert chat.messages == message.messages
    assert chat.messages is not None
    assert chat.messages[2]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Paris"}}
    assert chat.format == message.format == {"tools": [TOOL]}
    assert chat.without_text().format == {"tools": True}


def test_a_message_call() -> None:
    call = parsed(MESSAGES, temperature=0, top_p=0.5, top_k=3, stop_sequences=["x"], stream=True, max_tokens=5)
    assert (call.task, call.max_tokens, call.stop, call.stream) == ("generate", 5, ["x"], True)
    assert call.params == {"temperature": 0.0, "top_k": 3, "top_p": 0.5}


def test_a_flat_list_of_two_texts_is_one_pair() -> None:
    def shape(inputs: Any) -> tuple[list[Any], dict[str, Any]]:
        call = parsed("/predict", inputs=inputs)
        return call.inputs, call.format

    assert shape("a") == shape(["a"]) == (["a"], {"is_single": True})
    assert shape(["a", "b"]) == (["a", "b"], {"is_single": True, "pairs": True})
    assert shape([["a"], ["b"]]) == (["a", "b"], {})
    assert shape([["a", "b"], ["c", "d"]]) == (["a", "b", "c", "d"], {"pairs": True})
    assert parsed("/embed", model="auto") == schemas.parse("/embed", {"inputs": "hi"}, LIMITS)


@pytest.mark.parametrize("endpoint", MINIMAL)
def test_calls_name_their_endpoint_and_hold_no_tokens_yet(endpoint: str) -> None:
    call = parsed(endpoint)
    assert (call.endpoint, call.token_ids, call.type_ids, call.options) == (endpoint, [], None, {})
    assert Call.decode(call.encode()) == call


@pytest.mark.parametrize("endpoint", MINIMAL)
def test_options_reach_every_endpoint(endpoint: str) -> None:
    assert parsed(endpoint, options={"first_token_ms": 5}).options == {"first_token_ms": 5.0}


# Jobs and tokenize.


@pytest.mark.parametrize("endpoint", MINIMAL)
def test_job_submission(endpoint: str) -> None:
    body = {"endpoint": endpoint, "body": MINIMAL[endpoint], "metadata": {"a": "b"}, "timeout_s": 5, "deadline": 2e9}
    job = schemas.parse_job(body, LIMITS)
    assert (job.call, job.metadata, job.timeout_s, job.deadline) == (parsed(endpoint), {"a": "b"}, 5.0, 2e9)
    bare = schemas.parse_job({"endpoint": endpoint, "body": MINIMAL[endpoint]}, LIMITS)
    assert (bare.metadata, bare.timeout_s, bare.deadline) == ({}, None, None)


def test_every_inference_endpoint_can_be_a_job() -> None:
    assert set(get_args(JobRequest.model_fields["endpoint"].annotation)) == set(schemas.ENDPOINTS) == set(MINIMAL)


def test_tokenize_requests() -> None:
    assert schemas.read(TokenizeRequest, {"model": "m", "prompt": "", "tools": []}).prompt == ""
    chat = schemas.read(TokenizeRequest, {"model": "m", "messages": MINIMAL[CHAT]["messages"]})
    assert chat.messages is not None
    assert chat.messages[0].as_dict() == {"role": "user", "content": "hi"}
    assert schemas.read(DetokenizeRequest, {"model": "m", "tokens": []}).tokens == []


# Limits, OpenAPI, and values nobody thought of.


def test_limits_of_the_installation() -> None:
    small = LimitsEntry(n=2, inputs=4)
    schemas.parse(CHAT, MINIMAL[CHAT] | {"n": 2}, small)
    schemas.parse("/v1/completions", {"model": "m", "prompt": ["a", "b"], "n": 2}, small)
    schemas.parse("/v1/rerank", {"model": "m", "query": "q", "documents": ["a"] * 4}, small)
    for endpoint, body, param in [
        (CHAT, MINIMAL[CHAT] | {"n": 3}, "n"),
        ("/v1/completions", {"model": "m", "prompt": ["a", "b", "c"], "n": 2}, "prompt"),
        ("/v1/embeddings", {"model": "m", "input": ["a"] * 5}, "input"),
        ("/v1/classify", {"model": "m", "input": [[1]] * 5}, "input"),
        ("/v1/rerank", {"model": "m", "query": "q", "documents": ["a"] * 5}, "documents"),
        ("/v1/score", {"model": "m", "queries": ["a"] * 5, "documents": ["a"] * 5}, "documents"),
        ("/predict", {"inputs": [["a"]] * 5}, "inputs"),
    ]:
        with pytest.raises(errors.APIError) as caught:
            schemas.parse(endpoint, body, small)
        assert caught.value.param == param


@pytest.mark.parametrize("path", [*MINIMAL, "/v1/jobs", "/v1/tokenize", "/v1/detokenize", "/v1/messages/count_tokens"])
def test_openapi_schema_stands_alone(path: str) -> None:
    body = schemas.request_body(path)
    schema = body["content"]["application/json"]["schema"]
    assert "$ref" not in json.dumps(schema)
    assert schema["additionalProperties"] is False
    assert "model" in schema["properties"] or "endpoint" in schema["properties"]


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
field_names = sorted({name for model in schemas.ENDPOINTS.values() for name in model.model_fields})
known_names = field_names + sorted({name for model in schemas.ENDPOINTS.values() for name in model.no_effect})


@settings(deadline=None)
@given(
    st.sampled_from(sorted(MINIMAL)),
    st.dictionaries(st.sampled_from(known_names) | st.text(max_size=5), anything, max_size=3),
)
def test_any_object_is_a_call_or_a_refusal(endpoint: str, changes: dict[str, Any]) -> None:
    with suppress(errors.InvalidRequest):
        call = schemas.parse(endpoint, MINIMAL[endpoint] | changes, LIMITS)
        assert Call.decode(call.encode()).endpoint == endpoint
