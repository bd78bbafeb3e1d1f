"""POST /embed, /predict and /rerank: the requests of Hugging Face's text-embeddings-inference.

Its servers hold one model and its requests name none; here they may, and `auto` stands in where they do not.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from api.schemas.fields import FALSE, NOTHING, CallModel, EchoOptions, Inputs, ModelName
from tasks.call import Call

_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "truncate": FALSE,
    "truncation_direction": (None, "right", "Right"),
    "prompt_name": NOTHING,
    "raw_scores": FALSE,
}

_TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
_PREDICT_SCHEMA = {
    "anyOf": [
        {**_TEXT, "description": "One text."},
        {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": 2, "description": "One text, or one pair."},
        {
            "type": "array",
            "minItems": 1,
            "items": {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": 2},
            "description": "Many texts, or many pairs.",
        },
    ]
}


@dataclass(frozen=True, slots=True)
class _Batch:
    """Lists of one text, or of two, all alike."""

    is_single: bool
    lists: list[list[str]]


def _as_batch(value: Any) -> _Batch:
    """A flat list is one text or one pair, not a batch: `["a", "b"]` is a pair."""
    if type(value) is str:
        value = [value]
    if type(value) is not list or not value:
        raise PydanticCustomError("validation_error", "must be a text, a pair of texts, or a list of lists of these")
    is_single = type(value[0]) is str
    lists = [value] if is_single else value
    if set(map(type, lists)) != {list} or any(set(map(type, texts)) != {str} for texts in lists):
        raise PydanticCustomError("validation_error", "must be a text, a pair of texts, or a list of lists of these")
    if any("" in texts for texts in lists):
        raise PydanticCustomError("invalid_prompt", "must not have empty strings")
    if {len(texts) for texts in lists} not in ({1}, {2}):
        raise PydanticCustomError(
            "validation_error", 'must hold texts, or pairs of texts: many texts are [["a"], ["b"], ["c"]]'
        )
    return _Batch(is_single, lists)


class EmbedRequest(CallModel):
    """Texts or lists of token ids (with the model's special tokens in place)."""

    model: ModelName = "auto"
    inputs: Inputs
    dimensions: Annotated[int, Field(ge=1, le=65_536, description="Keep this many and normalise again.")] | None = None
    options: EchoOptions | None = None

    task: ClassVar = "embed"
    text_fields: ClassVar = ("inputs",)
    no_effect: ClassVar = {**_NO_EFFECT, "normalize": (None, True)}

    def to_call(self) -> Call:
        return Call(
            endpoint="/embed",
            task=self.task,
            model=self.model,
            inputs=self.inputs,
            format={} if self.dimensions is None else {"dimensions": self.dimensions},
            options=self.options.given() if self.options else {},
        )


class PredictRequest(CallModel):
    """One text, one pair of texts (a flat list), or a batch of either (a list of lists)."""

    model: ModelName = "auto"
    inputs: Annotated[Any, BeforeValidator(_as_batch), WithJsonSchema(_PREDICT_SCHEMA)]
    options: EchoOptions | None = None

    task: ClassVar = "classify"
    text_fields: ClassVar = ("inputs",)
    no_effect: ClassVar = _NO_EFFECT

    def to_call(self) -> Call:
        batch: _Batch = self.inputs
        shape: dict[str, Any] = {"is_single": True} if batch.is_single else {}
        if len(batch.lists[0]) == 2:
            shape["pairs"] = True
        return Call(
            endpoint="/predict",
            task=self.task,
            model=self.model,
            inputs=[text for texts in batch.lists for text in texts],
            format=shape,
            options=self.options.given() if self.options else {},
        )


class RerankRequest(CallModel):
    """A query and the texts to order by it."""

    model: ModelName = "auto"
    query: Annotated[str, Field(min_length=1)]
    texts: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    return_text: bool | None = None
    options: EchoOptions | None = None

    task: ClassVar = "rerank"
    text_fields: ClassVar = ("query", "texts")
    no_effect: ClassVar = _NO_EFFECT

    def to_call(self) -> Call:
        return Call(
            endpoint="/rerank",
            task=self.task,
            model=self.model,
            inputs=[self.query, *self.texts],
            format={"return_documents": True} if self.return_text else {},
            options=self.options.given() if self.options else {},
        )
