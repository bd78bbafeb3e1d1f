"""Requests that must be refused: status, code and field of each, and never a word of what was sent."""

import json
from typing import Any

import pytest

from api import decoding, errors, schemas
from api.schemas.batches import BatchRequest
from api.schemas.messages import CountTokensRequest
from api.schemas.responses import ResponseRequest
from api.schemas.tokenize import DetokenizeRequest, TokenizeRequest
from catalog import LimitsEntry

LIMITS = LimitsEntry()
SECRET = "hunter2 SECRET"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"
CLASSIFY = "/v1/classify"
RERANK = "/v1/rerank"
SCORE = "/v1/score"
EMBED, PREDICT, RANK = "/embed", "/predict", "/rerank"
MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
JOBS = "/v1/jobs"
BATCHES = "/v1/batches"
TOKENIZE = "/v1/tokenize"
DETOKENIZE = "/v1/detokenize"
RESPONSES = "/v1/responses"

VALID: dict[str, dict[str, Any]] = {
    CHAT: {"model": "m", "messages": [{"role": "user", "content": SECRET}]},
    COMPLETIONS: {"model": "m", "prompt": SECRET},
    EMBEDDINGS: {"model": "m", "input": SECRET},
    CLASSIFY: {"model": "m", "input": SECRET},
    RERANK: {"model": "m", "query": SECRET, "documents": [SECRET]},
    SCORE: {"model": "m", "queries": SECRET, "documents": [SECRET]},
    MESSAGES: {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": SECRET}]},
    COUNT: {"model": "m", "messages": [{"role": "user", "content": SECRET}]},
    EMBED: {"model": "m", "inputs": SECRET},
    PREDICT: {"model": "m", "inputs": SECRET},
    RANK: {"model": "m", "query": SECRET, "texts": [SECRET]},
    JOBS: {"endpoint": EMBEDDINGS, "body": {"model": "m", "input": SECRET}},
    BATCHES: {"input_file_id": "f", "endpoint": EMBEDDINGS, "completion_window": "24h", "metadata": {"k": SECRET}},
    TOKENIZE: {"model": "m", "prompt": SECRET},
    DETOKENIZE: {"model": "m", "tokens": [1]},
    RESPONSES: {"model": "m", "input": SECRET},
}
MISSING = object()
CALL: dict[str, Any] = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
DEEP: dict[str, Any] = {"not": {"not": {"not": {}}}}
for _ in range(24):
    DEEP = {"not": DEEP}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}


def refusal(endpoint: str, body: bytes) -> errors.APIError:
    with pytest.raises(errors.APIError) as caught:
        decoded = decoding.decode(body, LIMITS)
        if endpoint == JOBS:
            schemas.parse_job(decoded, LIMITS)
        elif endpoint == COUNT:
            schemas.read(CountTokensRequest, decoded)
        elif endpoint == BATCHES:
            schemas.read(BatchRequest, decoded)
        elif endpoint == TOKENIZE:
            schemas.read(TokenizeRequest, decoded)
        elif endpoint == DETOKENIZE:
            schemas.read(DetokenizeRequest, decoded)
        elif endpoint == RESPONSES:
            schemas.read(ResponseRequest, decoded)
        else:
            schemas.parse(endpoint, decoded, LIMITS)
    return caught.value


def check(error: errors.APIError, code: str, param: str | None) -> None:
    assert (error.status, error.code, error.param) == (400, code, param)
    answer = (
        bytes(errors.render(error).body).decode() + bytes(errors.render(error, accept="problem+json").body).decode()
    )
    for word in SECRET.split():
        assert word not in answer
    assert len(error.message) < 300


