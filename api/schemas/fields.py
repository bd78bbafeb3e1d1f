"""What the wire models share: their strictness, the bounds of common fields, and texts in their forms."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from api import decoding, errors
from catalog import LimitsEntry, Task
from tasks.call import Call

MAX_TOKEN_ID = 2**31 - 1
MAX_TOOLS = 128
_LIMITS = LimitsEntry()


class WireModel(BaseModel):
    """An object of the wire. JSON types are not converted into each other, unknown fields are refused,
    and null stands for "not given"."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    no_effect: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Known fields that cannot be honoured, by dotted path without indices, and the values that ask for
    nothing. Looked at only when validation has failed, so that they cost other requests nothing."""


class CallModel(WireModel, ABC):
    """The body of an inference endpoint."""

    task: ClassVar[Task] = "generate"
    text_fields: ClassVar[tuple[str, ...]] = ("input",)
    """The field that the call's inputs come from; or that of its queries, and that of its documents."""

    @abstractmethod
    def to_call(self) -> Call:
        """The same value for every body that means the same."""


NOTHING = (None,)
FALSE = (None, False)

COMMON_NO_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "truncate_prompt_tokens": NOTHING,
    "truncation_side": NOTHING,
    "priority": (None, 0),
    "request_id": NOTHING,
    "cache_salt": NOTHING,
    "mm_processor_kwargs": NOTHING,
}
"""vLLM's fields of every task."""


def _join_parts(value: Any) -> Any:
    """Content as one string. Text parts are joined as they are, without a separator."""
    if type(value) is not list:
        return value
    if not value:
        raise PydanticCustomError("validation_error", "must have at least one part")
    for part in value:
        if type(part) is not dict or type(part.get("type")) is not str:
            raise PydanticCustomError("validation_error", "parts must be objects with a type")
        if part["type"] not in {"text", "input_text"}:
            raise PydanticCustomError("unsupported_parameter", "can only have text parts")
        if part.keys() != {"type", "text"} or type(part["text"]) is not str:
            raise PydanticCustomError("validation_error", "text parts must have a type and a text, no more")
    return "".join(part["text"] for part in value)


def _as_inputs(value: Any) -> Any:
    """One text, many texts, one list of token ids or many, as a list of texts or of lists."""
    if type(value) is str:
        value = [value]
    if type(value) is not list:
        raise PydanticCustomError("validation_error", "must be a string, or a list of strings or of token ids")
    if not value:
        raise PydanticCustomError("invalid_prompt", "must not be empty")
    kinds = set(map(type, value))
    if kinds == {int}:
        value, kinds = [value], {list}
    if kinds == {str}:
        if "" in value:
            raise PydanticCustomError("invalid_prompt", "must not have empty strings")
    elif kinds == {list}:
        for tokens in value:
            _check_tokens(tokens)
    else:
        raise PydanticCustomError("validation_error", "must be a string, or a list of strings or of token ids")
    return value


def _check_tokens(tokens: list[Any]) -> None:
    if not tokens:
        raise PydanticCustomError("invalid_prompt", "must not have empty lists of token ids")
    if set(map(type, tokens)) != {int}:
        raise PydanticCustomError("validation_error", "must have only integers in a list of token ids")
    if min(tokens) < 0 or max(tokens) > MAX_TOKEN_ID:
        raise PydanticCustomError("number_out_of_range", "has a token id that no vocabulary has")


def _as_documents(value: Any) -> Any:
    """Documents as texts; `{"text": …}` is Cohere's other way to write one."""
    if type(value) is not list:
        raise PydanticCustomError("validation_error", "must be a list of strings")
    texts = [item["text"] if type(item) is dict and item.keys() == {"text"} else item for item in value]
    if set(map(type, texts)) - {str}:
        raise PydanticCustomError("validation_error", 'must have only strings, or objects {"text": string}')
    if "" in texts:
        raise PydanticCustomError("invalid_prompt", "must not have empty strings")
    return texts


def _as_list(value: Any) -> Any:
    return [value] if type(value) is str else value


