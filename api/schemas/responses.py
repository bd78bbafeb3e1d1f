"""POST /v1/responses: OpenAI's request, for text in and text out."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from api import grammars
from api.schemas.fields import COMMON_NO_EFFECT, NOTHING, EchoOptions, Label, Metadata, ModelName, WireModel
from api.schemas.sampling import given_params
from api.schemas.structured import JSONSchema
from api.schemas.webhooks import ResponseWebhook
from tasks.call import Call

_ROLES = {"user", "assistant", "system", "developer"}
_PARTS = {"input_text", "output_text", "text"}
_MOST_ITEMS = 2048

ResponseId = Annotated[str, Field(pattern=r"^resp_[0-9a-f]{32}$")]


def _as_messages(value: Any) -> Any:
    """A text, or items of type message as clients write them or got them from an earlier response, as
    [{"role", "content"}, …]."""
    if type(value) is str:
        value = [{"role": "user", "content": value}]
    if type(value) is not list or not value:
        raise PydanticCustomError("validation_error", "must be a string or a list of messages")
    return [_as_message(item) for item in value]


def _as_message(item: Any) -> dict[str, str]:
    if type(item) is not dict:
        raise PydanticCustomError("validation_error", "must have only objects")
    if item.get("type", "message") != "message":
        raise PydanticCustomError("unsupported_parameter", "can only have items of type message")
    # What an answer's own items carry beside role and content means nothing on the way back.
    if item.keys() - {"type", "role", "content", "id", "status", "phase"}:
        raise PydanticCustomError("validation_error", "must have messages of a role and a content, no more")
    if type(item.get("role")) is not str or item["role"] not in _ROLES:
        raise PydanticCustomError("validation_error", "must have messages of user, assistant, system or developer")
    return {"role": item["role"], "content": _text_of(item.get("content"))}


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


_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"enum": sorted(_PARTS)}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_INPUT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {
                    "type": {"const": "message"},
                    "role": {"enum": sorted(_ROLES)},
                    "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA, "minItems": 1}]},
                },
                "required": ["role", "content"],
            },
        },
    ]
}

Messages = Annotated[
    list[dict[str, str]], BeforeValidator(_as_messages), Field(max_length=_MOST_ITEMS), WithJsonSchema(_INPUT_SCHEMA)
]


class TextFormat(WireModel):
    """Text, any JSON object, or JSON that is valid by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    description: Annotated[str, Field(max_length=16_384)] | None = None
    schema_: JSONSchema | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="Either way the schema is enforced as it stands.")

    @model_validator(mode="after")
    def _type_and_schema_agree(self) -> "TextFormat":
        for field, value in (("name", self.name), ("schema", self.schema_)):
            if (value is not None) != (self.type == "json_schema"):
                raise PydanticCustomError(f"at:{field}", "is required with type json_schema, and only there")
        return self

    @property
    def grammar(self) -> str | None:
        """None: any text."""
        if self.schema_ is not None:
            return grammars.of_schema(self.schema_)
        return None if self.type == "text" else grammars.of_any_object()


class TextConfig(WireModel):
    """The form of the answer."""

    format: TextFormat | None = None


class ResponseStreamOptions(WireModel):
    """Known, without effect."""

    include_obfuscation: bool | None = None


class ResponseRequest(WireModel):
    """What the answer is made from and how. `store` is true where it is not named, as with OpenAI."""

    model: ModelName
    input: Messages
    instructions: str | None = None
    previous_response_id: ResponseId | None = None
    background: bool | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000, description="0 or -1: all tokens.")] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: Annotated[list[Literal["message.output_text.logprobs"]], Field(max_length=16)] | None = None
    text: TextConfig | None = None
    metadata: Metadata | None = None
    webhook: ResponseWebhook | None = None
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    service_tier: Literal["auto", "default"] | None = None
    options: EchoOptions | None = None

    no_effect: ClassVar = {
        **COMMON_NO_EFFECT,
        "access_programs": NOTHING,
        "background_options": NOTHING,
        "image": NOTHING,
        "conversation": NOTHING,
        "max_tool_calls": NOTHING,
        "moderation": NOTHING,
        "parallel_tool_calls": (None, True, False),
        "prompt": NOTHING,
        "prompt_cache_options": NOTHING,
        "prompt_cache_retention": NOTHING,
        "reasoning": (None, {}, {"effort": "none"}, {"effort": None}),
        "text.verbosity": (None, "medium"),
        "tool_choice": (None, "none", "auto"),
        "tools": (None, []),
        "truncation": (None, "disabled"),
        "context_management": (None, []),
    }

    @model_validator(mode="after")
    def _fields_agree(self) -> "ResponseRequest":
        if self.background and self.store is False:
            raise PydanticCustomError("background", "needs a stored response, which store: false forbids")
        if self.webhook is not None and not self.background:
            raise PydanticCustomError("webhook", "is only allowed with background: true")
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "is only allowed with stream: true")
        return self

    @property
    def is_stored(self) -> bool:
        return self.store is not False

    def to_call(self, context: list[dict[str, str]] | None = None) -> Call:
        """`context` are the turns of the responses before."""
        wants_logprobs = self.top_logprobs is not None or bool(self.include)
        logprobs = (self.top_logprobs or 0) if wants_logprobs else None
        opening = [{"role": "system", "content": self.instructions}] if self.instructions else []
        context = context or []
        shape: dict[str, Any] = {"response": self._kept(context)}
        params = given_params(self, logprobs)
        if (form := self._form) is not None and form.grammar is not None:
            params["grammar"], shape["constrained_by"] = form.grammar, "text.format"
        return Call(
            endpoint="/v1/responses",
            task="generate",
            model=self.model,
            messages=[*opening, *map(_as_template_knows, [*context, *self.input])],
            max_tokens=self.max_output_tokens,
            params=params,
            stream=bool(self.stream),
            format=shape,
            options=self.options.given() if self.options else {},
        )

    @property
    def _form(self) -> TextFormat | None:
        return None if self.text is None else self.text.format

    def _kept(self, context: list[dict[str, str]]) -> dict[str, Any]:
        """What the response shows of its request. Text is kept of stored responses only."""
        kept: dict[str, Any] = {
            "background": bool(self.background),
            "store": self.is_stored,
            "max_output_tokens": self.max_output_tokens,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_logprobs": self.top_logprobs or 0,
        }
        if self._form is not None and self._form.type != "text":
            kept["text_format"] = self._form.model_dump(by_alias=True, exclude_none=True)
        if self.is_stored:
            kept |= {
                "instructions": self.instructions,
                "previous_response_id": self.previous_response_id,
                "context": context,
                "input": self.input,
            }
        return kept


def _as_template_knows(message: dict[str, str]) -> dict[str, str]:
    """`developer` is the newer name of `system`; chat templates know only the older."""
    return message | {"role": "system"} if message["role"] == "developer" else message
