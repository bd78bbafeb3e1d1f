"""What form the answer must have: OpenAI's `response_format` and vLLM's `structured_outputs`."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from api import decoding, errors, grammars
from api.schemas.fields import WireModel
from catalog import LimitsEntry

_LIMITS = LimitsEntry()


def _as_object(value: Any) -> Any:
    """A schema may be given as text, as vLLM's clients do."""
    if type(value) is not str:
        return value
    try:
        return decoding.decode(value.encode(), _LIMITS)
    except errors.APIError:
        raise PydanticCustomError("validation_error", "must be a JSON object, or one as text") from None


JSONSchema = Annotated[dict[str, Any], AfterValidator(grammars.check_schema)]
_AnySchema = Annotated[
    JSONSchema,
    BeforeValidator(_as_object),
    WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string"}]}),
]
_Text = Annotated[str, Field(min_length=1, max_length=grammars.MAX_CHARS)]


class NamedSchema(WireModel):
    """OpenAI's wrapping of a JSON Schema."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: Annotated[str, Field(max_length=16_384)] | None = None
    schema_: JSONSchema | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="Either way the schema is enforced as it stands.")


class ResponseFormat(WireModel):
    """Text, any JSON object, or JSON that is valid by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _type_and_schema_agree(self) -> "ResponseFormat":
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise PydanticCustomError("at:json_schema", "is required with type json_schema, and only there")
        return self

    @property
    def grammar(self) -> str | None:
        """None: any text."""
        if self.json_schema is not None and self.json_schema.schema_ is not None:
            return grammars.of_schema(self.json_schema.schema_)
        return None if self.type == "text" else grammars.of_any_object()


class StructuredOutputs(WireModel):
    """Exactly one way to say what the text must be."""

    json_: _AnySchema | None = Field(None, alias="json")
    regex: _Text | None = None
    choice: (
        Annotated[list[Annotated[str, Field(max_length=4096)]], Field(min_length=1, max_length=grammars.MAX_CHOICES)]
        | None
    ) = None
    grammar: Annotated[_Text, Field(description="Lark, as llguidance reads it, or GBNF.")] | None = None
    json_object: Literal[True] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> "StructuredOutputs":
        ways = (self.json_, self.regex, self.choice, self.grammar, self.json_object)
        if sum(way is not None for way in ways) != 1:
            raise PydanticCustomError(
                "validation_error", "must have exactly one of json, regex, choice, grammar and json_object"
            )
        return self

    @property
    def wanted(self) -> str:
        """As one grammar."""
        if self.json_ is not None:
            return grammars.of_schema(self.json_)
        if self.regex is not None:
            return grammars.of_regex(self.regex)
        if self.choice is not None:
            return grammars.of_choice(self.choice)
        return self.grammar or grammars.of_any_object()
