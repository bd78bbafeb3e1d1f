"""POST /v1/jobs: any inference request, to be run without anybody waiting for it."""

from typing import Annotated, Any, Literal

from pydantic import Field

from api.schemas.fields import Metadata, WireModel
from api.schemas.webhooks import JobWebhook


class JobRequest(WireModel):
    """An inference endpoint and the body it would get."""

    endpoint: Literal[
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/classify",
        "/v1/rerank",
        "/v1/score",
        "/v1/messages",
        "/embed",
        "/predict",
        "/rerank",
    ]
    body: dict[str, Any]
    metadata: Metadata | None = None
    priority: Literal["priority", "default", "flex"] = "default"
    webhook: JobWebhook | None = None
    result_ttl_s: (
        Annotated[
            int,
            Field(ge=1, le=31_536_000, description="Seconds it is kept after its end, if the server's own are more."),
        ]
        | None
    ) = None
    timeout_s: (
        Annotated[float, Field(gt=0, le=604_800, description="Seconds until the job expires if it has not ended.")]
        | None
    ) = None
    deadline: (
        Annotated[float, Field(gt=0, le=2**33, description="Unix time at which the job expires if it has not ended.")]
        | None
    ) = None
