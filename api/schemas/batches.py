"""POST /v1/batches: the requests of a file, answered into other files."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from api.schemas.fields import Metadata, WireModel
from api.schemas.webhooks import BatchWebhook


def _is_endpoint(value: str) -> str:
    from api.schemas import ENDPOINTS  # that package imports this module

    if value not in ENDPOINTS:
        raise PydanticCustomError("validation_error", "must be the path of an inference endpoint")
    return value


def _name_endpoints(schema: dict[str, Any]) -> None:
    from api.schemas import ENDPOINTS

    schema["enum"] = list(ENDPOINTS)


_HOURS = r"([1-9]|[1-9][0-9]|1[0-5][0-9]|16[0-8])"


class ExpiresAfter(WireModel):
    """When a file is deleted."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2_592_000)]


class BatchRequest(WireModel):
    """OpenAI's, with any window of whole hours up to a week."""

    input_file_id: Annotated[str, Field(min_length=1, max_length=64)]
    endpoint: Annotated[str, AfterValidator(_is_endpoint), Field(json_schema_extra=_name_endpoints)]
    completion_window: Annotated[str, Field(pattern=f"^{_HOURS}h$", description="24h, or 1h to 168h.")]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None
    webhook: BatchWebhook | None = None

    @property
    def window_s(self) -> int:
        return int(self.completion_window[:-1]) * 3600
