"""POST /v1/responses: OpenAI's request, for text in, and text and calls of functions out."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from api import grammars
from api.schemas.fields import (
    COMMON_NO_EFFECT,
    FALSE,
    MAX_TOOLS,
    NOTHING,
    EchoOptions,
    Label,
    Metadata,
    ModelName,
    WireModel,
)
from api.schemas.response_items import Items
from api.schemas.sampling import given_params
from api.schemas.structured import JSONSchema
from api.schemas.tools import FunctionDefinition, NamedFunction, form_of_calls
from api.schemas.webhooks import ResponseWebhook
from tasks.call import Call

ResponseId = Annotated[str, Field(pattern=r"^resp_[0-9a-f]{32}$")]


class ResponseTool(FunctionDefinition):
    """A function, without Chat Completions' wrapping."""

    type: Literal["function"]

    def shown(self) -> dict[str, Any]:
        """The definition as a response repeats it."""
        return {
            "type": self.type,
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
            "strict": bool(self.strict),
        }


class ChosenFunction(NamedFunction):
    """The function that must be called."""

    type: Literal["function"]


def _check_kinds(value: Any) -> Any:
    """Names what is known of OpenAI's tools and cannot be honoured."""
    for tool in value if type(value) is list else ():
        if type(tool) is dict and type(tool.get("type")) is str and tool["type"] != "function":
            raise PydanticCustomError("unsupported_parameter", "can only have tools of type function")
    return value


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
    input: Items
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
    tools: (
        Annotated[
            list[ResponseTool],
            BeforeValidator(_check_kinds),
            Field(max_length=MAX_TOOLS, description="For models whose chat template knows tools."),
        ]
        | None
    ) = None
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | None = None
    parallel_tool_calls: bool | None = None
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
        "prompt": NOTHING,
        "prompt_cache_options": NOTHING,
        "prompt_cache_retention": NOTHING,
        "reasoning": (None, {}, {"effort": "none"}, {"effort": None}),
        "text.verbosity": (None, "medium"),
        "tools.async": FALSE,
        "tools.allowed_callers": (None, ["direct"]),
        "tools.defer_loading": FALSE,
        "tools.output_schema": NOTHING,
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

    @model_validator(mode="after")
    def _the_form_can_be_kept(self) -> "ResponseRequest":
        if self._is_call_forced and not self.tools:
            raise PydanticCustomError("tool_choice", "is only allowed with tools")
        if self._callable and self._form is not None and self._form.grammar is not None:
            raise PydanticCustomError("unsupported:text.format", "cannot be combined with tools")
        if (constraint := self.constraint()) is not None and len(constraint[0]) > grammars.MAX_CHARS:
            raise PydanticCustomError(constraint[1], "asks for too large a form")
        return self

    def constraint(self) -> tuple[str, str] | None:
        """What the text must look like, as a grammar, and the field that says so."""
        if self._callable:
            name = self.tool_choice.name if isinstance(self.tool_choice, ChosenFunction) else None
            is_single = name is not None or self.parallel_tool_calls is False
            functions = [tool.as_function() for tool in self._callable]
            where = "tools.{}.parameters"
            return form_of_calls(functions, where, is_forced=self._is_call_forced, name=name, is_single=is_single)
        grammar = None if self._form is None else self._form.grammar
        return None if grammar is None else (grammar, "text.format")

    @property
    def is_stored(self) -> bool:
        return self.store is not False

    def to_call(self, context: list[dict[str, Any]] | None = None) -> Call:
        """`context` are the turns of the responses before."""
        wants_logprobs = self.top_logprobs is not None or bool(self.include)
        logprobs = (self.top_logprobs or 0) if wants_logprobs else None
        opening = [{"role": "system", "content": self.instructions}] if self.instructions else []
        context = context or []
        shape: dict[str, Any] = {"response": self._kept(context)}
        params = given_params(self, logprobs)
        if (constraint := self.constraint()) is not None:
            params["grammar"], shape["constrained_by"] = constraint
        if self._callable:
            shape["tools"] = [tool.as_dict() for tool in self._callable]
            if self.parallel_tool_calls is False:
                shape["most_tool_calls"] = 1
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
    def _callable(self) -> list[ResponseTool]:
        """The functions that the model may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def _is_call_forced(self) -> bool:
        return self.tool_choice not in (None, "none", "auto")

    @property
    def _form(self) -> TextFormat | None:
        return None if self.text is None else self.text.format

    @property
    def _shown_choice(self) -> str | dict[str, str]:
        choice = self.tool_choice
        return {"type": choice.type, "name": choice.name} if isinstance(choice, ChosenFunction) else choice or "auto"

    def _kept(self, context: list[dict[str, Any]]) -> dict[str, Any]:
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
                "tools": [tool.shown() for tool in self.tools or ()],
                "tool_choice": self._shown_choice,
                "parallel_tool_calls": self.parallel_tool_calls is not False,
            }
        return kept


def _as_template_knows(message: dict[str, Any]) -> dict[str, Any]:
    """`developer` is the newer name of `system`; chat templates know only the older."""
    return message | {"role": "system"} if message["role"] == "developer" else message