_TOKENS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_INPUTS_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        _TOKENS_SCHEMA,
        {"type": "array", "items": _TOKENS_SCHEMA, "minItems": 1},
    ]
}
_TEXTS_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
    ]
}
_CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
                "additionalProperties": False,
            },
        },
    ]
}
_DOCUMENTS_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "items": {
        "anyOf": [
            {"type": "string", "minLength": 1},
            {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
        ]
    },
}

ModelName = Annotated[str, Field(min_length=1, max_length=256, description="A model, an alias, or auto.")]
Content = Annotated[str, BeforeValidator(_join_parts), WithJsonSchema(_CONTENT_SCHEMA)]
Inputs = Annotated[list[Any], BeforeValidator(_as_inputs), WithJsonSchema(_INPUTS_SCHEMA)]
Documents = Annotated[list[Any], BeforeValidator(_as_documents), Field(min_length=1), WithJsonSchema(_DOCUMENTS_SCHEMA)]
OneOrMore = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(_as_list),
    Field(min_length=1),
    WithJsonSchema(_TEXTS_SCHEMA),
]
Stop = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=256)]], BeforeValidator(_as_list), Field(max_length=16)
]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
Label = Annotated[str, Field(max_length=512)]
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Metadata = Annotated[dict[Annotated[str, Field(max_length=64)], Label], Field(max_length=16)]


class EchoOptions(WireModel):
    """How the echo runtime should behave. No other runtime has options."""

    first_token_ms: Annotated[float, Field(ge=0, le=600_000)] | None = None
    token_ms: Annotated[float, Field(ge=0, le=600_000)] | None = None
    num_tokens: Annotated[int, Field(ge=1, le=131_072)] | None = None
    fail: Literal["error", "invalid", "dead", "exit", "hang"] | None = None
    fail_after: Annotated[int, Field(ge=0, le=131_072)] | None = None

    def given(self) -> dict[str, str | int | float]:
        """Those that change something: a delay of 0 does not."""
        return {name: value for name, value in self if value}


class FunctionCall(WireModel):
    """What a function was called with."""

    name: FunctionName
    arguments: Annotated[str, Field(description="A JSON object, as text.")]

    @field_validator("arguments")
    @classmethod
    def _is_an_object(cls, value: str) -> str:
        try:
            decoding.decode(value.encode(), _LIMITS)
        except errors.APIError:
            raise PydanticCustomError("validation_error", "must be a JSON object, as text") from None
        return value


class ToolCall(WireModel):
    """A call in an earlier answer."""

    id: Label
    type: Literal["function"]
    function: FunctionCall

    def as_dict(self) -> dict[str, Any]:
        """Arguments as an object, as chat templates expect them."""
        function = {"name": self.function.name, "arguments": orjson.loads(self.function.arguments)}
        return {"id": self.id, "type": self.type, "function": function}


class Message(WireModel):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Label | None = None

    @model_validator(mode="after")
    def _fields_fit_the_role(self) -> "Message":
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("at:tool_calls", "is only allowed in messages of the assistant")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise PydanticCustomError("at:tool_call_id", "is required in messages of tools, and only there")
        if self.content is None and not self.tool_calls:
            raise PydanticCustomError("at:content", "must be a string, or a list of text parts")
        return self

    def as_dict(self) -> dict[str, Any]:
        """`developer` is the newer name of `system`; chat templates know only the older."""
        made: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.content or "",
        }
        if self.tool_calls:
            made["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        if self.tool_call_id is not None:
            made["tool_call_id"] = self.tool_call_id
        return made


Messages = Annotated[list[Message], Field(min_length=1, max_length=2048)]

MESSAGE_NO_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "messages.name": NOTHING,
    "messages.refusal": NOTHING,
    "messages.audio": NOTHING,
    "messages.annotations": (None, []),
    "messages.function_call": NOTHING,
    "messages.reasoning": NOTHING,
    "messages.reasoning_content": NOTHING,
}
"""Fields of an answer's message that clients send back as they got them."""
