"""Functions that a model may call."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic_core import PydanticCustomError

from api import grammars
from api.schemas.fields import MAX_TOOLS, FunctionName, WireModel


class FunctionDefinition(WireModel):
    """A function, as a model is told of it."""

    name: FunctionName
    description: Annotated[str, Field(max_length=16_384)] | None = None
    parameters: (
        Annotated[dict[str, Any], Field(description="JSON Schema. Enforced where a call is forced by tool_choice.")]
        | None
    ) = None
    strict: bool | None = Field(None, description="Can be kept where a call is forced by tool_choice.")

    def as_dict(self) -> dict[str, Any]:
        """The definition as chat templates expect it."""
        given = {"name": self.name, "description": self.description or "", "parameters": self.parameters or {}}
        return {"type": "function", "function": given}


class Tool(WireModel):
    """OpenAI's wrapping of a function."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(WireModel):
    """The name alone."""

    name: FunctionName


class NamedTool(WireModel):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


def forced(functions: Mapping[str, dict[str, Any]], where: str, *, name: str | None, is_single: bool) -> str:
    """The grammar of calls of the function of that name, or of any of them. `where` their schemas stand in the
    request, with a place for their number. Raises PydanticCustomError."""
    if name is not None and name not in functions:
        raise PydanticCustomError("tool_choice", "must name one of the tools")
    for number, schema in enumerate(functions.values()):
        field = where.format(number)
        try:
            grammars.check_schema(schema)
        except PydanticCustomError as error:
            raise PydanticCustomError(field, error.message_template) from None
        if schema.get("type", "object") != "object":
            raise PydanticCustomError(field, "must have the type object")
    wanted = functions if name is None else {name: functions[name]}
    return grammars.of_tool_calls(wanted, is_single=is_single)


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]
