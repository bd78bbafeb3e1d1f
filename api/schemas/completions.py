"""POST /v1/completions: OpenAI's older request, with vLLM's extra sampling fields."""

from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from api.schemas.fields import NOTHING, Inputs
from api.schemas.sampling import SAMPLING_NO_EFFECT, Sampling
from tasks.call import Call

_DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


class CompletionRequest(Sampling):
    """Each prompt is text or token ids; special tokens that a prompt spells out count as such."""

    prompt: Inputs
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Annotated[bool, Field(description="Begin the answer with the prompt; not with logprobs.")] | None = None
    best_of: Annotated[int, Field(ge=1, le=128, description="Must equal n.")] | None = None

    text_fields: ClassVar = ("prompt",)
    no_effect: ClassVar = {
        **SAMPLING_NO_EFFECT,
        "suffix": NOTHING,
        "prompt_embeds": NOTHING,
        "add_special_tokens": (None, True),
    }

    @model_validator(mode="after")
    def _fields_agree(self) -> "CompletionRequest":
        if self.echo and self.logprobs is not None:
            raise PydanticCustomError("unsupported:echo", "cannot be combined with logprobs")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise PydanticCustomError("unsupported:best_of", "must equal n: choices are not ranked")
        if self.min_tokens and self.min_tokens > (self.max_tokens or _DEFAULT_MAX_TOKENS):
            raise PydanticCustomError("min_tokens", "must not be greater than max_tokens")
        return self

    def to_call(self) -> Call:
        shape: dict[str, Any] = self.shape()
        if self.logprobs is not None:
            shape["top_logprobs"] = self.logprobs
        if self.echo:
            shape["echo"] = True
        return Call(
            endpoint="/v1/completions",
            task=self.task,
            model=self.model,
            inputs=self.prompt,
            n=self.n or 1,
            max_tokens=self.max_tokens or _DEFAULT_MAX_TOKENS,
            params=self.params(self.logprobs),
            stop=self.stops(),
            stream=bool(self.stream),
            include_usage=self.include_usage,
            format=shape,
            options=self.options.given() if self.options else {},
        )
