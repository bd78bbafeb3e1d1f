"""The `webhook` of a job, a background response or a batch."""

from typing import Annotated, Any, Literal

from pydantic import Field

from api.schemas.fields import WireModel

Url = Annotated[str, Field(min_length=1, max_length=2048, description="http or https.")]
JobEvent = Literal["job.succeeded", "job.failed", "job.cancelled", "job.expired"]
ResponseEvent = Literal["response.completed", "response.failed", "response.cancelled", "response.incomplete"]

BatchEvent = Literal["batch.completed", "batch.failed", "batch.expired", "batch.cancelled"]


class _Webhook(WireModel):
    url: Url

    def kept(self) -> dict[str, Any]:
        """As what it waits for keeps it."""
        return self.model_dump(exclude_none=True)


class JobWebhook(_Webhook):
    """Who is told when the job ends, and of which endings: all, where `events` is not given."""

    events: Annotated[list[JobEvent], Field(min_length=1, max_length=4)] | None = None


class ResponseWebhook(_Webhook):
    """As a job's, in OpenAI's words."""

    events: Annotated[list[ResponseEvent], Field(min_length=1, max_length=4)] | None = None


class BatchWebhook(_Webhook):
    """As a job's, in OpenAI's words."""

    events: Annotated[list[BatchEvent], Field(min_length=1, max_length=4)] | None = None
