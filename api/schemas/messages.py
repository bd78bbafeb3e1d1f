"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's requests."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from api import grammars
from api.schemas.fields import (
    MAX_TOOLS,
    NOTHING,
    CallModel,
    EchoOptions,
    FunctionName,
    Label,
    ModelName,
    WireModel,
)
from api.schemas.sampling import canonical
from api.schemas.structured import JSONSchema
from api.schemas.tools import Function, form_of_calls
from tasks.call import Call
from tasks.identity import MESSAGES


def _as_blocks(value: Any) -> Any:
    """Text alone is one block of text."""
    return [{"type": "text", "text": value}] if type(value) is str else value


def _check_kinds(value: Any) -> Any:
    """Names what is known of Anthropic's blocks and cannot be honoured."""
    for block in value if type(value) is list else ():
        if type(block) is dict and type(block.get("type")) is str and block["type"] not in _KINDS:
            raise PydanticCustomError("unsupported_parameter", "can only have blocks of text and of tools")
    return value


_KINDS = {"text", "tool_use", "tool_result"}


class CacheControl(WireModel):
    """Where Anthropic would cache a prompt. The runtimes here do that by themselves."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(WireModel):
    """Text."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None


class ToolUseBlock(WireModel):
    """A call in an earlier answer."""

    type: Literal["tool_use"]
    id: Label
    name: FunctionName
    input: dict[str, Any]
    cache_control: CacheControl | None = None


_TEXT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
        },
    ]
}
Text = Annotated[
    list[TextBlock], BeforeValidator(_check_kinds), BeforeValidator(_as_blocks), WithJsonSchema(_TEXT_SCHEMA)
]


class ToolResultBlock(WireModel):
    """What a tool answered."""

    type: Literal["tool_result"]
    tool_use_id: Label
    content: Text | None = None
    is_error: bool | None = Field(None, description="Accepted; the content tells the model.")
    cache_control: CacheControl | None = None


_Block = Annotated[TextBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]
_BLOCKS_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "minItems": 1,
            "items": {"type": "object", "properties": {"type": {"enum": sorted(_KINDS)}}, "required": ["type"]},
        },
    ]
}


def _joined(blocks: list[TextBlock] | None) -> str:
    return "".join(block.text for block in blocks or ())


class MessageParam(WireModel):
    """One message."""

    role: Literal["user", "assistant"]
    content: Annotated[
        list[_Block],
        BeforeValidator(_check_kinds),
        BeforeValidator(_as_blocks),
        Field(min_length=1),
        WithJsonSchema(_BLOCKS_SCHEMA),
    ]

    @model_validator(mode="after")
    def _blocks_fit_the_role(self) -> "MessageParam":
        foreign = ToolResultBlock if self.role == "assistant" else ToolUseBlock
        if any(isinstance(block, foreign) for block in self.content):
            raise PydanticCustomError(
                "at:content", "may have tool_use only from the assistant, tool_result from the user"
            )
        return self

    def as_chat(self) -> Iterator[dict[str, Any]]:
        """What a chat template knows: the tools' answers, each a message of its own, and then the text."""
        text = _joined([block for block in self.content if isinstance(block, TextBlock)])
        calls = [
            {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}
            for block in self.content
            if isinstance(block, ToolUseBlock)
        ]
        results = [block for block in self.content if isinstance(block, ToolResultBlock)]
        for block in results:
            yield {"role": "tool", "content": _joined(block.content), "tool_call_id": block.tool_use_id}
        if calls:
            yield {"role": self.role, "content": text, "tool_calls": calls}
        elif text or not results:
            yield {"role": self.role, "content": text}


class ToolParam(WireModel):
    """A function, as a model is told of it."""

    name: FunctionName
    description: Annotated[str, Field(max_length=16_384)] | None = None
    input_schema: Annotated[
        dict[str, Any], Field(description="JSON Schema. Enforced if strict, or where tool_choice is any or tool.")
    ]
    strict: bool | None = Field(None, description="Whether every use is valid by the schema.")
    type: Literal["custom"] | None = None
    cache_control: CacheControl | None = None

    def as_dict(self) -> dict[str, Any]:
        """The definition as chat templates expect it."""
        given = {"name": self.name, "description": self.description or "", "parameters": self.input_schema}
        return {"type": "function", "function": given}


class ToolChoice(WireModel):
    """Whether to call tools."""

    type: Literal["auto", "none", "any", "tool"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _type_and_name_agree(self) -> "ToolChoice":
        if (self.name is not None) != (self.type == "tool"):
            raise PydanticCustomError("at:name", "is required with type tool, and only there")
        return self


class OutputFormat(WireModel):
    """JSON that is valid by a schema."""

    type: Literal["json_schema"]
    schema_: JSONSchema = Field(alias="schema")


class OutputConfig(WireModel):
    """What the text must look like."""

    format: OutputFormat | None = None


class MessageMetadata(WireModel):
    """About the request."""

    user_id: Label | None = None


_NO_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "thinking": (None, {"type": "disabled"}),
    "output_config": (None, {}),
    "context_management": NOTHING,
    "mcp_servers": (None, []),
    "container": NOTHING,
    "diagnostics": NOTHING,
    "inference_geo": NOTHING,
    "speed": (None, "standard"),
    "user_profile_id": NOTHING,
    "workspace_id": NOTHING,
    "tools.input_examples": (None, []),
    "cache_control": (None, {"type": "ephemeral"}),
    "messages.content.citations": NOTHING,
    "messages.content.text.citations": NOTHING,
    "system.citations": NOTHING,
}


