"""Bodies of the admin API that must be refused: code and field of each, and never a word of what was sent."""

import json
from typing import Any

import pytest

from api import decoding, errors, schemas
from api.schemas.admin import KeyChange, KeyRequest, TenantChange
from api.schemas.fields import WireModel

SECRET = "hunter2 SECRET"
LIMITS = schemas._DEFAULT_LIMITS
RANGE, VALUE, UNKNOWN = "number_out_of_range", "validation_error", "unknown_field"


@pytest.mark.parametrize(
    ("model", "body", "code", "param"),
    [
        (KeyRequest, {}, VALUE, "name"),
        (KeyRequest, {"name": ""}, VALUE, "name"),
        (KeyRequest, {"name": 7}, VALUE, "name"),
        (KeyRequest, {"name": SECRET * 30}, VALUE, "name"),
        (KeyRequest, {"name": "k", "tenant": f"../{SECRET}"}, VALUE, "tenant"),
        (KeyRequest, {"name": "k", "tenant": ""}, VALUE, "tenant"),
        (KeyRequest, {"name": "k", "scopes": []}, VALUE, "scopes"),
        (KeyRequest, {"name": "k", "scopes": [SECRET]}, VALUE, "scopes.0"),
        (KeyRequest, {"name": "k", "scopes": SECRET}, VALUE, "scopes"),
        (KeyRequest, {"name": "k", "models": SECRET}, VALUE, "models"),
        (KeyRequest, {"name": "k", "models": [7]}, VALUE, "models.0"),
        (KeyRequest, {"name": "k", "timeout_s": 0}, RANGE, "timeout_s"),
        (KeyRequest, {"name": "k", "expires_in_s": -1}, RANGE, "expires_in_s"),
        (KeyRequest, {"name": "k", "expires_in_s": 1e300}, RANGE, "expires_in_s"),
        (KeyRequest, {"name": "k", "limits": SECRET}, VALUE, "limits"),
        (KeyRequest, {"name": "k", "limits": {"daily_tokens": -1}}, RANGE, "limits.daily_tokens"),
        (KeyRequest, {"name": "k", "limits": {"daily_tokens": 2**60}}, RANGE, "limits.daily_tokens"),
        (KeyRequest, {"name": "k", "limits": {"daily_cost": SECRET}}, VALUE, "limits.daily_cost"),
        (KeyRequest, {"name": "k", "limits": {"requests_per_minute": 1.5}}, VALUE, "limits.requests_per_minute"),
        (KeyRequest, {"name": "k", "limits": {"per_second": 1}}, UNKNOWN, "limits.per_second"),
        (KeyRequest, {"name": "k", SECRET: 1}, UNKNOWN, SECRET),
        (KeyChange, {"name": ""}, VALUE, "name"),
        (KeyChange, {"scopes": []}, VALUE, "scopes"),
        (KeyChange, {"expires_at": -1}, RANGE, "expires_at"),
        (KeyChange, {"tenant": "other"}, UNKNOWN, "tenant"),
        (TenantChange, {"weight": 0}, RANGE, "weight"),
        (TenantChange, {"weight": SECRET}, VALUE, "weight"),
        (TenantChange, {"limits": [1]}, VALUE, "limits"),
    ],
)
def test_refused(model: type[WireModel], body: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(errors.APIError) as caught:
        schemas.read(model, decoding.decode(json.dumps(body).encode(), LIMITS))
    assert (caught.value.status, caught.value.code, caught.value.param) == (
        400,
        code,
        None if param == SECRET else param,
    )
    assert SECRET not in caught.value.message


def test_null_lifts_a_limit_and_silence_keeps_it() -> None:
    wanted = schemas.read(TenantChange, {"limits": {"daily_tokens": None, "daily_cost": 0.1}})
    assert wanted.limits.columns() == {"daily_tokens": None, "daily_cost_nano": 100_000_000}
    assert schemas.read(TenantChange, {}).limits.columns() == {}
