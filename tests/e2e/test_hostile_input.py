"""Requests that mean harm, against a gateway process: each is refused by the table of errors, repeats nothing of
what was sent, leaves nothing behind, and costs no memory that is not given back.

No worker runs here: whatever was let through by mistake would stay in its queue to be seen.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import httpx
import psutil
import pytest
import redis

from api import errors
from api.error_forms import FORMS
from tasks import transport
from tests.api.test_bad_input import MISSING as LEFT_OUT
from tests.api.test_bad_input import TOGETHER, VALID, WRONG_VALUES
from tests.conftest import ECHO, running
from tests.stack import Stack

pytestmark = pytest.mark.e2e

MARK = "XylophoneQuartz"
JOB = "01a20979-8744-7650-870c-0098b145d576"
RESPONSE = "resp_01a2097987447650870c0098b145d576"
CHAT: dict[str, Any] = {"model": "echo", "messages": [{"role": "user", "content": MARK}]}
PROMPT: dict[str, Any] = {"model": "echo", "prompt": MARK}
JSON = {"Content-Type": "application/json"}
KEPT = ("jobs", "job_results", "response_cache", "idempotency_keys", "budget_days", "api_keys", "tenants",
        "webhook_secrets", "webhook_gone", "webhook_deliveries")  # fmt: skip


@dataclass(frozen=True)
class Case:
    method: str
    path: str
    code: str
    body: bytes | None = None
    headers: dict[str, Any] = field(default_factory=dict)
    is_admin: bool = False

    @property
    def status(self) -> int:
        form, error = FORMS.get(self.path), errors.TABLE[self.code]()
        return error.status if form is None else form(error, None)[0]

    def __str__(self) -> str:
        return f"{self.method} {self.path[:40]} {self.code} {self.body[:30] if self.body else ''!r}"


def post(path: str, code: str, body: Any, **headers: Any) -> Case:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Case("POST", path, code, raw, JSON | named, path.startswith("/admin"))


def get(path: str, code: str, **headers: Any) -> Case:
    return Case("GET", path, code, headers={name.replace("_", "-"): value for name, value in headers.items()},
                is_admin=path.startswith("/admin"))  # fmt: skip


BODIES: dict[str, dict[str, Any]] = {path: {**body} for path, body in VALID.items()} | {
    "/tokenize": VALID["/v1/tokenize"],
    "/detokenize": VALID["/v1/detokenize"],
    "/admin/v1/keys": {"name": MARK},
}
TEXTS: list[tuple[str, bytes]] = [
    ("invalid_json", b""),
    ("invalid_json", b" \r\n\t"),
    ("invalid_json", b"%TEXT%%TEXT%"),
    ("invalid_json", b"%TEXT%]"),
    ("invalid_json", b"[%TEXT%]"),
    ("invalid_json", b'"XylophoneQuartz"'),
    ("invalid_json", b"model=echo&prompt=XylophoneQuartz"),
    ("invalid_json", b"<xml>XylophoneQuartz</xml>"),
    ("invalid_json", b'{"XylophoneQuartz": undefined}'),
    ("invalid_json", b'{"XylophoneQuartz": 0x10}'),
    ("invalid_json", b'{"XylophoneQuartz": "'),
    ("invalid_encoding", b"\x80\x04\x95\x0cXylophoneQuartz."),
    ("non_finite_number", b'{"XylophoneQuartz": NaN}'),
    ("non_finite_number", b'{"XylophoneQuartz": -Infinity}'),
    ("non_finite_number", b'{"XylophoneQuartz": 1e400}'),
    ("number_out_of_range", b'{"XylophoneQuartz": ' + b"7" * 5000 + b"}"),
    ("duplicate_key", b'{"XylophoneQuartz": 1, "XylophoneQuartz": 1}'),
    ("duplicate_key", b'{"a": 1, "\\u0061": "XylophoneQuartz"}'),
    ("invalid_encoding", b'{"XylophoneQuartz": "\\u0000"}'),
    ("invalid_encoding", b'{"XylophoneQuartz": "\\udfff"}'),
    ("invalid_encoding", b'{"XylophoneQuartz": "\xff"}'),
    ("invalid_encoding", b"\xef\xbb\xbf{}"),
    ("invalid_encoding", '{"a": "XylophoneQuartz"}'.encode("utf-16")),
    ("invalid_encoding", '{"a": "XylophoneQuartz"}'.encode("utf-32-le")),
    ("json_too_deep", b'{"XylophoneQuartz":' * 900 + b"1" + b"}" * 900),
    ("json_too_deep", b'{"a":' + b"[" * 30_000 + b"]" * 30_000 + b"}"),
    ("payload_too_large", b'{"XylophoneQuartz": "' + b"x" * 70_000 + b'"}'),
]
JSON_TEXT = [
    post(path, code, text.replace(b"%TEXT%", json.dumps(body).encode()))
    for path, body in BODIES.items()
    for code, text in TEXTS
]
MEDIA = [
    *[post("/v1/chat/completions", "unsupported_media_type", CHAT, Content_Type=value) for value in (
        "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=XylophoneQuartz",
        "application/json; charset=utf-16", "application/json; charset=XylophoneQuartz", "application/jsonp",
        "application/x-python-serialize", "application/json, text/plain", "*/*", "application/json;" * 50,
    )],
    *[post("/v1/chat/completions", "unsupported_content_encoding", CHAT, Content_Encoding=value) for value in (
        "gzip", "br", "deflate", "zstd", "identity, gzip", "XylophoneQuartz", "x-gzip",
    )],
    post("/v1/jobs", "unsupported_media_type", VALID["/v1/jobs"], Content_Type="text/json"),
    post("/v1/responses", "unsupported_content_encoding", VALID["/v1/responses"], Content_Encoding="gzip"),
    post("/v1/messages", "unsupported_media_type", VALID["/v1/messages"], Content_Type="text/json"),
    post("/embed", "unsupported_content_encoding", VALID["/embed"], Content_Encoding="gzip"),
]  # fmt: skip
HEADERS = [
    *[post(path, "validation_error", body, Idempotency_Key=value)
      for path, body in (("/v1/chat/completions", CHAT), ("/v1/jobs", VALID["/v1/jobs"] | {
          "body": {"model": "echo", "input": MARK}})) for value in (
        "", '""', "x" * 256, f"{MARK} {MARK}", f"{MARK}\t{MARK}", f"{MARK}\xe9".encode("latin-1"), b"\xff\xfe",
        '"' + "x" * 256 + '"',
    )],
    *[post("/v1/completions", "validation_error", PROMPT, Cancel_After=value) for value in (
        MARK, "0", "-1", "1.5", "1e3", "", "10d", "9" * 8, "0h", "5 m", "٣".encode(),
    )],
    *[post("/v1/completions", "validation_error", PROMPT, Cache_Control=f"max-age={value}") for value in (
        MARK, "", "-1", "1.5", "0x10", "1 0",
    )],
    *[post("/v1/completions", "invalid_api_key", PROMPT, Authorization=value) for value in (
        "", "Bearer", f"Bearer {MARK}", f"Bearer sk-sy-{MARK}", f"Basic {MARK}", "Bearer sk-sy-" + "x" * 43,
        "Bearer sk-sy-" + "x" * 5000, "Bearer sk-sy-" + "'" * 43, "Bearer sk-sy-\xff\xfe".encode("latin-1"),
        "Bearer null", "Bearer sk-sy-*", "Bearer sk-sy-%", f"Bearer sk-sy-{MARK}, Bearer sk-sy-{MARK}", "Token x",
    )],
    *[get("/v1/models", "invalid_api_key", Authorization="", x_api_key=value) for value in (MARK, "", "sk-sy-" + MARK)],
    *[get(path, "invalid_api_key", Authorization=f"Bearer {MARK}")
      for path in ("/metrics", "/v1/jobs", "/v1/cache", "/info", "/admin/v1/keys", f"/v1/responses/{RESPONSE}",
                   "/v1/webhooks/deliveries")],
    *[post(path, "permission_denied", {"name": MARK}, Authorization="@plain")
      for path in ("/admin/v1/keys", f"/admin/v1/keys/{JOB}/revoke", f"/admin/v1/keys/{JOB}/rotate")],
]  # fmt: skip
NO_ID = ["0", "-1", MARK, JOB[:-1], JOB + "0", "x" * 5000, "%00", "1;DROP TABLE jobs", "' OR 1=1--", "%ff%fe", "٣" * 32,
         "null", "..%5c..", "{" + MARK + "}", "${jndi:ldap:x}"]  # fmt: skip
PATHS = [
    *[get(f"/v1/jobs/{quote(value, safe='%')}{rest}", "validation_error")
      for value in NO_ID for rest in ("", "/result", "/stream", "/explain")],
    *[get(f"/v1/responses/{quote(value, safe='%')}", "response_not_found")
      for value in [*NO_ID, JOB, "resp_" + "g" * 32, RESPONSE.upper(), RESPONSE + "0", f"resp_{JOB}"]],
    *[get(f"/v1/models/{quote(value, safe='%')}", "model_not_found") for value in NO_ID],
    *[Case("DELETE", f"/v1/cache/{quote(value, safe='%')}", "validation_error")
      for value in [*NO_ID, "A" * 64, "0" * 63, "g" * 64]],
    *[get(f"/admin/v1/keys/{quote(value, safe='%')}", "validation_error") for value in NO_ID],
    *[get(f"/admin/v1/tenants/{quote(value, safe='%')}", "validation_error")
      for value in ("-x", "%00", "x" * 65, "a b", "é", "a%0ab")],
    *[Case("POST", f"/v1/webhooks/deliveries/{quote(value, safe='%')}/redeliver", "validation_error") for value in NO_ID],
    *[get(f"/v1/jobs/{JOB}{rest}", "job_not_found") for rest in ("", "/result", "/stream", "/explain", "/events", "?wait=1")],
    *[get(f"/v1/jobs/{JOB}/stream", "job_not_found", Last_Event_ID=value) for value in ("-1", MARK, "9" * 30, "")],
    *[get(path, "not_found") for path in (
        f"/{MARK}", "//v1/models", "/v1/models/x/y", "/v1", "/v1/%2e%2e/admin", "/%00", "/v1/jobs/%2e%2e/%2e%2e/etc/passwd",
        "/.env", "/.git/config", "/static/..%2f..%2fetc%2fpasswd", "/v1/models%00", "/V1/models", "/actuator/health",
    )],
    *[Case(method, path, "method_not_allowed") for method, path in (
        ("PUT", "/v1/chat/completions"), ("GET", "/v1/chat/completions"), ("DELETE", "/v1/models"), ("PATCH", "/v1/jobs"),
        ("TRACE", "/v1/models"), ("OPTIONS", "/v1/models"), ("PROPFIND", "/v1/models"), ("HEAD", "/v1/completions"),
    )],
]  # fmt: skip
QUERIES = [
    *[get(f"/v1/jobs?{query}", "validation_error") for query in (
        "limit=0", "limit=101", "limit=-1", f"limit={MARK}", "limit=1.5", "limit=", "limit=1e1", "limit=" + "9" * 30,
        f"status={MARK}", "status=", "status=%00", f"after={MARK}", "after=%00", "model=" + "x" * 257, "model=%00",
        f"model={MARK}%00", "endpoint=" + "x" * 65, "endpoint=%00", "metadata%5Ba%5D=%00", "metadata%5Ba%5D=" + "x" * 513,
    )],
    *[get(f"/v1/jobs/{JOB}?wait={value}", "validation_error")
      for value in ("-1", "301", "nan", "inf", "-inf", MARK, "1e400", "")],
    *[get(f"/v1/jobs/{JOB}/stream?starting_after={value}", "validation_error")
      for value in ("-1", "1.5", MARK, "nan", "")],
    *[get(f"/v1/responses/{RESPONSE}/input_items?{query}", "validation_error")
      for query in ("limit=0", "order=" + MARK, "after=" + "x" * 65)],
    *[get(f"/v1/responses/{RESPONSE}?{query}", "validation_error")
      for query in (f"stream={MARK}", "starting_after=-1", "stream=2")],
    *[Case("POST", f"/v1/jobs/retry?{query}", "validation_error") for query in (
        "limit=0", "limit=1001", "model=%00", "code=%00", "code=" + "x" * 65, f"limit={MARK}")],
    *[Case("DELETE", f"/v1/jobs?{query}", "validation_error") for query in (
        "limit=0", "limit=1001", "status=running", f"status={MARK}", "model=%00", "endpoint=" + "x" * 65, "before=-1",
        "before=nan", "before=1e9", f"before={10**15}", f"before={MARK}")],
    *[Case("DELETE", f"/v1/cache?model={value}", "validation_error") for value in ("%00", "x" * 257)],
    *[get(f"/v1/webhooks/deliveries?{query}", "validation_error")
      for query in ("object_id=%00", "object_id=" + "x" * 129, "limit=0", f"status={MARK}", "after=1")],
    *[get(f"/admin/v1/keys?tenant={value}", "validation_error") for value in ("%00", "x" * 65)],
    *[Case("POST", f"/admin/v1/keys/{JOB}/rotate?grace_s={value}", "validation_error", is_admin=True)
      for value in ("-1", "nan", "inf", MARK, "1e300")],
]  # fmt: skip
VALUES = [
    post("/v1/completions", "context_length_exceeded", PROMPT | {"prompt": "x" * 4097}),
    post("/v1/completions", "context_length_exceeded", PROMPT | {"prompt": "\U0001f480" * 1025}),
    post("/v1/completions", "context_length_exceeded", PROMPT | {"max_tokens": 4096}),
    post("/v1/chat/completions", "context_length_exceeded", CHAT | {"max_tokens": 2**31 - 1}),
    post("/v1/embeddings", "context_length_exceeded", {"model": "echo", "input": ["x", "x" * 4097]}),
    post("/v1/responses", "context_length_exceeded", {"model": "echo", "input": "x" * 5000}),
    *[post(path, "validation_error", {"model": "echo", name: value})
      for path, name, value in (
          ("/v1/completions", "prompt", [256]), ("/v1/completions", "prompt", [[1], [2**31 - 1]]),
          ("/v1/embeddings", "input", [256]), ("/v1/classify", "input", [2**31 - 1]))],
    *[post(path, "validation_error", {"model": "echo", "tokens": [value]})
      for path in ("/v1/detokenize", "/detokenize") for value in (256, 2**31 - 1)],
    *[post(path, "model_not_found", body | {"model": model})
      for path, body in (("/v1/completions", PROMPT), ("/v1/chat/completions", CHAT))
      for model in ("no-such-model", "../../etc/passwd", "echo\n", "echo ", "ECHO", "Echo", "ec\u0445o", "*", "%", "'")],
    *[post("/v1/jobs", "validation_error", {"endpoint": "/v1/completions", "body": PROMPT, "webhook": {"url": url}})
      for url in (
        MARK, "ftp://example.com/", "file:///etc/passwd", "gopher://example.com:6379/_FLUSHALL", "javascript:alert(1)",
        "http://127.0.0.1/", "http://localhost@127.0.0.1/",
        "http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://169.254.169.254/latest/meta-data/", "http://10.0.0.1/",
        "http://192.168.1.1/", "http://172.16.0.1/", "http://100.64.0.1/", "http://[fe80::1]/", "http://[fc00::1]/",
        "http://0.0.0.0/", "http://user:XylophoneQuartz@example.com/", "http://", "http:///x", "//example.com/",
        "http://example.com:0/", "http://example.com:99999/", "http://exa mple.com/", "http://example.com/\r\nX: y",
        "http://[::1", "http://224.0.0.1/", "http://255.255.255.255/", "http://[64:ff9b::7f00:1]/",
    )],
    *[post("/v1/jobs", "number_out_of_range", {"endpoint": "/v1/completions", "body": PROMPT, name: value})
      for name, value in (("deadline", 2**63 - 1), ("deadline", -1), ("timeout_s", -1), ("timeout_s", 1e300),
                          ("result_ttl_s", 2**63 - 1), ("result_ttl_s", -1))],
    *[post("/admin/v1/keys", code, {"name": "n"} | changes) for code, changes in (
        ("validation_error", {"name": ""}), ("validation_error", {"name": "x" * 5000}),
        ("validation_error", {"tenant": f"{MARK} "}), ("validation_error", {"scopes": [MARK]}),
        ("validation_error", {"scopes": MARK}), ("number_out_of_range", {"expires_in_s": -1}),
        ("number_out_of_range", {"expires_in_s": 1e300}), ("number_out_of_range", {"timeout_s": -1}),
        ("unknown_field", {"hash": MARK}), ("unknown_field", {"is_admin": True}), ("validation_error", {"models": MARK}),
        ("number_out_of_range", {"limits": {"daily_tokens": 2**63 - 1}}), ("number_out_of_range", {"limits": {"daily_cost": 1e300}}),
        ("number_out_of_range", {"limits": {"max_concurrent": -1}}),
    )],
    *[Case("PATCH", path, code, json.dumps(body).encode(), JSON, is_admin=True) for path, code, body in (
        (f"/admin/v1/keys/{JOB}", "number_out_of_range", {"expires_at": 2**62}),
        (f"/admin/v1/keys/{JOB}", "number_out_of_range", {"expires_at": -(2**62)}),
        (f"/admin/v1/keys/{JOB}", "key_not_found", {}), (f"/admin/v1/keys/{JOB}", "unknown_field", {"tenant": MARK}),
        ("/admin/v1/tenants/t", "number_out_of_range", {"weight": 0}),
        ("/admin/v1/tenants/t", "number_out_of_range", {"weight": 1e300}),
        ("/admin/v1/tenants/t", "unknown_field", {"name": MARK}),
    )],
]  # fmt: skip
FAMILIES = {"json": JSON_TEXT, "media": MEDIA, "headers": HEADERS, "paths": PATHS, "queries": QUERIES, "values": VALUES}
CASES = [case for family in FAMILIES.values() for case in family]


@pytest.fixture(scope="module")
def stack(server_urls: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    yield from running(server_urls, tmp_path_factory.mktemp("hostile"), ECHO, [])


@pytest.fixture(scope="module")
def clients(stack: Stack) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    """Of a caller, and of an admin."""
    with stack.client() as plain, stack.client(stack.create_key("operators", is_admin=True)) as admin:
        yield plain, admin


def send(clients: tuple[httpx.Client, httpx.Client], case: Case) -> httpx.Response:
    plain, admin = clients
    headers = dict(case.headers)
    if headers.get("Authorization") == "@plain":
        headers["Authorization"] = plain.headers["Authorization"]
    return (admin if case.is_admin else plain).request(case.method, case.path, content=case.body, headers=headers)


def leftovers(stack: Stack) -> tuple[Any, ...]:
    """How many rows every table has, and what waits in Redis."""
    counts = stack.query("SELECT " + ", ".join(f"(SELECT count(*) FROM {table})" for table in KEPT))[0]
    with contextlib.closing(redis.Redis.from_url(stack.redis_url)) as client:
        keys = set(client.scan_iter()) - {transport.EPOCH_KEY.encode()}
    return counts, keys


@pytest.mark.parametrize("family", FAMILIES)
def test_refused_without_a_trace(stack: Stack, clients: tuple[httpx.Client, httpx.Client], family: str) -> None:
    before = leftovers(stack)
    wrong = []
    for case in FAMILIES[family]:
        response = send(clients, case)
        shown = response.text + str(response.headers)
        is_named = True
        if case.method != "HEAD" and case.path.partition("?")[0] not in FORMS:
            is_named = response.json()["error"]["code"] == case.code
        if (
            response.status_code != case.status
            or not is_named
            or MARK in shown
            or "SECRET" in shown
            or len(shown) > 1500
        ):
            wrong.append(f"{case}: {response.status_code} {response.text[:200]}")
    assert not wrong, "\n".join(wrong)
    assert leftovers(stack) == before


def wire_body(endpoint: str, field_name: str, value: Any) -> bytes:
    body = VALID[endpoint] | {field_name: value}
    if value is LEFT_OUT:
        del body[field_name]
    return json.dumps(body).encode()


def test_every_wrong_value_is_refused_over_the_wire_too(
    stack: Stack, clients: tuple[httpx.Client, httpx.Client]
) -> None:
    before = leftovers(stack)
    cases = [post(endpoint, code, wire_body(endpoint, name, value)) for endpoint, name, value, code, _ in WRONG_VALUES]
    cases += [post(endpoint, code, VALID[endpoint] | changes) for endpoint, changes, code, _ in TOGETHER]
    cases = [case for case in cases if case.body is not None and len(case.body) <= 65_536]
    assert len(cases) > 300
    wrong = [f"{case}: {response.status_code}" for case in cases
             if case.status != (response := send(clients, case)).status_code or "SECRET" in response.text]  # fmt: skip
    assert not wrong, "\n".join(wrong)
    assert leftovers(stack) == before


def test_what_was_refused_is_not_kept_in_memory_nor_in_the_log(
    stack: Stack, clients: tuple[httpx.Client, httpx.Client]
) -> None:
    gateway = psutil.Process(stack.processes["gateway"].pid)

    def rounds(number: int) -> int:
        for _ in range(number):
            for case in CASES:
                send(clients, case)
        return int(gateway.memory_info().rss)

    settled = rounds(1)
    grown = rounds(2) - settled
    assert grown < 16 * 2**20, f"{grown / 2**20:.1f} MiB more after {2 * len(CASES)} requests"
    assert clients[0].get("/healthz").status_code == 200
    # Its lines are written when their time comes: one that was answered later follows those asked for here.
    last = clients[0].get("/v1/models").headers["x-request-id"]
    line = "SELECT 1 FROM request_log WHERE request_id = %s"
    stack.wait_until(lambda: bool(stack.query(line, last)), "the account of the last request")
    logged = (stack.logs / "gateway.log").read_text()
    kept = "".join(map(str, stack.query("SELECT request_log::text FROM request_log")))
    for text in (logged, kept):
        assert not re.search(f"{MARK}|SECRET|hunter2", text, re.IGNORECASE)
    assert "internal_error" not in logged


def test_there_are_many() -> None:
    assert len(CASES) > 500
