"""POST /v1/tokenize and /v1/detokenize: vLLM's requests. Answered by the gateway; they make no job."""

from typing import Annotated, ClassVar

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from api.schemas.fields import FALSE, MESSAGE_NO_EFFECT, NOTHING, Messages, ModelName, TokenId, WireModel


class TokenizeRequest(WireModel):
    """A prompt, or the messages of a chat."""

    model: ModelName
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: Annotated[bool, Field(description="Default true; a chat's come from its template.")] | None = (
        None
    )
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None

    no_effect: ClassVar = {
        **MESSAGE_NO_EFFECT,
        "continue_final_message": FALSE,
        "tools": (None, []),
        "chat_template": NOTHING,
        "chat_template_kwargs": (None, {}),
        "mm_processor_kwargs": NOTHING,
    }

    @model_validator(mode="after")
    def _one_of_two(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "or messages must be given, and not both")
        if self.prompt is not None and self.add_generation_prompt is not None:
            raise PydanticCustomError("add_generation_prompt", "is only allowed with messages")
        if self.messages is not None and self.add_special_tokens:
            raise PydanticCustomError("add_special_tokens", "is only allowed with prompt")
        return self


class DetokenizeRequest(WireModel):
    """Token ids to turn back into text."""

    model: ModelName
    tokens: Annotated[list[TokenId], Field(max_length=1_000_000)]
