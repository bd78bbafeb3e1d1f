"""Functions that a model may call."""

from typing import Annotated, Any, Literal

from pydantic import Field

from api.schemas.fields import MAX_TOOLS, FunctionName, WireModel


class FunctionDefinition(WireModel):
    """A function, as a model is told of it."""

    name: FunctionName
    description: Annotated[str, Field(max_length=16_384)] | None = None
    parameters: (
        Annotated[dict[str, Any], Field(description="JSON Schema. Shown to the model, not enforced.")] | None
    ) = None

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


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]
