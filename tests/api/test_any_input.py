"""Parsers against whatever can be written: each reads it or refuses it as it says, and nothing else happens."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from api import decoding, errors, fingerprints, schemas, wishes
from api.schemas.admin import KeyChange, KeyRequest, TenantChange
from api.schemas.fields import WireModel
from api.schemas.jobs import JobRequest
from api.schemas.messages import CountTokensRequest
from api.schemas.responses import ResponseRequest
from api.schemas.tokenize import DetokenizeRequest, TokenizeRequest
from catalog import LimitsEntry
from tasks import webhook_post
from tasks.call import Call
from tests.api.test_bad_input import VALID
from tests.properties import examples

LIMITS = LimitsEntry()
MARK = "XylophoneQuartz "
OTHERS: dict[str, type[WireModel]] = {
    "/v1/jobs": JobRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
    "/v1/tokenize": TokenizeRequest,
    "/v1/detokenize": DetokenizeRequest,
    "/v1/responses": ResponseRequest,
    "/admin/v1/keys": KeyRequest,
    "/admin/v1/keys/{id}": KeyChange,
    "/admin/v1/tenants/{id}": TenantChange,
}
MODELS: dict[str, type[WireModel]] = {**schemas.ENDPOINTS, **OTHERS}
WORDS = ["", MARK, "m", "text", "type", "role", "user", "assistant", "tool", "content", "function", "name", "echo", "auto",
         "json_object", "input_text", "message", "url", "https://example.com/", "events", "/v1/completions", "\u202e", "😀"]  # fmt: skip
scalars = (
    st.none()
    | st.booleans()
    | st.sampled_from(WORDS)
    | st.sampled_from([0, 1, -1, 2, 16, 2**31, 2**63 - 1, -(2**63), 0.0, -0.0, 0.5, 1.0, 1e308, -1e308, 5e-324])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("path", MODELS)
@examples(60)
@given(data=st.data())
def test_any_values_in_any_fields(path: str, data: st.DataObject) -> None:
    model = MODELS[path]
    names = st.sampled_from([*sorted(model.model_fields), *sorted(str(name) for name in model.no_effect)])
    body = dict(VALID.get(path, {})) | data.draw(st.dictionaries(names, values, max_size=4))
    for name in data.draw(st.lists(st.sampled_from(sorted(body) or ["x"]), max_size=1)):
        body.pop(name, None)
    decoded = decoding.decode(json.dumps(body).encode(), LIMITS)
    refusal, call = None, None
    try:
        call = made(path, model, decoded)
    except errors.APIError as error:
        refusal = error
    if refusal is not None:
        assert refusal.status == 400
        assert refusal.code != "invalid_request"
        assert MARK.strip() not in refusal.message + (refusal.param or "")
        assert len(refusal.message) < 400
    if call is not None:
        assert Call.decode(call.encode()) == call
        assert len(fingerprints.request(call, wishes.Wish(wait_s=1))) == 32


def made(path: str, model: type[WireModel], body: dict[str, Any]) -> Call | None:
    if path in schemas.ENDPOINTS:
        return schemas.parse(path, body, LIMITS)
    if path == "/v1/jobs":
        return schemas.parse_job(body, LIMITS).call
    read = schemas.read(model, body)
    return read.to_call([]) if isinstance(read, ResponseRequest) else None


headers = st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=40)
pieces = st.lists(st.sampled_from(["wait", "=", "5", '"', ",", ";", " ", "respond-async", "max-age", "no-store", "99999999", "-", "h", "inf", "²"]),
                  max_size=8).map("".join)  # fmt: skip


@examples(200)
@given(st.dictionaries(
    st.sampled_from(["prefer", "cache-control", "cancel-after", "idempotency-key", "x-cancel-on-disconnect",
                     "x-stainless-retry-count"]), headers | pieces, max_size=6))  # fmt: skip
def test_any_headers_make_a_wish_or_are_refused(given_headers: dict[str, str]) -> None:
    with suppress(errors.InvalidValue):
        wish = wishes.read(Headers(given_headers), 600.0)
        assert 0 <= wish.wait_s <= 600
        assert wish.timeout_s is None or wish.timeout_s > 0
        assert wish.cache.max_age_s is None or 0 <= wish.cache.max_age_s <= 2**31
        assert wish.idempotency_key is None or 1 <= len(wish.idempotency_key) <= 255


parts = st.lists(st.sampled_from(["http", "https", ":", "//", "/", "@", "[", "]", "::1", "127.0.0.1", "example.com", "%", "0", "99999", "?", "#",
                                  "\\", ".", "\t", "\r\n", "é", "xn--", "fe80::1%eth0", "10.1", "user:pass"]), max_size=8).map("".join)  # fmt: skip


@examples(200)
@given(parts | st.text(max_size=60) | parts.map(lambda rest: f"http://{rest}"))
def test_any_url_is_refused_or_has_a_host(url: str) -> None:
    with suppress(webhook_post.Refused):
        found = webhook_post.check(url, ())
        assert found.scheme in ("http", "https")
        assert found.hostname
        assert "@" not in found.netloc
