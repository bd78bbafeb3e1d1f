"""Functions that a model may call."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import orjson
from pydantic import Field
from pydantic_core import PydanticCustomError

from api import grammars
from api.schemas.fields import MAX_TOOLS, FunctionName, WireModel


class FunctionDefinition(WireModel):
    """A function, as a model is told of it."""

    name: FunctionName
    description: Annotated[str, Field(max_length=16_384)] | None = None
    parameters: (
        Annotated[
            dict[str, Any], Field(description="JSON Schema. Enforced if strict, or if tool_choice forces a call.")
        ]
        | None
    ) = None
    strict: bool | None = Field(None, description="Whether every call is valid by the schema.")

    def as_dict(self) -> dict[str, Any]:
        """The definition as chat templates expect it."""
        given = {"name": self.name, "description": self.description or "", "parameters": self.parameters or {}}
        return {"type": "function", "function": given}

    def as_function(self) -> "Function":
        return Function(self.name, self.parameters or {}, bool(self.strict))


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


class Function(NamedTuple):
    """What of a tool decides how it can be called, whatever API names it."""

    name: str
    parameters: dict[str, Any]
    is_strict: bool


def form_of_calls(functions: Sequence[Function], where: str, *, is_forced: bool, name: str | None = None,
                  is_single: bool = False) -> tuple[str, str] | None:  # fmt: skip
    """What the text must look like as a grammar, and the field that says so: calls of the function of that name or of
    any of them where one is forced, and valid ones where a function is strict. None where neither is. `where` their
    parameters stand in the request, with a place for their number. Raises PydanticCustomError."""
    if not is_forced and not any(function.is_strict for function in functions):
        return None
    by = "tool_choice" if is_forced else "tools"
    schemas = {one.name: one.parameters if is_forced or one.is_strict else {} for one in functions}
    # Before anything is made of them: 0.25 s for a megabyte.
    if len(orjson.dumps(schemas)) > grammars.MAX_CHARS:
        raise PydanticCustomError(by, "asks for too large a form")
    if name is not None and name not in schemas:
        raise PydanticCustomError("tool_choice", "must name one of the tools")
    for number, schema in enumerate(schemas.values()):
        field = where.format(number)
        try:
            grammars.check_schema(schema)
        except PydanticCustomError as error:
            raise PydanticCustomError(field, error.message_template) from None
        if schema.get("type", "object") != "object":
            raise PydanticCustomError(field, "must have the type object")
    wanted = schemas if name is None else {name: schemas[name]}
    return grammars.of_tool_calls(wanted, is_forced=is_forced, is_single=is_single), by


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]
