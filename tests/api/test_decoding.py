"""Reading and decoding bodies: what is let through equals what json reads, and everything else is named."""

import json
import math
import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from api import decoding, errors
from catalog import LimitsEntry
from tests.properties import examples

LIMITS = LimitsEntry(body_bytes=4096, json_depth=8, json_nodes=100)
WIDE = LimitsEntry()

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
scalars = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
) | texts
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4))
objects = st.dictionaries(texts, values, max_size=6)


def code_of(body: bytes, limits: LimitsEntry = LIMITS) -> str:
    with pytest.raises(errors.APIError) as caught:
        decoding.decode(body, limits)
    return caught.value.code


@examples()
@given(objects, st.booleans(), st.sampled_from([None, 0, 3]))
def test_valid_json_is_read_as_json_reads_it(value: dict[str, Any], is_ascii: bool, indent: int | None) -> None:
    body = json.dumps(value, ensure_ascii=is_ascii, indent=indent).encode()
    assert decoding.decode(body, WIDE) == json.loads(body) == value


def reference(body: bytes) -> Any:
    """The same rules by the standard library alone. Raises ValueError."""

    def integer(digits: str) -> int:
        number = int(digits[:30])
        if number not in range(-(2**63), 2**63):
            raise ValueError
        return number

    def real(digits: str) -> float:
        if math.isinf(number := float(digits)):
            raise ValueError
        return number

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError
        return dict(pairs)

    def never(_: str) -> None:
        raise ValueError

    text = body.decode()
    value = json.loads(text, object_pairs_hook=distinct, parse_int=integer, parse_float=real, parse_constant=never)
    written = json.dumps(value, ensure_ascii=False).encode()  # Fails on lone surrogates, writes NUL as an escape.
    if b"\\u0000" in written.replace(b"\\\\", b"") or not isinstance(value, dict):
        raise ValueError
    return value


FRAGMENTS = [b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"0", b"-", b"1e400", b"NaN", b"\\u0000", b"\\ud800"]
FRAGMENTS += [b"\\u003a", b'"a":1,', b"9223372036854775808", b"\xff", b"\x00", b"\xef\xbb\xbf", b" ", b"true", b"\n"]


@examples(600)
@given(objects, st.lists(st.tuples(st.integers(0, 400), st.integers(0, 3), st.sampled_from(FRAGMENTS)), max_size=3))
def test_damaged_json_is_judged_as_by_the_reference(value: dict[str, Any], edits: list[tuple[int, int, bytes]]) -> None:
    body = json.dumps(value).encode()
    for position, num_removed, inserted in edits:
        position %= len(body) + 1
        body = body[:position] + inserted + body[position + num_removed :]
    try:
        expected = reference(body)
    except (ValueError, RecursionError):
        code_of(body, WIDE)
    else:
        assert decoding.decode(body, WIDE) == expected


@examples()
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    with suppress(errors.InvalidRequest):
        assert isinstance(decoding.decode(body, LIMITS), dict)


@examples()
@given(objects, texts, st.integers(0, 5), st.booleans())
def test_a_repeated_key_is_found_at_any_depth(around: dict[str, Any], key: str, depth: int, is_escaped: bool) -> None:
    again = '"' + "".join(f"\\u{unit:04x}" for unit in utf16(key)) + '"' if is_escaped else json.dumps(key)
    inner = f"{{{json.dumps(key)}:1,{again}:1}}"
    for _ in range(depth):
        inner = f'[{{"x":{inner}}}]'
    assert code_of(f'{{"inner":{inner},"around":{json.dumps(around)}}}'.encode(), WIDE) == "duplicate_key"


