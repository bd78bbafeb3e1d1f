"""HTTP's own framing, broken in every way we know, over raw sockets against a gateway process: an answer of 4xx or a
closed connection, never a 500, never silence, and never an answer to a request that was hidden in another."""

import contextlib
import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest

from tests.conftest import ECHO, running
from tests.stack import Stack

pytestmark = pytest.mark.e2e

PATIENCE_S = 20.0
"""Only a server that hangs takes this long."""
HIDDEN = b"GET /healthz?hidden HTTP/1.1\r\nHost: x\r\n\r\n"
"""Smuggled in what another request calls its body. Open to everyone, so an answer would be a 200."""


@dataclass(frozen=True)
class Case:
    name: str
    raw: bytes
    answers: tuple[int, ...] = (400,)
    """Statuses in order; none: the connection is closed without a word."""
    is_unfinished: bool = False
    """The request waits for more, which never comes: the client closes its half at once."""

    def __str__(self) -> str:
        return self.name


def request(
    *headers: bytes, line: bytes = b"POST /v1/chat/completions HTTP/1.1", host: bytes = b"Host: x\r\n"
) -> bytes:
    """A request's head, with `%KEY%` for the API key; headers as they are, each with a line's end."""
    lines = b"".join(header + b"\r\n" for header in headers)
    return (
        line + b"\r\n" + host + b"Authorization: Bearer %KEY%\r\nContent-Type: application/json\r\n" + lines + b"\r\n"
    )


def get(*headers: bytes, line: bytes = b"GET /v1/models HTTP/1.1", host: bytes = b"Host: x\r\n") -> bytes:
    return request(*headers, line=line, host=host)


