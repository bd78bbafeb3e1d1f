"""The items of a response's input: messages, calls of functions and what these gave, as the chat that they stand for.

A chat keeps calls with the message before them, which is how chat templates show them; `tasks.response_object` takes
it apart into items again.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import orjson
from pydantic import BeforeValidator, Field, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError

from api.schemas.fields import FunctionCall

_ROLES = {"user", "assistant", "system", "developer"}
_PARTS = {"input_text", "output_text", "text"}
_MOST_ITEMS = 2048
_MOST_CHARS = 512


def _as_chat(value: Any) -> Any:
    """A text, or items as clients write them or got them from an earlier response, as
    [{"role", "content"}, …], some with `tool_calls` or `tool_call_id`."""
    if type(value) is str:
        value = [{"role": "user", "content": value}]
    if type(value) is not list or not value:
        raise PydanticCustomError("validation_error", "must be a string or a list of items")
    messages: list[dict[str, Any]] = []
    for item in value:
        message = _as_message(item)
        if "tool_calls" in message and messages and messages[-1]["role"] == "assistant":
            messages[-1].setdefault("tool_calls", []).extend(message["tool_calls"])
        else:
            messages.append(message)
    return messages


def _as_message(item: Any) -> dict[str, Any]:
    if type(item) is not dict or type(kind := item.get("type", "message")) is not str:
        raise PydanticCustomError("validation_error", "must have only objects with a type")
    if kind not in _READERS:
        raise PydanticCustomError(
            "unsupported_parameter", "can only have items of type message, function_call and function_call_output"
        )
    # What an answer's own items carry beside these means nothing on the way back.
    fields, read = _READERS[kind]
    if {name for name, value in item.items() if value is not None} - fields - {"type", "id", "status"}:
        raise PydanticCustomError("validation_error", f"must have items of type {kind} with nothing but its fields")
    return read(item)


def _as_turn(item: Mapping[str, Any]) -> dict[str, Any]:
    if type(item.get("role")) is not str or item["role"] not in _ROLES:
        raise PydanticCustomError("validation_error", "must have messages of user, assistant, system or developer")
    return {"role": item["role"], "content": _text_of(item.get("content"))}


def _as_call(item: Mapping[str, Any]) -> dict[str, Any]:
    try:
        call = FunctionCall.model_validate({name: item.get(name) for name in ("name", "arguments")})
    except ValidationError:
        raise PydanticCustomError(
            "validation_error", "must have a function's name and a JSON object, as text, as arguments in each call"
        ) from None
    function = {"name": call.name, "arguments": orjson.loads(call.arguments)}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": _call_id(item), "type": "function", "function": function}],
    }


def _as_output(item: Mapping[str, Any]) -> dict[str, Any]:
    return {"role": "tool", "content": _text_of(item.get("output")), "tool_call_id": _call_id(item)}


def _call_id(item: Mapping[str, Any]) -> str:
    found = item.get("call_id")
    if type(found) is not str or not 0 < len(found) <= _MOST_CHARS:
        raise PydanticCustomError(
            "validation_error", f"must have a call_id of 1 to {_MOST_CHARS} characters in each call"
        )
    return found


def _text_of(content: Any) -> str:
    if type(content) is str:
        return content
    if type(content) is not list or not content:
        raise PydanticCustomError("validation_error", "must have a text or a list of parts as each content")
    for part in content:
        if type(part) is not dict or type(part.get("type")) is not str:
            raise PydanticCustomError("validation_error", "must have parts that are objects with a type")
        if part["type"] not in _PARTS:
            raise PydanticCustomError("unsupported_parameter", "can only have text parts")
        if part.keys() - {"type", "text", "annotations", "logprobs"} or type(part.get("text")) is not str:
            raise PydanticCustomError("validation_error", "must have text parts of a type and a text, no more")
    return "".join(part["text"] for part in content)


_READERS: Mapping[str, tuple[set[str], Callable[[Mapping[str, Any]], dict[str, Any]]]] = {
    "message": ({"role", "content", "phase"}, _as_turn),
    "function_call": ({"call_id", "name", "arguments"}, _as_call),
    "function_call_output": ({"call_id", "output"}, _as_output),
}
"""Type of an item → its fields, and what makes a message of it."""

_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"enum": sorted(_PARTS)}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_CONTENT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA, "minItems": 1}]}
_CALL_ID_SCHEMA = {"type": "string", "minLength": 1, "maxLength": _MOST_CHARS}


def _item_schema(kind: str, required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"type": {"const": kind}, **properties}, "required": required}


_INPUT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "anyOf": [
                    _item_schema("message", ["role", "content"], role={"enum": sorted(_ROLES)},
                                 content=_CONTENT_SCHEMA),
                    _item_schema("function_call", ["type", "call_id", "name", "arguments"], call_id=_CALL_ID_SCHEMA,
                                 name={"type": "string"}, arguments={"type": "string"}),
                    _item_schema("function_call_output", ["type", "call_id", "output"], call_id=_CALL_ID_SCHEMA,
                                 output=_CONTENT_SCHEMA),
                ]
            },
        },
    ]
}  # fmt: skip

Items = Annotated[
    list[dict[str, Any]], BeforeValidator(_as_chat), Field(max_length=_MOST_ITEMS), WithJsonSchema(_INPUT_SCHEMA)
]