def utf16(text: str) -> list[int]:
    raw = text.encode("utf-16-be")
    return [int.from_bytes(raw[at : at + 2]) for at in range(0, len(raw), 2)]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"   ", "invalid_json"),
        (b"{", "invalid_json"),
        (b"{}{}", "invalid_json"),
        (b"{} x", "invalid_json"),
        (b'{"a":1,}', "invalid_json"),
        (b"{'a':1}", "invalid_json"),
        (b'{"a":01}', "invalid_json"),
        (b'{"a":+1}', "invalid_json"),
        (b'{"a":.5}', "invalid_json"),
        (b'{"a":5.}', "invalid_json"),
        (b'{"a":0x10}', "invalid_json"),
        (b'{"a":True}', "invalid_json"),
        (b'{"a":undefined}', "invalid_json"),
        (b'{"a":1 /* c */}', "invalid_json"),
        (b'{"a":"\t"}', "invalid_json"),
        (b'{"a":"\n"}', "invalid_json"),
        (b'{"a":"\\x41"}', "invalid_json"),
        (b'{"a":"open', "invalid_json"),
        (b"[]", "invalid_json"),
        (b'"text"', "invalid_json"),
        (b"null", "invalid_json"),
        (b"3", "invalid_json"),
        (b"model=x&prompt=y", "invalid_json"),
        (b'{"a":NaN}', "non_finite_number"),
        (b'{"a":Infinity}', "non_finite_number"),
        (b'{"a":-Infinity}', "non_finite_number"),
        (b'{"a":[1,{"b":NaN}]}', "non_finite_number"),
        (b'{"a":1e400}', "non_finite_number"),
        (b'{"a":-1e400}', "non_finite_number"),
        (b'{"a":9223372036854775808}', "number_out_of_range"),
        (b'{"a":-9223372036854775809}', "number_out_of_range"),
        (b'{"a":18446744073709551615}', "number_out_of_range"),
        (b'{"a":18446744073709551616}', "number_out_of_range"),
        (b'{"a":' + b"9" * 400 + b"}", "number_out_of_range"),
        (b'{"a":-' + b"9" * 4000 + b"}", "number_out_of_range"),
        (b'{"a":1,"a":1}', "duplicate_key"),
        (b'{"a":1,"\\u0061":2}', "duplicate_key"),
        (b'{":":1,"\\u003a":2}', "duplicate_key"),
        (b'{"a":{"b":1,"b":":"}}', "duplicate_key"),
        (b'{"a":[{"b":1,"b":2}]}', "duplicate_key"),
        (b'{"a":"x","a":"\\u003a"}', "duplicate_key"),
        (b'{"a":"\\ud800"}', "invalid_encoding"),
        (b'{"a":"\\udc00x"}', "invalid_encoding"),
        (b'{"\\ud83d":1}', "invalid_encoding"),
        (b'{"a":"\\u0000"}', "invalid_encoding"),
        (b'{"a\\u0000":1}', "invalid_encoding"),
        (b'{"a":"\\\\\\u0000"}', "invalid_encoding"),
        (b'{"a":"\x00"}', "invalid_encoding"),
        (b'{"a":"\xff"}', "invalid_encoding"),
        (b'{"a":"\xc0\xaf"}', "invalid_encoding"),
        (b'{"a":"\xed\xa0\x80"}', "invalid_encoding"),
        (b'{"a":"\xf4\x90\x80\x80"}', "invalid_encoding"),
        (b"\xef\xbb\xbf{}", "invalid_encoding"),
        ("{}".encode("utf-16"), "invalid_encoding"),
        ("{}".encode("utf-16-be"), "invalid_encoding"),
        ("{}".encode("utf-32"), "invalid_encoding"),
        (b'{"a":' * 9 + b"1" + b"}" * 9, "json_too_deep"),
        (b'{"a":' + b"[" * 8 + b"]" * 8 + b"}", "json_too_deep"),
        (b'{"a":' + b"[" * 900 + b"]" * 900 + b"}", "payload_too_large"),
        (b'{"a":[' + b"0," * 100 + b"0]}", "payload_too_large"),
        (b'{"a":[' + b"{}," * 60 + b"0]}", "payload_too_large"),
    ],
)
def test_bad_text_is_named(body: bytes, code: str) -> None:
    assert code_of(body) == code


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b' \r\n\t{ "a" : [ ] } \n',
        b'{"a":9223372036854775807,"b":-9223372036854775808}',
        b'{"a":0.12345678901234567890123}',
        b'{"a":1e-400}',
        b'{"a":"1234567890123456789012345"}',
        b'{"a":"\\\\u0000"}',
        b'{"a":"\\u003a:","b":{"a":":"}}',
        b'{"a":"\\ud83d\\ude00"}',
        b'{"a":"[[[[[[[[[[[[[[[[{{{{{{{{{{{{{{"}',
        b'{"a":"' + b"," * 500 + b'"}',
        b'{"a":"' + b'\\",' * 200 + b'"}',
        b'{"a":' * 8 + b"1" + b"}" * 8,
        b'{"a":[' + b"[]," * 40 + b"[]]}",
        '{"a":"naïve 漢字 😀"}'.encode(),
    ],
)
def test_unusual_but_valid_text_is_read(body: bytes) -> None:
    assert decoding.decode(body, LIMITS) == json.loads(body)