def message(**fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": SECRET} | fields]


WRONG_VALUES: list[tuple[str, str, Any, str, str | None]] = [
    # endpoint, field, value, code, param (None: the field itself)
    *[(endpoint, "model", value, "validation_error", None) for endpoint in VALID if endpoint not in (JOBS, BATCHES)
      for value in (*(MISSING,)[: endpoint.startswith("/v1/")], 7, "", None, [SECRET], SECRET * 50)],
    (CHAT, "messages", MISSING, "validation_error", None),
    (CHAT, "messages", [], "validation_error", None),
    (CHAT, "messages", SECRET, "validation_error", None),
    (CHAT, "messages", {"role": "user", "content": SECRET}, "validation_error", None),
    (CHAT, "messages", [SECRET], "validation_error", "messages.0"),
    (CHAT, "messages", [[SECRET]], "validation_error", "messages.0"),
    (CHAT, "messages", [None], "validation_error", "messages.0"),
    (CHAT, "messages", message() * 2049, "validation_error", None),
    (CHAT, "messages", [{"content": SECRET}], "validation_error", "messages.0.role"),
    (CHAT, "messages", [{"role": "user"}], "validation_error", "messages.0.content"),
    (CHAT, "messages", message(role=SECRET), "validation_error", "messages.0.role"),
    (CHAT, "messages", message(role="tool"), "validation_error", "messages.0.tool_call_id"),
    (CHAT, "messages", message(tool_call_id=SECRET), "validation_error", "messages.0.tool_call_id"),
    (CHAT, "messages", message(role="tool", tool_call_id=7), "validation_error", "messages.0.tool_call_id"),
    (CHAT, "messages", message(tool_calls=[CALL]), "validation_error", "messages.0.tool_calls"),
    (CHAT, "messages", message(role="assistant", tool_calls=[{"id": SECRET}]), "validation_error",
     "messages.0.tool_calls.0.type"),
    (CHAT, "messages", message(role="assistant", tool_calls=[CALL | {"function": {"name": SECRET, "arguments": "{}"}}]),
     "validation_error", "messages.0.tool_calls.0.function.name"),
    *[(CHAT, "messages", message(role="assistant", tool_calls=[CALL | {"function": {"name": "f", "arguments": text}}]),
       "validation_error", "messages.0.tool_calls.0.function.arguments")
      for text in (SECRET, "", "[]", "{", '{"a": NaN}', '{"a":' * 40 + "1" + "}" * 40, '{"a": "\\u0000"}')],
    (CHAT, "messages", message(role="assistant", content=None, tool_calls=[]), "validation_error", "messages.0.content"),
    (CHAT, "messages", message(role="function"), "validation_error", "messages.0.role"),
    (CHAT, "messages", message(role=None), "validation_error", "messages.0.role"),
    (CHAT, "messages", message(content=None), "validation_error", "messages.0.content"),
    (CHAT, "messages", message(content=7), "validation_error", "messages.0.content"),
    (CHAT, "messages", message(content={"text": SECRET}), "validation_error", "messages.0.content"),
    (CHAT, "messages", message(content=[]), "validation_error", "messages.0.content"),
    (CHAT, "messages", message(content=[SECRET]), "validation_error", "messages.0.content"),
    (CHAT, "messages", message(content=[{"type": SECRET}]), "unsupported_parameter", "messages.0.content"),
    (CHAT, "messages", message(content=[{"text": SECRET}]), "validation_error", "messages.0.content"),
    (CHAT, "messages", message(content=[{"type": "text"}]), "validation_error", "messages.0.content"),
    (CHAT, "messages", message(content=[{"type": "text", "text": 7}]), "validation_error", "messages.0.content"),
    (CHAT, "messages", message(content=[{"type": "text", "text": SECRET, SECRET: 1}]), "validation_error",
     "messages.0.content"),
    (CHAT, "messages", message(content=[{"type": "image_url", "image_url": {"url": SECRET}}]), "unsupported_parameter",
     "messages.0.content"),
    (CHAT, "messages", message(content=[{"type": "input_audio"}]), "unsupported_parameter", "messages.0.content"),
    (CHAT, "messages", message() + message(content=7), "validation_error", "messages.1.content"),
    (CHAT, "messages", message(name=SECRET), "unsupported_parameter", "messages.0.name"),
    (CHAT, "messages", message(refusal=SECRET), "unsupported_parameter", "messages.0.refusal"),
    (CHAT, "messages", message(weight=1), "unknown_field", "messages.0.weight"),
    (CHAT, "messages", message() + message(**{SECRET: 1}), "unknown_field", "messages.1"),
    *[(endpoint, field, value, "validation_error", None) for endpoint in (CHAT, COMPLETIONS) for field, value in [
        ("temperature", "1"), ("temperature", True), ("temperature", [1]), ("temperature", SECRET),
        ("top_p", "0.5"), ("top_k", 1.5), ("top_k", 5.0), ("seed", 1.0), ("seed", "1"), ("seed", SECRET),
        ("max_tokens", 1.0), ("max_tokens", "1"), ("max_tokens", True), ("max_tokens", [SECRET]),
        ("n", "1"), ("n", True), ("n", 1.0), ("stream", 1), ("stream", "true"), ("stream", SECRET),
        ("ignore_eos", 1), ("min_tokens", 1.5), ("stop", 5), ("stop", ["x"] * 17), ("stop", {"a": SECRET}),
        ("logit_bias", [1]), ("logit_bias", {SECRET: 1}), ("logit_bias", {"05": 1}), ("logit_bias", {"-1": 1}),
        ("logit_bias", {"5": SECRET}), ("logit_bias", {str(key): 1 for key in range(1025)}),
        ("stop_token_ids", 5), ("stop_token_ids", [1] * 65), ("stream_options", {"include_usage": True}),
        ("stream_options", SECRET), ("user", 7), ("user", SECRET * 50), ("metadata", [SECRET]),
        ("metadata", {SECRET: 1}), ("metadata", {SECRET * 10: "v"}), ("metadata", {"k": SECRET * 50}),
        ("metadata", {f"{SECRET}{key}": "v" for key in range(17)}), ("service_tier", "scale"),
        ("service_tier", SECRET), ("options", [SECRET]),
    ]],
    (CHAT, "stop", [""], "validation_error", "stop.0"),
    (CHAT, "stop", "", "validation_error", "stop.0"),
    (CHAT, "stop", ["x", 5], "validation_error", "stop.1"),
    (CHAT, "stop", [SECRET * 50], "validation_error", "stop.0"),
    (CHAT, "stop_token_ids", [1, SECRET], "validation_error", "stop_token_ids.1"),
    (CHAT, "stop_token_ids", [-1], "number_out_of_range", "stop_token_ids.0"),
    (CHAT, "options", {"fail": SECRET}, "validation_error", "options.fail"),
    (CHAT, "options", {"token_ms": -1}, "number_out_of_range", "options.token_ms"),
    (CHAT, "options", {"other": 1}, "unknown_field", "options.other"),
    (CHAT, "options", {SECRET: 1}, "unknown_field", "options"),
    (CHAT, "stream_options", {"include_usage": True, "other": 1}, "unknown_field", "stream_options.other"),
    *[(CHAT, field, value, "number_out_of_range", None) for field, value in [
        ("temperature", -0.1), ("temperature", 2.01), ("temperature", 1e300), ("top_p", 0), ("top_p", 1.01),
        ("top_k", -2), ("top_k", 10**7), ("min_p", -0.1), ("min_p", 1.1), ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1), ("repetition_penalty", 0), ("repetition_penalty", 11), ("max_tokens", 0),
        ("max_tokens", -1), ("max_tokens", 2**31), ("max_completion_tokens", 0), ("min_tokens", -1), ("n", 0),
        ("n", 17), ("n", 129), ("n", -1), ("top_logprobs", 21), ("top_logprobs", -1), ("logit_bias", {"5": 100.5}),
        ("logit_bias", {"5": -101}),
    ]],
    *[(CHAT, field, value, "unsupported_parameter", None) for field, value in [
        ("functions", [{"name": SECRET}]), ("function_call", {"name": SECRET}),
        ("audio", {"voice": SECRET}), ("modalities", ["text", "audio"]), ("prediction", {"content": SECRET}),
        ("web_search_options", {}), ("store", True), ("store", 0), ("reasoning_effort", "high"),
        ("verbosity", "low"), ("best_of", 2), ("guided_json", {"a": 1}),
        ("chat_template", SECRET), ("chat_template_kwargs", {"a": SECRET}),
        ("add_generation_prompt", False), ("continue_final_message", True), ("documents", [SECRET]),
        ("priority", 1), ("prompt_logprobs", 1), ("use_beam_search", True), ("bad_words", [SECRET]),
        ("skip_special_tokens", False), ("cache_salt", SECRET), ("kv_transfer_params", {}),
    ]],
    (CHAT, "tools", {}, "validation_error", None),
    (CHAT, "tools", [SECRET], "validation_error", "tools.0"),
    (CHAT, "tools", [TOOL] * 129, "validation_error", None),
    (CHAT, "tools", [{"type": SECRET, "function": {"name": "f"}}], "validation_error", "tools.0.type"),
    (CHAT, "tools", [{"type": "function", "function": {"name": SECRET}}], "validation_error", "tools.0.function.name"),
    (CHAT, "tools", [{"type": "function", "function": {"name": "f", "parameters": SECRET}}], "validation_error",
     "tools.0.function.parameters"),
    (CHAT, "tools", [{"type": "function", "function": {"name": "f", "strict": 1}}], "validation_error",
     "tools.0.function.strict"),
    (CHAT, "tools", [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "array"}}}],
     "validation_error", "tools.0.function.parameters"),
    (CHAT, "tools", [{"type": "function", "function": {"name": "f", "api_base": SECRET}}], "unknown_field",
     "tools.0.function.api_base"),
    (CHAT, "tool_choice", "required", "validation_error", None),
    (CHAT, "tool_choice", {"type": "function", "function": {"name": "f"}, SECRET: 1}, "validation_error", None),
    (CHAT, "parallel_tool_calls", 1, "validation_error", None),
    (MESSAGES, "messages", [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "i", SECRET: 1}]}],
     "unknown_field", "messages.0.content.0.tool_result"),
    *[(MESSAGES, field, value, code, param) for field, value, code, param in [
        ("max_tokens", MISSING, "validation_error", None), ("max_tokens", 0, "number_out_of_range", None),
        ("messages", MISSING, "validation_error", None), ("messages", [], "validation_error", None),
        ("messages", [{"role": SECRET, "content": SECRET}], "validation_error", "messages.0.role"),
        ("messages", [{"role": "user"}], "validation_error", "messages.0.content"),
        ("messages", [{"role": "user", "content": []}], "validation_error", "messages.0.content"),
        ("messages", [{"role": "user", "content": [SECRET]}], "validation_error", "messages.0.content.0"),
        ("messages", [{"role": "user", "content": [{"type": SECRET}]}], "unsupported_parameter", "messages.0.content"),
        ("messages", [{"role": "user", "content": [{"type": "image", "source": SECRET}]}], "unsupported_parameter",
         "messages.0.content"),
        ("messages", [{"role": "user", "content": [{"type": "tool_use", "id": "i", "name": "f", "input": {}}]}],
         "validation_error", "messages.0.content"),
        ("messages", [{"role": "user", "content": SECRET}, {"role": "assistant", "content": SECRET}],
         "unsupported_parameter", None),
        ("system", 7, "validation_error", None), ("system", [{"type": "image"}], "unsupported_parameter", None),
        ("temperature", 1.5, "number_out_of_range", None), ("temperature", SECRET, "validation_error", None),
        ("top_k", -1, "number_out_of_range", None), ("top_p", 0, "number_out_of_range", None),
        ("stop_sequences", SECRET, "validation_error", None), ("stop_sequences", [""], "validation_error", "stop_sequences.0"),
        ("metadata", {"user_id": 7}, "validation_error", None),
        ("metadata", {"other": SECRET}, "unknown_field", None),
        ("output_config", {"effort": "low"}, "unsupported_parameter", "output_config.effort"),
        ("output_config", {"format": {"type": SECRET}}, "validation_error", "output_config.format.type"),
        ("output_config", {"format": {"type": "json_schema"}}, "validation_error", "output_config.format.schema"),
        ("output_config", {"format": {"type": "json_schema", "schema": DEEP}}, "validation_error",
         "output_config.format.schema"),
        ("thinking", {"type": "enabled", "budget_tokens": 1024}, "unsupported_parameter", None),
        ("tool_choice", {"type": "any"}, "validation_error", None),
        ("tool_choice", {"type": "tool", "name": "f"}, "validation_error", None),
        ("tool_choice", {"type": "tool"}, "validation_error", "tool_choice.name"),
        ("tool_choice", {"type": "auto", "name": "f"}, "validation_error", "tool_choice.name"),
        ("tools", [{"name": "f"}], "validation_error", "tools.0.input_schema"),
        ("tools", [{"name": SECRET, "input_schema": {}}], "validation_error", "tools.0.name"),
        ("service_tier", "flex", "validation_error", None), ("mcp_servers", [SECRET], "unsupported_parameter", None),
        ("container", SECRET, "unsupported_parameter", None), ("n", 2, "unknown_field", None),
    ]],
    (COUNT, "max_tokens", 5, "unknown_field", None),
    (COUNT, "messages", [{"role": "user", "content": 7}], "validation_error", "messages.0.content"),
    *[(endpoint, field, SECRET, "unknown_field", None) for endpoint in VALID
      for field in ("api_base", "user_id", "cost", "extra_body", "Model", "__class__")],
    *[(endpoint, field, 1, "unknown_field", "") for endpoint in VALID for field in (SECRET, "a.b", "", "x" * 65, "ï")],
    (CHAT, "prompt", SECRET, "unknown_field", None),
    (CHAT, "input", SECRET, "unknown_field", None),
    (COMPLETIONS, "messages", [], "unknown_field", None),
    *[(endpoint, field, value, code, None)
      for endpoint, field in ((COMPLETIONS, "prompt"), (EMBEDDINGS, "input"), (CLASSIFY, "input"))
      for value, code in [
        (MISSING, "validation_error"), (None, "validation_error"), (7, "validation_error"),
        ({"text": SECRET}, "validation_error"), ([SECRET, 7], "validation_error"), ([SECRET, None], "validation_error"),
        ([SECRET, [1]], "validation_error"), ([1, 2.0], "validation_error"), ([1, True], "validation_error"),
        ([True], "validation_error"), ([1.5], "validation_error"), ([[1], 2], "validation_error"),
        ([[SECRET]], "validation_error"), ([[1, True]], "validation_error"),
        ([[1.0]], "validation_error"), ([[[1]]], "validation_error"),
        ("", "invalid_prompt"), ([], "invalid_prompt"), ([""], "invalid_prompt"), ([SECRET, ""], "invalid_prompt"),
        ([[]], "invalid_prompt"), ([[1], []], "invalid_prompt"), ([-1], "number_out_of_range"),
        ([[1, 2**31]], "number_out_of_range"), (["x"] * 2049, "validation_error"),
      ]],
    *[(COMPLETIONS, field, value, "unsupported_parameter", None) for field, value in [
        ("suffix", SECRET), ("suffix", ""), ("best_of", 2), ("prompt_embeds", SECRET), ("add_special_tokens", False),
        ("allowed_token_ids", [1]),
    ]],
    *[(endpoint, f"guided_{kind}", SECRET, "unsupported_parameter", None) for endpoint in (CHAT, COMPLETIONS)
      for kind in ("json", "regex", "choice", "grammar", "decoding_backend", "whitespace_pattern")],
    *[(endpoint, field, value, "validation_error", param) for endpoint in (CHAT, COMPLETIONS)
      for field, value, param in [
        ("response_format", SECRET, None), ("response_format", {"type": SECRET}, "response_format.type"),
        ("response_format", {}, "response_format.type"),
        ("response_format", {"type": "json_schema"}, "response_format.json_schema"),
        ("response_format", {"type": "text", "json_schema": {"name": "f"}}, "response_format.json_schema"),
        *[("response_format", {"type": "json_schema", "json_schema": value}, f"response_format.json_schema{param}")
          for value, param in [
            (SECRET, ""), ({"schema": {}}, ".name"), ({"name": SECRET}, ".name"), ({"name": "f" * 65}, ".name"),
            ({"name": "f", "schema": SECRET}, ".schema"), ({"name": "f", "schema": [SECRET]}, ".schema"),
            ({"name": "f", "strict": "true"}, ".strict"), ({"name": "f", "schema": DEEP}, ".schema"),
            ({"name": "f", "schema": {"enum": [1] * 9000}}, ".schema"),
            ({"name": "f", "schema": {"const": SECRET * 7000}}, ".schema"),
          ]],
        ("structured_outputs", SECRET, None), ("structured_outputs", {}, None),
        ("structured_outputs", {"regex": SECRET, "choice": [SECRET]}, None),
        ("structured_outputs", {"regex": None}, None),
        *[("structured_outputs", {name: value}, f"structured_outputs.{name}{param}") for name, value, param in [
            ("json", SECRET, ""), ("json", "{", ""), ("json", "[1]", ""), ("json", 7, ""), ("json", DEEP, ""),
            ("json", json.dumps(DEEP), ""), ("regex", "", ""), ("regex", [SECRET], ""), ("regex", SECRET * 7000, ""),
            ("choice", SECRET, ""), ("choice", [], ""), ("choice", [7], ".0"), ("choice", [SECRET] * 1025, ""),
            ("choice", [SECRET * 400], ".0"), ("grammar", "", ""), ("grammar", {SECRET: 1}, ""),
            ("json_object", False, ""), ("json_object", SECRET, ""),
          ]],
        ("structured_outputs", {"choice": ["x" * 4000] * 20}, None),
      ]],
    (CHAT, "response_format", {"type": "json_object", SECRET: 1}, "unknown_field", "response_format"),
    (CHAT, "response_format", {"type": "json_object", "other": 1}, "unknown_field", "response_format.other"),
    (CHAT, "response_format", {"type": "json_schema", "json_schema": {"name": "f", "schema": {"x-guidance": SECRET}}},
     "unsupported_parameter", "response_format.json_schema.schema"),
    (CHAT, "structured_outputs", {"structural_tag": SECRET}, "unsupported_parameter",
     "structured_outputs.structural_tag"),
    (CHAT, "structured_outputs", {"regex": "a", "whitespace_pattern": SECRET}, "unsupported_parameter",
     "structured_outputs.whitespace_pattern"),
    (CHAT, "structured_outputs", {"regex": "a", "disable_any_whitespace": True}, "unsupported_parameter",
     "structured_outputs.disable_any_whitespace"),
    (COMPLETIONS, "logprobs", 6, "number_out_of_range", None),
    (COMPLETIONS, "logprobs", True, "validation_error", None),
    (COMPLETIONS, "echo", 1, "validation_error", None),
    (COMPLETIONS, "top_logprobs", 1, "unknown_field", None),
    (COMPLETIONS, "max_completion_tokens", 1, "unknown_field", None),
    (COMPLETIONS, "min_tokens", 17, "validation_error", None),
    (EMBEDDINGS, "encoding_format", SECRET, "validation_error", None),
    (EMBEDDINGS, "dimensions", 0, "number_out_of_range", None),
    (EMBEDDINGS, "dimensions", 65_537, "number_out_of_range", None),
    (EMBEDDINGS, "dimensions", 8.0, "validation_error", None),
    (EMBEDDINGS, "truncate_prompt_tokens", 5, "unsupported_parameter", None),
    (EMBEDDINGS, "normalize", False, "unsupported_parameter", None),
    (CLASSIFY, "use_activation", False, "unsupported_parameter", None),
    (CLASSIFY, "top_k", 3, "unknown_field", None),
    (RERANK, "query", MISSING, "validation_error", None),
    (RERANK, "query", "", "validation_error", None),
    (RERANK, "query", [SECRET], "validation_error", None),
    (RERANK, "documents", MISSING, "validation_error", None),
    (RERANK, "documents", [], "validation_error", None),
    (RERANK, "documents", SECRET, "validation_error", None),
    (RERANK, "documents", [SECRET, 7], "validation_error", None),
    (RERANK, "documents", [{"text": SECRET, "title": SECRET}], "validation_error", None),
    (RERANK, "documents", [{"text": 7}], "validation_error", None),
    (RERANK, "documents", [SECRET, ""], "invalid_prompt", None),
    (RERANK, "documents", ["x"] * 2049, "validation_error", None),
    (RERANK, "top_n", -1, "number_out_of_range", None),
    (RERANK, "top_n", 1.0, "validation_error", None),
    (RERANK, "return_documents", "no", "validation_error", None),
    (RERANK, "max_tokens_per_doc", 5, "unsupported_parameter", None),
    (SCORE, "queries", MISSING, "validation_error", None),
    (SCORE, "queries", "", "validation_error", "queries.0"),
    (SCORE, "queries", [], "validation_error", None),
    (SCORE, "queries", [SECRET, 7], "validation_error", "queries.1"),
    (SCORE, "queries", [SECRET, SECRET], "validation_error", None),
    (SCORE, "documents", MISSING, "validation_error", "queries"),
    (SCORE, "documents", [SECRET, ""], "validation_error", "documents.1"),
    (SCORE, "documents", {SECRET: 1}, "validation_error", None),
    (SCORE, "documents", ["x"] * 2049, "validation_error", None),
    (SCORE, "items", SECRET, "validation_error", "queries"),
    (SCORE, "data_1", SECRET, "validation_error", "queries"),
    (SCORE, "instruction", SECRET, "unsupported_parameter", None),
    (SCORE, "use_activation", False, "unsupported_parameter", None),
    (EMBED, "inputs", MISSING, "validation_error", None),
    (EMBED, "inputs", "", "invalid_prompt", None),
    (EMBED, "inputs", [SECRET, 7], "validation_error", None),
    (EMBED, "truncate", True, "unsupported_parameter", None),
    (EMBED, "normalize", False, "unsupported_parameter", None),
    (EMBED, "prompt_name", SECRET, "unsupported_parameter", None),
    (EMBED, "dimensions", 0, "number_out_of_range", None),
    (PREDICT, "inputs", MISSING, "validation_error", None),
    (PREDICT, "inputs", 7, "validation_error", None),
    (PREDICT, "inputs", [], "validation_error", None),
    (PREDICT, "inputs", [7], "validation_error", None),
    (PREDICT, "inputs", ["a", ["b"]], "validation_error", None),
    (PREDICT, "inputs", ["a", "b", SECRET], "validation_error", None),
    (PREDICT, "inputs", [["a"], ["b", SECRET]], "validation_error", None),
    (PREDICT, "inputs", [["a"], [7]], "validation_error", None),
    (PREDICT, "inputs", [["a", "b", SECRET]], "validation_error", None),
    (PREDICT, "inputs", [[]], "validation_error", None),
    (PREDICT, "inputs", "", "invalid_prompt", None),
    (PREDICT, "inputs", [["a", ""]], "invalid_prompt", None),
    (PREDICT, "inputs", [["x"]] * 2049, "validation_error", None),
    (PREDICT, "raw_scores", True, "unsupported_parameter", None),
    (RANK, "query", MISSING, "validation_error", None),
    (RANK, "texts", [], "validation_error", None),
    (RANK, "texts", SECRET, "validation_error", None),
    (RANK, "texts", [SECRET, 7], "validation_error", "texts.1"),
    (RANK, "texts", ["x"] * 2049, "validation_error", None),
    (RANK, "return_text", 1, "validation_error", None),
    (RANK, "documents", [SECRET], "unknown_field", None),
    (JOBS, "endpoint", MISSING, "validation_error", None),
    (JOBS, "endpoint", SECRET, "validation_error", None),
    (JOBS, "endpoint", "/v1/models", "validation_error", None),
    (JOBS, "endpoint", JOBS, "validation_error", None),
    (JOBS, "body", MISSING, "validation_error", None),
    (JOBS, "body", [SECRET], "validation_error", None),
    (JOBS, "body", {}, "validation_error", "body.model"),
    (JOBS, "body", {"model": "m", "input": ""}, "invalid_prompt", "body.input"),
    (JOBS, "body", {"model": "m", "input": SECRET, "dimensions": 0}, "number_out_of_range", "body.dimensions"),
    (JOBS, "body", {"model": "m", "input": SECRET, "messages": SECRET}, "unknown_field", "body.messages"),
    (JOBS, "body", {"model": "m", "input": SECRET, SECRET: 1}, "unknown_field", "body"),
    (JOBS, "timeout_s", 0, "number_out_of_range", None),
    (JOBS, "deadline", 0, "number_out_of_range", None),
    (JOBS, "deadline", 1e300, "number_out_of_range", None),
    (JOBS, "deadline", SECRET, "validation_error", None),
    (JOBS, "timeout_s", 604_801, "number_out_of_range", None),
    (JOBS, "timeout_s", SECRET, "validation_error", None),
    (JOBS, "metadata", {"k": 1}, "validation_error", None),
    (JOBS, "priority", 1, "validation_error", None),
    *[(where, "webhook", value, code, param) for where in (JOBS, RESPONSES) for value, code, param in [
        (SECRET, "validation_error", None), ({}, "validation_error", "webhook.url"),
        ({"url": 7}, "validation_error", "webhook.url"), ({"url": ""}, "validation_error", "webhook.url"),
        ({"url": "x" * 2049}, "validation_error", "webhook.url"),
        ({"url": SECRET, SECRET: 1}, "unknown_field", "webhook"),
        ({"url": SECRET, "events": []}, "validation_error", "webhook.events"),
        ({"url": SECRET, "events": SECRET}, "validation_error", "webhook.events"),
        ({"url": SECRET, "events": [SECRET]}, "validation_error", "webhook.events.0"),
    ]],
    (JOBS, "webhook", {"url": SECRET, "events": ["response.completed"]}, "validation_error", "webhook.events.0"),
    (RESPONSES, "webhook", {"url": SECRET, "events": ["job.failed"]}, "validation_error", "webhook.events.0"),
    (RESPONSES, "webhook", {"url": SECRET}, "validation_error", "webhook"),
    (JOBS, "result_ttl_s", 0, "number_out_of_range", None),
    (JOBS, "result_ttl_s", 31_536_001, "number_out_of_range", None),
    (JOBS, "result_ttl_s", 1.5, "validation_error", None),
    *[(BATCHES, name, value, "validation_error", None) for name in ("input_file_id", "endpoint", "completion_window")
      for value in (MISSING, 7, "", None, [SECRET], SECRET * 50)],
    *[(BATCHES, "endpoint", value, "validation_error", None) for value in (BATCHES, TOKENIZE, "/v1/models", "v1/classify")],
    *[(BATCHES, "completion_window", value, "validation_error", None)
      for value in ("0h", "169h", "24", "1d", "024h", "24h ", "24h\n", "-1h", "２４h")],
    (BATCHES, "metadata", {"k": 1}, "validation_error", "metadata"),
    (BATCHES, "metadata", {SECRET * 9: "x"}, "validation_error", "metadata"),
    (BATCHES, "metadata", {str(n): "x" for n in range(17)}, "validation_error", None),
    (BATCHES, "metadata", {"k": SECRET * 99}, "validation_error", "metadata"),
    (BATCHES, "output_expires_after", SECRET, "validation_error", None),
    (BATCHES, "output_expires_after", {"anchor": "created_at"}, "validation_error", "output_expires_after.seconds"),
    (BATCHES, "output_expires_after", {"seconds": 3600}, "validation_error", "output_expires_after.anchor"),
    (BATCHES, "output_expires_after", {"anchor": SECRET, "seconds": 3600}, "validation_error",
     "output_expires_after.anchor"),
    *[(BATCHES, "output_expires_after", {"anchor": "created_at", "seconds": value}, "number_out_of_range",
       "output_expires_after.seconds") for value in (0, -1, 3599, 2_592_001)],
    (BATCHES, "output_expires_after", {"anchor": "created_at", "seconds": "3600"}, "validation_error",
     "output_expires_after.seconds"),
    (BATCHES, "priority", 1, "unknown_field", None),
    (TOKENIZE, "prompt", MISSING, "validation_error", None),
    (TOKENIZE, "prompt", [SECRET], "validation_error", None),
    (TOKENIZE, "messages", message(), "validation_error", "prompt"),
    (TOKENIZE, "add_generation_prompt", True, "validation_error", None),
    (TOKENIZE, "chat_template", SECRET, "unsupported_parameter", None),
    (DETOKENIZE, "tokens", MISSING, "validation_error", None),
    (DETOKENIZE, "tokens", SECRET, "validation_error", None),
    (DETOKENIZE, "tokens", [1, SECRET], "validation_error", "tokens.1"),
    (DETOKENIZE, "tokens", [-1], "number_out_of_range", "tokens.0"),
    *[(RESPONSES, field, value, "validation_error", None) for field, value in [
        ("input", MISSING), ("input", None), ("input", 7), ("input", []), ("input", [SECRET]), ("input", [None]),
        ("input", [{"role": SECRET, "content": SECRET}]), ("input", [{"content": SECRET}]),
        ("input", [{"role": "user"}]), ("input", [{"role": "user", "content": 7}]),
        ("input", [{"role": "user", "content": []}]), ("input", [{"role": "user", "content": [SECRET]}]),
        ("input", [{"role": "user", "content": [{"type": "input_text"}]}]),
        ("input", [{"role": "user", "content": [{"type": "input_text", "text": SECRET, SECRET: 1}]}]),
        ("input", [{"role": "user", "content": SECRET, SECRET: 1}]), ("input", [{"role": "user", "content": "x"}] * 2049),
        ("instructions", 7), ("previous_response_id", SECRET), ("previous_response_id", "resp_" + "0" * 31),
        ("previous_response_id", "resp_" + "g" * 32), ("background", 1), ("background", "true"), ("store", 0),
        ("stream", 1), ("include", SECRET), ("metadata", {"k": 1}), ("metadata", [SECRET]),
        ("user", "x" * 513), ("service_tier", "flex"), ("temperature", SECRET),
    ]],
    *[(RESPONSES, "input", [item], "validation_error", None) for item in [
        {"type": 7}, {"type": "function_call", "name": SECRET}, {"type": "function_call", "call_id": "c", "name": "f"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": SECRET},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "[]"},
        {"type": "function_call", "call_id": "c", "name": f"{SECRET}!", "arguments": "{}"},
        {"type": "function_call", "call_id": "c" * 513, "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", SECRET: 1},
        {"type": "function_call_output", "output": SECRET}, {"type": "function_call_output", "call_id": 7, "output": "x"},
        {"type": "function_call_output", "call_id": "c"}, {"type": "function_call_output", "call_id": "", "output": "x"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text"}]},
    ]],
    (RESPONSES, "tools", [{"type": "function", "name": SECRET + "!"}], "validation_error", "tools.0.name"),
    (RESPONSES, "tools", [{"type": "function", "function": {"name": "f"}}], "validation_error", "tools.0.name"),
    (RESPONSES, "tools", [{"type": "function", "name": "f", "defer_loading": True}], "unsupported_parameter",
     "tools.0.defer_loading"),
    (RESPONSES, "tools", [{"type": "function", "name": "f", "strict": True, "parameters": {"type": "array"}}],
     "validation_error", "tools.0.parameters"),
    (RESPONSES, "tools", [{"type": "function", "name": "f"}] * 129, "validation_error", None),
    (RESPONSES, "tool_choice", "required", "validation_error", None),
    (RESPONSES, "tool_choice", {"type": "function"}, "validation_error", None),
    (RESPONSES, "parallel_tool_calls", 1, "validation_error", None),
    (RESPONSES, "include", [SECRET], "validation_error", "include.0"),
    (RESPONSES, "text", {"format": {"type": SECRET}}, "validation_error", "text.format.type"),
    (RESPONSES, "text", {"format": SECRET}, "validation_error", "text.format"),
    (RESPONSES, "text", {"format": {"type": "json_schema", "schema": {}}}, "validation_error", "text.format.name"),
    (RESPONSES, "text", {"format": {"type": "json_object", "name": SECRET}}, "validation_error", "text.format.name"),
    (RESPONSES, "text", {"format": {"type": "json_schema", "name": "n"}}, "validation_error", "text.format.schema"),
    (RESPONSES, "text", {"verbosity": "low"}, "unsupported_parameter", "text.verbosity"),
    *[(RESPONSES, field, value, "unsupported_parameter", None) for field, value in [
        ("input", [{"type": "reasoning", "summary": [SECRET]}]), ("input", [{"type": "item_reference", "id": SECRET}]),
        ("input", [{"role": "user", "content": [{"type": "input_image", "image_url": SECRET}]}]),
        ("tools", [{"type": "web_search"}]), ("conversation", SECRET), ("prompt", {"id": SECRET}),
        ("reasoning", {"effort": "high"}), ("truncation", "auto"), ("max_tool_calls", 3),
    ]],
    *[(RESPONSES, field, value, "number_out_of_range", None) for field, value in [
        ("max_output_tokens", 0), ("temperature", 2.1), ("top_p", 0), ("top_logprobs", 21), ("top_logprobs", -1),
    ]],
]  # fmt: skip


@pytest.mark.parametrize(("endpoint", "field", "value", "code", "param"), WRONG_VALUES)
def test_wrong_value(endpoint: str, field: str, value: Any, code: str, param: str | None) -> None:
    body = VALID[endpoint] | {field: value}
    if value is MISSING:
        del body[field]
    check(refusal(endpoint, json.dumps(body).encode()), code, (field if param is None else param) or None)


TOGETHER: list[tuple[str, dict[str, Any], str, str | None]] = [
    (CHAT, {"max_tokens": 5, "max_completion_tokens": 6}, "validation_error", "max_tokens"),
    (CHAT, {"max_tokens": 7, "max_completion_tokens": 6}, "validation_error", "max_tokens"),
    (CHAT, {"max_tokens": 5, "min_tokens": 6}, "validation_error", "min_tokens"),
    (CHAT, {"max_completion_tokens": 5, "min_tokens": 6}, "validation_error", "min_tokens"),
    (CHAT, {"top_logprobs": 3}, "validation_error", "top_logprobs"),
    (CHAT, {"top_logprobs": 3, "logprobs": False}, "validation_error", "top_logprobs"),
    (CHAT, {"stream": False, "stream_options": {"include_usage": True}}, "validation_error", "stream_options"),
    (RESPONSES, {"tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": "function", "name": "SECRET"}},
     "validation_error", "tool_choice"),
    (RESPONSES, {"tools": [{"type": "function", "name": "f"}], "text": {"format": {"type": "json_object"}}},
     "unsupported_parameter", "text.format"),
    (CHAT, {"tools": [], "temperature": 3}, "number_out_of_range", "temperature"),
    (CHAT, {"tools": [], "functions": [{}]}, "unsupported_parameter", "functions"),
    (CHAT, {"tools": None, SECRET: 1}, "unknown_field", None),
    (CHAT, {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "SECRET"}}}, "validation_error",
     "tool_choice"),
    *[(CHAT, {"tools": [TOOL, {"type": "function", "function": {"name": "g", "parameters": schema}}],
              "tool_choice": "required"}, "validation_error", "tools.1.function.parameters")
      for schema in ({"type": "array"}, {"type": [SECRET]}, DEEP)],
    (CHAT, {"tools": [TOOL], "response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
    (CHAT, {"tools": [TOOL], "tool_choice": "required", "structured_outputs": {"regex": SECRET}},
     "unsupported_parameter", "structured_outputs"),
    (CHAT, {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": SECRET}}, "validation_error",
     "structured_outputs"),
    *[(endpoint, {"response_format": {"type": "json_object"}} | other, "unsupported_parameter", next(iter(other)))
      for endpoint in (CHAT, COMPLETIONS) for other in ({"ignore_eos": True}, {"min_tokens": 2})],
    (MESSAGES, {"tools": [{"name": "f", "input_schema": DEEP}], "tool_choice": {"type": "any"}}, "validation_error",
     "tools.0.input_schema"),
    (MESSAGES, {"tools": [{"name": "f", "input_schema": {}}],
                "output_config": {"format": {"type": "json_schema", "schema": {}}}}, "unsupported_parameter",
     "output_config"),
    (MESSAGES, {"tools": [{"name": "f", "input_schema": {}}], "tool_choice": {"type": "tool", "name": "SECRET"}},
     "validation_error", "tool_choice"),
    (COMPLETIONS, {"echo": True, "logprobs": 1}, "unsupported_parameter", "echo"),
    (COMPLETIONS, {"n": 2, "best_of": 3}, "unsupported_parameter", "best_of"),
    (COMPLETIONS, {"n": 2, "best_of": 1}, "unsupported_parameter", "best_of"),
    (COMPLETIONS, {"prompt": ["x"] * 200, "n": 16}, "validation_error", "prompt"),
    (RESPONSES, {"background": True, "store": False}, "validation_error", "background"),
    (RESPONSES, {"stream_options": {}}, "validation_error", "stream_options"),
    (TOKENIZE, {"prompt": None, "messages": message(), "add_special_tokens": True}, "validation_error",
     "add_special_tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("endpoint", "changes", "code", "param"), TOGETHER)
def test_fields_that_contradict(endpoint: str, changes: dict[str, Any], code: str, param: str | None) -> None:
    check(refusal(endpoint, json.dumps(VALID[endpoint] | changes).encode()), code, param)


@pytest.mark.parametrize("endpoint", VALID)
@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda text: text[:-1], "invalid_json"),
        (lambda text: text + b"}", "invalid_json"),
        (lambda text: b"[" + text + b"]", "invalid_json"),
        (lambda text: text[:-1] + b',"model":"m","model":"m"}', "duplicate_key"),
        (lambda text: text[:-1] + b',"temperature":NaN}', "non_finite_number"),
        (lambda text: text[:-1] + b',"temperature":1e999}', "non_finite_number"),
        (lambda text: text[:-1] + b',"seed":99999999999999999999}', "number_out_of_range"),
        (lambda text: text.replace(b"SECRET", b"SECRET\\u0000"), "invalid_encoding"),
        (lambda text: text.replace(b"SECRET", b"SECRET\\ud83d"), "invalid_encoding"),
        (lambda text: text.replace(b"SECRET", b"SECRET\xfe"), "invalid_encoding"),
        (lambda text: text.decode().encode("utf-16"), "invalid_encoding"),
        (lambda text: text[:-1] + b',"a":' + b"[" * 40 + b"]" * 40 + b"}", "json_too_deep"),
    ],
)
def test_spoiled_text(endpoint: str, spoil: Any, code: str) -> None:
    body = json.dumps(VALID[endpoint] | ({"user": SECRET} if endpoint == DETOKENIZE else {})).encode()
    check(refusal(endpoint, spoil(body)), code, None)


@pytest.mark.parametrize("endpoint", VALID)
def test_the_bodies_that_the_cases_spoil_are_valid(endpoint: str) -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        refusal(endpoint, json.dumps(VALID[endpoint]).encode())


def test_there_are_many() -> None:
    assert len(WRONG_VALUES) > 300
    assert len({str(case) for case in WRONG_VALUES}) == len(WRONG_VALUES)
