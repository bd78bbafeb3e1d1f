"""POST /v1/rerank: vLLM's request, which is Cohere's but for the default of return_documents."""

from typing import Annotated, Any, ClassVar

from pydantic import Field

from api.schemas.fields import COMMON_NO_EFFECT, NOTHING, CallModel, Documents, EchoOptions, Label, ModelName
from tasks.call import Call


class RerankRequest(CallModel):
    """A query and the documents to order by it."""

    model: ModelName
    query: Annotated[str, Field(min_length=1)]
    documents: Documents
    top_n: Annotated[int, Field(ge=0, le=2**31 - 1, description="Keep the best; 0: all.")] | None = None
    return_documents: (
        Annotated[bool, Field(description="Repeat each document's text. Default true, as vLLM; Cohere's is false.")]
        | None
    ) = None
    user: Label | None = None
    options: EchoOptions | None = None

    task: ClassVar = "rerank"
    text_fields: ClassVar = ("query", "documents")
    no_effect: ClassVar = {
        **COMMON_NO_EFFECT,
        "max_tokens_per_doc": NOTHING,
        "max_chunks_per_doc": NOTHING,
        "rank_fields": (None, ["text"]),
        "use_activation": (None, True),
        "activation": (None, True),
    }

    def to_call(self) -> Call:
        shape: dict[str, Any] = {"return_documents": self.return_documents is not False}
        if self.top_n and self.top_n < len(self.documents):
            shape["top_n"] = self.top_n
        return Call(
            endpoint="/v1/rerank",
            task=self.task,
            model=self.model,
            inputs=[self.query, *self.documents],
            format=shape,
            options=self.options.given() if self.options else {},
        )
