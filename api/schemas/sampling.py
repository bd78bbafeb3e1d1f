"""How to generate: the fields that chat and text completions have in common."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from api import grammars
from api.schemas.fields import (
    COMMON_NO_EFFECT,
    FALSE,
    NOTHING,
    CallModel,
    EchoOptions,
    Label,
    Metadata,
    ModelName,
    Stop,
    TokenId,
    WireModel,
)
from api.schemas.structured import ResponseFormat, StructuredOutputs
from backends.base import SamplingParams

_NO_EFFECT_VALUES = {
    name: value
    for name, value in asdict(SamplingParams(max_tokens=1)).items()
    if name not in {"max_tokens", "logprobs", "grammar"}
}
_SAMPLING_FIELDS = frozenset(_NO_EFFECT_VALUES)
_MAX_BIASES = 1024


class StreamOptions(WireModel):
    """How to stream."""

    include_usage: bool | None = None


class Sampling(CallModel):
    """Bounds are OpenAI's, and vLLM's for the fields that only vLLM has."""

    model: ModelName
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000, description="0 or -1: all tokens.")] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=_MAX_BIASES, description="Token id → bias."),
        ]
        | None
    ) = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    metadata: Metadata | None = Field(None, description="Accepted, and not kept: answers are not stored objects.")
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: Annotated[StructuredOutputs, Field(description="vLLM's.")] | None = None
    options: EchoOptions | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "is only allowed with stream: true")
        return self

    @model_validator(mode="after")
    def _the_form_can_be_kept(self) -> "Sampling":
        if (constraint := self.constraint()) is None:
            return self
        if len(constraint[0]) > grammars.MAX_CHARS:
            raise PydanticCustomError(constraint[1], "asks for too large a form")
        if self.structured_outputs is not None and self.response_format is not None:
            raise PydanticCustomError("structured_outputs", "cannot be combined with response_format")
        # Past the end of a form nothing but the end of the sequence is possible.
        for name in ("ignore_eos", "min_tokens"):
            if getattr(self, name):
                raise PydanticCustomError(f"unsupported:{name}", "cannot be combined with a form of the output")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def constraint(self) -> tuple[str, str] | None:
        """What the text must look like, as a grammar, and the field that says so."""
        if self.structured_outputs is not None:
            return self.structured_outputs.wanted, "structured_outputs"
        if self.response_format is not None and (grammar := self.response_format.grammar) is not None:
            return grammar, "response_format"
        return None

    def params(self, logprobs: int | None) -> dict[str, Any]:
        """The `SamplingParams` fields that change something. JSON types only, in a fixed order."""
        given = given_params(self, logprobs)
        if (constraint := self.constraint()) is not None:
            given["grammar"] = constraint[0]
        return given

    def shape(self) -> dict[str, Any]:
        """What of `Call.format` chats and completions have in common: the tier that was asked for by name (an answer
        says it, so requests of two tiers share no run), and what constrains the text."""
        made: dict[str, Any] = {"service_tier": self.service_tier} if self.service_tier in ("flex", "priority") else {}
        if (constraint := self.constraint()) is not None:
            made["constrained_by"] = constraint[1]
        return made

    def stops(self) -> list[str]:
        """Whichever matches first ends the text, so neither order nor repetition means anything."""
        return sorted(set(self.stop)) if self.stop else []


def given_params(request: WireModel, logprobs: int | None) -> dict[str, Any]:
    """The sampling fields of a request that change something."""
    given = {} if logprobs is None else {"logprobs": logprobs}
    return canonical({name: getattr(request, name) for name in request.model_fields_set & _SAMPLING_FIELDS}, given)


def canonical(fields: Mapping[str, Any], given: dict[str, Any] | None = None) -> dict[str, Any]:
    """Those of the fields that change something, and what is `given` already, in a fixed order."""
    changed = {name: _canonical(name, value) for name, value in fields.items() if value is not None}
    made = {**(given or {}), **{name: value for name, value in changed.items() if value != _NO_EFFECT_VALUES[name]}}
    return dict(sorted(made.items())) if len(made) > 1 else made


def _canonical(name: str, value: Any) -> Any:
    if name == "top_k":
        return max(value, 0)
    if name == "stop_token_ids":
        return sorted(set(value)) or ()
    if name == "logit_bias":
        return {token: bias for token, bias in sorted((int(key), bias) for key, bias in value.items()) if bias}
    return value + 0.0 if type(value) is float else value  # -0.0 becomes 0.0


SAMPLING_NO_EFFECT: Mapping[str, tuple[Any, ...]] = {
    **COMMON_NO_EFFECT,
    "store": FALSE,
    "prompt_cache_retention": NOTHING,
    "stream_options.include_obfuscation": (None, True, False),
    "stream_options.continuous_usage_stats": FALSE,
    "use_beam_search": FALSE,
    "length_penalty": (None, 1, 1.0),
    "early_stopping": FALSE,
    "structured_outputs.disable_any_whitespace": FALSE,
    "structured_outputs.disable_additional_properties": FALSE,
    "structured_outputs.whitespace_pattern": NOTHING,
    "structured_outputs.structural_tag": NOTHING,
    "guided_json": NOTHING,
    "guided_regex": NOTHING,
    "guided_choice": NOTHING,
    "guided_grammar": NOTHING,
    "guided_decoding_backend": NOTHING,
    "guided_whitespace_pattern": NOTHING,
    "include_stop_str_in_output": FALSE,
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "prompt_logprobs": NOTHING,
    "allowed_token_ids": NOTHING,
    "bad_words": (None, []),
    "logits_processors": NOTHING,
    "return_token_ids": FALSE,
    "return_tokens_as_token_ids": FALSE,
    "kv_transfer_params": NOTHING,
    "vllm_xargs": NOTHING,
}
"""Every field below is known to OpenAI's or vLLM's API and not honoured here."""