class CountTokensRequest(WireModel):
    """A message's request, as far as its prompt goes."""

    model: ModelName
    messages: Annotated[list[MessageParam], Field(min_length=1, max_length=2048)]
    system: Text | None = None
    tools: Annotated[list[ToolParam], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None

    no_effect: ClassVar = _NO_EFFECT

    @model_validator(mode="after")
    def _the_user_speaks_last(self) -> "CountTokensRequest":
        _check_last(self.messages)
        return self

    def chat(self) -> list[dict[str, Any]]:
        """The messages as a chat template knows them."""
        return _chat(self.system, self.messages)

    def tool_definitions(self) -> list[dict[str, Any]] | None:
        """The tools as a chat template knows them."""
        return _definitions(self.tools, self.tool_choice)


class MessagesRequest(CallModel):
    """Text in, text and uses of tools out."""

    model: ModelName
    messages: Annotated[list[MessageParam], Field(min_length=1, max_length=2048)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)]
    system: Text | None = None
    stop_sequences: (
        Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=16)] | None
    ) = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000, description="0: all tokens.")] | None = None
    tools: Annotated[list[ToolParam], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    metadata: MessageMetadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    output_config: OutputConfig | None = None
    options: EchoOptions | None = None

    text_fields: ClassVar = ("messages",)
    no_effect: ClassVar = {name: idle for name, idle in _NO_EFFECT.items() if name != "output_config"} | {
        "output_config.effort": NOTHING
    }

    @model_validator(mode="after")
    def _the_user_speaks_last(self) -> "MessagesRequest":
        _check_last(self.messages)
        return self

    @model_validator(mode="after")
    def _the_form_can_be_kept(self) -> "MessagesRequest":
        if self.tool_choice is not None and self.tool_choice.type in ("any", "tool") and not self.tools:
            raise PydanticCustomError("tool_choice", "is only allowed with tools")
        if self.output_config is not None and self.output_config.format is not None:
            if self.tools and (self.tool_choice is None or self.tool_choice.type != "none"):
                raise PydanticCustomError("unsupported:output_config", "cannot be combined with tools")
        elif (constraint := self.constraint()) is not None and len(constraint[0]) > grammars.MAX_CHARS:
            raise PydanticCustomError(constraint[1], "asks for too large a form")
        return self

    def constraint(self) -> tuple[str, str] | None:
        """What the text must look like, as a grammar, and the field that says so."""
        if self.output_config is not None and self.output_config.format is not None:
            return grammars.of_schema(self.output_config.format.schema_), "output_config"
        choice = self.tool_choice
        if not self.tools or (choice is not None and choice.type == "none"):
            return None
        is_forced = choice is not None and choice.type in ("any", "tool")
        is_single = choice is not None and (choice.type == "tool" or bool(choice.disable_parallel_tool_use))
        functions = [Function(tool.name, tool.input_schema, bool(tool.strict)) for tool in self.tools]
        name = None if choice is None else choice.name
        return form_of_calls(functions, "tools.{}.input_schema", is_forced=is_forced, name=name, is_single=is_single)

    def to_call(self) -> Call:
        sampling = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p")}
        shape: dict[str, Any] = {}
        given: dict[str, Any] = {}
        if (constraint := self.constraint()) is not None:
            given["grammar"], shape["constrained_by"] = constraint
        if tools := _definitions(self.tools, self.tool_choice):
            shape["tools"] = tools
            if self.tool_choice is not None and self.tool_choice.disable_parallel_tool_use:
                shape["most_tool_calls"] = 1
        return Call(
            endpoint=MESSAGES,
            task=self.task,
            model=self.model,
            messages=_chat(self.system, self.messages),
            max_tokens=self.max_tokens,
            params=canonical(sampling, given),
            stop=sorted(set(self.stop_sequences or ())),
            stream=bool(self.stream),
            format=shape,
            options=self.options.given() if self.options else {},
        )


def _check_last(messages: list[MessageParam]) -> None:
    if messages[-1].role == "assistant":
        raise PydanticCustomError("unsupported:messages", "cannot end with the assistant's: answers are not prefilled")


def _chat(system: list[TextBlock] | None, messages: list[MessageParam]) -> list[dict[str, Any]]:
    first = [{"role": "system", "content": _joined(system)}] if system else []
    return [*first, *(made for message in messages for made in message.as_chat())]


def _definitions(tools: list[ToolParam] | None, choice: ToolChoice | None) -> list[dict[str, Any]] | None:
    if not tools or (choice is not None and choice.type == "none"):
        return None
    return [tool.as_dict() for tool in tools]