@pytest.mark.parametrize(("depth", "fits"), [(31, True), (32, True), (33, False), (900, False), (1500, False)])
def test_depth_limit(depth: int, fits: bool) -> None:
    body = b'{"a":' * depth + b"1" + b"}" * depth
    if fits:
        assert decoding.decode(body, WIDE)
    else:
        assert code_of(body, WIDE) == "json_too_deep"


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":"' + b'\\"' * 500_000,
        b'"' * 1_000_000,
        b'{"a":' + b"[" * 1_000_000,
        b'{"a":[' + b"0," * 500_000 + b"0]}",
        b'{"a":"' + b"\\\\" * 500_000 + b'u0000"}',
        b'{"a":"' + b"[," * 500_000 + b'"}',
        b'{"a":' + b"9" * 1_000_000 + b"}",
        b'{"a":' + b"-" * 1_000_000 + b"}",
        b"{" + b'"a":1,' * 150_000 + b'"b":1}',
    ],
    ids=range(9),
)
def test_a_megabyte_of_malice_is_judged_at_once(body: bytes) -> None:
    started = time.process_time()
    with suppress(errors.InvalidRequest):
        decoding.decode(body, WIDE)
    assert time.process_time() - started < 1


def request(pieces: list[bytes], **headers: str) -> Request:
    found = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    source = iter([*messages, {"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> Any:
        return next(source)

    raw = [(name.encode(), value.encode()) for name, value in found.items() if value]
    return Request({"type": "http", "method": "POST", "headers": raw}, receive)


async def test_body_is_put_together() -> None:
    assert await decoding.read_body(request([b'{"a"', b":1}"]), LIMITS) == b'{"a":1}'


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "Application/JSON", "application/json; charset=utf-8", 'application/json;charset="UTF-8"'],
)
async def test_json_content_types(content_type: str) -> None:
    assert await decoding.read_body(request([b"{}"], content_type=content_type), LIMITS) == b"{}"


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"content_type": ""}, "unsupported_media_type"),
        ({"content_type": "text/plain"}, "unsupported_media_type"),
        ({"content_type": "application/x-www-form-urlencoded"}, "unsupported_media_type"),
        ({"content_type": "application/json; charset=utf-16"}, "unsupported_media_type"),
        ({"content_type": "application/jsonx"}, "unsupported_media_type"),
        ({"content_encoding": "gzip"}, "unsupported_content_encoding"),
        ({"content_encoding": "identity, br"}, "unsupported_content_encoding"),
        ({"content_length": "4097"}, "payload_too_large"),
        ({"content_length": "9" * 5000}, "payload_too_large"),
    ],
)
async def test_headers_refuse_before_the_body_is_read(headers: dict[str, str], code: str) -> None:
    async def nothing() -> Message:
        raise AssertionError("the body was read")

    asked = Request(request([], **headers).scope, nothing)
    with pytest.raises(errors.APIError) as caught:
        await decoding.read_body(asked, LIMITS)
    assert caught.value.code == code


async def test_a_second_encoding_is_seen() -> None:
    asked = request([b"{}"])
    asked.scope["headers"] += [(b"content-encoding", b"gzip"), (b"content-encoding", b"identity")]
    with pytest.raises(errors.UnsupportedContentEncoding):
        await decoding.read_body(asked, LIMITS)


async def test_a_caller_that_hangs_up_has_no_body() -> None:
    asked = request([])

    async def gone() -> Message:
        return {"type": "http.disconnect"}

    with pytest.raises(ClientDisconnect):
        await decoding.read_body(Request(asked.scope, gone), LIMITS)


async def test_a_body_that_outgrows_the_limit_is_dropped_on_the_way() -> None:
    num_read = 0

    async def endless() -> Message:
        nonlocal num_read
        num_read += 1
        return {"type": "http.request", "body": b"x" * 1000, "more_body": True}

    asked = Request(request([]).scope, endless)
    with pytest.raises(errors.PayloadTooLarge):
        await decoding.read_body(asked, LIMITS)
    assert num_read == 5


@pytest.mark.parametrize(("size", "fits"), [(4096, True), (4097, False)])
async def test_body_limit_is_exact(size: int, fits: bool) -> None:
    asked = request([b"x" * (size - 1), b"x"])
    if fits:
        assert len(await decoding.read_body(asked, LIMITS)) == size
    else:
        with pytest.raises(errors.PayloadTooLarge):
            await decoding.read_body(asked, LIMITS)
