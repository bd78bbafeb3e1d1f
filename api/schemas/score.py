"""POST /v1/score: vLLM's request, under each of the names it takes."""

from typing import Any, ClassVar

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from api.schemas.fields import COMMON_NO_EFFECT, NOTHING, CallModel, EchoOptions, Label, ModelName, OneOrMore
from tasks.call import Call

_NAMES = (("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2"))


class ScoreRequest(CallModel):
    """One query and many documents, or as many queries as documents: pairs."""

    model: ModelName
    queries: OneOrMore | None = None
    documents: OneOrMore | None = None
    items: OneOrMore | None = Field(None, description="The same as documents.")
    data_1: OneOrMore | None = Field(None, description="The same as queries, with data_2.")
    data_2: OneOrMore | None = None
    text_1: OneOrMore | None = Field(None, description="The same as queries, with text_2.")
    text_2: OneOrMore | None = None
    user: Label | None = None
    options: EchoOptions | None = None

    task: ClassVar = "rerank"
    text_fields: ClassVar = ("queries", "documents")
    no_effect: ClassVar = {
        **COMMON_NO_EFFECT,
        "add_special_tokens": (None, True),
        "use_activation": (None, True),
        "activation": (None, True),
        "instruction": NOTHING,
        "max_tokens_per_query": NOTHING,
        "max_tokens_per_doc": NOTHING,
    }

    @model_validator(mode="after")
    def _one_pair_of_fields(self) -> "ScoreRequest":
        given = {name for pair in _NAMES for name in pair if getattr(self, name) is not None}
        named = next((pair for pair in _NAMES if given == set(pair)), None)
        if named is None:
            raise PydanticCustomError(
                "queries", "and documents (or data_1 and data_2, text_1 and text_2) must be given"
            )
        queries, documents = (getattr(self, name) for name in named)
        if len(queries) not in (1, len(documents)):
            raise PydanticCustomError(named[0], "must have one item, or as many as there are documents")
        return self

    def _given(self, side: int) -> list[str]:
        return next(texts for names in _NAMES if (texts := getattr(self, names[side])) is not None)

    def to_call(self) -> Call:
        queries, documents = self._given(0), self._given(1)
        shape: dict[str, Any] = {"num_queries": len(queries)} if len(queries) > 1 else {}
        return Call(
            endpoint="/v1/score",
            task=self.task,
            model=self.model,
            inputs=[*queries, *documents],
            format=shape,
            options=self.options.given() if self.options else {},
        )