LENGTHS = [
    Case("length and chunked", request(b"Content-Length: 6", b"Transfer-Encoding: chunked") + b"0\r\n\r\n" + HIDDEN),
    Case("chunked and length", request(b"Transfer-Encoding: chunked", b"Content-Length: 6") + b"0\r\n\r\n" + HIDDEN),
    Case("two different lengths", request(b"Content-Length: 2", b"Content-Length: 3") + b"{}" + HIDDEN),
    Case("two equal lengths", request(b"Content-Length: 2", b"Content-Length: 2") + b"{}" + HIDDEN),
    Case("a list of lengths", request(b"Content-Length: 2, 2") + b"{}" + HIDDEN),
    Case("negative length", request(b"Content-Length: -1") + HIDDEN),
    Case("signed length", request(b"Content-Length: +2") + b"{}" + HIDDEN),
    Case("hexadecimal length", request(b"Content-Length: 0x2") + b"{}" + HIDDEN),
    Case("length in words", request(b"Content-Length: two") + b"{}" + HIDDEN),
    Case("length with a fraction", request(b"Content-Length: 2.0") + b"{}" + HIDDEN),
    Case("empty length", request(b"Content-Length: ") + HIDDEN),
    Case("length beyond 64 bits", request(b"Content-Length: " + b"9" * 30) + b"{}"),
    Case("length of an exabyte", request(b"Content-Length: 999999999999999999") + b"{}", (413,)),
    Case("length over the limit", request(b"Content-Length: 65537") + b"{}", (413,)),
    Case("length with an inner space", request(b"Content-Length: 2 2") + b"{}"),
    Case("space before the colon", request(b"Content-Length : 2") + b"{}"),
    Case("no length", request() + b"{}" + HIDDEN, (400,)),
    Case("body longer than its length", request(b"Content-Length: 2") + b"{}" + b"{}{}{}", (400,)),
    Case("body shorter than its length", request(b"Content-Length: 100") + b"{}", (), is_unfinished=True),
    Case("a zero length and a body", get(b"Content-Length: 0", line=b"GET /nowhere HTTP/1.1") + b"X" * 100, (400, 404)),
    Case("half a head", request(b"Content-Length: 2")[:-30], (), is_unfinished=True),
    Case("half a request line", b"POST /v1/ch", (), is_unfinished=True),
    Case("nothing at all", b"", (), is_unfinished=True),
    Case("empty lines", b"\r\n" * 1000, (), is_unfinished=True),
    Case("empty lines for ever", b"\r\n" * 500_000, (431,)),
]
CHUNKS = (
    [
        Case(f"chunked: {name}", request(b"Transfer-Encoding: chunked") + body, answers, is_unfinished=is_unfinished)
        for name, body, answers, is_unfinished in [
            ("bad size", b"zz\r\n{}\r\n0\r\n\r\n" + HIDDEN, (400,), False),
            ("negative size", b"-2\r\n{}\r\n0\r\n\r\n", (400,), False),
            ("prefixed size", b"0x2\r\n{}\r\n0\r\n\r\n", (400,), False),
            ("size of 17 digits", b"F" * 17 + b"\r\n{}", (400,), False),
            ("no line end after the data", b"2\r\n{}0\r\n\r\n" + HIDDEN, (400,), False),
            ("data longer than its size", b"2\r\n{}{}{}\r\n0\r\n\r\n", (400,), False),
            ("bare LF", b"2\n{}\n0\n\n" + HIDDEN, (400,), False),
            ("space in the size", b"2 2\r\n{}\r\n0\r\n\r\n", (400,), False),
            ("NUL in an extension", b"2;a=\x00\r\n{}\r\n0\r\n\r\n", (400,), False),
            ("LF in an extension", b"2;a=b\nX: y\r\n{}\r\n0\r\n\r\n", (400,), False),
            ("no end", b"2\r\n{}\r\n", (), True),
            ("half a chunk", b"50\r\n{}", (), True),
            (
                "too large in small chunks",
                b"1000\r\n" + b" " * 4096 + b"\r\n" + (b"1000\r\n" + b" " * 4096 + b"\r\n") * 16,
                (413,),
                False,
            ),
            ("an endless extension", b"2;" + b"a" * 1_000_000, (431,), False),
            ("an endless trailer", b"2\r\n{}\r\n0\r\nX: " + b"a" * 1_000_000, (431,), False),
            ("one that announces too much", b"FFFFFFF\r\n" + b" " * 70_000, (413,), False),
        ]
    ]
    + [
        Case(
            f"transfer encoding {value.decode('latin-1')!r}",
            request(b"Transfer-Encoding: " + value) + b"2\r\n{}\r\n0\r\n\r\n" + HIDDEN,
        )
        for value in (
            b"xchunked",
            b"chunked, gzip",
            b"gzip",
            b"identity",
            b"chunked chunked",
            b"\x0bchunked",
            b"chunked\x00",
            b'"chunked"',
            b"",
        )
    ]
    + [
        Case(
            "two transfer encodings",
            request(b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity") + b"0\r\n\r\n" + HIDDEN,
        ),
        Case(
            "folded transfer encoding",
            request(b"Transfer-Encoding:\r\n chunked", b"Content-Length: 5") + b"0\r\n\r\n" + HIDDEN,
        ),
        Case(
            "a tab before chunked",
            request(b"Transfer-Encoding:\tchunked", b"Content-Length: 5") + b"0\r\n\r\n" + HIDDEN,
        ),
        Case(
            "chunked in HTTP/1.0 with a length",
            request(b"Transfer-Encoding: chunked", b"Content-Length: 5", line=b"POST /v1/completions HTTP/1.0")
            + b"0\r\n\r\n"
            + HIDDEN,
        ),
    ]
)
HEADS = [
    Case("too many headers", get(*(b"X-%d: y" % number for number in range(200))), (431,)),
    Case("very many headers", get(*(b"X-%d: y" % number for number in range(100_000))), (431,)),
    Case("a large header", get(b"X: " + b"y" * 40_000), (431,)),
    Case("a very large header", get(b"X: " + b"y" * 5_000_000), (431,)),
    Case("an endless header", b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 3_000_000, (431,)),
    Case("a very long name", get(b"X" * 3_000_000 + b": y"), (431,)),
    Case("a long path", get(line=b"GET /" + b"x" * 40_000 + b" HTTP/1.1"), (431,)),
    Case("an endless path", b"GET /" + b"x" * 3_000_000, (431,)),
    Case("a long query", get(line=b"GET /v1/models?" + b"a=b&" * 10_000 + b" HTTP/1.1"), (431,)),
    Case("an endless method", b"G" * 1_000_000),
    Case("folded header", get(b"X-A: b\r\n c")),
    Case("folded first header", b"GET /v1/models HTTP/1.1\r\n Host: x\r\n\r\n"),
    Case("NUL in a value", get(b"X: a\x00b")),
    Case("NUL in a name", get(b"X\x00: b")),
    Case("bare LF in a value", get(b"X: a\nY: b")),
    Case("bare CR in a value", get(b"X: a\rY: b")),
    Case("LF line ends", get().replace(b"\r\n", b"\n")),
    Case("space in a name", get(b"X Y: b")),
    Case("no name", get(b": b")),
    Case("no colon", get(b"X")),
    Case("letters beyond ASCII in a name", get("Ü: b".encode())),
    Case("control characters in a value", get(b"X: \x01\x02")),
    Case("no host", get(host=b"")),
    Case("two hosts", get(host=b"Host: x\r\nHost: y\r\n")),
]
LINES = [
    Case("HTTP/0.9", b"GET /healthz\r\n\r\n"),
    Case("HTTP/2's preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    Case("HTTP/3", get(line=b"GET /healthz HTTP/3.0")),
    Case("HTTP/1.9", get(line=b"GET /healthz HTTP/1.9")),
    Case("HTTP/1.11", get(line=b"GET /healthz HTTP/1.11")),
    Case("small letters", get(line=b"get /healthz http/1.1")),
    Case("no version", get(line=b"GET /healthz HTTP/")),
    Case("another protocol", get(line=b"GET /healthz ICY/1.1")),
    Case("unknown method", get(line=b"XYZZY /healthz HTTP/1.1")),
    Case("space in the path", get(line=b"GET /health z HTTP/1.1")),
    Case("tab for a space", get(line=b"GET\t/healthz HTTP/1.1")),
    Case("NUL in the path", get(line=b"GET /health\x00z HTTP/1.1")),
    Case("letters beyond ASCII in the path", get(line="GET /hëalthz HTTP/1.1".encode())),
    Case("no path", get(line=b"GET HTTP/1.1")),
    Case("a path without a slash", get(line=b"GET healthz HTTP/1.1")),
    Case("asterisk", get(line=b"OPTIONS * HTTP/1.1"), (404,)),
    Case("connect", get(line=b"CONNECT 127.0.0.1:5432 HTTP/1.1")),
    Case("absolute form of another host", get(line=b"GET http://169.254.169.254/latest/meta-data HTTP/1.1"), (404,)),
    Case("absolute form with a scheme alone", get(line=b"GET http: HTTP/1.1")),
    Case("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256))),
    Case("Redis", b"*1\r\n$8\r\nFLUSHALL\r\n"),
    Case("SMTP", b"EHLO x\r\nMAIL FROM:<a@b>\r\n"),
    Case("noise", bytes(range(1, 256)) * 20),
]
CASES = [*LENGTHS, *CHUNKS, *HEADS, *LINES]


@pytest.fixture(scope="module")
def stack(server_urls: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    yield from running(server_urls, tmp_path_factory.mktemp("framing"), ECHO, [])


def speak(stack: Stack, raw: bytes, num_answers: int = 1, *, is_unfinished: bool = False) -> bytes:
    """Send it all, then listen until the server closes; our half is closed after that many answers, or at once."""
    received = b""
    with socket.create_connection(("127.0.0.1", stack.port), timeout=PATIENCE_S) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(raw.replace(b"%KEY%", stack.secret.encode()))
            if is_unfinished:
                connection.shutdown(socket.SHUT_WR)
        is_open = not is_unfinished
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(65_536):
                received += piece
                if is_open and len(statuses(received)) >= num_answers:
                    is_open = False
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_WR)
    return received


def statuses(received: bytes) -> list[int]:
    return [int(found) for found in re.findall(rb"HTTP/1\.[01] (\d{3}) ", received)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_broken_framing_is_refused_or_cut(stack: Stack, case: Case) -> None:
    received = speak(stack, case.raw, is_unfinished=case.is_unfinished)
    found = statuses(received)
    assert set(found) <= set(case.answers), received[:500]
    # Who is refused in the middle of sending much may lose the answer to the reset that follows it.
    assert found or not case.answers or len(case.raw) > 30_000
    assert httpx.get(f"{stack.url}/healthz").status_code == 200
    assert "internal_error" not in (stack.logs / "gateway.log").read_text()
    assert stack.query("SELECT count(*) FROM jobs") == [(0,)]


def test_a_refusal_has_the_form_of_every_other(stack: Stack) -> None:
    head, _, body = speak(stack, get(b"X: a\x00b")).partition(b"\r\n\r\n")
    assert head.splitlines()[0] == b"HTTP/1.1 400 Bad Request"
    assert b"connection: close" in head
    assert json.loads(body)["error"]["code"] == "invalid_http"
    head, _, body = speak(stack, get(b"X: " + b"y" * 33_000)).partition(b"\r\n\r\n")
    assert head.splitlines()[0] == b"HTTP/1.1 431 Request Header Fields Too Large"
    assert json.loads(body)["error"]["code"] == "headers_too_large"


@pytest.mark.parametrize(
    ("raw", "answers"),
    [
        (get(*(b"X-%d: y" % number for number in range(90))), [200]),
        (get(b"X: " + b"y" * 30_000), [200]),
        (get(b"X:y", b"Y:  \t z \t"), [200]),
        (get(line=b"GET http://x/v1/models HTTP/1.1"), [200]),
        (get(line=b"GET /v1/models HTTP/1.0", host=b""), [200]),
        (b"\r\n\r\n" + get(), [200]),
        (get() * 5, [200] * 5),
        (get() + get(line=b"GET /nowhere HTTP/1.1") + get(line=b"DELETE /v1/models HTTP/1.1") + get(), [200, 404, 405, 200]),
        (request(b"Content-Length: 2") + b"{}" + get(), [400, 200]),
        (request(b"Transfer-Encoding: chunked") + b"1;a=b\r\n{\r\n1\r\n}\r\n0\r\nX: y\r\n\r\n" + get(), [400, 200]),
        (request(b"Transfer-Encoding: Chunked") + b"002\r\n{}\r\n0\r\n\r\n", [400]),
        (request(b"Content-Length: 2", b"Expect: 100-continue") + b"{}", [100, 400]),
        (request(b"Content-Length: 70000", b"Expect: 100-continue"), [413]),
        (request(b"Content-Length: 2", b"Expect: something") + b"{}", [400]),
        (get(b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13", b"Sec-WebSocket-Key: eA=="), [200]),
        (get(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AA"), [200]),
    ],
    ids=range(16),
)  # fmt: skip
def test_unusual_but_whole_requests_are_answered_each_once(stack: Stack, raw: bytes, answers: list[int]) -> None:
    assert statuses(speak(stack, raw, len(answers))) == answers


def test_what_follows_an_upgrade_is_not_taken_for_a_request(stack: Stack) -> None:
    for head in (get(b"Connection: Upgrade", b"Upgrade: h2c"),
                 request(b"Connection: Upgrade", b"Upgrade: h2c", b"Content-Length: 2") + b"{}"):  # fmt: skip
        assert len(statuses(speak(stack, head + HIDDEN))) == 1


def test_a_trailer_is_not_a_header(stack: Stack) -> None:
    body = b"2\r\n{}\r\n0\r\nAuthorization: Bearer %KEY%\r\nx-api-key: %KEY%\r\n\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nTrailer: Authorization\r\n\r\n"
    assert statuses(speak(stack, head + body)) == [401]


def test_a_request_in_single_bytes_is_read(stack: Stack) -> None:
    raw = request(b"Content-Length: 2").replace(b"%KEY%", stack.secret.encode()) + b"{}"
    with socket.create_connection(("127.0.0.1", stack.port), timeout=PATIENCE_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for number in range(len(raw)):
            connection.sendall(raw[number : number + 1])
        assert connection.recv(65_536).startswith(b"HTTP/1.1 400 ")


def test_the_half_open_do_not_keep_others_out(stack: Stack) -> None:
    with contextlib.ExitStack() as opened:
        for raw in (get()[:-4], request(b"Content-Length: 100") + b"{", b""):
            for _ in range(60):
                connection = socket.create_connection(("127.0.0.1", stack.port), timeout=PATIENCE_S)
                opened.enter_context(connection)
                connection.sendall(raw.replace(b"%KEY%", stack.secret.encode()))
        assert statuses(speak(stack, get())) == [200]
    assert statuses(speak(stack, get())) == [200]
