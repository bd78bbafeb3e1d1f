"""POST /v1/chat/completions: OpenAI's request, with vLLM's extra sampling fields."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from api.schemas.fields import FALSE, MESSAGE_NO_EFFECT, NOTHING, Messages
from api.schemas.sampling import SAMPLING_NO_EFFECT, Sampling
from api.schemas.tools import NamedTool, Tools, form_of_calls
from tasks.call import Call


class ChatRequest(Sampling):
    """Text in, text and calls of tools out: no other modality."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1, description="The same as max_tokens.")] | None = (
        None
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[Tools, Field(description="For models whose chat template knows tools.")] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    no_effect: ClassVar = {
        **SAMPLING_NO_EFFECT,
        **MESSAGE_NO_EFFECT,
        "audio": NOTHING,
        "modalities": (None, ["text"]),
        "moderation": NOTHING,
        "prediction": NOTHING,
        "prompt_cache_options": NOTHING,
        "web_search_options": NOTHING,
        "reasoning_effort": (None, "none"),
        "verbosity": (None, "medium"),
        "functions": (None, []),
        "function_call": (None, "none", "auto"),
        "best_of": (None, 1),
        "echo": FALSE,
        "add_generation_prompt": (None, True),
        "continue_final_message": FALSE,
        "add_special_tokens": FALSE,
        "documents": (None, []),
        "chat_template": NOTHING,
        "chat_template_kwargs": (None, {}),
    }

    @model_validator(mode="after")
    def _fields_agree(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "is only allowed with logprobs: true")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise PydanticCustomError("max_tokens", "must equal max_completion_tokens where both are given")
        if self.min_tokens and (most := self.max_completion_tokens or self.max_tokens) and self.min_tokens > most:
            raise PydanticCustomError("min_tokens", "must not be greater than max_tokens")
        return self

    @model_validator(mode="after")
    def _tools_agree(self) -> "ChatRequest":
        if self.is_call_forced and not self.tools:
            raise PydanticCustomError("tool_choice", "is only allowed with tools")
        if not self.tools or self.tool_choice == "none":
            return self
        if (other := super().constraint()) is not None:
            raise PydanticCustomError(f"unsupported:{other[1]}", "cannot be combined with tools")
        return self

    @property
    def is_call_forced(self) -> bool:
        """Whether the model must call a function."""
        return self.tool_choice not in (None, "none", "auto")

    def constraint(self) -> tuple[str, str] | None:
        if not self.tools or self.tool_choice == "none":
            return super().constraint()
        name = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        is_single = name is not None or self.parallel_tool_calls is False
        functions = [tool.function.as_function() for tool in self.tools]
        where = "tools.{}.function.parameters"
        return form_of_calls(functions, where, is_forced=self.is_call_forced, name=name, is_single=is_single)

    def to_call(self) -> Call:
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        shape: dict[str, Any] = self.shape()
        if logprobs is not None:
            shape["top_logprobs"] = logprobs
        if self.tools and self.tool_choice != "none":
            shape["tools"] = [tool.function.as_dict() for tool in self.tools]
            if self.parallel_tool_calls is False:
                shape["most_tool_calls"] = 1
        return Call(
            endpoint="/v1/chat/completions",
            task=self.task,
            model=self.model,
            messages=[message.as_dict() for message in self.messages],
            n=self.n or 1,
            max_tokens=self.max_completion_tokens or self.max_tokens,
            params=self.params(logprobs),
            stop=self.stops(),
            stream=bool(self.stream),
            include_usage=self.include_usage,
            format=shape,
            options=self.options.given() if self.options else {},
        )
