"""What the admin API reads."""

from typing import Annotated, Any, Literal

from pydantic import Field

from api.key_views import NANO
from api.schemas.fields import WireModel

_Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
_Name = Annotated[str, Field(min_length=1, max_length=128)]
_Models = Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=256)]
_Scope = Literal["submit", "read", "cancel", "admin"]
_Scopes = Annotated[list[_Scope], Field(min_length=1, max_length=4)]
TENANT = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


def _usual_scopes() -> list[_Scope]:
    return ["submit", "read", "cancel"]


class LimitsBody(WireModel):
    """Null lifts a limit; what is not named stays."""

    requests_per_minute: _Count | None = None
    tokens_per_minute: _Count | None = None
    max_concurrent: _Count | None = None
    daily_tokens: Annotated[int, Field(ge=0, le=2**53)] | None = None
    daily_cost: Annotated[float, Field(ge=0, le=1e9)] | None = None

    def columns(self) -> dict[str, Any]:
        given = self.model_dump(exclude_unset=True)
        if "daily_cost" in given:
            cost = given.pop("daily_cost")
            given["daily_cost_nano"] = None if cost is None else round(cost * NANO)
        return given


class KeyRequest(WireModel):
    """A key to be made."""

    name: _Name
    tenant: Annotated[str, Field(pattern=TENANT)] = "default"
    scopes: _Scopes = Field(default_factory=_usual_scopes)
    models: _Models | None = None
    limits: LimitsBody = LimitsBody()
    timeout_s: Annotated[float, Field(gt=0, le=31_536_000)] | None = None
    expires_in_s: Annotated[float, Field(gt=0, le=315_360_000)] | None = None


class KeyChange(WireModel):
    """What is not named stays."""

    name: _Name = ""
    scopes: _Scopes = Field(default_factory=list)
    models: _Models | None = None
    limits: LimitsBody = LimitsBody()
    timeout_s: Annotated[float, Field(gt=0, le=31_536_000)] | None = None
    expires_at: Annotated[int, Field(ge=0, le=32_503_680_000)] | None = None


class TenantChange(WireModel):
    """What is not named stays."""

    weight: Annotated[float, Field(gt=0, le=1_000_000)] = 1.0
    limits: LimitsBody = LimitsBody()
