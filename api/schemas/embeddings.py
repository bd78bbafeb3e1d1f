"""POST /v1/embeddings: OpenAI's request."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from api.schemas.fields import COMMON_NO_EFFECT, CallModel, EchoOptions, Inputs, Label, ModelName
from tasks.call import Call


class EmbeddingRequest(CallModel):
    """Texts or lists of token ids (with the model's special tokens in place)."""

    model: ModelName
    input: Inputs
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=65_536, description="Keep this many and normalise again.")] | None = None
    user: Label | None = None
    options: EchoOptions | None = None

    task: ClassVar = "embed"
    no_effect: ClassVar = {**COMMON_NO_EFFECT, "add_special_tokens": (None, True), "normalize": (None, True)}

    def to_call(self) -> Call:
        shape: dict[str, Any] = {"encoding_format": self.encoding_format or "float"}
        if self.dimensions is not None:
            shape["dimensions"] = self.dimensions
        return Call(
            endpoint="/v1/embeddings",
            task=self.task,
            model=self.model,
            inputs=self.input,
            format=shape,
            options=self.options.given() if self.options else {},
        )
